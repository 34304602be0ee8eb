"""bge-m3's sparse output behind the interface of langchain-qdrant."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pydantic import Field, PrivateAttr

from bge_core import M3Embedder
from bge_core.errors import needs_extra
from langchain_bge._fields import LocalModelFields

if TYPE_CHECKING:
    from bge_core import M3Outputs

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


class BGESparseEmbeddings(LocalModelFields, SparseEmbeddings):
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

    show_progress: bool = Field(default=False, strict=True)
    """Show a progress bar while documents are embedded."""

    if TYPE_CHECKING:
        _core: M3Embedder = PrivateAttr()

    def embed_documents(self, texts: list[str]) -> list[SparseVector]:
        """Weigh the tokens of documents.

        Args:
            texts: Documents; equal ones are computed once.

        Returns:
            A vector a document, in order: token ids, ascending, and a weight above 0 each.

        Raises:
            BGEError: As `bge_core.M3Embedder.encode` says.
        """
        show = self.show_progress
        return _vectors(self._core.encode(texts, dense=False, show_progress=show))

    async def aembed_documents(self, texts: list[str]) -> list[SparseVector]:
        """Weigh the tokens of documents without blocking the event loop."""
        show = self.show_progress
        encoded = await self._core.aencode(texts, dense=False, show_progress=show)
        return await asyncio.to_thread(_vectors, encoded)

    def embed_query(self, text: str) -> SparseVector:
        """Weigh the tokens of a query, as those of a document: bge-m3 wants no instruction.

        Args:
            text: The query.

        Raises:
            BGEError: As `bge_core.M3Embedder.encode` says.
        """
        return _vectors(self._core.encode([text], dense=False, priority="interactive"))[0]

    async def aembed_query(self, text: str) -> SparseVector:
        """Weigh the tokens of a query without blocking the event loop; see `embed_query`."""
        return _vectors(await self._core.aencode([text], dense=False, priority="interactive"))[0]

    def _make_core(self) -> M3Embedder:
        core = M3Embedder(self.model, share_outputs=True, **self._options())
        core.require("sparse")
        return core


def _vectors(encoded: M3Outputs) -> list[SparseVector]:
    return [
        SparseVector(indices=list(weights), values=list(weights.values()))
        for weights in encoded.sparse or ()
    ]
