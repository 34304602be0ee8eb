"""What each known checkpoint needs: a table of rows, and how a name finds its row.

The facts come from the checkpoints' model cards and from FlagEmbedding's own sources. A newly
published checkpoint is a new row here; a user adds rows with `register`.
"""

from __future__ import annotations

import logging
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, Literal, get_args

from bge_core import arguments
from bge_core.arguments import shown
from bge_core.errors import ArgumentError, InputTypeError

__all__ = [
    "PROFILES",
    "LayerHeads",
    "Output",
    "PairPrompt",
    "Profile",
    "SupportedModel",
    "TaskInstruction",
    "find_profile",
    "is_hub_id",
    "is_published",
    "register",
    "registered_profiles",
    "restore_profiles",
    "supported_models",
]

logger = logging.getLogger(__name__)

Kind = Literal["embedder", "reranker"]
Pooling = Literal["cls", "mean", "last"]
Output = Literal["dense", "sparse", "multi_vector"]
HalfDtype = Literal["float16", "bfloat16"]

_EN = "Represent this sentence for searching relevant passages: "
_ZH = "为这个句子生成表示以用于检索相关文章："
_WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query."
_PLAIN = "{instruction}{query}"
_ANSWERS = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the "
    "query by providing a prediction of either 'Yes' or 'No'."
)
_PREDICT = "Predict whether passage B contains an answer to query A."
_GEMMA_NOTE = "Gemma Terms of Use: read them before commercial use."
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True, slots=True)
class TaskInstruction:
    """The two instructions that llm-embedder wants for one task.

    Attributes:
        query: Put in front of a query.
        document: Put in front of a document.
    """

    query: str
    document: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairPrompt:
    """How a language model is asked to score a pair: its parts, in order, and the answer.

    Attributes:
        query: Put in front of the query.
        passage: Put in front of the passage.
        separator: Put between query and passage, and between passage and question.
        question: Asked after the pair, whatever was cut of it.
        answer: The score is the logit of the first token of this word; None for a model whose
            heads give the score.
    """

    query: str = "A: "
    passage: str = "B: "
    separator: str = "\n"
    question: str = _ANSWERS
    answer: str | None = "Yes"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerHeads:
    """After which of its layers a reranker has a score.

    Attributes:
        first: The first of them, counted from 1.
        last: All of the layers.
        step: How many layers there are from one to the next.
        compresses: Whether it was trained to shorten passages on the way.
    """

    first: int
    last: int
    step: int = 1
    compresses: bool = False

    @property
    def cutoffs(self) -> range:
        """The layers after which there is a score."""
        return range(self.first, self.last + 1, self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a checkpoint needs and its own files don't say, under the checkpoint's name.

    Attributes:
        id: Its id on the model hub, or the name of its folder.
        kind: `"embedder"` or `"reranker"`.
        family: The architecture's `model_type`, as config.json says it.
        max_length: Tokens that the model can take, special ones included.
        languages: ISO codes, or `"multilingual"`.
        dimension: Length of a dense vector; None for a reranker, and where nothing says it.
        pooling: Which rows of the last layer make the vector, where the checkpoint has no
            modules.json; None for a reranker, and where the checkpoint always says it.
        outputs: What an embedder gives of a text: a dense vector, and of bge-m3 a weight a token
            (sparse) and a vector a token; empty for a reranker.
        query_instruction: The model card's instruction; `""` where it wants none, and None where
            it wants one that the card leaves to the user.
        query_format: How instruction and query are joined; a query without an instruction is
            left as it is.
        query_suffix: Put behind every query, with or without an instruction.
        example_format: How an example of a query and its answer is written, of the models that
            take some; each is followed by an empty line.
        half: What `dtype="auto"` means on cuda: decoders were trained in bfloat16, and Gemma 2
            overflows in float16.
        pair_prompt: How a reranker that is a language model is asked; None for a cross-encoder.
        layer_heads: After which layers a reranker has a score; None for after the last alone.
        tasks: llm-embedder's instructions by task; empty elsewhere.
        licence: The licence of the weights.
        licence_note: What a user should know before using them.
        refusal: Why this release can't serve it, as the end of a sentence; None if it can.

    Raises:
        ArgumentError: A value that no checkpoint can have.
        InputTypeError: A value of the wrong type.

    Example:
        >>> row = Profile(
        ...     id="acme/support-search",
        ...     kind="embedder",
        ...     family="bert",
        ...     max_length=512,
        ...     pooling="cls",
        ...     query_instruction="Represent this question for finding the page that answers it: ",
        ... )
        >>> row.kind, row.licence
        ('embedder', 'unknown')
    """

    id: str
    kind: Kind
    family: str
    max_length: int
    languages: tuple[str, ...] = ()
    dimension: int | None = None
    pooling: Pooling | None = None
    outputs: tuple[Output, ...] = ("dense",)
    query_instruction: str | None = ""
    query_format: str = _PLAIN
    query_suffix: str = ""
    example_format: str = ""
    half: HalfDtype = "float16"
    pair_prompt: PairPrompt | None = None
    layer_heads: LayerHeads | None = None
    tasks: Mapping[str, TaskInstruction] = field(default_factory=lambda: MappingProxyType({}))
    licence: str = "unknown"
    licence_note: str = ""
    refusal: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no checkpoint can have."""
        if not is_hub_id(arguments.text("id", self.id)):
            msg = (
                f"id={shown(self.id)} can't be registered: it must be a hub id such as "
                "'acme/my-model', or a folder's name without its path."
            )
            raise ArgumentError(msg)
        arguments.one_of("kind", self.kind, get_args(Kind))
        self._check_texts()
        length = arguments.whole_number("max_length", self.max_length)
        object.__setattr__(self, "max_length", length)
        if self.dimension is not None:
            width = arguments.whole_number("dimension", self.dimension, instead=" or None")
            object.__setattr__(self, "dimension", width)
        arguments.one_of("half", self.half, get_args(HalfDtype))
        if self.pooling is not None:
            arguments.one_of("pooling", self.pooling, get_args(Pooling), instead=", or None")
        for output in self.outputs:
            arguments.one_of("outputs", output, get_args(Output))
        self._check_parts()
        self._check_against_kind()

    def _check_texts(self) -> None:
        for name in ("query_format", "query_suffix", "example_format", "licence", "licence_note"):
            arguments.text(name, getattr(self, name))
        for name in ("query_instruction", "refusal"):
            if (value := getattr(self, name)) is not None:
                arguments.text(name, value)
        if not arguments.text("family", self.family):
            msg = "family is empty: pass the model_type that config.json has, such as 'bert'."
            raise ArgumentError(msg)
        # A str is a sequence of str, too.
        for name in ("languages", "outputs"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                msg = f"{name} must be a tuple of str, got {shown(value)}."
                raise InputTypeError(msg)
            object.__setattr__(self, name, tuple(arguments.texts(name, value)))

    def _check_parts(self) -> None:
        if not isinstance(self.tasks, Mapping) or not all(
            isinstance(name, str) and isinstance(task, TaskInstruction)
            for name, task in self.tasks.items()
        ):
            msg = f"tasks must map names to TaskInstruction, got {shown(self.tasks)}."
            raise InputTypeError(msg)
        object.__setattr__(self, "tasks", MappingProxyType(dict(self.tasks)))
        if self.pair_prompt is not None and not isinstance(self.pair_prompt, PairPrompt):
            msg = f"pair_prompt must be a PairPrompt or None, got {shown(self.pair_prompt)}."
            raise InputTypeError(msg)
        if self.layer_heads is not None and not isinstance(self.layer_heads, LayerHeads):
            msg = f"layer_heads must be a LayerHeads or None, got {shown(self.layer_heads)}."
            raise InputTypeError(msg)
        _check_format("query_format", self.query_format, {"query"}, {"instruction"})
        if self.example_format:
            _check_format(
                "example_format", self.example_format, {"query", "response"}, {"instruct"}
            )

    def _check_against_kind(self) -> None:
        if self.kind == "embedder":
            foreign = [name for name in ("pair_prompt", "layer_heads") if getattr(self, name)]
            if "dense" not in self.outputs:
                msg = f"outputs={shown(self.outputs)} has no 'dense', which every embedder gives."
                raise ArgumentError(msg)
        else:
            if self.outputs == ("dense",):  # the default
                object.__setattr__(self, "outputs", ())
            others = ("pooling", "dimension", "outputs", "query_instruction", "query_suffix")
            foreign = [name for name in (*others, "example_format", "tasks") if getattr(self, name)]
        if foreign:
            other = "a reranker" if self.kind == "embedder" else "an embedder"
            msg = (
                f"{self.id!r} is of kind={self.kind!r}, and {', '.join(foreign)} is for {other}: "
                "leave it out, or say the other kind."
            )
            raise ArgumentError(msg)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by its values: a read-only mapping has no pickle of its own."""
        values = {column.name: getattr(self, column.name) for column in fields(self)}
        return _profile_of, (values | {"tasks": dict(self.tasks)},)

    @property
    def has_task_template(self) -> bool:
        """Whether queries get a task in a template, and not an instruction as it is."""
        return self.query_format != _PLAIN


def is_hub_id(name: str) -> bool:
    """Return whether a name can be a hub id, or the bare name of one."""
    return _HUB_ID.fullmatch(name) is not None


def _profile_of(values: Mapping[str, Any]) -> Profile:
    return Profile(**values)


def _check_format(name: str, template: str, needed: set[str], allowed: set[str]) -> None:
    """Refuse a format with fields that nothing fills, or without those that it is for."""
    try:
        found = [word for _, word, _, _ in string.Formatter().parse(template) if word is not None]
    except ValueError:
        found = []
    if not needed <= set(found) <= needed | allowed or len(found) != len(set(found)):
        expected = " and ".join(f"{{{word}}}" for word in sorted(needed | allowed))
        msg = f"{name}={shown(template)} must have the fields {expected}, each once."
        raise ArgumentError(msg)


def _bert(
    name: str, language: str, dimension: int, *, instruction: str, family: str = "bert"
) -> Profile:
    return Profile(
        id=f"BAAI/{name}",
        kind="embedder",
        family=family,
        languages=(language,),
        max_length=512,
        dimension=dimension,
        pooling="cls",
        query_instruction=instruction,
        licence="mit",
    )


def _m3(
    name: str, *, outputs: tuple[Output, ...] = ("dense",), refusal: str | None = None
) -> Profile:
    return Profile(
        id=f"BAAI/{name}",
        kind="embedder",
        family="xlm-roberta",
        languages=("multilingual",),
        max_length=8192,
        dimension=1024,
        pooling="cls",
        outputs=outputs,
        licence="mit",
        refusal=refusal,
    )


def _decoder(
    name: str,
    family: str,
    *,
    languages: tuple[str, ...],
    dimension: int,
    max_length: int,
    instruction: str | None,
    query_format: str = "<instruct>{instruction}\n<query>{query}",
    query_suffix: str = "",
    example_format: str = "",
    licence: str = "apache-2.0",
    licence_note: str = "",
) -> Profile:
    return Profile(
        id=f"BAAI/{name}",
        kind="embedder",
        family=family,
        languages=languages,
        max_length=max_length,
        dimension=dimension,
        pooling="last",
        query_instruction=instruction,
        query_format=query_format,
        query_suffix=query_suffix,
        example_format=example_format,
        half="bfloat16",
        licence=licence,
        licence_note=licence_note,
    )


def _reranker(
    name: str,
    family: str,
    *,
    languages: tuple[str, ...],
    max_length: int,
    licence: str = "mit",
    licence_note: str = "",
    half: HalfDtype = "float16",
    pair_prompt: PairPrompt | None = None,
    layer_heads: LayerHeads | None = None,
) -> Profile:
    return Profile(
        id=f"BAAI/{name}",
        kind="reranker",
        family=family,
        languages=languages,
        max_length=max_length,
        outputs=(),
        half=half,
        pair_prompt=pair_prompt,
        layer_heads=layer_heads,
        licence=licence,
        licence_note=licence_note,
    )


_LLM_EMBEDDER_TASKS = MappingProxyType(
    {
        "qa": TaskInstruction(
            "Represent this query for retrieving relevant documents: ",
            "Represent this document for retrieval: ",
        ),
        "icl": TaskInstruction(
            "Convert this example into vector to look for useful examples: ",
            "Convert this example into vector for retrieval: ",
        ),
        "chat": TaskInstruction(
            "Embed this dialogue to find useful historical dialogues: ",
            "Embed this historical dialogue for retrieval: ",
        ),
        "lrlm": TaskInstruction(
            "Embed this text chunk for finding useful historical chunks: ",
            "Embed this historical text chunk for retrieval: ",
        ),
        "tool": TaskInstruction(
            "Transform this user request for fetching helpful tool descriptions: ",
            "Transform this tool description for retrieval: ",
        ),
        "convsearch": TaskInstruction(
            "Encode this query and context for searching relevant passages: ",
            "Encode this passage for retrieval: ",
        ),
    }
)

_ROWS: tuple[Profile, ...] = (
    _bert("bge-large-en-v1.5", "en", 1024, instruction=_EN),
    _bert("bge-base-en-v1.5", "en", 768, instruction=_EN),
    _bert("bge-small-en-v1.5", "en", 384, instruction=_EN),
    _bert("bge-large-zh-v1.5", "zh", 1024, instruction=_ZH),
    _bert("bge-base-zh-v1.5", "zh", 768, instruction=_ZH),
    _bert("bge-small-zh-v1.5", "zh", 512, instruction=_ZH),
    _bert("bge-large-en", "en", 1024, instruction=_EN),
    _bert("bge-base-en", "en", 768, instruction=_EN),
    _bert("bge-small-en", "en", 384, instruction=_EN),
    _bert("bge-large-zh", "zh", 1024, instruction=_ZH),
    _bert("bge-base-zh", "zh", 768, instruction=_ZH),
    _bert("bge-small-zh", "zh", 512, instruction=_ZH),
    _bert("bge-large-zh-noinstruct", "zh", 1024, instruction=""),
    Profile(
        id="BAAI/llm-embedder",
        kind="embedder",
        family="bert",
        languages=("en",),
        max_length=512,
        dimension=768,
        pooling="cls",
        query_instruction=_LLM_EMBEDDER_TASKS["qa"].query,
        tasks=_LLM_EMBEDDER_TASKS,
        licence="mit",
    ),
    _m3("bge-m3", outputs=("dense", "sparse", "multi_vector")),
    _m3("bge-m3-unsupervised"),
    _m3(
        "bge-m3-retromae",
        refusal=(
            "it is the pre-trained backbone that bge-m3 was trained from, and its vectors do not "
            "measure similarity: use BAAI/bge-m3 instead"
        ),
    ),
    _decoder(
        "bge-multilingual-gemma2",
        "gemma2",
        languages=("multilingual",),
        dimension=3584,
        max_length=8192,
        instruction=_WEB_SEARCH,
        licence="gemma",
        licence_note=_GEMMA_NOTE,
    ),
    _decoder(
        "bge-en-icl",
        "mistral",
        languages=("en",),
        dimension=4096,
        max_length=32768,
        instruction=_WEB_SEARCH,
        query_suffix="\n<response>",
        example_format="<instruct>{instruct}\n<query>{query}\n<response>{response}",
    ),
    _decoder(
        "bge-code-v1",
        "qwen2",
        languages=("en", "zh", "code"),
        dimension=1536,
        max_length=32768,
        instruction=(
            "Given a question in text, retrieve SQL queries that are appropriate responses to "
            "the question."
        ),
    ),
    _decoder(
        "bge-reasoner-embed-qwen3-8b-0923",
        "qwen3",
        languages=("en",),
        dimension=4096,
        max_length=32768,
        instruction=None,
        query_format="Instruct: {instruction}\nQuery: {query}",
        licence="unknown",
        licence_note="The model card was not seen: read its licence before use.",
    ),
    _reranker("bge-reranker-base", "xlm-roberta", languages=("zh", "en"), max_length=512),
    _reranker("bge-reranker-large", "xlm-roberta", languages=("zh", "en"), max_length=512),
    _reranker(
        "bge-reranker-v2-m3",
        "xlm-roberta",
        languages=("multilingual",),
        max_length=8192,
        licence="apache-2.0",
    ),
    _reranker(
        "bge-reranker-v2-gemma",
        "gemma",
        languages=("multilingual",),
        max_length=8192,
        licence="apache-2.0",
        licence_note="The backbone, gemma-2b, is under the Gemma Terms of Use.",
        half="bfloat16",
        pair_prompt=PairPrompt(),
    ),
    _reranker(
        "bge-reranker-v2-minicpm-layerwise",
        "minicpm",
        languages=("multilingual",),
        max_length=2048,
        licence="apache-2.0",
        half="bfloat16",
        pair_prompt=PairPrompt(answer=None),
        layer_heads=LayerHeads(first=8, last=40),
    ),
    _reranker(
        "bge-reranker-v2.5-gemma2-lightweight",
        "gemma2",
        languages=("multilingual",),
        max_length=8192,
        licence="gemma",
        licence_note=_GEMMA_NOTE,
        half="bfloat16",
        pair_prompt=PairPrompt(question=_PREDICT, answer=None),
        layer_heads=LayerHeads(first=8, last=42, compresses=True),
    ),
)

_PUBLISHED = frozenset(row.id for row in _ROWS)
_rows: dict[str, Profile] = {row.id: row for row in _ROWS}
# By what follows the organisation, in lower case.
_by_name: dict[str, Profile] = {row.id.rpartition("/")[2].casefold(): row for row in _ROWS}

PROFILES: Mapping[str, Profile] = MappingProxyType(_rows)
"""Every checkpoint that is known by name: the published ones, and those of `register`, by id."""

# How the hub's cache, and sentence-transformers' older one, write "org/name" as one folder.
_CACHED = re.compile(r"models--.+?--(.+)|BAAI(?:--|_)(.+)", re.IGNORECASE)


def register(profile: Profile) -> None:
    """Make a checkpoint known by name, as the published ones are.

    From then on its hub id, a folder of that name, a `checkpoint-*` folder in one, and the hub's
    cache of it get its instruction, pooling and limits: in every class, on a server, and in the
    doctor. It counts in this process, and goes along in pickles of models to others. Any thread
    may call this; a row that is there already is left as it is.

    Args:
        profile: The checkpoint's row.

    Raises:
        ArgumentError: The name has another row already, or is written as a cache writes another's.
        InputTypeError: It is no `Profile`.

    Example:
        >>> register(
        ...     Profile(
        ...         id="acme/ticket-search",
        ...         kind="embedder",
        ...         family="bert",
        ...         max_length=512,
        ...         pooling="cls",
        ...         query_instruction="ticket: ",
        ...     )
        ... )
        >>> from bge_core import Embedder
        >>> Embedder("acme/ticket-search").query_instruction
        'ticket: '
    """
    if not isinstance(profile, Profile):
        msg = f"register takes a bge_core.Profile, got {type(profile).__name__}."
        raise InputTypeError(msg)
    name = profile.id.rpartition("/")[2].casefold()
    if _name_of(profile.id) != name:
        msg = (
            f"The name {profile.id!r} can't be registered: as a folder's it would be read as "
            f"{_name_of(profile.id)!r}, or as a checkpoint of training. Give yours another name."
        )
        raise ArgumentError(msg)
    # One step, so that no lock is needed, which a fork could leave held.
    known = _by_name.setdefault(name, profile)
    if known != profile:
        what = "published" if known.id in _PUBLISHED else "registered with other values"
        msg = (
            f"The name {profile.id!r} can't be registered: {known.id!r} is {what}, and a name's "
            "last part, which is that of its folders, can mean one checkpoint. Give yours a name "
            "of its own."
        )
        raise ArgumentError(msg)
    _rows.setdefault(profile.id, known)


def is_published(profile: Profile) -> bool:
    """Return whether a row is one of BGE's own, and not of `register`."""
    return profile.id in _PUBLISHED


def registered_profiles() -> tuple[Profile, ...]:
    """Return the rows that `register` added."""
    return tuple(row for name, row in list(_rows.items()) if name not in _PUBLISHED)


def restore_profiles(rows: Iterable[Profile]) -> None:
    """Register the rows of a pickle; one whose name is another's here is left out with a warning.

    Not an error: a pool's worker that can't read its task dies in silence, and the caller waits
    for ever; and the row may be of another model than the pickle's.
    """
    for row in rows:
        try:
            register(row)
        except ArgumentError as exc:
            logger.warning("%s", exc)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportedModel:
    """A row of `supported_models()`; `str()` makes one line of it.

    Attributes:
        id: The hub id, or a folder's name.
        kind: `"embedder"` or `"reranker"`.
        dimension: Length of a dense vector; None for a reranker.
        max_length: Tokens that it can take, special ones included.
        languages: ISO codes, or `"multilingual"`.
        outputs: What an embedder gives; empty for a reranker.
        query_instruction: What queries get in front; None where the card leaves it to the user.
        licence: The licence of the weights.
        licence_note: What a user should know before using them.
    """

    id: str
    kind: Kind
    dimension: int | None
    max_length: int
    languages: tuple[str, ...]
    outputs: tuple[Output, ...]
    query_instruction: str | None
    licence: str
    licence_note: str

    def __str__(self) -> str:
        """Write it as a line of a table."""
        size = "" if self.dimension is None else str(self.dimension)
        languages = ", ".join(self.languages)
        return (
            f"{self.id:<42} {self.kind:<8} {size:>5} {self.max_length:>6}  {languages:<14} "
            f"{self.licence}"
        ).rstrip()


def supported_models() -> list[SupportedModel]:
    r"""List the checkpoints that are known by name and can be used.

    Any other embedder that sentence-transformers saved, and any cross-encoder of one label, can be
    used as well; these need no settings.

    Returns:
        A row a checkpoint, the published ones first; those of `register` are among them.

    Example:
        >>> print(*supported_models()[:2], sep="\n")
        BAAI/bge-large-en-v1.5                     embedder  1024    512  en             mit
        BAAI/bge-base-en-v1.5                      embedder   768    512  en             mit
    """
    columns = [column.name for column in fields(SupportedModel)]
    return [
        SupportedModel(**{name: getattr(row, name) for name in columns})
        for row in list(_rows.values())
        if row.refusal is None
    ]


def find_profile(name: str, kind: Kind | None = None) -> Profile | None:
    """Find the row of a hub id or a folder's path, by whole names and never by a part of one.

    Args:
        name: A hub id (`BAAI/bge-m3`), a mirror's id of the same name, the bare name, a folder's
            path, a `checkpoint-*` folder inside a folder so named, a snapshot in the hub's cache,
            or a folder of ModelScope's, which writes a dot as `___`.
        kind: The kind that is wanted; None for either.

    Returns:
        The row, or None for a name that is not in the table, or is there of the other kind.
    """
    row = _by_name.get(_name_of(name))
    return row if row is None or kind in (None, row.kind) else None


def _name_of(name: str) -> str:
    """Return the name that a hub id or a folder's path has in the table, in lower case."""
    parts = [part for part in PurePath(name.replace("\\", "/")).parts if part != "/"]
    if not parts:
        return ""
    last = parts[-1]
    if last.startswith("checkpoint-") and len(parts) > 1:
        last = parts[-2]
    elif len(parts) > 2 and parts[-2] == "snapshots":
        last = parts[-3]
    if cached := _CACHED.fullmatch(last):
        last = cached.group(1) or cached.group(2)
    return last.replace("___", ".").casefold()
