"""Queries of a LlamaIndex embedding: many in one batch, and cached apart from documents."""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding, mean_agg
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.embedding import (
    EmbeddingEndEvent,
    EmbeddingStartEvent,
)

from bge_core import arguments
from bge_core.engine.call import run_off_loop
from bge_core.tokenizer import can_check_inline

__all__ = ["BatchedQueries"]

dispatcher = get_dispatcher(__name__)

# The host keeps every vector under its raw text in "embeddings", whatever the text's role.
_COLLECTION = "query_embeddings"


class BatchedQueries(BaseEmbedding):
    """A LlamaIndex embedding whose query side knows batches and has a cache of its own.

    The host embeds several query strings one by one, and looks a query up among the documents'
    vectors, where an equal text has a vector without the query's instruction.
    """

    @abstractmethod
    def _get_query_embeddings(self, queries: list[str]) -> list[Embedding]:
        """Embed queries in one batch."""

    @abstractmethod
    async def _aget_query_embeddings(self, queries: list[str]) -> list[Embedding]:
        """Embed queries in one batch without blocking the event loop."""

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._get_query_embeddings([query])[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self._aget_query_embeddings([query]))[0]

    def get_query_embedding(self, query: str) -> Embedding:
        """Embed one query, with the instruction in front."""
        return self._embed_queries([arguments.text("query", query)])[0]

    async def aget_query_embedding(self, query: str) -> Embedding:
        """Embed one query without blocking the event loop; see `get_query_embedding`."""
        return (await self._aembed_queries([arguments.text("query", query)]))[0]

    @dispatcher.span
    def get_query_embeddings(self, queries: list[str]) -> list[Embedding]:
        """Embed queries in one batch: one span and one event for all of them."""
        return self._embed_queries(queries)

    @dispatcher.span
    async def aget_query_embeddings(self, queries: list[str]) -> list[Embedding]:
        """Embed queries in one batch without blocking the event loop."""
        return await self._aembed_queries(queries)

    def get_agg_embedding_from_queries(
        self, queries: list[str], agg_fn: Callable[..., Embedding] | None = None
    ) -> Embedding:
        """Embed queries in one batch and aggregate their vectors, by their mean if not told."""
        return (agg_fn or mean_agg)(self.get_query_embeddings(queries))

    async def aget_agg_embedding_from_queries(
        self, queries: list[str], agg_fn: Callable[..., Embedding] | None = None
    ) -> Embedding:
        """Do it without blocking the event loop; see `get_agg_embedding_from_queries`."""
        return (agg_fn or mean_agg)(await self.aget_query_embeddings(queries))

    def _embed_queries(self, queries: list[str]) -> list[Embedding]:
        queries = arguments.texts("queries", queries)
        if not queries:
            return []
        cache, found = self.embeddings_cache, dict[str, Embedding]()
        with self._event(queries) as embeddings:
            if cache is not None:
                for query in dict.fromkeys(queries):
                    if entry := cache.get(key=query, collection=_COLLECTION):
                        found[query] = _vector(entry)
            if missing := [query for query in dict.fromkeys(queries) if query not in found]:
                if self.rate_limiter is not None:
                    self.rate_limiter.acquire()
                for query, vector in zip(missing, self._get_query_embeddings(missing), strict=True):
                    found[query] = vector
                    if cache is not None:
                        cache.put(key=query, val=_entry(vector), collection=_COLLECTION)
            embeddings += [found[query] for query in queries]
        return embeddings

    async def _aembed_queries(self, queries: list[str]) -> list[Embedding]:
        inline = can_check_inline(queries)
        queries = await run_off_loop(arguments.texts, "queries", queries, inline=inline)
        if not queries:
            return []
        cache, found = self.embeddings_cache, dict[str, Embedding]()
        with self._event(queries) as embeddings:
            if cache is not None:
                for query in dict.fromkeys(queries):
                    if entry := await cache.aget(key=query, collection=_COLLECTION):
                        found[query] = _vector(entry)
            if missing := [query for query in dict.fromkeys(queries) if query not in found]:
                if self.rate_limiter is not None:
                    await self.rate_limiter.async_acquire()
                vectors = await self._aget_query_embeddings(missing)
                for query, vector in zip(missing, vectors, strict=True):
                    found[query] = vector
                    if cache is not None:
                        await cache.aput(key=query, val=_entry(vector), collection=_COLLECTION)
            embeddings += [found[query] for query in queries]
        return embeddings

    @contextmanager
    def _event(self, queries: list[str]) -> Iterator[list[Embedding]]:
        """Tell the host of one batch, as its own methods do; the body fills the list."""
        payload = self.to_payload()
        embeddings: list[Embedding] = []
        dispatcher.event(EmbeddingStartEvent(model_dict=payload))
        with self.callback_manager.event(
            CBEventType.EMBEDDING, payload={EventPayload.SERIALIZED: payload}
        ) as event:
            yield embeddings
            event.on_end(
                payload={EventPayload.CHUNKS: queries, EventPayload.EMBEDDINGS: embeddings}
            )
        dispatcher.event(EmbeddingEndEvent(chunks=queries, embeddings=embeddings))


def _vector(entry: dict[str, Any]) -> Embedding:
    vector: Embedding = next(iter(entry.values()))
    return vector


def _entry(vector: Embedding) -> dict[str, Any]:
    # The host's own shape: an entry of one vector under a random name.
    return {str(uuid.uuid4()): vector}
