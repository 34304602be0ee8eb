"""What LlamaIndex's components have beside the fields that all hosts share."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import BaseComponent
from llama_index.core.storage.kvstore.types import BaseKVStore
from pydantic import BaseModel, Field

from bge_core import arguments
from bge_core.engine.call import run_off_loop
from bge_core.errors import InputTypeError
from bge_core.host_fields import (
    LocalModelFields,
    ModelName,
    ServedModelFields,
    WholeNumber,
    with_profiles,
    without_profiles,
)
from bge_core.progress import progress_bar_of_calls
from bge_core.tokenizer import can_check_inline

__all__ = ["EmbeddingComponent", "LocalModelComponent", "ServedModelComponent"]

logger = logging.getLogger(__name__)

# Living objects of the host: shared by copies, and no part of a configuration.
_SERVICES = ("callback_manager", "embeddings_cache", "rate_limiter")


class LocalModelComponent(LocalModelFields, BaseComponent):
    """Base of components that run a local model."""

    _not_compared = frozenset(_SERVICES)
    _takes_bare_model = True  # as HuggingFaceEmbedding and SentenceTransformerRerank do
    # What the classes that these replace call otherwise, or do otherwise.
    _renamed_arguments: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "batch_size": "batches are sized in tokens: write batch_tokens=..., or leave it out",
            "cross_encoder_kwargs": "write max_length=..., dtype=... and the like as arguments",
            "model_kwargs": "write dtype=..., revision=... and the like as arguments",
            "parallel_process": "write device=['cuda:0', 'cuda:1'] to use several devices",
            "show_progress_bar": "pass show_progress=True to the index or pipeline",
            "target_devices": "write device=['cuda:0', 'cuda:1'] to use several devices",
            "text_instruction": "BGE's documents are embedded as they are (llm-embedder's "
            "instruction comes with task=...): leave it out, and for another model write "
            "document_instruction='...'",
            "tokenizer_name": "a checkpoint's own tokenizer is used: leave it out",
        }
    )

    @classmethod
    def _normalize_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        # The host takes anything for the one, and raises an error of its own for the other.
        kinds: dict[str, type] = {
            "callback_manager": CallbackManager,
            "embeddings_cache": BaseKVStore,
        }
        for name, kind in kinds.items():
            value = arguments.get(name)
            if value is not None and not isinstance(value, kind):
                msg = f"{name} must be a {kind.__name__} or None, got {type(value).__name__}."
                raise InputTypeError(msg)
        return super()._normalize_arguments(arguments)

    def __getstate__(self) -> dict[Any, Any]:
        """Return the fields: never the weights, and no service that can't leave the process.

        BaseComponent would delete what can't be pickled from the living object, too.
        """
        state = dict(self.__dict__)
        for name in _SERVICES:
            service = state.get(name)
            if not getattr(service, "handlers", True):
                # A manager that calls nobody has only its memory of past events.
                del state[name]
                continue
            try:
                pickle.dumps(service)
            except Exception as exc:  # noqa: BLE001 - pickling may raise anything at all
                del state[name]
                logger.warning("%s can't be pickled (%s): the copy goes without.", name, exc)
        return with_profiles(state)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Restore fields; the model is made at first use.

        An error here would be lost: a pool's worker that can't read its task dies in silence, and
        the pool starts another one for ever.
        """
        BaseModel.__init__(self, **without_profiles(state))


class ServedModelComponent(LocalModelComponent, ServedModelFields):
    """Base of components whose model may run on a server instead."""


class EmbeddingComponent(LocalModelComponent):
    """What the dense and the sparse embedding share: the host's words for model and batches."""

    _model_field = "model_name"

    if TYPE_CHECKING:  # either of them
        model: ModelName = Field(default="", kw_only=False)
        model_name: str = Field(default="")
    else:
        model_name: ModelName = Field(frozen=True)
        """A hub id (`"BAAI/bge-small-en-v1.5"`) or a folder; `model=` is the same argument."""

        # The host would embed each character of a str and each key of a mapping.
        def get_text_embedding_batch(
            self, texts: list[str], show_progress: bool = False, **kwargs: Any
        ) -> list[Any]:
            """Embed documents, in the host's batches; see the host's own method."""
            texts = arguments.texts("texts", texts)
            with self._progress_bar(len(texts), show_progress):
                return super().get_text_embedding_batch(texts, **kwargs)

        async def aget_text_embedding_batch(
            self, texts: list[str], show_progress: bool = False, **kwargs: Any
        ) -> list[Any]:
            """Embed documents without blocking the event loop."""
            inline = can_check_inline(texts)
            texts = await run_off_loop(arguments.texts, "texts", texts, inline=inline)
            batch = super().aget_text_embedding_batch
            with self._progress_bar(len(texts), show_progress):
                return await batch(texts, **kwargs)

        def _progress_bar(self, total: int, show: bool) -> AbstractContextManager[None]:
            # The host's own counts the texts that it handed over, 2,048 at a time.
            windows = getattr(self, "long_passages", "truncate") == "window"
            return progress_bar_of_calls(
                None if windows else total,
                show=show,
                unit="window" if windows else "text",
                title="Generating embeddings",
            )

        @property
        def model(self) -> str:
            """The hub id or folder."""
            return self.model_name

    embed_batch_size: WholeNumber = Field(default=2048, gt=0, le=2048)
    """Texts that the host hands over at a time, its maximum by default: they are sorted by length
    and packed to `batch_tokens`, and that is what bounds the memory."""

    num_workers: WholeNumber | None = Field(default=None)
    """Batches that the host has embedded side by side in its async methods; None for its own."""
