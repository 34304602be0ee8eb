"""The workers: one model a device, a lane for queries and one for bulk, shared by all callers.

Callers hand in sequences and get a future. A lane's worker fills a pack with whatever waits,
whoever asked for it, so concurrent queries share one forward pass, and an index build in the
bulk lane never stands before a query.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, Literal

import torch

from bge_core.errors import ClosedError, ComputationError
from bge_core.packing import fill

if TYPE_CHECKING:
    from bge_core.runner import Runner
    from bge_core.tokens import Tokenizer, Tokens

__all__ = ["Engine", "Lane", "shared_engine"]

logger = logging.getLogger(__name__)

Lane = Literal["query", "bulk"]
Rows = list[Any]

# Computing threads that outlive the interpreter crash it; a pack takes less than this.
_EXIT_SECONDS = 4.0
# Bulk work gets a third of the CPU that queries get while both want it, and all of it otherwise.
_BULK_NICENESS = 5


class _Job:
    """One caller's sequences, computed over one or more packs."""

    __slots__ = (
        "_left",
        "_lock",
        "budget",
        "cursor",
        "future",
        "lengths",
        "order",
        "progress",
        "rows",
    )

    def __init__(
        self,
        sequences: Sequence[Tokens],
        budget: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        # Equal lengths stand side by side, longest first: what may run out of memory does so early.
        self.order = sorted(enumerate(sequences), key=lambda item: -len(item[1]))
        self.lengths = [len(sequence) for _, sequence in self.order]
        self.cursor = 0
        self.budget = budget
        self.progress = progress
        self.rows: Rows = [None] * len(sequences)
        self.future: Future[Rows] = Future()
        self._left = len(sequences)
        self._lock = threading.Lock()

    def accept(self, indices: Sequence[int], rows: Sequence[Any]) -> None:
        """Take computed rows; the last ones finish the job."""
        with self._lock:
            for index, row in zip(indices, rows, strict=True):
                self.rows[index] = row
            self._left -= len(indices)
            done = not self._left
            if self.progress is not None:
                self.progress(len(indices))
        if done:
            self._finish(lambda: self.future.set_result(self.rows))

    def fail(self, error: BaseException) -> None:
        """Hand the caller an error, unless it has gone."""
        self._finish(lambda: self.future.set_exception(error))

    def _finish(self, settle: Callable[[], None]) -> None:
        try:
            settle()
        except InvalidStateError:
            logger.debug("A caller had left before its work was done.")


_Entry = tuple[_Job, int, "Tokens"]


class _Workers:
    """What the worker threads share; it must not refer to the engine, so that that can die."""

    def __init__(self, runners: Mapping[Lane, Sequence[Runner]], name: str) -> None:
        self.runners = dict(runners)
        self.name = name
        self.ceilings = [1 << 60] * max(len(lane) for lane in runners.values())
        self.closed = False
        self.forked = False
        self._start_over()
        _live.add(self)

    def _start_over(self) -> None:
        self.ready = threading.Condition()
        self.waiting: dict[Lane, deque[_Job]] = {"query": deque(), "bulk": deque()}
        self.threads: dict[Lane, list[threading.Thread]] = {"query": [], "bulk": []}

    def submit(self, job: _Job, lane: Lane) -> None:
        with self.ready:
            if self.closed:
                msg = f"The model {self.name!r} is closed: make a new one to compute with it."
                raise ClosedError(msg)
            if not self.threads[lane]:
                self._start(lane)
            self.waiting[lane].append(job)
            self.ready.notify_all()

    def _start(self, lane: Lane) -> None:
        for index in range(len(self.runners[lane])):
            thread = threading.Thread(
                target=self._work, args=(lane, index), name=f"bge-{lane}-{index}", daemon=True
            )
            self.threads[lane].append(thread)
            thread.start()

    def _work(self, lane: Lane, index: int) -> None:
        runner = self.runners[lane][index]
        if lane == "bulk":
            _step_aside()
        if self.forked:
            # GNU OpenMP's threads are not in a forked child, and waiting for them would hang.
            torch.set_num_threads(1)
        while True:
            with self.ready:
                while not (pack := self._take(lane, runner, self.ceilings[index])):
                    if self.closed:
                        return
                    self.ready.wait()
            self._run(pack, runner, index)
            # Nothing of the pack may outlive it while the worker waits.
            del pack

    def _take(self, lane: Lane, runner: Runner, ceiling: int) -> list[_Entry]:
        """Fill a pack from the jobs that wait, each in its turn; called under the lock."""
        waiting = self.waiting[lane]
        pack: list[_Entry] = []
        room = 0
        while waiting:
            job = waiting.popleft()
            if job.future.done():
                continue
            if not pack:
                room = min(job.budget or runner.default_budget, ceiling)
            elif job.lengths[job.cursor] > room:
                waiting.appendleft(job)
                break
            end = fill(job.lengths, start=job.cursor, room=room, padded=runner.padded)
            pack.extend((job, *entry) for entry in job.order[job.cursor : end])
            room -= sum(job.lengths[job.cursor : end])
            job.cursor = end
            if end < len(job.order):
                # The others' turn comes first.
                waiting.append(job)
                break
        return pack

    def _run(self, pack: list[_Entry], runner: Runner, index: int) -> None:
        # Queries of several callers come mixed; equal lengths share one attention call.
        pack.sort(key=lambda entry: len(entry[2]))
        try:
            rows = runner.run([sequence for _, _, sequence in pack])
        except torch.OutOfMemoryError as exc:
            self._shrink(pack, runner, index, exc)
            return
        except BaseException as exc:  # noqa: BLE001 -- a worker lives on and its callers must hear
            for job in {id(entry[0]): entry[0] for entry in pack}.values():
                job.fail(exc)
            return
        done: dict[int, tuple[_Job, list[int], Rows]] = {}
        for (job, place, _), row in zip(pack, rows, strict=True):
            _, places, own = done.setdefault(id(job), (job, [], []))
            places.append(place)
            own.append(row)
        for job, places, own in done.values():
            job.accept(places, own)

    def _shrink(self, pack: list[_Entry], runner: Runner, index: int, error: BaseException) -> None:
        """Run a pack that was too large in two halves, and remember the smaller size."""
        tokens = sum(len(sequence) for _, _, sequence in pack)
        if len(pack) == 1:
            msg = (
                f"{self.name!r} ran out of memory on one text of {tokens} tokens: pass a smaller "
                "max_length or dtype='float16', or free memory on the device."
            )
            failure = ComputationError(msg)
            failure.__cause__ = error
            pack[0][0].fail(failure)
            return
        self.ceilings[index] = min(self.ceilings[index], max(tokens // 2, 1))
        logger.warning(
            "Out of memory on a pack of %d tokens: going on with %d.", tokens, self.ceilings[index]
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(pack) // 2
        self._run(pack[:half], runner, index)
        self._run(pack[half:], runner, index)

    def close(self) -> None:
        """Stop the workers after the pack that they are at, and let go of the weights."""
        with self.ready:
            self.closed = True
            dropped = [job for jobs in self.waiting.values() for job in jobs]
            for jobs in self.waiting.values():
                jobs.clear()
            self.runners = {}
            self.ready.notify_all()
        msg = f"The model {self.name!r} was closed before this work was done."
        for job in dropped:
            job.fail(ClosedError(msg))

    def join(self, deadline: float) -> None:
        """Wait for the packs that are being computed, until a time of `time.monotonic()`."""
        for thread in (thread for lane in self.threads.values() for thread in lane):
            thread.join(max(0.0, deadline - time.monotonic()))

    def after_fork(self) -> None:
        """Start over in a forked child: its parent's threads are not here."""
        self.forked = True
        self._start_over()


class Engine:
    """One model on one or more devices, with its tokenizer.

    Args:
        runners: One a device, for each lane; both lanes may have the same.
        tokenizer: The checkpoint's tokenizer.
        name: The model's name, for messages.
    """

    def __init__(
        self, runners: Mapping[Lane, Sequence[Runner]], tokenizer: Tokenizer, *, name: str
    ) -> None:
        self.tokenizer = tokenizer
        self._workers = _Workers(runners, name)
        # The last owner's close, or garbage collection, stops the workers and frees the weights.
        weakref.finalize(self, self._workers.close)

    def submit(
        self,
        sequences: Sequence[Tokens],
        *,
        lane: Lane,
        budget: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Future[Rows]:
        """Queue sequences for computing.

        Args:
            sequences: At least one.
            lane: `"query"` for what somebody waits for, `"bulk"` for the rest.
            budget: Tokens a pack may have; None for the device's default.
            progress: Called in a worker with the number of sequences done.

        Returns:
            A future of one float32 row a sequence, in order. Cancelling it drops what has not
            been computed.

        Raises:
            ClosedError: The engine was closed.
        """
        job = _Job(sequences, budget, progress)
        self._workers.submit(job, lane)
        return job.future


_engines: weakref.WeakValueDictionary[Hashable, Engine] = weakref.WeakValueDictionary()
_live: weakref.WeakSet[_Workers] = weakref.WeakSet()
_loading = threading.RLock()


def shared_engine(key: Hashable, load: Callable[[], Engine]) -> Engine:
    """Give the engine of a key, loading it if no one has it.

    Args:
        key: Everything that changes the weights in memory.
        load: Loads the model.

    Returns:
        An engine that lives as long as somebody holds it.
    """
    with _loading:
        engine = _engines.get(key)
        if engine is None:
            engine = load()
            _engines[key] = engine
        return engine


def _step_aside() -> None:
    """Let the queries of this process come first on a busy CPU: threads inherit the niceness."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        nice = os.getpriority(os.PRIO_PROCESS, thread) + _BULK_NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(nice, 19))


def _at_exit() -> None:
    for workers in list(_live):
        workers.close()
    deadline = time.monotonic() + _EXIT_SECONDS
    for workers in list(_live):
        workers.join(deadline)


def _in_child() -> None:
    global _loading  # noqa: PLW0603 -- a lock that another thread held at the fork stays locked
    _loading = threading.RLock()
    for workers in list(_live):
        workers.after_fork()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
