"""One Parquet shard: read, computed and written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from bge_core.errors import ArgumentError, needs_extra

if TYPE_CHECKING:
    from bge_core.scale.steps import Step

__all__ = ["ShardReport", "ShardWorker", "absolute_target", "open_target"]

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import fs
except ImportError as exc:
    raise needs_extra(
        exc, "bge_core.scale", packages=("pyarrow",), install="'bge-adapters[ray]'"
    ) from exc

_PROVENANCE = b"bge_core"


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What a job over shards did.

    Attributes:
        written: Shards that were computed and written.
        skipped: Shards that were there already.
        rows: Rows of the shards that were written.
    """

    written: int
    skipped: int
    rows: int


class ShardWorker:
    """One engine that reads and writes whole shards."""

    def __init__(self, step: Step, source: str, target: str) -> None:
        self._step = step
        self._files, self._folder = open_target(source)
        self._there, self._target = open_target(target)

    def __call__(self, shards: pa.Table) -> pa.Table:
        """Write the shards that a table names and add how many rows each has."""
        rows = [self._rows(name) for name in shards["shard"].to_pylist()]
        return shards.append_column("rows", pa.array(rows, pa.int64()))

    @cached_property
    def _provenance(self) -> bytes:
        return json.dumps(self._step.provenance()).encode()

    def _rows(self, name: str) -> int | None:
        """Write a shard and count its rows; None for one that is there."""
        path = f"{self._target}/{name}"
        if self._there.get_file_info(path).type == fs.FileType.NotFound:
            return self._write(name, path)
        wrote = (pq.read_schema(path, filesystem=self._there).metadata or {}).get(_PROVENANCE)
        if wrote != self._provenance:
            msg = (
                f"{path!r} was written with {(wrote or b'something else').decode()}, and this job "
                f"is {self._provenance.decode()}: name another target, or delete that file."
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
                marked = {**(schema.metadata or {}), _PROVENANCE: self._provenance}
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


def absolute_target(place: str | os.PathLike[str]) -> str:
    """Return a name that an actor in another folder understands."""
    name = os.fspath(place)
    return name if "://" in name else Path(name).resolve().as_posix()


def open_target(place: str) -> tuple[fs.FileSystem, str]:
    """Return the file system and the path in it."""
    if "://" not in place:
        return fs.LocalFileSystem(), place
    files, path = fs.FileSystem.from_uri(place)
    return files, path.rstrip("/")
