"""Columns for more rows than one machine has time for: embeddings and reranking on Ray Data.

Every actor of a pool has one engine. A job reads and writes either a `ray.data.Dataset`, or a
folder of Parquet shards, which a job that was stopped goes on with where it was.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bge_core import arguments
from bge_core.errors import ArgumentError, InputTypeError, needs_extra
from bge_core.scale.shards import ShardReport, ShardWorker, absolute_target, open_target
from bge_core.scale.steps import Embed, Rerank

if TYPE_CHECKING:
    from bge_core.scale.steps import Step

__all__ = ["add_columns", "write_shards"]


try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    import ray.data
    from pyarrow import fs
except ImportError as exc:
    raise needs_extra(
        exc, "bge_core.ray", packages=("pyarrow", "ray"), install="'bge-adapters[ray]'"
    ) from exc


# One batch computes while the other one is read, cut into tokens or written.
_BATCHES_AT_ONCE = 2


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
        ArgumentError: A column or a device that is not supported.
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
    source, target = absolute_target(source), absolute_target(target)
    files, folder = open_target(source)
    there, new_folder = open_target(target)
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
        ShardWorker,
        fn_constructor_args=(step, source, target),
        batch_size=1,
        batch_format="pyarrow",
        **_pool(step, actors, cpus, limit=len(names)),
    ).take_all()
    for file in there.get_file_info(fs.FileSelector(new_folder)):
        if file.base_name.startswith(".") and file.extension == "part":
            there.delete_file(file.path)  # of an actor that died
    written = [row["rows"] for row in done if row["rows"] is not None]
    return ShardReport(written=len(written), skipped=len(done) - len(written), rows=sum(written))


class _Worker:
    """One engine: the step's model loads at the first batch and stays."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._step(table)


def _pool(step: Step, actors: int | None, cpus: int, *, limit: int | None = None) -> dict[str, Any]:
    """Return what map_batches needs for a pool of engines, at most `limit` of them."""
    if actors is not None:
        actors = arguments.whole_number("actors", actors)
    cpus = arguments.whole_number("cpus", cpus)
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
            size=min(size, limit or size),
            max_tasks_in_flight_per_actor=_BATCHES_AT_ONCE,
            max_concurrent_calls_per_actor=_BATCHES_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        **each,
    }


def _check_step(step: object) -> None:
    if not isinstance(step, (Embed, Rerank)):
        msg = f"step must be an Embed(...) or a Rerank(...), got {type(step).__name__}."
        raise InputTypeError(msg)
