"""A model that a server runs: batches, requests side by side, and answers that are checked."""

from __future__ import annotations

import asyncio
import os
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from bge_core.checkpoints.catalog import find_profile
from bge_core.checkpoints.metadata import check_kind, check_profile, read
from bge_core.checkpoints.source import Source, locate
from bge_core.engine.call import Call, progress_bar
from bge_core.errors import ComputationError
from bge_core.lifecycle import Closeable
from bge_core.servers.http import Endpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.checkpoints.catalog import Profile
    from bge_core.checkpoints.metadata import Checkpoint, Kind
    from bge_core.engine.scheduler import Priority

__all__ = ["batches", "by_index", "gather_limited", "is_number", "to_float32"]

Item = TypeVar("Item", str, tuple[str, str])
Progress = Callable[[int], None] | None

# What text-embeddings-inference takes at a time unless told otherwise, and half of the two
# megabytes that it takes at most, in characters of four bytes.
_BATCH = 32
_BATCH_CHARACTERS = 250_000
# Requests of one call that the server has at a time.
_IN_FLIGHT = 4


Part = TypeVar("Part")
Result = TypeVar("Result")


class RemoteModel(Closeable, Generic[Item]):
    """A model that a server runs.

    The model's name says what it is: instructions and dimension come from it, and with a folder
    of this machine from its JSON files. Nothing is downloaded, and pickles carry the
    configuration only.

    Args:
        kind: `"embedder"` or `"reranker"`.
        model: The published id of the model that is served, or a folder with the same.
        endpoint: The server's address.
        api_key: A bearer token.
        timeout: Seconds to wait for one answer; None for 60.

    Raises:
        ArgumentError: A value that can't be served.
        CheckpointError: A model that is none, or of another kind.
        InputTypeError: A value of the wrong type.
    """

    _unpickled_attributes = frozenset({"_checkpoint", "_closed", "_in_flight"})

    def __init__(
        self,
        *,
        kind: Kind,
        model: str | os.PathLike[str],
        endpoint: str,
        api_key: str | None,
        timeout: float | None,
    ) -> None:
        self._kind = kind
        self._source = Source.of(model)
        self._endpoint = Endpoint(endpoint, api_key=api_key, timeout=timeout)
        self._start()
        if self._source.is_local:
            self._folder()  # reading it is the check
        else:
            check_profile(self._profile(), kind, self.model)

    def _start(self) -> None:
        self._closed = False
        self._checkpoint: Checkpoint | None = None
        self._in_flight: set[Future[Any]] = set()

    @property
    def model(self) -> str:
        """The hub id or folder."""
        return self._source.model

    @property
    def endpoint(self) -> str:
        """The server's address."""
        return self._endpoint.url

    @property
    def dtype(self) -> str:
        """`"unknown"`: the server has its own number format, and doesn't say."""
        return "unknown"

    def close(self) -> None:
        """Let go of the server; callers that still wait get a `ClosedError`."""
        self._closed = True
        for future in list(self._in_flight):
            future.cancel()
        self._endpoint.close()

    @abstractmethod
    async def _rows(self, items: Sequence[Item], progress: Progress) -> list[NDArray[np.float32]]:
        """Ask the server for a row of each item."""

    def _folder(self) -> Checkpoint | None:
        """Read the folder on this machine, where the model is one."""
        if self._checkpoint is None and self._source.is_local:
            found = read(self._source, locate(self._source))
            check_kind(found, self._kind, pooling=None)
            self._checkpoint = found
        return self._checkpoint

    def _served_name(self) -> str:
        """Give the name that a server knows; a path on this machine is none of its business."""
        profile = self._profile()
        if not self._source.is_local:
            return self.model
        return profile.id if profile else Path(self.model).name

    def _profile(self) -> Profile | None:
        folder = self._folder()
        return find_profile(self.model) or (folder.profile if folder else None)

    def _content(self) -> str:
        # What the server's weights are can't be known: a name stands for them.
        folder = self._folder()
        return folder.digest() if folder else self.model

    def _compute(
        self,
        items: Sequence[Item],
        *,
        priority: Priority,  # noqa: ARG002 -- the server has its own queue
        show_progress: bool = False,
    ) -> NDArray[np.float32] | None:
        self._check_open()
        if not items:
            return None
        call = Call(items)
        future = self._begin(call, show_progress=show_progress)
        call.take(self._wait(future))
        return call.stacked()

    async def _acompute(
        self,
        items: Sequence[Item],
        *,
        priority: Priority,  # noqa: ARG002 -- the server has its own queue
        show_progress: bool = False,
    ) -> NDArray[np.float32] | None:
        self._check_open()
        if not items:
            return None
        call = await asyncio.to_thread(Call, items)
        future = self._begin(call, show_progress=show_progress)
        call.take(await self._await(future))
        return await asyncio.to_thread(call.stacked)

    def _begin(self, call: Call[Item], *, show_progress: bool) -> Future[list[NDArray[np.float32]]]:
        async def work() -> list[NDArray[np.float32]]:
            with progress_bar(len(call.items), show=show_progress) as progress:
                return await self._rows(call.items, progress)

        future = self._endpoint.start(work())
        self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)
        if self._closed:
            future.cancel()
        return future

    def _non_finite_error(self, which: str) -> ComputationError:
        msg = (
            f"{self.endpoint} gave NaN or infinity for {which}: half precision overflows on some "
            "texts. Start the server with float32 or bfloat16 (--dtype)."
        )
        return ComputationError(msg)


def batches(texts: Sequence[str]) -> Iterator[slice]:
    """Cut texts into the slices that one request carries."""
    start = characters = 0
    for place, text in enumerate(texts):
        characters += len(text)
        if place > start and (place - start == _BATCH or characters > _BATCH_CHARACTERS):
            yield slice(start, place)
            start, characters = place, len(text)
    yield slice(start, len(texts))


async def gather_limited(
    parts: Sequence[Part], ask: Callable[[Part], Awaitable[Result]]
) -> list[Result]:
    """Ask for all parts, a few at a time; the first failure stops the rest."""
    results: dict[int, Result] = {}
    waiting = iter(enumerate(parts))

    async def turn() -> None:
        for place, part in waiting:
            results[place] = await ask(part)

    turns = [asyncio.ensure_future(turn()) for _ in range(min(_IN_FLIGHT, len(parts)))]
    try:
        await asyncio.gather(*turns)
    finally:
        for task in turns:
            task.cancel()
    return [results[place] for place in range(len(parts))]


def by_index(endpoint: Endpoint, path: str, entries: object, name: str, count: int) -> list[Any]:
    """Give what entries say under a name, each in its own place.

    Raises:
        EndpointError: There is not exactly one entry for each of 0 to `count` - 1.
    """
    if not isinstance(entries, list):
        raise endpoint.malformed(path, "it has no list of results")
    found: dict[int, Any] = {}
    for entry in entries:
        index = entry.get("index") if isinstance(entry, dict) else None
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            raise endpoint.malformed(path, f"an entry's index is {index!r:.60} of {count} texts")
        if index in found:
            raise endpoint.malformed(path, f"index {index} is there twice")
        found[index] = entry.get(name)
    if len(found) != count:
        raise endpoint.malformed(path, f"{len(found)} results for {count} texts")
    return [found[index] for index in range(count)]


def is_number(value: object) -> bool:
    """Return whether a JSON value is a number that numpy can hold."""
    if isinstance(value, float):
        return True
    # JSON's whole numbers have no limit, and numpy's have.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def to_float32(values: list[Any]) -> NDArray[np.float32]:
    """Convert numbers to float32; what is too big becomes infinity."""
    with np.errstate(over="ignore"):  # what is too big becomes infinity, and is refused as such
        return np.asarray(values, dtype=np.float64).astype(np.float32)
