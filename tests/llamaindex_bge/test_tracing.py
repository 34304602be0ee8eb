"""Where texts, vectors and scores land in a trace: on the spans that the host's own put them on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span import SimpleSpan
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from llamaindex_bge import BGEEmbedding, BGEReranker

TEXTS = ["Paris is the capital of France.", "A cat sat on the mat.", "Water boils."]
QUERY = "what is the capital of France?"


class Trace(BaseSpanHandler[SimpleSpan]):
    """Keeps spans and events, as tracers do: an event belongs to the span that is open."""

    spans: dict[str, tuple[str, Any, str | None]] = {}  # noqa: RUF012 - pydantic copies it
    events: list[Any] = []  # noqa: RUF012

    @classmethod
    def class_name(cls) -> str:
        return "Trace"

    def new_span(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        parent_span_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> SimpleSpan:
        method = id_.partition("-")[0].rpartition(".")[2]
        self.spans[id_] = (method, instance, parent_span_id)
        return SimpleSpan(id_=id_, parent_id=parent_span_id)

    def prepare_to_exit_span(self, id_: str, *args: Any, **kwargs: Any) -> None:
        return None

    def prepare_to_drop_span(self, id_: str, *args: Any, **kwargs: Any) -> None:
        return None

    def embeddings(self) -> list[tuple[str, bool, bool, list[str], int]]:
        """Each span of an embedding that has a text: its method, whose it is, and what is on it."""
        found = []
        for event in self.events:
            if isinstance(event, EmbeddingEndEvent):
                method, instance, parent = self.spans[event.span_id]
                root = parent is None or not isinstance(self.spans[parent][1], BaseEmbedding)
                whose = isinstance(instance, BaseEmbedding)
                found.append((method, whose, root, event.chunks, len(event.embeddings)))
        return sorted(found)


class Events(BaseEventHandler):
    trace: Any

    @classmethod
    def class_name(cls) -> str:
        return "Events"

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.trace.events.append(event)


@pytest.fixture
def trace() -> Iterator[Trace]:
    root = get_dispatcher()
    trace = Trace()
    events = Events(trace=trace)
    root.add_span_handler(trace)
    root.add_event_handler(events)
    yield trace
    root.span_handlers.remove(trace)
    root.event_handlers.remove(events)


WORK = {
    "query": ("get_query_embedding", QUERY),
    "text": ("get_text_embedding", TEXTS[0]),
    "batch": ("get_text_embedding_batch", TEXTS),
}


@pytest.mark.parametrize("work", WORK)
async def test_text_and_vector_are_on_the_embedding_s_own_span(
    en_folder: Path, call: Any, trace: Trace, work: str
):
    method, given = WORK[work]
    await call(MockEmbedding(embed_dim=4), method, given)
    expected = trace.embeddings()
    trace.events.clear()
    await call(BGEEmbedding(model=en_folder), method, given)
    assert trace.embeddings() == expected
    ((_, on_an_embedding, is_root, chunks, vectors),) = expected
    assert on_an_embedding
    assert is_root
    assert (chunks, vectors) == ([given] if isinstance(given, str) else given, len(chunks))


async def test_a_retriever_s_query_is_on_the_embedding_s_own_span(
    en_folder: Path, call: Any, trace: Trace
):
    model = BGEEmbedding(model=en_folder)
    index = VectorStoreIndex(nodes=[TextNode(text=text) for text in TEXTS], embed_model=model)
    trace.spans.clear()
    trace.events.clear()
    await call(index.as_retriever(similarity_top_k=2), "retrieve", QUERY)
    ((method, on_an_embedding, is_root, chunks, vectors),) = trace.embeddings()
    assert (on_an_embedding, is_root, chunks, vectors) == (True, True, [QUERY], 1)
    assert method.endswith("get_query_embeddings")
    # It stands under the retriever's, as one of its steps.
    end = next(event for event in trace.events if isinstance(event, EmbeddingEndEvent))
    parent = trace.spans[end.span_id][2]
    assert parent is not None
    assert "retrieve" in trace.spans[parent][0]


async def test_several_queries_are_one_span(en_folder: Path, call: Any, trace: Trace):
    bundle = ["a", "b", "a"]
    await call(BGEEmbedding(model=en_folder), "get_agg_embedding_from_queries", bundle)
    ((_, on_an_embedding, is_root, chunks, vectors),) = trace.embeddings()
    assert (on_an_embedding, is_root, chunks, vectors) == (True, True, bundle, 3)


async def test_a_cached_query_is_on_its_span_too(en_folder: Path, call: Any, trace: Trace):
    from llama_index.core.storage.kvstore import SimpleKVStore

    model = BGEEmbedding(model=en_folder, embeddings_cache=SimpleKVStore())
    for _ in range(2):
        await call(model, "get_query_embedding", QUERY)
    assert [entry[1:] for entry in trace.embeddings()] == [(True, True, [QUERY], 1)] * 2


async def test_a_rerank_is_on_its_own_span(reranker_folder: Path, call: Any, trace: Trace):
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in TEXTS]
    reranker = BGEReranker(model=reranker_folder, top_n=2)
    result = await call(reranker, "postprocess_nodes", nodes, query_bundle=QueryBundle(QUERY))
    events = [
        event for event in trace.events if isinstance(event, (ReRankStartEvent, ReRankEndEvent))
    ]
    start, end = events
    assert start.span_id == end.span_id
    method, instance, _ = trace.spans[start.span_id]
    assert method.endswith("postprocess_nodes")
    assert isinstance(instance, BaseNodePostprocessor)
    assert (start.query, start.top_n, start.nodes) == (QueryBundle(QUERY), 2, nodes)
    assert end.nodes == result
    # One rerank is one span with these events, not one within another.
    spans = [span for span in trace.spans.values() if isinstance(span[1], BaseNodePostprocessor)]
    assert len(spans) == 1
