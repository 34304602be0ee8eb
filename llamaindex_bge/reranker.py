"""BGE rerankers as a LlamaIndex node postprocessor."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic import Field

from bge_core import ArgumentError, InputTypeError, Ranked
from bge_core.arguments import shown
from bge_core.host_fields import Count, ModelName, RankingFields, earlier_score_key
from llamaindex_bge._component import ServedModelComponent

__all__ = ["BGEReranker"]

dispatcher = get_dispatcher(__name__)
logger = logging.getLogger(__name__)

_RETRIEVAL_SCORE = "retrieval_score"


class BGEReranker(RankingFields, ServedModelComponent, BaseNodePostprocessor):
    """A BGE reranker, or bge-m3, that puts retrieved nodes in a better order.

    With `model="BAAI/bge-m3"` the score is a weighted mean of dense, sparse and multi-vector
    scores, by the weights that a `BGEEmbedding` on the same model has loaded.

    Gives copies, best first, and leaves the nodes that came in alone; equal scores keep their
    order. A node without a text of its own, such as an image, can't be scored: such nodes come
    after every scored one, in their order, with `score=None`; `top_n` counts them, and a
    `score_threshold` leaves them out, as SimilarityPostprocessor does. Arguments are keywords,
    but for the model, which may stand first. Each is a field, and they are checked at once; weights
    load at first use.

    Raises:
        ArgumentError: An unknown argument, or a value that is not supported.
        CheckpointError: A model that can't be found, is damaged, or is neither bge-m3 nor a
            reranker.

    Example:
        >>> from llama_index.core.schema import NodeWithScore, TextNode
        >>> texts = ["hi", "The giant panda is a bear."]
        >>> nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
        >>> reranker = BGEReranker(model="BAAI/bge-reranker-base", top_n=1)
        >>> best = reranker.postprocess_nodes(nodes, query_str="what is a panda?")  # doctest: +SKIP
        >>> best[0].text, best[0].score  # doctest: +SKIP
        ('The giant panda is a bear.', 0.9979)
    """

    if TYPE_CHECKING:  # either of them
        model: ModelName = Field(default="", kw_only=False)
        model_name: str = Field(default="")
    else:
        model: ModelName = Field(frozen=True)
        """A hub id (`"BAAI/bge-reranker-base"`) or a folder; `model_name=` is the same argument."""

        @property
        def model_name(self) -> str:
            """The hub id or folder."""
            return self.model

    top_n: Count | None = Field(default=2)
    """How many nodes to give, 1 or more; None for all."""

    keep_retrieval_score: bool = Field(default=False, strict=True)
    """Keep the retriever's score as `metadata["retrieval_score"]`, and that of an earlier reranker
    as `relevance_score_1`, the next one's as `relevance_score_2`; all of them out of the texts for
    embedding and for the LLM."""

    metadata_mode: MetadataMode = MetadataMode.EMBED
    """Which metadata is scored with a node's text."""

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex writes beside a configuration."""
        return "BGEReranker"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _checked(nodes, query_bundle)
        with self._event(nodes, query) as result:
            positions, texts = self._texts(nodes)
            ranked = self._core.rank(
                query.query_str,
                texts,
                top_n=self.top_n,
                score_threshold=self.score_threshold,
                priority=self.priority,
            )
            result.extend(self._result(nodes, positions, ranked))
        return result

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _checked(nodes, query_bundle)
        with self._event(nodes, query) as result:
            positions, texts = self._texts(nodes)
            ranked = await self._core.arank(
                query.query_str,
                texts,
                top_n=self.top_n,
                score_threshold=self.score_threshold,
                priority=self.priority,
            )
            result.extend(self._result(nodes, positions, ranked))
        return result

    @contextmanager
    def _event(
        self, nodes: list[NodeWithScore], query: QueryBundle
    ) -> Iterator[list[NodeWithScore]]:
        """Tell the host of one call, start and end, whatever happens; the body fills the list."""
        top_n = len(nodes) if self.top_n is None else self.top_n
        result: list[NodeWithScore] = []
        dispatcher.event(
            ReRankStartEvent(query=query, nodes=nodes, top_n=top_n, model_name=self.model_name)
        )
        try:
            with self.callback_manager.event(
                CBEventType.RERANKING,
                payload={
                    EventPayload.NODES: nodes,
                    EventPayload.MODEL_NAME: self.model_name,
                    EventPayload.QUERY_STR: query.query_str,
                    EventPayload.TOP_K: top_n,
                },
            ) as event:
                yield result
                event.on_end(payload={EventPayload.NODES: result})
        finally:
            dispatcher.event(ReRankEndEvent(nodes=result))

    def _texts(self, nodes: Sequence[NodeWithScore]) -> tuple[list[int], list[str]]:
        """Return the positions of the nodes that have a text, and what is scored of them."""
        positions = [
            position
            for position, node in enumerate(nodes)
            # Metadata alone, such as an image's path, says nothing that could be ranked.
            if node.node.get_content(metadata_mode=MetadataMode.NONE).strip()
        ]
        if len(positions) < len(nodes):
            missing = len(nodes) - len(positions)
            have, they, come = ("has", "it", "comes") if missing == 1 else ("have", "they", "come")
            logger.warning(
                "%d of %d nodes %s no text to score (images, or empty): %s %s.",
                missing,
                len(nodes),
                have,
                they,
                f"{come} last" if self.score_threshold is None else "can't reach score_threshold",
            )
        return positions, [
            nodes[position].get_content(self.metadata_mode) for position in positions
        ]

    def _result(
        self, nodes: Sequence[NodeWithScore], positions: list[int], ranked: list[Ranked]
    ) -> list[NodeWithScore]:
        result = [self._copy(nodes[positions[found.index]], found) for found in ranked]
        if self.score_threshold is None:
            scored = set(positions)
            result += [
                self._copy(node, None)
                for position, node in enumerate(nodes)
                if position not in scored
            ]
        return result[: self.top_n]

    def _copy(self, node: NodeWithScore, found: Ranked | None) -> NodeWithScore:
        inner = node.node
        said: dict[str, object] = {}
        if self.keep_retrieval_score:
            earlier = _RETRIEVAL_SCORE in inner.metadata
            said[_RETRIEVAL_SCORE] = inner.metadata.get(_RETRIEVAL_SCORE, node.score)
            if earlier and node.score is not None:
                said[earlier_score_key(inner.metadata)] = node.score
        if found is not None and found.span is not None:
            said["relevance_start"], said["relevance_end"] = self._in_text(node, found.span)
        excluded = {
            "excluded_embed_metadata_keys": _with(inner.excluded_embed_metadata_keys, said),
            "excluded_llm_metadata_keys": _with(inner.excluded_llm_metadata_keys, said),
        }
        # Not a deep copy: an IndexNode may hold a whole query engine.
        metadata = {**inner.metadata, **said}
        own = {"metadata": metadata, "relationships": dict(inner.relationships), **excluded}
        score = None if found is None else found.score
        return node.model_copy(update={"node": inner.model_copy(update=own), "score": score})

    def _in_text(self, node: NodeWithScore, span: tuple[int, int]) -> tuple[int, int]:
        """Move a span of what was scored, which may begin with metadata, to the node's text."""
        text = node.node.get_content(metadata_mode=MetadataMode.NONE)
        bare = text.strip()  # as the host strips it where metadata stands beside it
        place = node.get_content(self.metadata_mode).rfind(bare)
        if place < 0:  # a node of another kind, which writes its text in its own way
            return 0, len(text)
        moved = text.find(bare) - place
        start, end = (min(max(edge + moved, 0), len(text)) for edge in span)
        return start, end


def _with(keys: Sequence[str], said: Mapping[str, object]) -> list[str]:
    return [*keys, *(key for key in said if key not in keys)]


def _checked(nodes: Sequence[NodeWithScore], query: QueryBundle | None) -> QueryBundle:
    """Refuse a call without a query, or with something else than nodes."""
    if query is None:
        msg = "BGEReranker needs a query: pass query_str='...' or query_bundle=QueryBundle('...')."
        raise ArgumentError(msg)
    if not isinstance(query, QueryBundle):
        msg = f"query_bundle must be a QueryBundle, got {shown(query)}: pass a str as query_str."
        raise InputTypeError(msg)
    if isinstance(nodes, str) or not isinstance(nodes, Sequence):
        msg = f"nodes must be a list of NodeWithScore, got {type(nodes).__name__}."
        raise InputTypeError(msg)
    for index, node in enumerate(nodes):
        if not isinstance(node, NodeWithScore):
            msg = (
                f"nodes[{index}] must be a NodeWithScore, got {type(node).__name__}: "
                "wrap it as NodeWithScore(node=...)."
            )
            raise InputTypeError(msg)
    return query
