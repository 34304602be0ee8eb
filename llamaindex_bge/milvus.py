"""bge-m3's sparse output behind the interface of llama-index-vector-stores-milvus."""

from __future__ import annotations

from bge_core.errors import needs_extra
from llamaindex_bge.sparse import BGESparseEmbedding

try:
    from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction
except ImportError as exc:
    raise needs_extra(
        exc,
        "BGEMilvusSparseEmbedding",
        packages=("llama_index.vector_stores.milvus", "pymilvus"),
        install="llama-index-vector-stores-milvus",
    ) from exc

__all__ = ["BGEMilvusSparseEmbedding"]


class BGEMilvusSparseEmbedding(BGESparseEmbedding, BaseSparseEmbeddingFunction):  # type: ignore[misc]
    """bge-m3's token weights, for `MilvusVectorStore(sparse_embedding_function=...)`.

    Beside a `BGEEmbedding` on the same model it shares the weights, and one forward pass a text
    gives both vectors. The store asks for the sparse vector of a node's text without its metadata:
    where the node's metadata is embedded with it, that is another text and another pass. Arguments
    are keywords, each is a field, and they are checked at once; weights load at first use.

    Raises:
        ArgumentError: An unknown argument, or a value that is not supported.
        CheckpointError: A model that can't be found, is damaged, or has no sparse output.
    """

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex writes beside a configuration."""
        return "BGEMilvusSparseEmbedding"

    def encode_documents(self, documents: list[str]) -> list[dict[int, float]]:
        """Weigh the tokens of documents.

        Args:
            documents: Documents; equal ones are computed once.

        Returns:
            A dict a document, in order: token ids, ascending, to a weight above 0 each.

        Raises:
            BGEError: As `bge_core.M3Embedder.encode` says.
        """
        return self._get_text_embeddings(documents)

    async def async_encode_documents(self, documents: list[str]) -> list[dict[int, float]]:
        """Weigh the tokens of documents without blocking the event loop."""
        return await self._aget_text_embeddings(documents)

    def encode_queries(self, queries: list[str]) -> list[dict[int, float]]:
        """Weigh the tokens of queries, which overtake an index build.

        Args:
            queries: Queries.

        Returns:
            As `encode_documents`.

        Raises:
            BGEError: As `bge_core.M3Embedder.encode` says.
        """
        return self._of_queries(queries)

    async def async_encode_queries(self, queries: list[str]) -> list[dict[int, float]]:
        """Weigh the tokens of queries without blocking the event loop."""
        return await self._aof_queries(queries)
