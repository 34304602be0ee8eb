"""bge-m3's sparse output behind the interface of langchain-qdrant."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from bge_core.errors import needs_extra
from langchain_bge._sparse_fields import SparseFields

if TYPE_CHECKING:
    from pydantic import Field

    from bge_core.host_fields import ModelName
    from langchain_bge._sparse_fields import Weights

try:
    from langchain_qdrant import SparseEmbeddings, SparseVector
except ImportError as exc:
    raise needs_extra(
        exc,
        "BGESparseEmbeddings",
        packages=("langchain_qdrant", "qdrant_client"),
        install="langchain-qdrant",
    ) from exc

__all__ = ["BGESparseEmbeddings"]


class BGESparseEmbeddings(SparseFields, SparseEmbeddings):
    """bge-m3's token weights, for `QdrantVectorStore` in hybrid or sparse mode.

    Beside a `BGEEmbeddings` on the same model it costs nothing: they share the weights, and one
    forward pass a document gives both vectors, whichever is asked for first. Arguments are
    checked at once; weights load at first use.

    Raises:
        ArgumentError: An unknown argument, or a value that is not supported.
        CheckpointError: A model that can't be found, is damaged, or has no sparse output.

    Example:
        >>> sparse = BGESparseEmbeddings(model="BAAI/bge-m3")
        >>> vector = sparse.embed_query("What is a panda?")
        >>> len(vector.indices) == len(vector.values) > 0
        True
    """

    _takes_bare_model = True  # as FastEmbedSparse does
    if TYPE_CHECKING:
        model: ModelName = Field(default="", kw_only=False)

    def embed_documents(self, texts: list[str]) -> list[SparseVector]:
        """Weigh the tokens of documents.

        Args:
            texts: Documents; equal ones are computed once.

        Returns:
            A vector a document, in order: token ids, ascending, and a weight above 0 each.

        Raises:
            BGEError: As `bge_core.M3Embedder.encode` says.
        """
        return _vectors(self._of_documents(texts))

    async def aembed_documents(self, texts: list[str]) -> list[SparseVector]:
        """Weigh the tokens of documents without blocking the event loop."""
        return await asyncio.to_thread(_vectors, await self._aof_documents(texts))

    def embed_query(self, text: str) -> SparseVector:
        """Weigh the tokens of a query, as those of a document: bge-m3 wants no instruction.

        Args:
            text: The query.

        Raises:
            BGEError: As `bge_core.M3Embedder.encode` says.
        """
        return _vectors([self._of_query(text)])[0]

    async def aembed_query(self, text: str) -> SparseVector:
        """Weigh the tokens of a query without blocking the event loop; see `embed_query`."""
        return _vectors([await self._aof_query(text)])[0]


def _vectors(sparse: list[Weights]) -> list[SparseVector]:
    return [
        SparseVector(indices=list(weights), values=list(weights.values())) for weights in sparse
    ]
