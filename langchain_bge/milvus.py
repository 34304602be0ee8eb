"""bge-m3's sparse output behind the interface of langchain-milvus."""

from __future__ import annotations

from bge_core.errors import needs_extra
from langchain_bge._sparse_fields import SparseFields

try:
    from langchain_milvus.utils.sparse import BaseSparseEmbedding
except ImportError as exc:
    raise needs_extra(
        exc,
        "BGEMilvusSparseEmbeddings",
        packages=("langchain_milvus", "pymilvus"),
        install="langchain-milvus",
    ) from exc

__all__ = ["BGEMilvusSparseEmbeddings"]


class BGEMilvusSparseEmbeddings(SparseFields, BaseSparseEmbedding):  # type: ignore[misc]
    """bge-m3's token weights, for `Milvus` in hybrid or sparse mode.

    Milvus takes it in the list of its embedding functions:
    `Milvus([BGEEmbeddings(model=...), BGEMilvusSparseEmbeddings(model=...)], ...)`. Beside a
    `BGEEmbeddings` on the same model it costs nothing: they share the weights, and one forward
    pass a document gives both vectors. Arguments are checked at once; weights load at first use.

    Raises:
        ArgumentError: An unknown argument, or a value that is not supported.
        CheckpointError: A model that can't be found, is damaged, or has no sparse output.
    """

    def embed_documents(self, texts: list[str]) -> list[dict[int, float]]:
        """Weigh the tokens of documents.

        Args:
            texts: Documents; equal ones are computed once.

        Returns:
            A dict a document, in order: token ids, ascending, to a weight above 0 each.

        Raises:
            BGEError: As `bge_core.M3Embedder.encode` says.
        """
        return self._of_documents(texts)

    async def aembed_documents(self, texts: list[str]) -> list[dict[int, float]]:
        """Weigh the tokens of documents without blocking the event loop."""
        return await self._aof_documents(texts)

    def embed_query(self, query: str) -> dict[int, float]:
        """Weigh the tokens of a query, as those of a document: bge-m3 wants no instruction.

        Args:
            query: The query.

        Raises:
            BGEError: As `bge_core.M3Embedder.encode` says.
        """
        return self._of_query(query)

    async def aembed_query(self, query: str) -> dict[int, float]:
        """Weigh the tokens of a query without blocking the event loop; see `embed_query`."""
        return await self._aof_query(query)
