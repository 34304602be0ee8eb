"""The workers: one model a device, a lane for queries and one for bulk, shared by all callers.

Callers hand in sequences and get a future. A lane's worker fills a pack with whatever waits,
whoever asked for it, so concurrent queries share one forward pass, and an index build in the
bulk lane never stands before a query.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, Literal

import torch

from bge_core.errors import ClosedError, ComputationError, closed, closed_meanwhile
from bge_core.packing import fill

if TYPE_CHECKING:
    from bge_core.runner import Runner
    from bge_core.tokens import Tokenizer, Tokens

__all__ = ["Engine", "Lane", "shared_engine", "staying"]

logger = logging.getLogger(__name__)

Lane = Literal["query", "bulk"]
Rows = list[Any]

# How long the interpreter's end waits for threads that are in C++, and would crash it.
_EXIT_SECONDS = 4.0
# After bulk work, what the allocator kept goes back to the system once no more came for so long.
_REST_SECONDS = 1.0
# Bulk work gets a third of the CPU that queries get while both want it, and all of it otherwise.
_BULK_NICENESS = 5


class _Job:
    """One caller's sequences, computed over one or more packs."""

    __slots__ = (
        "__weakref__",
        "_left",
        "_lock",
        "budget",
        "caller",
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
        caller: Hashable,
        budget: int | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        # Equal lengths stand side by side, longest first: what may run out of memory does so early.
        self.order = sorted(enumerate(sequences), key=lambda item: -len(item[1]))
        self.lengths = [len(sequence) for _, sequence in self.order]
        self.cursor = 0
        self.caller = caller
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


def _jobs(pack: Sequence[_Entry]) -> Iterable[_Job]:
    return {id(entry[0]): entry[0] for entry in pack}.values()


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
        # Each caller's jobs, in the order of the callers' turns.
        self.waiting: dict[Lane, OrderedDict[Hashable, deque[_Job]]] = {
            "query": OrderedDict(),
            "bulk": OrderedDict(),
        }
        self.threads: dict[Lane, list[threading.Thread]] = {"query": [], "bulk": []}

    def submit(self, job: _Job, lane: Lane) -> None:
        with self.ready:
            if self.closed:
                raise closed(self.name)
            if not self.threads[lane]:
                self._start(lane)
            self.waiting[lane].setdefault(job.caller, deque()).append(job)
            self.ready.notify_all()
        # Weakly: a job and its future that know each other would wait for the garbage collector.
        mine = weakref.ref(job)
        job.future.add_done_callback(lambda future: self._forget(future, mine(), lane))

    def _forget(self, future: Future[Rows], job: _Job | None, lane: Lane) -> None:
        """Let go of what was cancelled before its turn, which may be far away."""
        if job is None or not future.cancelled():
            return
        with self.ready:
            jobs = self.waiting[lane].get(job.caller)
            if jobs is not None and job in jobs:
                jobs.remove(job)
                if not jobs:
                    del self.waiting[lane][job.caller]

    def _start(self, lane: Lane) -> None:
        for index in range(len(self.runners[lane])):
            thread = threading.Thread(
                target=self._work, args=(lane, index), name=f"bge-{lane}-{index}", daemon=True
            )
            thread.start()
            self.threads[lane].append(thread)

    def _work(self, lane: Lane, index: int) -> None:
        self._serve(lane, index)
        if not _presence.ending:
            _give_back()

    def _serve(self, lane: Lane, index: int) -> None:
        """Compute what comes until the engine is closed; nothing of the model outlives it."""
        with self.ready:
            if self.closed:
                return
            runner = self.runners[lane][index]
        if lane == "bulk":
            _step_aside()
        if self.forked:
            # GNU OpenMP's threads are not in a forked child, and waiting for them would hang.
            torch.set_num_threads(1)
        rested: float | None = None
        while True:
            with self.ready:
                pack = self._take(lane, runner, self.ceilings[index])
                if not pack:
                    if self.closed:
                        return
                    # Queries wake it, too, and are no reason to rest longer.
                    self.ready.wait(rested and max(0.0, rested - time.monotonic()))
            if pack:
                self._run(pack, runner, index)
                rested = time.monotonic() + _REST_SECONDS if lane == "bulk" else None
            elif rested and time.monotonic() >= rested:
                _give_back()
                rested = None
            # Nothing of the pack may outlive it while the worker waits.
            del pack

    def _take(self, lane: Lane, runner: Runner, ceiling: int) -> list[_Entry]:
        """Fill a pack from the callers that wait, each in its turn; called under the lock."""
        waiting = self.waiting[lane]
        pack: list[_Entry] = []
        lengths: list[int] = []
        room = ceiling
        for _ in range(len(waiting)):
            caller, jobs = waiting.popitem(last=False)
            taken = len(pack)
            while jobs:
                job = jobs[0]
                if job.future.done():
                    jobs.popleft()
                    continue
                own = min(room, job.budget or runner.default_budget)
                end = fill(
                    job.lengths, start=job.cursor, room=own, padded=runner.padded, beside=lengths
                )
                if end > job.cursor:
                    room = own
                pack += ((job, *entry) for entry in job.order[job.cursor : end])
                lengths += job.lengths[job.cursor : end]
                job.cursor = end
                if end < len(job.order):
                    break
                jobs.popleft()
            if jobs:
                waiting[caller] = jobs
                if len(pack) == taken:
                    # Nothing of it fitted, so its turn is still to come.
                    waiting.move_to_end(caller, last=False)
                break
        return pack

    def _run(self, pack: list[_Entry], runner: Runner, index: int) -> None:
        # Queries of several callers come mixed; equal lengths share one attention call.
        pack.sort(key=lambda entry: len(entry[2]))
        shortage: BaseException | None = None
        try:
            rows = runner.run([sequence for _, _, sequence in pack])
            self._hand_out(pack, rows)
        except torch.OutOfMemoryError as exc:
            # Its traceback holds every tensor of the failed pass.
            shortage = exc.with_traceback(None)
        except BaseException as exc:  # noqa: BLE001 -- a worker lives on and its callers must hear
            for job in _jobs(pack):
                job.fail(exc)
        if shortage is not None:
            self._shrink(pack, runner, index, shortage)

    def _hand_out(self, pack: list[_Entry], rows: Iterable[Any]) -> None:
        done: dict[int, tuple[_Job, list[int], Rows]] = {}
        for (job, place, _), row in zip(pack, rows, strict=True):
            _, places, own = done.setdefault(id(job), (job, [], []))
            places.append(place)
            own.append(row)
        for job, places, own in done.values():
            job.accept(places, own)

    def _shrink(
        self, pack: list[_Entry], runner: Runner, index: int, shortage: BaseException
    ) -> None:
        """Run a pack that was too large in parts, and remember the smaller size."""
        tokens = sum(len(sequence) for _, _, sequence in pack)
        if len(pack) == 1:
            msg = (
                f"{self.name!r} ran out of memory on one text of {tokens} tokens: pass a smaller "
                "max_length or dtype='float16', or free memory on the device."
            )
            failure = ComputationError(msg)
            failure.__cause__ = shortage
            pack[0][0].fail(failure)
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.ceilings[index] = min(self.ceilings[index], max(tokens // 2, 1))
        logger.warning(
            "Out of memory on a pack of %d tokens: going on with %d.", tokens, self.ceilings[index]
        )
        lengths = [len(sequence) for _, _, sequence in pack]
        start = 0
        while start < len(pack):
            # The ceiling may fall while the parts run. A part is smaller than the whole.
            room = min(self.ceilings[index], tokens - 1)
            end = fill(lengths, start=start, room=room, padded=runner.padded)
            self._run(pack[start:end], runner, index)
            start = end

    def close(self) -> None:
        """Stop the workers after the pack that they are at, and let go of the weights."""
        with self.ready:
            self.closed = True
            dropped = [
                job for lane in self.waiting.values() for jobs in lane.values() for job in jobs
            ]
            for jobs in self.waiting.values():
                jobs.clear()
            self.runners = {}
            self.ready.notify_all()
        for job in dropped:
            job.fail(closed_meanwhile(self.name))

    def all_threads(self) -> list[threading.Thread]:
        """Give the threads of all lanes."""
        return [thread for lane in self.threads.values() for thread in lane]

    def join(self, deadline: float) -> None:
        """Wait for the packs that are being computed, until a time of `time.monotonic()`."""
        for thread in self.all_threads():
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

    @property
    def runners(self) -> Mapping[Lane, Sequence[Runner]]:
        """What executes packs, one a device, for each lane."""
        return self._workers.runners

    def submit(
        self,
        sequences: Sequence[Tokens],
        *,
        lane: Lane,
        caller: Hashable = None,
        budget: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Future[Rows]:
        """Queue sequences for computing.

        Args:
            sequences: At least one.
            lane: `"query"` for what somebody waits for, `"bulk"` for the rest.
            caller: Who asks: callers take turns, and a caller's own jobs follow one another. None
                for a caller of its own.
            budget: Tokens a pack may have; None for the device's default.
            progress: Called in a worker with the number of sequences done.

        Returns:
            A future of one row a sequence, in order, as the runner gives it. Cancelling it drops
            what has not been computed.

        Raises:
            ClosedError: The engine was closed.
        """
        job = _Job(sequences, object() if caller is None else caller, budget, progress)
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
    with _loading, staying():
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
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, thread, min(nice, 19))


def _give_back() -> None:
    """Have glibc return what was freed: it would keep a gigabyte of weights and activations.

    Each worker has a part of the heap of its own, and the next model's workers get others. It
    takes some 10 ms, and the next pass a few more, which is why it is not done while work comes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class _Presence:
    """Counts the callers' threads that are where the interpreter must not end around them."""

    def __init__(self) -> None:
        self.ending = False
        self.after_fork()

    def after_fork(self) -> None:
        """Start over in a forked child, where a lock may stay locked for ever."""
        self.changed = threading.Condition()
        self.count = 0


_presence = _Presence()
_ENDING = "The interpreter is ending: nothing is loaded or computed any more."


@contextlib.contextmanager
def staying() -> Iterator[None]:
    """Let the interpreter's end wait for this thread, for a few seconds at most.

    A daemon thread that comes back from C++ or Rust to an interpreter that has ended is unwound
    through frames that forbid it, and the process aborts.

    Raises:
        ClosedError: The interpreter is ending.
    """
    with _presence.changed:
        if _presence.ending:
            raise ClosedError(_ENDING)
        _presence.count += 1
    try:
        yield
    except Exception as exc:
        # Libraries fail in ways of their own then, which say nothing of the model.
        if _presence.ending:
            raise ClosedError(_ENDING) from exc
        raise
    finally:
        with _presence.changed:
            _presence.count -= 1
            _presence.changed.notify_all()


def _at_exit() -> None:
    with _presence.changed:
        _presence.ending = True
    live = list(_live)
    for workers in live:
        workers.close()
    _stop_between_modules({thread for workers in live for thread in workers.all_threads()})
    deadline = time.monotonic() + _EXIT_SECONDS
    for workers in live:
        workers.join(deadline)
    with _presence.changed:
        _presence.changed.wait_for(lambda: not _presence.count, deadline - time.monotonic())


def _stop_between_modules(threads: AbstractSet[threading.Thread]) -> None:
    """Have threads leave a long pass at its next module."""

    def stop(_module: torch.nn.Module, _inputs: Any) -> None:
        if threading.current_thread() in threads:
            raise ClosedError(_ENDING)

    torch.nn.modules.module.register_module_forward_pre_hook(stop)


def _in_child() -> None:
    global _loading  # noqa: PLW0603 -- a lock that another thread held at the fork stays locked
    _loading = threading.RLock()
    _presence.after_fork()
    for workers in list(_live):
        workers.after_fork()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
