"""What goes around a query: an instruction, or a decoder's task, examples and suffix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bge_core import arguments
from bge_core.arguments import shown
from bge_core.errors import ArgumentError, InputTypeError

if TYPE_CHECKING:
    from bge_core.checkpoints.catalog import Profile, TaskInstruction

__all__ = ["PromptTemplate", "QueryExample", "resolve_prompts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryExample:
    """A query and an answer to it, shown to bge-en-icl in front of every query.

    Attributes:
        query: A query as the users' are.
        response: A passage that answers it.
        instruct: The example's own task; None for that of the queries.

    Raises:
        ArgumentError: A text is not valid Unicode.
        InputTypeError: A text is no str.

    Example:
        >>> QueryExample(query="who wrote Emma?", response="Jane Austen wrote Emma in 1815.").query
        'who wrote Emma?'
    """

    query: str
    response: str
    instruct: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no text."""
        for name in ("query", "response", "instruct"):
            value = getattr(self, name)
            if value is not None or name != "instruct":
                object.__setattr__(self, name, arguments.text(f"An example's {name}", value))

    @classmethod
    def all_of(
        cls, examples: Iterable[QueryExample | Mapping[str, str]] | None
    ) -> tuple[QueryExample, ...]:
        """Make examples of what a user wrote.

        Args:
            examples: Examples, mappings of their names (`instruct`, `query` and `response`, as
                FlagEmbedding takes them), or None for none.

        Raises:
            ArgumentError: A name is unknown or missing, or a text is not valid Unicode.
            InputTypeError: It is no list, or an item is neither.
        """
        if examples is None:
            return ()
        if isinstance(examples, cls) or not arguments.is_list(examples):
            msg = (
                "examples must be a list of dicts with query and response, got "
                f"{type(examples).__name__}."
            )
            raise InputTypeError(msg)
        return tuple(cls._of(item, f"examples[{index}]") for index, item in enumerate(examples))

    @classmethod
    def _of(cls, item: object, where: str) -> QueryExample:
        if isinstance(item, cls):
            return item
        if not isinstance(item, Mapping):
            msg = f"{where} must be a dict with query and response, got {shown(item)}."
            raise InputTypeError(msg)
        if not {"query", "response"} <= item.keys() <= {"query", "response", "instruct"}:
            msg = (
                f"{where} has the keys {', '.join(map(str, item)) or '(none)'}: it takes query and "
                "response, and instruct where its task is another than the queries'."
            )
            raise ArgumentError(msg)
        return cls(**item)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """What goes around queries and in front of documents.

    Attributes:
        instruction: The instruction, or a decoder's task; None where nothing says one.
        query_prefix: What that puts directly in front of a query.
        query_suffix: Put behind every query.
        few_shot_prefix: Put in front of all that, and of no document.
        document_prefix: Put in front of a document.
    """

    instruction: str | None
    query_prefix: str
    query_suffix: str = ""
    few_shot_prefix: str = ""
    document_prefix: str = ""


def resolve_prompts(
    model: str,
    profile: Profile | None,
    prompts: Mapping[str, str],
    *,
    query_instruction: str | None,
    document_instruction: str | None,
    task_description: str | None,
    task: str | None,
    examples: tuple[QueryExample, ...],
) -> PromptTemplate:
    """Join what a checkpoint wants and what the user wrote.

    Args:
        model: The model's name, for messages.
        profile: Its row in the table of published checkpoints; None if it has none.
        prompts: The checkpoint's own prompts by name, used where it has no row.
        query_instruction: The user's instruction; None for the checkpoint's.
        document_instruction: The same in front of documents.
        task_description: The same, in the words of a decoder's card.
        task: llm-embedder's task.
        examples: bge-en-icl's examples.

    Raises:
        ArgumentError: A word that this model does not take, or two that disagree.
    """
    has_task_template = profile is not None and profile.has_task_template
    if task_description is not None and not has_task_template:
        msg = (
            f"task_description={shown(task_description)} is for BGE's decoders, which have a "
            f"place for it; {model!r} takes query_instruction='...', which goes in front of "
            "queries as it is, or None for its own."
        )
        raise ArgumentError(msg)
    if None not in (query_instruction, task_description) and query_instruction != task_description:
        msg = (
            f"query_instruction={shown(query_instruction)} and task_description="
            f"{shown(task_description)} are one setting of {model!r}: pass one of them."
        )
        raise ArgumentError(msg)
    given = query_instruction if task_description is None else task_description
    if profile is None:
        _no_examples(model, examples)
        _task_instruction(model, None, task)
        asked = prompts.get("query") if given is None else given
        document = prompts.get("document", "")
        if document_instruction is not None:
            document = document_instruction
        return PromptTemplate(instruction=asked, query_prefix=asked or "", document_prefix=document)
    row = _task_instruction(model, profile, task)
    document = "" if row is None else row.document
    if document_instruction is not None:
        document = document_instruction
    published = profile.query_instruction if row is None else row.query
    asked = published if given is None else given
    head, _, _ = profile.query_format.partition("{instruction}")
    if head and asked and asked.startswith(head):
        msg = (
            f"{shown(asked)} has the template of {model!r} around it already, {head!r}: pass the "
            "task alone, such as 'Given a question, retrieve passages that answer the question.'"
        )
        raise ArgumentError(msg)
    if not profile.example_format:
        _no_examples(model, examples)
    before, _, _ = profile.query_format.partition("{query}")
    return PromptTemplate(
        instruction=asked,
        query_prefix=before.replace("{instruction}", asked) if asked else "",
        query_suffix=profile.query_suffix,
        few_shot_prefix="".join(
            _written(profile.example_format, example, asked, index)
            for index, example in enumerate(examples)
        ),
        document_prefix=document,
    )


def _written(style: str, example: QueryExample, task: str | None, index: int) -> str:
    instruct = example.instruct or task
    if not instruct:
        msg = (
            f"examples[{index}] has no task: give it instruct='...', or pass task_description "
            "for the queries and the examples."
        )
        raise ArgumentError(msg)
    written = style.format(instruct=instruct, query=example.query, response=example.response)
    return f"{written}\n\n"


def _no_examples(model: str, examples: tuple[QueryExample, ...]) -> None:
    if examples:
        msg = (
            "examples are for BAAI/bge-en-icl, which was trained with some in front of queries, "
            f"and not for {model!r}: leave them out."
        )
        raise ArgumentError(msg)


def _task_instruction(
    model: str, profile: Profile | None, task: str | None
) -> TaskInstruction | None:
    tasks = profile.tasks if profile else {}
    if task is None:
        return tasks.get("qa")
    task = arguments.text("task", task)
    if task not in tasks:
        msg = (
            f"task={shown(task)} is none of {sorted(tasks)} of {model!r}."
            if tasks
            else f"task={shown(task)} is for BAAI/llm-embedder only, not for {model!r}: "
            "leave it out, or pass query_instruction."
        )
        raise ArgumentError(msg)
    return tasks[task]
