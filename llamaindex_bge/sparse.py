"""bge-m3's sparse output as a LlamaIndex sparse embedding, and for vector stores' hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base_sparse import BaseSparseEmbedding, SparseEmbedding
from pydantic import PrivateAttr

from bge_core import M3Embedder
from llamaindex_bge._component import EmbeddingComponent

__all__ = ["BGESparseEmbedding"]

SparseBatch = tuple[list[list[int]], list[list[float]]]


# The host's two bases spell the type of one serializer's argument differently.
class BGESparseEmbedding(EmbeddingComponent, BaseSparseEmbedding):  # type: ignore[misc]
    """bge-m3's token weights, for hybrid search.

    Beside a `BGEEmbedding` on the same model it costs nothing: they share the weights, and one
    forward pass a document gives both vectors, whichever is asked for first. `QdrantVectorStore`
    takes it by its two hooks: `sparse_doc_fn=sparse.sparse_doc_fn` and
    `sparse_query_fn=sparse.sparse_query_fn`. Arguments are keywords, but for the model,
    which may stand first. Each is a field, and they are checked at once; weights load at first use.

    Raises:
        ArgumentError: An unknown argument, or a value that is not supported.
        CheckpointError: A model that can't be found, is damaged, or has no sparse output.

    Example:
        >>> sparse = BGESparseEmbedding(model_name="BAAI/bge-m3")
        >>> panda, cat = sparse.get_text_embedding_batch(["A panda is a bear.", "Cats purr."])
        >>> query = sparse.get_query_embedding("What is a panda?")
        >>> isinstance(sparse.similarity(query, panda), float)
        True
    """

    if TYPE_CHECKING:
        _core: M3Embedder = PrivateAttr()

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex writes beside a configuration."""
        return "BGESparseEmbedding"

    def to_payload(self) -> dict[str, Any]:
        """Describe the model for events, without credentials."""
        shown = ("model_name", "embed_batch_size", "max_length", "device", "dtype")
        return {"class_name": self.class_name(), **{name: getattr(self, name) for name in shown}}

    def similarity(self, embedding1: SparseEmbedding, embedding2: SparseEmbedding) -> float:
        """Return bge-m3's own lexical score, a dot product; the host's cosine ranks differently."""
        shared = embedding1.keys() & embedding2.keys()
        return float(sum(embedding1[token] * embedding2[token] for token in shared))

    def sparse_doc_fn(self, texts: list[str]) -> SparseBatch:
        """Weigh the tokens of documents, as `QdrantVectorStore(sparse_doc_fn=...)` takes them.

        Args:
            texts: Documents.

        Returns:
            Token ids of each, and their weights.

        Raises:
            BGEError: As `bge_core.M3Embedder.encode` says.
        """
        return _batch(self._get_text_embeddings(texts))

    def sparse_query_fn(self, texts: list[str]) -> SparseBatch:
        """Weigh the tokens of queries, as `QdrantVectorStore(sparse_query_fn=...)` takes them.

        They are queries by what waits for them: they overtake an index build.
        """
        return _batch(self._of_queries(texts))

    def _make_core(self) -> M3Embedder:
        made = M3Embedder(self.model_name, share_outputs=True, **self._options())
        made.require("sparse")
        return made

    def _of_queries(self, queries: list[str]) -> list[SparseEmbedding]:
        return _given(self._core.encode(queries, dense=False, priority="interactive").sparse)

    async def _aof_queries(self, queries: list[str]) -> list[SparseEmbedding]:
        encoded = await self._core.aencode(queries, dense=False, priority="interactive")
        return _given(encoded.sparse)

    def _get_query_embedding(self, query: str) -> SparseEmbedding:
        return self._of_queries([query])[0]

    async def _aget_query_embedding(self, query: str) -> SparseEmbedding:
        return (await self._aof_queries([query]))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[SparseEmbedding]:
        return _given(self._core.encode(texts, dense=False).sparse)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[SparseEmbedding]:
        return _given((await self._core.aencode(texts, dense=False)).sparse)

    def _get_text_embedding(self, text: str) -> SparseEmbedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> SparseEmbedding:
        return (await self._aget_text_embeddings([text]))[0]


def _given(sparse: list[SparseEmbedding] | None) -> list[SparseEmbedding]:
    return sparse or []


def _batch(sparse: list[SparseEmbedding]) -> SparseBatch:
    return [list(weights) for weights in sparse], [list(weights.values()) for weights in sparse]
