"""What the adapters share: where a model comes from, where it runs, and how it is let go."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
)

from bge_core import ArgumentError, M3Embedder, Scorer
from bge_core.embedder import DenseEmbedder
from bge_core.host_fields import (
    check_argument_names,
    frozen_field_error,
    refuse_positional,
    validation_error,
)
from bge_core.lifecycle import ContextManaged

if TYPE_CHECKING:
    import torch

    DType = str | torch.dtype
    Device = str | torch.device | list[str]
else:

    def _name(value: Any) -> Any:
        # A torch.dtype or torch.device becomes its name, so that a dump is plain JSON and torch
        # need not be imported here.
        if isinstance(value, (list, tuple)):
            return [_name(item) for item in value]
        if type(value).__module__.partition(".")[0] == "torch":
            return str(value).removeprefix("torch.")
        return value

    DType = Annotated[str, BeforeValidator(_name)]
    Device = Annotated[str | list[str], BeforeValidator(_name)]

__all__ = ["LocalModelFields", "ServedModelFields"]


class LocalModelFields(BaseModel, ContextManaged):
    """A checkpoint on this machine, as fields; each adapter adds what is its own.

    The model behind the fields is made at construction, which checks them and loads no weights.
    Pickles, copies and dumps carry the configuration only.
    """

    model_config = ConfigDict(
        extra="forbid",
        # What stands under a field is its description for schemas and editors.
        use_attribute_docstrings=True,
        # `model_kwargs` and `model_name` are LangChain's own words.
        protected_namespaces=(),
        populate_by_name=True,
        validate_assignment=True,
        # A wrong argument's message must not show the token beside it.
        hide_input_in_errors=True,
    )

    model: str | Path = Field(validation_alias=AliasChoices("model", "model_name"), frozen=True)
    """A hub id (`"BAAI/bge-small-en-v1.5"`) or a folder; `model_name=` is the same argument."""

    device: Device | None = Field(default=None, frozen=True)
    """`"cuda"`, `"cuda:1"`, `"mps"`, `"cpu"`, or a list of them; None for the best one."""

    dtype: DType = Field(default="auto", frozen=True)
    """`"auto"` (on cuda float16, of decoders bfloat16; else float32), `"float32"`, `"float16"` or
    `"bfloat16"`."""

    use_fp16: bool | None = Field(default=None, frozen=True)
    """FlagEmbedding's word for float16 (True) or float32 (False); None leaves it to `dtype`."""

    max_length: int | None = Field(default=None, frozen=True)
    """Tokens that are read of a text, special ones included; None for the checkpoint's limit."""

    batch_tokens: int | None = Field(default=None, frozen=True)
    """Tokens computed in one pass; None for the device's default."""

    on_truncation: Literal["ignore", "warn", "error"] = Field(default="warn", frozen=True)
    """What happens when a text is longer: `"warn"` logs one line a call, `"error"` refuses."""

    backend: Literal["torch", "openvino", "auto"] = Field(default="torch", frozen=True)
    """What executes the model: `"openvino"` is faster for single queries on a CPU (extra
    `[openvino]`); `"auto"` uses it for queries and torch for documents, where it is installed."""

    cache_folder: str | Path | None = Field(default=None, frozen=True)
    """The hub's cache; None for the usual one."""

    revision: str | None = Field(default=None, frozen=True)
    """Branch, tag or commit on the hub."""

    local_files_only: bool = Field(default=False, frozen=True)
    """Never go to the network."""

    trust_remote_code: bool = Field(default=False, frozen=True)
    """Run Python code that the checkpoint carries; off for good reason."""

    token: SecretStr | None = Field(default=None, frozen=True)
    """A hub token for private models."""

    _core: DenseEmbedder | M3Embedder | Scorer = PrivateAttr()
    _renamed_arguments: ClassVar[Mapping[str, str]] = {}

    if not TYPE_CHECKING:  # type checkers know the arguments from the fields

        def __new__(cls, *given: Any, **_: Any) -> Self:
            """Refuse what was given without its name."""
            refuse_positional(cls.__name__, given, first="model")
            return super().__new__(cls)

        def __init__(self, **arguments: Any) -> None:
            # What pydantic's validators raise it wraps in a report of several lines. What is
            # raised around it reaches the user as it is: one sentence, and a BGEError.
            known, owner = {*type(self).model_fields, "model_name"}, type(self).__name__
            arguments = check_argument_names(
                owner, arguments, known=known, moved=self._renamed_arguments
            )
            try:
                super().__init__(**self._normalize_arguments(arguments))
            except ValidationError as exc:
                raise validation_error(owner, exc.errors(include_url=False)) from exc
            self._core = self._make_core()

        def __setattr__(self, name: str, value: Any) -> None:
            """Set a field, unless the model behind it was made with the old value."""
            field = type(self).model_fields.get(name)
            if field is not None and field.frozen:
                raise frozen_field_error(type(self).__name__, name)
            try:
                super().__setattr__(name, value)
            except ValidationError as exc:
                owner = type(self).__name__
                raise validation_error(owner, exc.errors(include_url=False)) from exc

    @property
    def model_name(self) -> str:
        """The hub id or folder, as a str."""
        return str(self.model)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the numbers.

        For the namespaces of caches. The weights count; the folder's place and batch sizes don't,
        the device only through its dtype.
        """
        return self._core.fingerprint

    def close(self) -> None:
        """Let go of the model; the weights are freed when nobody else holds them."""
        self._core.close()

    def model_copy(
        self,
        *,
        update: Mapping[str, Any] | None = None,
        deep: bool = False,  # noqa: ARG002 -- pydantic's signature
    ) -> Self:
        """Make another adapter of the same configuration, with `update` applied and checked.

        Args:
            update: Arguments to give anew, as to the constructor.
            deep: Of no effect: a configuration shares nothing that could be changed.

        Raises:
            ArgumentError: A value that can't be served.
        """
        changed = dict(update or {})
        if "model_name" in changed:
            changed["model"] = changed.pop("model_name")
        return type(self)(**{**self.model_dump(exclude_unset=True), **changed})

    def __copy__(self) -> Self:
        """Make another adapter of the same configuration."""
        return self.model_copy()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Make another adapter of the same configuration."""
        return self.model_copy()

    @classmethod
    def _normalize_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Rewrite what was given in another library's words, or refuse it in a sentence."""
        if "model" in arguments and "model_name" in arguments:
            msg = "model and model_name are one argument with two names: pass one of them."
            raise ArgumentError(msg)
        return arguments

    @abstractmethod
    def _make_core(self) -> DenseEmbedder | M3Embedder | Scorer:
        """Make the model that the fields describe."""

    def _shared(self) -> dict[str, Any]:
        """Give the fields of this class as the core's keywords, save `model`."""
        names = LocalModelFields.model_fields.keys() - {"model", "token"}
        token = None if self.token is None else self.token.get_secret_value()
        return {name: getattr(self, name) for name in names} | {"token": token}


class ServedModelFields(LocalModelFields):
    """A checkpoint on this machine, or on a server that runs already."""

    endpoint: str | None = Field(default=None, frozen=True)
    """The address of a text-embeddings-inference or Infinity server that runs `model`; None for
    this machine. What says how a model is loaded and run is the server's then, and refused."""

    api_key: SecretStr | None = Field(default=None, frozen=True)
    """The server's token."""

    timeout: float | None = Field(default=None, frozen=True)
    """Seconds to wait for one answer of the server; None for 60."""

    long_passages: Literal["truncate", "window"] = Field(default="truncate", frozen=True)
    """What happens with a document that doesn't fit: `"truncate"` reads its beginning; `"window"`
    reads all of it in overlapping windows, whose vectors' mean is its vector, and the best of
    whose scores is its score. Queries are cut in any case, and a server cuts as it does."""

    def _shared(self) -> dict[str, Any]:
        key = None if self.api_key is None else self.api_key.get_secret_value()
        served = {"endpoint": self.endpoint, "api_key": key, "timeout": self.timeout}
        return super()._shared() | served | {"long_passages": self.long_passages}
