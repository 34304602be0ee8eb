"""What the embeddings and the reranker share: fields, construction, copies and pickles."""

from __future__ import annotations

import logging
import os
import pickle
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from llama_index.core.bridge.pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
)
from llama_index.core.schema import BaseComponent

from bge_core import ArgumentError, M3Embedder, Scorer, register
from bge_core.checkpoints.catalog import registered_profiles
from bge_core.embedder import DenseEmbedder
from bge_core.host_fields import (
    check_argument_names,
    frozen_field_error,
    refuse_positional,
    validation_error,
)
from bge_core.lifecycle import ContextManaged

__all__ = ["LocalModelComponent", "ModelName", "ServedModelComponent"]

logger = logging.getLogger(__name__)


# What the classes that these replace call otherwise, or do otherwise.
_MOVED = {
    "batch_size": "batches are sized in tokens: write batch_tokens=..., or leave it out",
    "cross_encoder_kwargs": "write max_length=..., dtype=... and the like as arguments",
    "model": "write model_name='...'",
    "model_kwargs": "write dtype=..., revision=... and the like as arguments",
    "model_name": "write model='...'",
    "parallel_process": "write device=['cuda:0', 'cuda:1'] to use several devices",
    "show_progress_bar": "pass show_progress=True to the index or pipeline",
    "target_devices": "write device=['cuda:0', 'cuda:1'] to use several devices",
    "text_instruction": "documents are embedded as they are, but llm-embedder's: leave it out",
    "tokenizer_name": "a checkpoint's own tokenizer is used: leave it out",
}


def _name(value: object) -> object:
    """Give the name of a torch dtype or device; torch itself is not imported."""
    if type(value).__module__.partition(".")[0] == "torch":
        return str(value).removeprefix("torch.")
    return value


def _names(value: object) -> object:
    return [_name(item) for item in value] if isinstance(value, (list, tuple)) else _name(value)


def _path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _folder(value: object) -> object:
    # A relative path could be read as a hub id.
    return os.path.abspath(value) if isinstance(value, os.PathLike) else value  # noqa: PTH100


ModelName = Annotated[str, BeforeValidator(_folder)]
"""A hub id or a folder."""


class LocalModelComponent(BaseComponent, ContextManaged):
    """Base of components that run a local model.

    The model is made of the fields at construction, which checks them and loads no weights. The
    fields that it is made of are frozen, so that a component never claims what its model doesn't
    do. Copies and pickles carry the fields only.
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        # An error's text must not show a token.
        hide_input_in_errors=True,
    )

    max_length: int | None = Field(
        default=None,
        frozen=True,
        description="Tokens that are read, special ones included; None for the checkpoint's own.",
    )
    device: Annotated[str | list[str] | None, BeforeValidator(_names)] = Field(
        default=None,
        frozen=True,
        description="'cuda', 'cuda:1', 'mps', 'cpu', or several of them; None for the best.",
    )
    dtype: Annotated[str, BeforeValidator(_name)] = Field(
        default="auto",
        frozen=True,
        description=(
            "'auto' (on cuda float16, of decoders bfloat16; else float32), 'float32', 'float16' "
            "or 'bfloat16'."
        ),
    )
    use_fp16: bool | None = Field(
        default=None,
        frozen=True,
        description="FlagEmbedding's word for float16 (True) or float32 (False).",
    )
    batch_tokens: int | None = Field(
        default=None,
        frozen=True,
        description="Tokens computed in one pass; None for the device's default.",
    )
    on_truncation: Literal["ignore", "warn", "error"] = Field(
        default="warn",
        frozen=True,
        description="What happens when a text is longer than max_length; 'warn' logs one line.",
    )
    backend: Literal["torch", "openvino", "auto"] = Field(
        default="torch",
        frozen=True,
        description=(
            "What executes the model: 'openvino' is faster for single queries on a CPU (extra "
            "[openvino]); 'auto' uses it for queries and torch for texts, where it is installed."
        ),
    )
    cache_folder: Annotated[str | None, BeforeValidator(_path)] = Field(
        default=None, frozen=True, description="The hub's cache; None for the usual one."
    )
    revision: str | None = Field(
        default=None, frozen=True, description="Branch, tag or commit on the hub."
    )
    local_files_only: bool = Field(
        default=False, frozen=True, description="Never go to the network."
    )
    trust_remote_code: bool = Field(
        default=False, frozen=True, description="Run Python code that the checkpoint carries."
    )
    token: str | None = Field(
        default=None,
        frozen=True,
        exclude=True,
        repr=False,
        description="A hub token; never shown, and never part of to_dict().",
    )

    # Type checkers make the constructor's signature of the fields.
    if not TYPE_CHECKING:

        def __new__(cls, *given: Any, **_: Any) -> Self:
            """Refuse what was given without its name."""
            first = "model_name" if "model_name" in cls.model_fields else "model"
            refuse_positional(cls.__name__, given, first=first)
            return super().__new__(cls)

        def __init__(self, **arguments: Any) -> None:
            """Check the arguments and the model that they describe; loads no weights."""
            known, owner = type(self).model_fields, type(self).__name__
            arguments = check_argument_names(owner, arguments, known=known, moved=_MOVED)
            try:
                super().__init__(**arguments)
            except ValidationError as exc:
                raise validation_error(owner, exc.errors(include_url=False)) from exc
            self._core  # noqa: B018 - making the model is the check

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the numbers.

        For the namespaces of caches. The weights count; the folder's place and batch sizes don't,
        the device only through its dtype.
        """
        return self._core.fingerprint

    def close(self) -> None:
        """Let go of the model; its weights are freed when nobody else holds them."""
        self._core.close()

    @property
    @abstractmethod
    def _core(self) -> DenseEmbedder | M3Embedder | Scorer:
        """The model that the fields describe, made once."""

    def _shared_arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LocalModelComponent.model_fields}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, unless the model behind it was made with the old value."""
        field = type(self).model_fields.get(name)
        if field is not None and field.frozen:
            raise frozen_field_error(type(self).__name__, name)
        try:
            super().__setattr__(name, value)
        except ValidationError as exc:
            raise validation_error(type(self).__name__, exc.errors(include_url=False)) from exc

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:  # noqa: ARG002
        """Make another component of the same fields; weights are shared, never copied.

        Args:
            update: Fields that shall differ; they are checked as the constructor does.
            deep: Makes no difference: fields are plain values, and callback manager, cache and
                rate limiter are services to be shared.
        """
        return type(self)(**{**self.__dict__, **(update or {})})

    def __copy__(self) -> Self:
        """Make another component of the same fields."""
        return self.model_copy()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Make another component of the same fields."""
        return self.model_copy()

    def __getstate__(self) -> dict[Any, Any]:
        """Give the fields: never the weights, and no service that can't leave the process.

        BaseComponent would delete what can't be pickled from the living object, too.
        """
        state = dict(self.__dict__)
        for name in ("callback_manager", "embeddings_cache", "rate_limiter"):
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
        # Without its row a model that was registered by name is another in the next process.
        return state | {"registered_profiles": registered_profiles()}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Take fields; the model is made at first use.

        An error here would be lost: a pool's worker that can't read its task dies in silence, and
        the pool starts another one for ever.
        """
        for row in state.pop("registered_profiles", ()):
            try:
                register(row)
            except ArgumentError as exc:
                logger.warning("%s", exc)
        super().__init__(**state)


class ServedModelComponent(LocalModelComponent):
    """Base of components whose model may run on a server instead."""

    endpoint: str | None = Field(
        default=None,
        frozen=True,
        description=(
            "The address of a text-embeddings-inference or Infinity server that runs the model; "
            "None for this machine. What says how a model is loaded and run is refused with it."
        ),
    )
    api_key: SecretStr | None = Field(
        default=None,
        frozen=True,
        exclude=True,
        repr=False,
        description="The server's token; never shown, and never part of to_dict().",
    )
    timeout: float | None = Field(
        default=None,
        frozen=True,
        description="Seconds to wait for one answer of the server; None for 60.",
    )
    long_passages: Literal["truncate", "window"] = Field(
        default="truncate",
        frozen=True,
        description=(
            "What happens with a text that doesn't fit: 'truncate' reads its beginning; 'window' "
            "reads all of it in overlapping windows, whose vectors' mean is its vector, and the "
            "best of whose scores is its score. Queries are cut in any case."
        ),
    )

    def _shared_arguments(self) -> dict[str, Any]:
        key = None if self.api_key is None else self.api_key.get_secret_value()
        served = {"endpoint": self.endpoint, "api_key": key, "timeout": self.timeout}
        return super()._shared_arguments() | served | {"long_passages": self.long_passages}
