"""What each published BGE checkpoint needs: a frozen table, and how a name finds its row.

The facts come from the checkpoints' model cards and from FlagEmbedding's own sources. A new
checkpoint is a new row here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from types import MappingProxyType
from typing import Literal

__all__ = ["PROFILES", "Output", "PairPrompt", "Profile", "TaskInstruction", "find_profile"]

Kind = Literal["embedder", "reranker"]
Pooling = Literal["cls", "mean", "last"]
Output = Literal["dense", "sparse", "multi_vector"]
Half = Literal["float16", "bfloat16"]

_EN = "Represent this sentence for searching relevant passages: "
_ZH = "为这个句子生成表示以用于检索相关文章："
_WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query."
_PLAIN = "{instruction}{query}"
_ANSWERS = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the "
    "query by providing a prediction of either 'Yes' or 'No'."
)
_GEMMA_NOTE = "Gemma Terms of Use: read them before commercial use."


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
        answer: The score is the logit of the first token of this word.
    """

    query: str = "A: "
    passage: str = "B: "
    separator: str = "\n"
    question: str = _ANSWERS
    answer: str = "Yes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One published checkpoint.

    Attributes:
        id: Its id on the model hub.
        kind: `"embedder"` or `"reranker"`.
        family: The architecture's `model_type`, as config.json says it.
        languages: ISO codes, or `"multilingual"`.
        max_length: Tokens that the model can take, special ones included.
        dimension: Length of a dense vector; None for a reranker.
        pooling: Which rows of the last layer make the vector; None for a reranker.
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
        tasks: llm-embedder's instructions by task; empty elsewhere.
        licence: The licence of the weights.
        licence_note: What a user should know before using them.
        refusal: Why this release can't serve it, as the end of a sentence; None if it can.
    """

    id: str
    kind: Kind
    family: str
    languages: tuple[str, ...]
    max_length: int
    dimension: int | None = None
    pooling: Pooling | None = None
    outputs: tuple[Output, ...] = ("dense",)
    query_instruction: str | None = ""
    query_format: str = _PLAIN
    query_suffix: str = ""
    example_format: str = ""
    half: Half = "float16"
    pair_prompt: PairPrompt | None = None
    tasks: Mapping[str, TaskInstruction] = field(default_factory=lambda: MappingProxyType({}))
    licence: str = "mit"
    licence_note: str = ""
    refusal: str | None = None

    @property
    def frames_tasks(self) -> bool:
        """Whether queries get a task in a frame, and not an instruction as it is."""
        return self.query_format != _PLAIN


_OWN_CODE = (
    "its layers and heads are Python code of its own, not of transformers, and that code could "
    "not be tried with current transformers, so it is not run, with trust_remote_code=True "
    "neither: use BAAI/bge-reranker-v2-gemma or BAAI/bge-reranker-v2-m3 instead"
)


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
    half: Half = "float16",
    pair_prompt: PairPrompt | None = None,
    refusal: str | None = None,
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
        licence=licence,
        licence_note=licence_note,
        refusal=refusal,
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
        refusal=_OWN_CODE,
    ),
    _reranker(
        "bge-reranker-v2.5-gemma2-lightweight",
        "gemma2",
        languages=("multilingual",),
        max_length=8192,
        licence="gemma",
        licence_note=_GEMMA_NOTE,
        refusal=_OWN_CODE,
    ),
)

PROFILES: Mapping[str, Profile] = MappingProxyType({row.id: row for row in _ROWS})
"""Every published checkpoint that this package knows, by hub id."""

_BY_NAME: Mapping[str, Profile] = MappingProxyType(
    {row.id.partition("/")[2].casefold(): row for row in _ROWS}
)
# How the hub's cache, and sentence-transformers' older one, write "BAAI/name" as one folder.
_CACHED = re.compile(r"(?:models--)?BAAI(?:--|_)(.+)", re.IGNORECASE)


def find_profile(name: str) -> Profile | None:
    """Find the row of a hub id or a folder's path, by whole names and never by a part of one.

    Args:
        name: A hub id (`BAAI/bge-m3`), a mirror's id of the same name, a folder's path, a
            `checkpoint-*` folder inside a folder so named, or a snapshot in the hub's cache.

    Returns:
        The row, or None for a name that is not in the table.
    """
    parts = [part for part in PurePath(name.replace("\\", "/")).parts if part != "/"]
    if not parts:
        return None
    last = parts[-1]
    if last.startswith("checkpoint-") and len(parts) > 1:
        last = parts[-2]
    elif len(parts) > 2 and parts[-2] == "snapshots":
        last = parts[-3]
    cached = _CACHED.fullmatch(last)
    return _BY_NAME.get((cached.group(1) if cached else last).casefold())
