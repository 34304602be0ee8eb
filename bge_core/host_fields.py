"""The fields that every host's adapter has, as pydantic models: which model, and where it runs.

Only adapters import this module: the core itself needs no pydantic.
"""

from __future__ import annotations

import inspect
import itertools
import os
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    Self,
    Union,
    cast,
    get_args,
    get_origin,
)

from annotated_types import Ge
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticKnownError

from bge_core.arguments import name_hint, shown
from bge_core.backends.table import BackendName
from bge_core.checkpoints.catalog import registered_profiles, restore_profiles
from bge_core.checkpoints.source import check_name
from bge_core.embedder import Embedder
from bge_core.errors import ArgumentError, InputTypeError
from bge_core.factory import make_reranker
from bge_core.lifecycle import ContextManaged
from bge_core.m3 import M3Embedder, M3Reranker, M3Weights
from bge_core.prompts import QueryExample
from bge_core.reranker import Scorer

__all__ = [
    "Count",
    "Examples",
    "LocalModelFields",
    "ModelName",
    "Number",
    "PromptFields",
    "RankingFields",
    "RerankerFields",
    "ResolvedSettings",
    "ServedModelFields",
    "Weights",
    "WholeNumber",
    "earlier_score_key",
    "with_profiles",
    "without_profiles",
]


_PROFILES = "registered_profiles"


def _plain(value: object) -> object:
    """Return the name of a torch dtype or device; torch itself is not imported."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if type(value).__module__.partition(".")[0] == "torch":
        return str(value).removeprefix("torch.")
    return value


def _absolute(value: object) -> object:
    # A relative path could be read as a hub id.
    return os.path.abspath(value) if isinstance(value, os.PathLike) else value  # noqa: PTH100


def _path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _whole(value: object) -> int:
    # numpy's integers are whole numbers, and a bool is none.
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise PydanticKnownError("int_type")  # noqa: EM101 -- pydantic has the sentence
    return int(value)


def _real(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise PydanticKnownError("float_type")  # noqa: EM101
    try:
        return float(value)
    except OverflowError:
        raise PydanticKnownError("finite_number") from None  # noqa: EM101


# What type checkers let through is what the constructor takes; what a field then holds is narrower.
if TYPE_CHECKING:
    import torch

    from bge_core.engine.model import HasModel
    from bge_core.engine.stats import ModelStats

    Count = int
    Device = str | torch.device | list[str]
    DType = str | torch.dtype
    Folder = str | os.PathLike[str]
    ModelName = str | os.PathLike[str]
    Number = float
    Secret = str | SecretStr
    Examples = Iterable[QueryExample | Mapping[str, str]]
    Weights = M3Weights | Mapping[str, float]
    WholeNumber = int
else:
    # The bound inside: behind the validator, no schema shows it.
    Count = Annotated[int, Ge(1), BeforeValidator(_whole)]
    Device = Annotated[str | list[str], BeforeValidator(_plain)]
    DType = Annotated[str, BeforeValidator(_plain)]
    Folder = Annotated[str, BeforeValidator(_path)]
    ModelName = Annotated[str, BeforeValidator(_absolute)]
    Number = Annotated[float, BeforeValidator(_real)]
    Secret = SecretStr
    Examples = tuple[QueryExample, ...]
    Weights = M3Weights
    WholeNumber = Annotated[int, BeforeValidator(_whole)]


class LocalModelFields(BaseModel, ContextManaged):
    """A checkpoint on this machine, as fields; each adapter adds what is its own.

    The model behind the fields is made at construction, which checks them and loads no weights.
    The fields that it is made of are frozen, so that an adapter never claims what its model
    doesn't do. Copies and pickles carry the fields only; equal fields are equal adapters.
    """

    model_config = ConfigDict(
        extra="forbid",
        # What stands under a field is its description for schemas and editors.
        use_attribute_docstrings=True,
        # `model_name` is the hosts' own word.
        protected_namespaces=(),
        validate_assignment=True,
        # A wrong argument's message must not show the token beside it.
        hide_input_in_errors=True,
    )

    device: Device | None = Field(default=None, frozen=True)
    """`"cuda"`, `"cuda:1"`, `"mps"`, `"cpu"`, or a list of them; None for the best one."""

    dtype: DType = Field(default="auto", frozen=True)
    """`"auto"` (on cuda float16, of decoders bfloat16; else float32), `"float32"`, `"float16"`,
    `"bfloat16"`, or on a CPU `"int8"`: faster, and the vectors are a little less exact."""

    use_fp16: bool | None = Field(default=None, frozen=True, strict=True)
    """FlagEmbedding's word for float16 (True) or float32 (False); None leaves it to `dtype`."""

    max_length: WholeNumber | None = Field(default=None, frozen=True)
    """Tokens that are read of a text, special ones included; None for the checkpoint's limit."""

    batch_tokens: WholeNumber | None = Field(default=None, frozen=True)
    """Tokens computed in one pass; None for the device's default."""

    on_truncation: Literal["ignore", "warn", "error"] = Field(default="warn", frozen=True)
    """What happens when a text is longer: `"warn"` logs one line a call, `"error"` refuses."""

    backend: BackendName = Field(default="torch", frozen=True)
    """What executes the model: `"openvino"` is faster for single queries on a CPU (extra
    `[openvino]`); `"auto"` uses it for an embedder's queries, where it is installed, and torch for
    all else."""

    cache_folder: Folder | None = Field(default=None, frozen=True)
    """The hub's cache; None for the usual one."""

    revision: str | None = Field(default=None, frozen=True)
    """Branch, tag or commit on the hub."""

    local_files_only: bool = Field(default=False, frozen=True, strict=True)
    """Never go to the network."""

    trust_remote_code: bool = Field(default=False, frozen=True, strict=True)
    """Run Python code that the checkpoint carries; off for good reason."""

    token: Secret | None = Field(default=None, frozen=True, exclude=True, repr=False)
    """A hub token for private models; never shown, and never part of a dump."""

    _made: Any = PrivateAttr(default=None)
    _model_field: ClassVar[str] = "model"
    _renamed_arguments: ClassVar[Mapping[str, str]] = {}
    # Whether the class that this one replaces takes its model first, without a name.
    _takes_bare_model: ClassVar[bool] = False
    # Of no say in what an adapter is: written as other fields, or a service of the host.
    _not_compared: ClassVar[frozenset[str]] = frozenset()

    if TYPE_CHECKING:
        _core: Any = PrivateAttr()
    else:  # type checkers know the arguments from the fields

        def __init__(self, *given: Any, **arguments: Any) -> None:
            # What pydantic's validators raise it wraps in a report of several lines. What is
            # raised around it reaches the user as it is: one sentence, and a BGEError.
            owner = type(self)
            if given[int(owner._takes_bare_model) :]:
                raise positional_error(
                    owner.__name__, given, first=owner._model_field, bare=owner._takes_bare_model
                )
            known = {*owner.model_fields, "model", "model_name"}
            arguments = check_argument_names(
                owner.__name__, arguments, known=known, renamed=owner._renamed_arguments
            )
            arguments = owner._normalize_arguments(owner._with_one_model(arguments, *given))
            try:
                super().__init__(**arguments)
            except ValidationError as exc:
                raise validation_error(owner.__name__, exc.errors(include_url=False)) from None
            self._core  # noqa: B018 - making the model is the check

        def __setattr__(self, name: str, value: Any) -> None:
            """Set a field, unless the model behind it was made with the old value."""
            owner = type(self)
            field = owner.model_fields.get(name)
            if field is not None and field.frozen:
                raise frozen_field_error(owner.__name__, name)
            try:
                super().__setattr__(name, value)
            except ValidationError as exc:
                raise validation_error(owner.__name__, exc.errors(include_url=False)) from None

        @property
        def _core(self) -> Any:
            """The model that the fields describe, made once."""
            if self._made is None:
                self._made = self._make_core()
            return self._made

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Describe the constructor for `help()`: a short signature, a sentence an argument."""
        super().__pydantic_init_subclass__(**options)
        if cls._model_field in cls.model_fields:
            if cls.__init__ is LocalModelFields.__init__:  # a subclass's own has its own arguments
                cls.__signature__ = _signature(cls)
            own = inspect.cleandoc(cls.__dict__.get("__doc__") or cls.__name__)
            text, raises, rest = own.partition("Raises:\n")
            cls.__doc__ = f"{text.rstrip()}\n\n{_arguments_section(cls)}\n\n{raises}{rest}"

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the numbers.

        For the namespaces of caches. The weights count; the folder's place and batch sizes don't,
        the device only through its dtype.
        """
        return str(self._core.fingerprint)

    @property
    def resolved(self) -> ResolvedSettings:
        """What is in effect, where a field says None or `"auto"`.

        Of a hub id that has to be looked at first, it is downloaded.

        Raises:
            CheckpointError: The model can't be found.
        """
        return resolved_settings(self._core)

    def stats(self) -> ModelStats:
        """Return what this object has done so far, and what waits for its model right now.

        Requests, texts, tokens, forward passes, the queue, the seconds of each stage. Reading it
        loads nothing; after `close` it says what was done until then.
        """
        counted: ModelStats = self._core.stats()
        return counted

    def close(self) -> None:
        """Release the model; the weights are freed when nobody else holds them."""
        self._core.close()

    def model_copy(
        self,
        *,
        update: Mapping[str, Any] | None = None,
        deep: bool = False,  # noqa: ARG002 -- pydantic's signature
    ) -> Self:
        """Make another adapter of the same fields, with `update` applied and checked.

        Args:
            update: Arguments to give anew, as to the constructor.
            deep: Of no effect: fields are plain values or services that are shared, and so are
                weights.

        Raises:
            ArgumentError: A value that is not supported.
            InputTypeError: `update` is no mapping.
        """
        if update is not None and not isinstance(update, Mapping):
            msg = f"update must be a mapping of arguments, got {type(update).__name__}."
            raise InputTypeError(msg)
        changed = self._with_one_model({str(name): value for name, value in (update or {}).items()})
        return type(self)(**{**self._copied_fields(), **changed})

    def __copy__(self) -> Self:
        """Make another adapter of the same fields."""
        return self.model_copy()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Make another adapter of the same fields."""
        return self.model_copy()

    def __eq__(self, other: object) -> bool:
        """Return whether both are of one class and one configuration."""
        if not isinstance(other, LocalModelFields) or type(other) is not type(self):
            return NotImplemented
        return self._compared() == other._compared()

    def __hash__(self) -> int:
        """Hash what can't be changed, so that the hash stays while the object lives."""
        frozen = (
            (name, value) for name, value in self._compared().items() if self._is_frozen(name)
        )
        return hash((type(self), *((name, repr(value)) for name, value in frozen)))

    def __getstate__(self) -> dict[Any, Any]:
        """Return the fields: never the model, which is made anew at first use."""
        return with_profiles({**super().__getstate__(), "__pydantic_private__": {"_made": None}})

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Restore fields; the model is made at first use."""
        super().__setstate__(without_profiles(state))

    @classmethod
    def _with_one_model(cls, arguments: Mapping[str, Any], *bare: Any) -> dict[str, Any]:
        """Put the model under the field's name: `model` and `model_name` are one argument."""
        here = cls._model_field
        other = "model_name" if here == "model" else "model"
        if here in arguments and other in arguments:
            msg = "model and model_name are one argument with two names: pass one of them."
            raise ArgumentError(msg)
        if bare and (here in arguments or other in arguments):
            msg = f"The model was given twice, without a name and as {here}=: pass one of them."
            raise ArgumentError(msg)
        named = {here if name == other else name: value for name, value in arguments.items()}
        return {here: bare[0], **named} if bare else named

    @classmethod
    def _normalize_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Rewrite what was given in other words than the fields', or refuse it in a sentence."""
        made: dict[str, Callable[[Any], Any]] = {
            cls._model_field: check_name,
            "examples": QueryExample.all_of,
            "m3_weights": M3Weights.of,
        }
        return {
            name: made[name](value) if name in made and value is not None else value
            for name, value in arguments.items()
        }

    def _make_core(self) -> Any:
        """Make the model that the fields describe."""
        # Not abstract: of what is, LlamaIndex makes a span in its users' traces.
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        """Return the fields of this class as the core's keywords."""
        return {name: _secret_value(getattr(self, name)) for name in LocalModelFields.model_fields}

    def _copied_fields(self) -> dict[str, Any]:
        """Return what a copy is made of."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def _compared(self) -> dict[str, Any]:
        """Return what makes two adapters equal."""
        names = (name for name in type(self).model_fields if name not in self._not_compared)
        return {name: getattr(self, name) for name in names}

    def _is_frozen(self, name: str) -> bool:
        return bool(type(self).model_fields[name].frozen)


class ServedModelFields(LocalModelFields):
    """A checkpoint on this machine, or on a server that runs already."""

    endpoint: str | None = Field(default=None, frozen=True)
    """The address of a text-embeddings-inference or Infinity server that runs the model; None for
    this machine. What says how a model is loaded and run is the server's then, and refused."""

    api_key: Secret | None = Field(default=None, frozen=True, exclude=True, repr=False)
    """The server's token; never shown, and never part of a dump."""

    timeout: Number | None = Field(default=None, frozen=True)
    """Seconds to wait for one answer of the server; None for 60."""

    served_model_name: str | None = Field(default=None, frozen=True)
    """The server's name of the model, where it is another than the model's."""

    endpoint_batch_size: WholeNumber | None = Field(default=None, frozen=True)
    """Texts that one request to the server carries, at most; None for 32. A smaller limit of the
    server's is learnt from its first refusal."""

    long_passages: Literal["truncate", "window"] = Field(default="truncate", frozen=True)
    """What happens with a document that doesn't fit: `"truncate"` reads its beginning; `"window"`
    reads all of it in overlapping windows, whose vectors' mean is its vector, and the best of
    whose scores is its score. Queries are cut in any case, and a server cuts as it does."""

    def _options(self) -> dict[str, Any]:
        return {name: _secret_value(getattr(self, name)) for name in ServedModelFields.model_fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSettings:
    """What a model does, as `adapter.resolved` gives it.

    Attributes:
        query_instruction: What is put in front of queries, of a decoder its task; `""` for
            nothing, None for a reranker.
        document_instruction: What is put in front of documents; `""` for nothing, None for a
            reranker.
        max_length: Tokens that are read; None where a server doesn't say.
        device: The devices that compute; none for a server's.
        dtype: The number format; `"unknown"` of a server.
        pooling: Which rows make the vector; None for a reranker, and where a server decides.
        dimension: Length of a dense vector; None for a reranker.
        backend: `"torch"`, `"openvino"`, or `"auto"` for whichever is installed; `"server"`.
    """

    query_instruction: str | None
    document_instruction: str | None
    max_length: int | None
    device: tuple[str, ...]
    dtype: str
    pooling: str | None
    dimension: int | None
    backend: str


def resolved_settings(core: Embedder | M3Embedder | Scorer) -> ResolvedSettings:
    """Return what is in effect for a model."""
    query = document = pooling = dimension = None
    owner = cast("HasModel", core._embedder if isinstance(core, M3Reranker) else core)
    local = owner.local if owner.is_local else None
    if isinstance(core, (Embedder, M3Embedder)):
        query = document = ""
        dimension, pooling = core.dimension, local.pooling if local else None
    if isinstance(core, Embedder):
        template = core._template
        query, document = template.instruction or "", template.document_prefix
    try:
        max_length = owner.max_length
    except ArgumentError:
        max_length = None  # a server's, of a model without a row
    return ResolvedSettings(
        query_instruction=query,
        document_instruction=document,
        max_length=max_length,
        device=tuple(local.placed()[0]) if local else (),
        dtype=owner.dtype,
        pooling=pooling,
        dimension=dimension,
        backend=local.backend if local else "server",
    )


class PromptFields(LocalModelFields):
    """What goes in front of an embedder's texts, and how long its vectors are."""

    query_instruction: str | None = Field(default=None, frozen=True)
    """Put in front of queries; None for the one that the model card gives, `""` for none. Of a
    decoder it is the task alone, which goes into the template that the model was trained with."""

    document_instruction: str | None = Field(default=None, frozen=True)
    """Put in front of documents, for models that were trained with one (E5: `"passage: "`); None
    for the checkpoint's own prompt, which BGE's have none of."""

    task_description: str | None = Field(default=None, frozen=True)
    """A decoder's word for `query_instruction`: what its queries are and what is to be found for
    them, in a sentence."""

    examples: Examples | None = Field(default=None, frozen=True)
    """Queries and their answers that bge-en-icl sees in front of each query: `QueryExample`, or
    dicts of `query`, `response` and, where it is another, `instruct`."""

    task: str | None = Field(default=None, frozen=True)
    """llm-embedder's task (`"qa"`, `"icl"`, `"chat"`, `"lrlm"`, `"tool"`, `"convsearch"`)."""

    truncate_dim: WholeNumber | None = Field(default=None, frozen=True)
    """How many of a vector's numbers are kept, the first ones, before it is normalised: of models
    that were trained for it (Matryoshka); None for what the checkpoint says, mostly all."""

    def _options(self) -> dict[str, Any]:
        own = (
            *("query_instruction", "document_instruction", "task_description", "examples"),
            *("task", "truncate_dim"),
        )
        return super()._options() | {name: getattr(self, name) for name in own}


class RerankerFields(LocalModelFields):
    """What scores pairs: the scale, the priority, and how many layers are computed."""

    priority: Literal["interactive", "background"] = "interactive"
    """`"background"` inside a job, such as an index build: its work comes after what somebody waits
    for."""

    normalize: bool = Field(default=True, frozen=True, strict=True)
    """Scores from 0 to 1, the sigmoid of the logit, each for itself; False for raw logits. Of no
    effect with bge-m3, whose scores are about 0 to 1 in any case."""

    cutoff_layers: WholeNumber | list[WholeNumber] | None = Field(default=None, frozen=True)
    """The layer after which the score is read, of bge-reranker-v2-minicpm-layerwise (8 to 40) and
    bge-reranker-v2.5-gemma2-lightweight (8 to 42); None for the last. Those above it cost nothing.
    """

    compress_layers: WholeNumber | list[WholeNumber] | None = Field(default=None, frozen=True)
    """Layers before which bge-reranker-v2.5-gemma2-lightweight shortens the passage, such as
    `[24, 40]`; None for `[8]`."""

    compress_ratio: WholeNumber = Field(default=1, frozen=True)
    """How many neighbouring tokens of the passage become one there: 1 (off), 2, 4 or 8."""

    def _options(self) -> dict[str, Any]:
        own = ("cutoff_layers", "compress_layers", "compress_ratio")
        return super()._options() | {name: getattr(self, name) for name in own}


class RankingFields(RerankerFields):
    """What ranks passages, and keeps the best."""

    top_n: Count | None = Field(default=None)
    """How many to keep, 1 or more; None for all."""

    score_threshold: Number | None = Field(default=None, allow_inf_nan=False)
    """The least score to keep, itself included; None for any."""

    m3_weights: Weights | None = Field(default=None, frozen=True)
    """How much the scores of bge-m3 count, `M3Weights(dense=1.0, sparse=0.3, multi_vector=1.0)`
    or a dict of these names; None for just these, and for a reranker."""

    _factory: ClassVar[Callable[..., Scorer]] = staticmethod(make_reranker)
    if TYPE_CHECKING:
        _core: Scorer = PrivateAttr()

    def _make_core(self) -> Scorer:
        core = self._factory(
            getattr(self, self._model_field),
            m3_weights=self.m3_weights,
            normalize=self.normalize,
            **self._options(),
        )
        core.check_limits(top_n=self.top_n, score_threshold=self.score_threshold)
        return core


def with_profiles(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Add the registered rows to a pickle's state: without them a model is another elsewhere."""
    return {**state, _PROFILES: registered_profiles()}


def without_profiles(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Register a state's rows, and return the rest of it; a row in doubt is a warning."""
    restore_profiles(state.get(_PROFILES, ()))
    return {name: value for name, value in state.items() if name != _PROFILES}


def earlier_score_key(metadata: Mapping[str, Any]) -> str:
    """Return the key for the score that an earlier reranker gave: the first that is free."""
    names = (f"relevance_score_{stage}" for stage in itertools.count(1))
    return next(name for name in names if name not in metadata)


def _secret_value(value: Any) -> Any:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _signature(owner: type[LocalModelFields]) -> inspect.Signature:
    """Return the constructor's arguments, with types in plain words, as `help()` shows them."""
    bare = owner._model_field if owner._takes_bare_model else None
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD
                if name == bare
                else inspect.Parameter.KEYWORD_ONLY,
                default=_default_text(field),
                annotation=_Text(_type_text(field.annotation)),
            )
            for name, field in _ordered(owner)
        ]
    )


def _ordered(owner: type[LocalModelFields]) -> list[tuple[str, FieldInfo]]:
    """Return the fields in a reader's order: the model, the class's own, the shared ones."""
    shared = ServedModelFields.model_fields
    return sorted(
        owner.model_fields.items(),
        key=lambda item: (item[0] != owner._model_field, item[0] in shared),
    )


def _default_text(field: FieldInfo) -> Any:
    if field.is_required():
        return inspect.Parameter.empty
    return _Text("...") if field.default_factory else field.default


class _Text(str):
    """What a signature shows without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


_PLAIN_NAMES = {NoneType: "None", Ellipsis: "...", SecretStr: "str | SecretStr"}


def _type_text(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(parts[0])
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_text, parts))
    if annotation in _PLAIN_NAMES:
        return _PLAIN_NAMES[annotation]
    name = getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(_type_text, parts))}]" if parts else name


def _arguments_section(owner: type[LocalModelFields]) -> str:
    lines = ["Args:"]
    for name, field in _ordered(owner):
        sentence = field.description or "As in all of the host's classes."
        said = f"{name}: {' '.join(sentence.split())}"
        lines.append(textwrap.fill(said, 96, initial_indent=" " * 4, subsequent_indent=" " * 8))
    return "\n".join(lines)


# A wrong value of these is not shown: it may be a secret, or hold one.
_SECRET = ("api_key", "encode_kwargs", "endpoint", "model_kwargs", "token")


def check_argument_names(
    owner: str, arguments: Mapping[str, Any], *, known: Collection[str], renamed: Mapping[str, str]
) -> dict[str, Any]:
    """Return the arguments that a class has; another class's defaults, spelt out, are ignored.

    Args:
        owner: The class's name.
        arguments: What was given.
        known: The arguments that it has.
        renamed: Other libraries' arguments -> what to write here.

    Raises:
        ArgumentError: One is unknown; says what to write instead.
    """
    for name, value in arguments.items():
        if name in known or (name in renamed and not value):
            continue
        hint = f"{renamed[name]}." if name in renamed else name_hint(name, known)
        msg = f"{owner} has no argument {name!r}: {hint}"
        raise ArgumentError(msg)
    return {name: value for name, value in arguments.items() if name in known}


def positional_error(
    owner: str, given: Sequence[object], *, first: str, bare: bool
) -> InputTypeError:
    """Return the error about what was given without a name.

    Args:
        owner: The class's name.
        given: What was given.
        first: The argument that was most likely meant by the first.
        bare: Whether that one needs no name.
    """
    return InputTypeError(
        f"{owner} takes keywords only{', but for its model' if bare else ''}: write "
        f"{owner}({first}={shown(given[0])}, ...)."
    )


def validation_error(owner: str, report: Iterable[Mapping[str, Any]]) -> ArgumentError:
    """Return an error that says on one line what pydantic says on several.

    Args:
        owner: The class's name.
        report: `ValidationError.errors()`.
    """
    said = []
    for item in report:
        name = ".".join(dict.fromkeys(str(part) for part in item["loc"][:1]))
        if item["type"] == "missing":
            # A subclass's own field is no model.
            model = (
                f"{_published(owner)!r} or another" if name in ("model", "model_name") else "..."
            )
            said.append(f"{name} is missing: pass {name}={model}")
            continue
        hidden = name in _SECRET or item["type"] == "no_such_attribute"
        given = "" if hidden else f", got {shown(item['input'])}"
        said.append(f"{name}: {item['msg'][:1].lower()}{item['msg'][1:]}{given}")
    return ArgumentError(f"{owner} can't take these arguments: {'; '.join(dict.fromkeys(said))}.")


def _published(owner: str) -> str:
    """Return a published checkpoint that a class of this name takes, for a message."""
    if "Sparse" in owner:
        return "BAAI/bge-m3"
    if "Rerank" in owner or "CrossEncoder" in owner:
        return "BAAI/bge-reranker-base"
    return "BAAI/bge-small-en-v1.5"


def frozen_field_error(owner: str, name: str) -> ArgumentError:
    """Return the error that says that an argument can't be changed afterwards."""
    return ArgumentError(
        f"{name} of a {owner} can't be changed, since its model was made with it: make another "
        f"with model_copy(update={{{name!r}: ...}}), which shares the weights where it can."
    )
