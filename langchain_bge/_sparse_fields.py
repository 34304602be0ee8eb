"""bge-m3's token weights as LangChain's vector stores ask for them, whatever type they take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, PrivateAttr

from bge_core import M3Embedder
from langchain_bge._fields import LocalModelFields

__all__ = ["SparseFields"]

Weights = dict[int, float]


class SparseFields(LocalModelFields):
    """The model, and its token weights as dicts of token ids, ascending, to weights above 0."""

    show_progress: bool = Field(default=False, strict=True)
    """Show a progress bar while documents are embedded."""

    if TYPE_CHECKING:
        _core: M3Embedder = PrivateAttr()

    def _of_documents(self, texts: list[str]) -> list[Weights]:
        show = self.show_progress
        return self._core.encode(texts, dense=False, show_progress=show).sparse or []

    async def _aof_documents(self, texts: list[str]) -> list[Weights]:
        show = self.show_progress
        encoded = await self._core.aencode(texts, dense=False, show_progress=show)
        return encoded.sparse or []

    def _of_query(self, text: str) -> Weights:
        encoded = self._core.encode([text], dense=False, priority="interactive")
        return (encoded.sparse or [])[0]

    async def _aof_query(self, text: str) -> Weights:
        encoded = await self._core.aencode([text], dense=False, priority="interactive")
        return (encoded.sparse or [])[0]

    def _make_core(self) -> M3Embedder:
        core = M3Embedder(self.model, share_outputs=True, **self._options())
        core.require("sparse")
        return core
