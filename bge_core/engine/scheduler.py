"""The workers: one model a device, two priorities, shared by all callers.

Callers submit sequences and get a future. A worker fills a pack with whatever waits at its
priority, whoever asked for it, so that concurrent queries share one forward pass. Background work,
such as an index build, never delays interactive work.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, Literal

import torch

from bge_core.backends.packing import fill
from bge_core.engine.process import (
    at_exit,
    is_exiting,
    lower_thread_priority,
    on_fork,
    trim_heap,
)
from bge_core.errors import ComputationError, closed_error, closed_while_waiting_error

if TYPE_CHECKING:
    from bge_core.backends.base import Runner
    from bge_core.backends.output_cache import OutputCache
    from bge_core.tokenizer import Tokenizer, TokenSequence

__all__ = ["Engine", "Priority"]

logger = logging.getLogger(__name__)

Priority = Literal["interactive", "background"]
Rows = list[Any]

# After background work the heap goes back to the system once no more came for so long.
_IDLE_SECONDS = 1.0


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
        sequences: Sequence[TokenSequence],
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


_Entry = tuple[_Job, int, "TokenSequence"]


def _jobs(pack: Sequence[_Entry]) -> Iterable[_Job]:
    return {id(entry[0]): entry[0] for entry in pack}.values()


class _Workers:
    """What the worker threads share; it must not refer to the engine, so that that can die."""

    def __init__(self, runners: Mapping[Priority, Sequence[Runner]], name: str) -> None:
        self.runners = dict(runners)
        self.name = name
        self.ceilings = [1 << 60] * max(len(priority) for priority in runners.values())
        self.closed = False
        self.forked = False
        self._start_over()
        on_fork(self, _Workers.after_fork)
        at_exit(self)

    def _start_over(self) -> None:
        self.ready = threading.Condition()
        # Each caller's jobs, in the order of the callers' turns.
        self.waiting: dict[Priority, OrderedDict[Hashable, deque[_Job]]] = {
            "interactive": OrderedDict(),
            "background": OrderedDict(),
        }
        self.threads: dict[Priority, list[threading.Thread]] = {"interactive": [], "background": []}

    def submit(self, job: _Job, priority: Priority) -> None:
        with self.ready:
            if self.closed:
                raise closed_error(self.name)
            if not self.threads[priority]:
                self._start(priority)
            self.waiting[priority].setdefault(job.caller, deque()).append(job)
            self.ready.notify_all()
        # Weakly: a job and its future that know each other would wait for the garbage collector.
        mine = weakref.ref(job)
        job.future.add_done_callback(lambda future: self._forget(future, mine(), priority))

    def _forget(self, future: Future[Rows], job: _Job | None, priority: Priority) -> None:
        """Let go of what was cancelled before its turn, which may be far away."""
        if job is None or not future.cancelled():
            return
        with self.ready:
            jobs = self.waiting[priority].get(job.caller)
            if jobs is not None and job in jobs:
                jobs.remove(job)
                if not jobs:
                    del self.waiting[priority][job.caller]

    def _start(self, priority: Priority) -> None:
        for index in range(len(self.runners[priority])):
            thread = threading.Thread(
                target=self._work,
                args=(priority, index),
                name=f"bge-{priority}-{index}",
                daemon=True,
            )
            thread.start()
            self.threads[priority].append(thread)

    def _work(self, priority: Priority, index: int) -> None:
        self._serve(priority, index)
        if not is_exiting():
            trim_heap()

    def _serve(self, priority: Priority, index: int) -> None:
        """Compute what comes until the engine is closed; nothing of the model outlives it."""
        with self.ready:
            if self.closed:
                return
            runner = self.runners[priority][index]
        if priority == "background":
            lower_thread_priority()
        if self.forked:
            # GNU OpenMP's threads are not in a forked child, and waiting for them would hang.
            torch.set_num_threads(1)
        idle_since: float | None = None
        while True:
            with self.ready:
                pack = self._take(priority, runner, self.ceilings[index])
                if not pack:
                    if self.closed:
                        return
                    # Queries wake it, too, and are no reason to rest longer.
                    self.ready.wait(idle_since and max(0.0, idle_since - time.monotonic()))
            if pack:
                self._run(pack, runner, index)
                idle_since = time.monotonic() + _IDLE_SECONDS if priority == "background" else None
            elif idle_since and time.monotonic() >= idle_since:
                trim_heap()
                idle_since = None
            # Nothing of the pack may outlive it while the worker waits.
            del pack

    def _take(self, priority: Priority, runner: Runner, ceiling: int) -> list[_Entry]:
        """Fill a pack from the callers that wait, each in its turn; called under the lock."""
        waiting = self.waiting[priority]
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
                job
                for priority in self.waiting.values()
                for jobs in priority.values()
                for job in jobs
            ]
            for jobs in self.waiting.values():
                jobs.clear()
            self.runners = {}
            self.ready.notify_all()
        for job in dropped:
            job.fail(closed_while_waiting_error(self.name))

    def all_threads(self) -> list[threading.Thread]:
        """Give the threads of both priorities."""
        return [thread for priority in self.threads.values() for thread in priority]

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
        runners: One a device, for each priority; both may have the same.
        tokenizer: The checkpoint's tokenizer.
        name: The model's name, for messages.
        output_cache: What the runners' passes leave for others; None for none.
    """

    def __init__(
        self,
        runners: Mapping[Priority, Sequence[Runner]],
        tokenizer: Tokenizer,
        *,
        name: str,
        output_cache: OutputCache | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.output_cache = output_cache
        self._workers = _Workers(runners, name)
        # The last owner's close, or garbage collection, stops the workers and frees the weights.
        weakref.finalize(self, self._workers.close)

    @property
    def runners(self) -> Mapping[Priority, Sequence[Runner]]:
        """What executes packs, one a device, for each priority."""
        return self._workers.runners

    def submit(
        self,
        sequences: Sequence[TokenSequence],
        *,
        priority: Priority,
        caller: Hashable = None,
        budget: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Future[Rows]:
        """Queue sequences for computing.

        Args:
            sequences: At least one.
            priority: `"interactive"` for what somebody waits for, `"background"` for the rest.
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
        self._workers.submit(job, priority)
        return job.future
