"""The options of every model, here and on a server, each said once, and the signatures they make.

A new option of a model on this machine is a field of `ModelOptions`, its line in `ModelArguments`,
and its use; one of a server is the same in `ServerOptions` and `ServerArguments`.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Required, TypedDict, TypeVar, cast

from bge_core import arguments
from bge_core.checkpoints.source import Source
from bge_core.devices import Placement
from bge_core.errors import ArgumentError

if TYPE_CHECKING:
    import torch

    from bge_core.prompts import QueryExample

__all__ = [
    "EmbedderArguments",
    "ModelArguments",
    "ModelOptions",
    "RemoteArguments",
    "RerankerArguments",
    "ServerArguments",
    "ServerOptions",
    "given_options",
    "with_options_of",
]

Function = TypeVar("Function", bound=Callable[..., Any])


class ModelArguments(TypedDict, total=False):
    """`ModelOptions` as keywords, for signatures; all of them may be left out."""

    device: str | torch.device | Sequence[str] | None
    dtype: str | torch.dtype
    use_fp16: bool | None
    max_length: int | None
    batch_tokens: int | None
    on_truncation: str
    backend: str
    cache_folder: str | os.PathLike[str] | None
    revision: str | None
    local_files_only: bool
    trust_remote_code: bool
    token: str | None


class ServerArguments(TypedDict, total=False):
    """`ServerOptions` as keywords, but for `max_length`, which a model on this machine has, too."""

    api_key: str | None
    timeout: float | None
    served_model_name: str | None
    endpoint_batch_size: int | None


class RemoteArguments(ServerArguments, total=False):
    """`ServerArguments` with the server's address, which a served model can't be without."""

    endpoint: Required[str]


class EmbedderArguments(ModelArguments, ServerArguments, total=False):
    """The keywords of `Embedder` and `RemoteEmbedder`."""

    query_instruction: str | None
    document_instruction: str | None
    task_description: str | None
    examples: Iterable[QueryExample | Mapping[str, str]] | None
    task: str | None
    pooling: str | None
    normalize: bool
    truncate_dim: int | None
    long_passages: str


class RerankerArguments(ModelArguments, ServerArguments, total=False):
    """The keywords of `Reranker` and `RemoteReranker`."""

    normalize: bool
    long_passages: str
    cutoff_layers: int | Sequence[int] | None
    compress_layers: int | Sequence[int] | None
    compress_ratio: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Where a model comes from, where it runs, and how much it reads.

    Checked when it is made, without torch; nothing is looked up or loaded.

    Attributes:
        model: A hub id (`"BAAI/bge-small-en-v1.5"`) or a folder.
        device: `"cuda"`, `"cuda:1"`, `"mps"`, `"cpu"`, or several of them; None for the best.
        dtype: `"auto"` (on cuda float16, of decoders bfloat16; else float32), `"float32"`,
            `"float16"`, `"bfloat16"`, or on a CPU `"int8"`, which is faster and a little less
            exact. What comes out is float32 always.
        use_fp16: FlagEmbedding's word for float16 (True) or float32 (False).
        max_length: Tokens that are read of a text or pair, special ones included; None for the
            checkpoint's own limit.
        batch_tokens: Tokens computed in one pass; None for the device's default.
        on_truncation: What happens when a text is longer: `"warn"` logs one line a call,
            `"error"` refuses, `"ignore"` is silent.
        backend: What executes the model: `"torch"`; `"openvino"`, on a CPU, with the extra
            `[openvino]`; or `"auto"`: OpenVINO for an embedder's queries where it is installed
            and runs the model, torch for the rest. Checked where the model is made.
        cache_folder: The hub's cache; None for the usual one.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never go to the network.
        trust_remote_code: Run Python code that the checkpoint carries; off for good reason.
        token: A hub token for private models, kept out of every message.
        source: The model's name and how it is fetched, as checked.
        placement: The devices and the dtype, as checked.

    Raises:
        ArgumentError: A value that is not supported.
        CheckpointError: The model is no folder and can't be a hub id.
        InputTypeError: A value of the wrong type.
    """

    model: str | os.PathLike[str]
    device: str | torch.device | Sequence[str] | None = None
    dtype: str | torch.dtype = "auto"
    use_fp16: bool | None = None
    max_length: int | None = None
    batch_tokens: int | None = None
    on_truncation: str = "warn"
    backend: str = "torch"
    cache_folder: str | os.PathLike[str] | None = None
    revision: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    token: str | None = field(default=None, repr=False)
    source: Source = field(init=False, repr=False)
    placement: Placement = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check every value, and give each the form that the rest of the code takes."""
        source = Source.of(
            self.model,
            revision=self.revision,
            cache_folder=self.cache_folder,
            local_files_only=self.local_files_only,
            trust_remote_code=self.trust_remote_code,
            token=self.token,
        )
        placement = Placement.of(device=self.device, dtype=self.dtype, use_fp16=self.use_fp16)
        checked = {
            "source": source,
            "placement": placement,
            # A torch.dtype or torch.device is its name from here on.
            "device": placement.devices,
            "dtype": placement.dtype,
            "model": source.model,
            "token": source.token,
            "max_length": _whole("max_length", self.max_length),
            "batch_tokens": _whole("batch_tokens", self.batch_tokens),
            "on_truncation": arguments.one_of(
                "on_truncation", self.on_truncation, arguments.ON_TRUNCATION
            ),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Which server runs a model, and how it is asked.

    Checked when it is made; the server is not asked, and its address is checked where it is used.

    Attributes:
        model: The published id of the model that is served, or a folder on this machine with the
            same model. A name that only the server knows (`"bge-small-en-v1.5"`,
            `"bge-m3:latest"`) is sent as it is, and what is published under it tells the rest.
        endpoint: The server's address (`"http://localhost:8080"`), which `/embeddings` or `/rerank`
            follows.
        api_key: A bearer token; None for a server without one.
        timeout: Seconds to wait for one answer; None for 60. Waiting for a turn doesn't count.
        served_model_name: The server's name of the model, where it is another than `model`.
        endpoint_batch_size: Texts or passages that one request carries, at most; None for 32. A
            smaller limit of the server's is learnt from its first refusal.
        max_length: Tokens that the server reads of a text or pair, for `long_passages="window"`;
            None for the model's limit.

    Raises:
        ArgumentError: A value that is not supported.
        InputTypeError: A value of the wrong type.
    """

    model: str | os.PathLike[str]
    endpoint: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float | None = None
    served_model_name: str | None = None
    endpoint_batch_size: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Check every value but the address, and give each its plain type."""
        name = self.served_model_name
        if name is not None and not arguments.text("served_model_name", name).strip():
            msg = (
                "served_model_name is empty: pass the name that the server knows, or leave it out."
            )
            raise ArgumentError(msg)
        size = _whole("endpoint_batch_size", self.endpoint_batch_size, " of texts")
        object.__setattr__(self, "endpoint_batch_size", size)
        object.__setattr__(self, "max_length", _whole("max_length", self.max_length))


def given_options(options: Mapping[str, object], *, of: Callable[..., object]) -> list[str]:
    """Return the names of the options that are not at their defaults, sorted.

    Args:
        options: Keywords that somebody gave.
        of: The class whose keywords they are; a name that it lacks counts as given.
    """
    known = inspect.signature(of).parameters
    return sorted(
        name
        for name, value in options.items()
        if name not in known or not _is_default(value, known[name].default)
    )


def _is_default(value: object, default: object) -> bool:
    # Not by == alone, which an array answers number by number.
    return value is default or (isinstance(value, type(default)) and bool(value == default))


def with_options_of(*sources: Callable[..., object]) -> Callable[[Function], Function]:
    """Spell the `**options` of a signature out, by the keyword-only arguments of others.

    `help()` shows them, and what is none of them is refused under the name of the class or the
    function that was called. Type checkers and editors read the same names from `Unpack[...]`.

    Args:
        sources: Classes or functions whose keyword-only arguments they are.
    """

    def spell_out(function: Function) -> Function:
        signature = inspect.signature(function)
        kept = {
            name: parameter
            for name, parameter in signature.parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }
        for source in sources:
            for name, parameter in inspect.signature(source).parameters.items():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                    kept.setdefault(name, parameter)
        required_first = sorted(
            kept.values(), key=lambda one: (one.kind, one.default is not one.empty)
        )
        signature = signature.replace(parameters=required_first)

        @functools.wraps(function)
        def checked(*given: Any, **options: Any) -> Any:
            called = type(given[0]) if given and function.__name__ == "__init__" else function
            for name in (name for name in options if name not in kept):
                hint = arguments.name_hint(name, kept.keys() - {"self"})
                msg = f"{called.__name__}() got an unexpected keyword argument {name!r}: {hint}"
                raise TypeError(msg)
            try:
                signature.bind(*given, **options)
            except TypeError as exc:
                verb = "" if str(exc).startswith("missing") else "got "
                msg = f"{called.__name__}() {verb}{exc}."
                raise TypeError(msg) from None
            return function(*given, **options)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        return cast("Function", checked)

    return spell_out


def _whole(name: str, value: object, unit: str = " of tokens") -> int | None:
    if value is None:
        return None
    return arguments.whole_number(name, value, unit=unit, instead=" or None")
