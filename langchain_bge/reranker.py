"""A BGE reranker behind LangChain's `BaseDocumentCompressor`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import EllipsisType
from typing import Any, NotRequired, TypedDict

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import (
    Runnable,
    RunnableConfig,
    RunnableParallel,
    RunnablePassthrough,
)
from pydantic import Field

from bge_core import InputTypeError, Ranked
from bge_core.arguments import is_list, text
from bge_core.host_fields import Count, RankingFields, earlier_score_key
from langchain_bge._fields import ServedModelFields
from langchain_bge._runs import RerankRunnable, arerank_run, config_of, rerank_run

__all__ = ["BGEReranker", "RerankResult"]


class RerankResult(TypedDict):
    """One document's place in what was given, its score, and what of it the score is of."""

    index: int
    relevance_score: float
    relevance_start: NotRequired[int]
    relevance_end: NotRequired[int]


class BGEReranker(RankingFields, ServedModelFields, BaseDocumentCompressor):
    """A BGE reranker, or bge-m3, that orders documents by how well they answer a query.

    With `model="BAAI/bge-m3"` the score is a weighted mean of dense, sparse and multi-vector
    scores, by the weights that a `BGEEmbeddings` on the same model has loaded.

    Works wherever a document compressor does (`ContextualCompressionRetriever`,
    `DocumentCompressorPipeline`), and in a chain as `as_runnable()`. Arguments are checked at
    once; weights load at first use and are shared by all adapters on the same model, revision,
    device and dtype.

    Raises:
        ArgumentError: An unknown argument, or a value that is not supported.
        CheckpointError: A model that can't be found, is damaged, or is neither bge-m3 nor a
            reranker of one label.

    Example:
        >>> reranker = BGEReranker(model="BAAI/bge-reranker-base", top_n=1)
        >>> passages = ["hi", "The giant panda is a bear."]
        >>> reranker.rerank(passages, "What is a panda?")  # doctest: +SKIP
        [{'index': 1, 'relevance_score': 0.9979}]
    """

    top_n: Count | None = Field(default=3)
    """How many documents to keep, 1 or more; None for all."""

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
    ) -> list[Document]:
        """Keep the best `top_n` documents, best first; equal scores keep the order given.

        Args:
            documents: Documents of any type; they are never changed.
            query: The query.
            callbacks: Are told of the rerank, as a run with the query, counts and scores. Left
                out, those of the surrounding chain are.

        Returns:
            Copies that keep id, type and metadata and have the score, a Python float, as
            `metadata["relevance_score"]`; the score of an earlier reranker is kept as
            `relevance_score_1`, the next one's as `relevance_score_2`. With
            `long_passages="window"`, `relevance_start` and `relevance_end` are the characters
            [start, end) of `page_content` that the score is of. The metadata dict is the copy's
            own; the values in it are shared with the document that came in.

        Raises:
            BGEError: As `bge_core.Reranker.rank` says.
        """
        return self._compress(documents, query, config_of(callbacks), type(self).__name__)

    async def acompress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
    ) -> list[Document]:
        """Keep the best documents without blocking the event loop; see `compress_documents`."""
        config = config_of(callbacks)
        return await self._acompress(documents, query, config, type(self).__name__)

    def as_runnable(
        self,
        retriever: Runnable[str, list[Document]] | None = None,
        *,
        name: str | None = None,
        query_key: str = "query",
        documents_key: str = "documents",
    ) -> Runnable[Any, list[Document]]:
        """Make a step of a chain, which is a run of its own in traces.

        Args:
            retriever: What finds the documents; None where the chain brings them.
            name: The step's name in traces; None for the class's.
            query_key: The key of the query in what comes in.
            documents_key: The key of the documents.

        Returns:
            Without a retriever, a step that takes a dict of query and documents; with one, a
            step that takes the query.

        Example:
            >>> reranker = BGEReranker(model="BAAI/bge-reranker-base")
            >>> reranker.as_runnable(name="rerank").get_name()
            'rerank'
        """
        step = RerankRunnable(
            self,
            name=text("name", type(self).__name__ if name is None else name) or type(self).__name__,
            query_key=text("query_key", query_key),
            documents_key=text("documents_key", documents_key),
        )
        if retriever is None:
            return step
        return RunnableParallel({query_key: RunnablePassthrough(), documents_key: retriever}) | step

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
            `long_passages="window"` also `relevance_start` and `relevance_end`, see
            `compress_documents`.

        Raises:
            BGEError: As `bge_core.Reranker.rank` says.
        """
        ranked = self._core.rank(
            query,
            _texts(documents),
            top_n=self.top_n if isinstance(top_n, EllipsisType) else top_n,
            score_threshold=self.score_threshold,
            priority=self.priority,
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
        ranked = await self._core.arank(
            query,
            _texts(documents),
            top_n=self.top_n if isinstance(top_n, EllipsisType) else top_n,
            score_threshold=self.score_threshold,
            priority=self.priority,
        )
        return _results(ranked)

    def _compress(
        self, documents: Sequence[Document], query: str, config: RunnableConfig, name: str
    ) -> list[Document]:
        documents = _checked_documents(documents)
        with rerank_run(config, name, self._run_inputs(documents, query)) as result:
            result.extend(_copies(documents, self.rerank(documents, query)))
        return result

    async def _acompress(
        self, documents: Sequence[Document], query: str, config: RunnableConfig, name: str
    ) -> list[Document]:
        documents = _checked_documents(documents)
        async with arerank_run(config, name, self._run_inputs(documents, query)) as result:
            result.extend(_copies(documents, await self.arerank(documents, query)))
        return result

    def _run_inputs(self, documents: Sequence[Document], query: str) -> dict[str, Any]:
        return {
            "query": query,
            "documents": list(documents),
            "count": len(documents),
            "top_n": self.top_n,
            "model": self.model_name,
        }


def _checked_documents(documents: Iterable[Document]) -> list[Document]:
    _check_list(documents)
    found = list(documents)  # a generator gives them once
    for index, document in enumerate(found):
        if not isinstance(document, Document):
            msg = (
                f"documents[{index}] must be a Document, got {type(document).__name__}: "
                "rerank() takes texts as well."
            )
            raise InputTypeError(msg)
    return found


def _texts(documents: Sequence[str | Document]) -> list[str]:
    _check_list(documents)
    return [item.page_content if isinstance(item, Document) else item for item in documents]


def _check_list(documents: object) -> None:
    if isinstance(documents, Document) or not is_list(documents):
        msg = f"documents must be a list of Document or str, got {type(documents).__name__}."
        raise InputTypeError(msg)


def _results(ranked: list[Ranked]) -> list[RerankResult]:
    results = []
    for found in ranked:
        result = RerankResult(index=found.index, relevance_score=found.score)
        if found.span is not None:
            result["relevance_start"], result["relevance_end"] = found.span
        results.append(result)
    return results


def _copies(documents: Sequence[Document], results: list[RerankResult]) -> list[Document]:
    copies = []
    for result in results:
        document = documents[result["index"]]
        said = {name: value for name, value in result.items() if name != "index"}
        metadata = {**document.metadata, **said}
        if (score := document.metadata.get("relevance_score")) is not None:
            metadata[earlier_score_key(document.metadata)] = score
        copies.append(document.model_copy(update={"metadata": metadata}))
    return copies
