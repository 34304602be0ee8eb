"""A BGE reranker behind LangChain's `BaseDocumentCompressor`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, NotRequired, TypedDict

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import Field, PrivateAttr

from bge_core import InputTypeError, Ranked, Scorer, make_scorer
from bge_core.host_fields import Weights
from langchain_bge._fields import ServedModelFields

__all__ = ["BGEReranker", "RerankResult"]


class RerankResult(TypedDict):
    """One document's place in what was given, its score, and what of it the score is of."""

    index: int
    relevance_score: float
    relevance_span: NotRequired[list[int]]


class BGEReranker(ServedModelFields, BaseDocumentCompressor):
    """A BGE reranker, or bge-m3, that orders documents by how well they answer a query.

    With `model="BAAI/bge-m3"` the score is a weighted mean of dense, sparse and multi-vector
    scores, by the weights that a `BGEEmbeddings` on the same model has loaded.

    Works wherever a document compressor does (`ContextualCompressionRetriever`,
    `DocumentCompressorPipeline`), and in a chain through `RunnableLambda`. Arguments are checked
    at once; weights load at first use and are shared by all adapters on the same model, revision,
    device and dtype.

    Raises:
        ArgumentError: An unknown argument, or a value that can't be served.
        CheckpointError: A model that can't be found, is damaged, or is neither bge-m3 nor a
            reranker of one label.

    Example:
        >>> reranker = BGEReranker(model="BAAI/bge-reranker-base", top_n=1)
        >>> passages = ["hi", "The giant panda is a bear."]
        >>> reranker.rerank(passages, "What is a panda?")  # doctest: +SKIP
        [{'index': 1, 'relevance_score': 0.9979}]
    """

    top_n: int | None = Field(default=3, ge=1, strict=True)
    """How many documents to keep, 1 or more; None for all."""

    score_threshold: float | None = Field(default=None, allow_inf_nan=False)
    """The least score to keep, itself included; None for any."""

    normalize: bool = Field(default=True, frozen=True)
    """Scores from 0 to 1, the sigmoid of the logit, each for itself; False for raw logits. Of no
    effect with bge-m3, whose scores are about 0 to 1 in any case."""

    m3_weights: Weights | None = Field(default=None, frozen=True)
    """How much the scores of bge-m3 count, `M3Weights(dense=1.0, sparse=0.3, multi_vector=1.0)`
    or a dict of these names; None for just these, and for a reranker."""

    if TYPE_CHECKING:
        _core: Scorer = PrivateAttr()

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,  # noqa: ARG002 -- the host's signature
    ) -> list[Document]:
        """Keep the best `top_n` documents, best first; equal scores keep the order given.

        Args:
            documents: Documents of any type; they are never changed.
            query: The query.
            callbacks: Of no effect.

        Returns:
            Copies that keep id, type and metadata and have the score, a Python float, as
            `metadata["relevance_score"]`; with `long_passages="window"` also, as
            `metadata["relevance_span"]`, [start, end] of the characters of `page_content` that
            the score is of. The metadata dict is the copy's own; the values in it are shared
            with the document that came in.

        Raises:
            BGEError: As `bge_core.Reranker.rank` says.
        """
        _check_documents(documents)
        return _copies(documents, self.rerank(documents, query))

    async def acompress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,  # noqa: ARG002 -- the host's signature
    ) -> list[Document]:
        """Keep the best documents without blocking the event loop; see `compress_documents`."""
        _check_documents(documents)
        return _copies(documents, await self.arerank(documents, query))

    def rerank(
        self,
        documents: Sequence[str | Document],
        query: str,
        *,
        top_n: int | EllipsisType | None = ...,
    ) -> list[RerankResult]:
        """Rank documents by their score, best first; equal scores keep the order given.

        Args:
            documents: Texts or documents.
            query: The query.
            top_n: How many to give, 1 or more; None for all; the field's if left out.

        Returns:
            `index` into `documents` and `relevance_score`, none below `score_threshold`; with
            `long_passages="window"` also `relevance_span`, see `compress_documents`.

        Raises:
            BGEError: As `bge_core.Reranker.rank` says.
        """
        ranked = self._core.rank_spans(
            query,
            _texts(documents),
            top_n=self.top_n if isinstance(top_n, EllipsisType) else top_n,
            score_threshold=self.score_threshold,
        )
        return _results(ranked)

    async def arerank(
        self,
        documents: Sequence[str | Document],
        query: str,
        *,
        top_n: int | EllipsisType | None = ...,
    ) -> list[RerankResult]:
        """Rank documents without blocking the event loop; see `rerank`."""
        ranked = await self._core.arank_spans(
            query,
            _texts(documents),
            top_n=self.top_n if isinstance(top_n, EllipsisType) else top_n,
            score_threshold=self.score_threshold,
        )
        return _results(ranked)

    def _make_core(self) -> Scorer:
        core = make_scorer(
            self.model, m3_weights=self.m3_weights, normalize=self.normalize, **self._options()
        )
        core.check_limits(top_n=self.top_n, score_threshold=self.score_threshold)
        return core


def _check_documents(documents: Sequence[Document]) -> None:
    for index, document in enumerate(documents):
        if not isinstance(document, Document):
            msg = (
                f"documents[{index}] must be a Document, got {type(document).__name__}: "
                "rerank() takes texts as well."
            )
            raise InputTypeError(msg)


def _texts(documents: Sequence[str | Document]) -> list[str]:
    if isinstance(documents, (str, bytes, Document)) or not isinstance(documents, Iterable):
        msg = f"documents must be a list of Document or str, got {type(documents).__name__}."
        raise InputTypeError(msg)
    return [item.page_content if isinstance(item, Document) else item for item in documents]


def _results(ranked: list[Ranked]) -> list[RerankResult]:
    results = []
    for found in ranked:
        result = RerankResult(index=found.index, relevance_score=found.score)
        if found.span is not None:
            result["relevance_span"] = list(found.span)  # as JSON has it
        results.append(result)
    return results


def _copies(documents: Sequence[Document], results: list[RerankResult]) -> list[Document]:
    copies = []
    for result in results:
        document = documents[result["index"]]
        said = {name: value for name, value in result.items() if name != "index"}
        metadata = {**document.metadata, **said}
        copies.append(document.model_copy(update={"metadata": metadata}))
    return copies
