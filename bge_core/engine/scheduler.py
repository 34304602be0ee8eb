"""The workers: one model, on a device or several, two priorities, shared by all callers.

Callers submit sequences and get a future. A worker fills a pack with whatever waits at its
priority, whoever asked for it, so that concurrent queries share one forward pass. Background work,
such as an index build, never delays interactive work.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeGuard, cast

import torch

from bge_core.backends.base import OverlappingRunner
from bge_core.backends.cpu_threads import (
    SMALL_PACK_TOKENS,
    end_waiting_threads,
    note_threads_end,
    use_threads,
)
from bge_core.backends.memory import free_cached_memory, is_out_of_memory
from bge_core.backends.packing import BatchSize, next_batch_end
from bge_core.engine.process import (
    at_exit,
    is_exiting,
    lower_thread_priority,
    on_fork,
    trim_heap,
)
from bge_core.engine.stats import Counters, Waiting
from bge_core.engine.thread_shares import ThreadShares
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
# Packs that have to succeed before a limit that an out-of-memory error set is doubled. A limit
# that turns out too high again waits for twice as many, up to so many.
_GOOD_PACKS = 16
_MOST_GOOD_PACKS = 1024
# A pack on a device that computes beside its thread has no more than what takes so long, so that
# callers get their turns; what it takes is learnt, from so many tokens on.
_PACK_SECONDS = 0.05
_FIRST_TOKENS = 4096
# A limit falls to no less; a pack that has less and doesn't fit is cut all the same.
_LEAST_TOKENS = 64
_UNLIMITED = 1 << 60
# Packs a device that a caller may have waiting or in work: enough that none rests while the caller
# tokenises more.
_PACKS_AHEAD = 3
# A pack takes no further caller from here on: filling it holds the lock that `submit` takes.
_MOST_SEQUENCES = 4096


class _Job:
    """One caller's sequences, computed over one or more packs."""

    __slots__ = (
        "__weakref__",
        "_left",
        "_lock",
        "budget",
        "caller",
        "counters",
        "cursor",
        "future",
        "gone",
        "lengths",
        "order",
        "progress",
        "rows",
        "tokens",
        "waits_since",
    )

    def __init__(
        self,
        sequences: Sequence[TokenSequence],
        caller: Hashable,
        budget: int | None,
        progress: Callable[[int], None] | None,
        counters: Counters | None = None,
    ) -> None:
        # Equal lengths stand side by side, longest first: what may run out of memory does so early.
        self.order = sorted(enumerate(sequences), key=lambda item: -len(item[1]))
        self.lengths = [len(sequence) for _, sequence in self.order]
        self.cursor = 0
        # That wait.
        self.tokens = sum(self.lengths)
        self.caller = caller
        self.budget = budget
        self.progress = progress
        self.counters = Counters() if counters is None else counters
        self.waits_since: float | None = time.perf_counter()
        self.rows: Rows = [None] * len(sequences)
        self.future: Future[Rows] = Future()
        # Nobody waits any more: it was cancelled, or a part of it failed.
        self.gone = False
        self._left = len(sequences)
        self._lock = threading.Lock()

    def waited(self, until: float) -> float:
        """Return the seconds that it waited for its first pass; 0 for the later ones."""
        since, self.waits_since = self.waits_since, None
        return 0.0 if since is None else until - since

    def accept(self, indices: Sequence[int], rows: Sequence[Any]) -> None:
        """Accept computed rows; the last ones finish the job."""
        with self._lock:
            for index, row in zip(indices, rows, strict=True):
                self.rows[index] = row
            self._left -= len(indices)
            done = not self._left
            # One worker at a time: it's the caller's, who may count without a lock.
            self._report(len(indices))
        if done:
            self._finish(lambda: self.future.set_result(self.rows))

    def _report(self, count: int) -> None:
        """Call the caller's own function, whose failure is nobody's: it is not called again."""
        if self.progress is None:
            return
        try:
            self.progress(count)
        except BaseException as exc:  # noqa: BLE001 -- this is a worker, and others wait for it
            self.progress = None
            _log(logging.WARNING, "A progress callback failed and is called no more: %r", exc)

    def fail(self, error: BaseException) -> None:
        """Fail the caller's future, unless the caller has gone."""
        self.gone = True
        self._finish(lambda: self.future.set_exception(error))

    def _finish(self, settle: Callable[[], None]) -> None:
        try:
            settle()
        except InvalidStateError:
            _log(logging.DEBUG, "A caller had left before its work was done.")


_Entry = tuple[_Job, int, "TokenSequence"]


def _jobs(pack: Sequence[_Entry]) -> Iterable[_Job]:
    return {id(entry[0]): entry[0] for entry in pack}.values()


def _log(level: int, message: str, *arguments: object) -> None:
    """Log from a worker: a handler or filter of the user's that raises must not end it."""
    with contextlib.suppress(Exception):
        logger.log(level, message, *arguments)


def _overlaps(runner: Runner) -> TypeGuard[OverlappingRunner]:
    return isinstance(runner, OverlappingRunner) and runner.overlaps


class _TokenLimit:
    """How many tokens a pack on one device may have: less after it ran out of memory.

    Another process may have taken the memory for a while, so the limit grows again. Both
    priorities' workers use it without a lock: a step that is lost is made by the next pack.
    """

    __slots__ = ("_failed", "_good", "_grown", "_patience", "tokens")

    def __init__(self) -> None:
        self.tokens = _UNLIMITED
        self._failed = 0
        self._good = 0
        self._grown = False
        self._patience = _GOOD_PACKS

    def lower(self, failed: int) -> None:
        """Note that so many tokens didn't fit."""
        if self._grown:
            self._patience = min(2 * self._patience, _MOST_GOOD_PACKS)
        self._grown, self._good = False, 0
        self._failed = max(self._failed, failed)
        self.tokens = min(self.tokens, max(failed // 2, _LEAST_TOKENS))

    def succeed(self, tokens: int) -> None:
        """Note that so many tokens fitted; small packs say nothing of the limit."""
        if self.tokens == _UNLIMITED or 2 * tokens < min(self.tokens, self._failed):
            return
        self._good += 1
        if self._good < self._patience:
            return
        self._grown, self._good = True, 0
        self.tokens *= 2
        if self.tokens > self._failed:
            self.tokens, self._failed, self._patience = _UNLIMITED, 0, _GOOD_PACKS


class _Pace:
    """How many tokens a device computes in the time that a pack may take."""

    __slots__ = ("tokens",)

    def __init__(self) -> None:
        self.tokens = _FIRST_TOKENS

    def note(self, tokens: int, seconds: float) -> None:
        """Note how long so many tokens took; a small pack says nothing unless it was slow."""
        if 2 * tokens < self.tokens and seconds < _PACK_SECONDS:
            return
        factor = _PACK_SECONDS / max(seconds, 1e-6)
        # By steps: a first pass takes seconds, and that says nothing of the next.
        wanted = int(self.tokens * min(max(factor, 0.5), 2.0))
        self.tokens = min(max(wanted, _LEAST_TOKENS), _UNLIMITED)


class _Pass:
    """A pack that a device computes, or will when it is asked for the rows."""

    __slots__ = ("begun", "computed", "fetch", "lengths", "pack", "tokens")

    def __init__(self, pack: list[_Entry], runner: Runner, *, overlapping: bool) -> None:
        # Queries of several callers come mixed; equal lengths share one attention call.
        pack.sort(key=lambda entry: len(entry[2]))
        self.pack = pack
        self.lengths = [len(sequence) for _, _, sequence in pack]
        self.tokens = self.lengths[-1] * len(pack) if runner.padded else sum(self.lengths)
        self.begun = time.perf_counter()
        self.computed: Callable[[], None] | None = None
        """Called when it is computed, before anybody hears of it, who might fork then."""
        sequences = [sequence for _, _, sequence in pack]
        self.fetch: Callable[[], Rows | Any]
        if not overlapping:
            self.fetch = partial(runner.run, sequences)
            return
        try:
            self.fetch = cast("OverlappingRunner", runner).launch(sequences)
        except BaseException as exc:  # noqa: BLE001 -- the pass before is handed out first
            # Its traceback holds every tensor of the failed pass.
            self.fetch = partial(_fail, exc.with_traceback(None) if is_out_of_memory(exc) else exc)

    def rows(self) -> Rows | Any:
        """Return the rows, which may have to be computed or waited for."""
        try:
            return self.fetch()
        finally:
            if self.computed is not None:
                self.computed()


def _fail(error: BaseException) -> NoReturn:
    raise error


class _Pool:
    """The threads that feed one runner at one priority; used under the workers' lock.

    Args:
        threads: Threads that its passes may share out.
    """

    __slots__ = ("idle", "shares", "threads")

    def __init__(self, threads: int) -> None:
        self.shares = ThreadShares(threads)
        self.threads: list[threading.Thread] = []
        self.idle: dict[int, threading.Condition] = {}
        """Those that wait for work, by their number in `threads`."""


class _Workers:
    """What the worker threads share; it must not refer to the engine, so that that can die."""

    def __init__(self, runners: Mapping[Priority, Sequence[Runner]], name: str) -> None:
        self.runners = dict(runners)
        self.name = name
        devices = max(len(priority) for priority in runners.values())
        self.token_limits = [_TokenLimit() for _ in range(devices)]
        self.closed = False
        self.forked = False
        self._start_over()
        on_fork(self, _Workers.after_fork)
        at_exit(self)

    def _start_over(self) -> None:
        self.lock = threading.RLock()
        # Each caller's jobs, in the order of the callers' turns.
        self.waiting: dict[Priority, OrderedDict[Hashable, deque[_Job]]] = {
            "interactive": OrderedDict(),
            "background": OrderedDict(),
        }
        self.waiting_tokens: dict[Priority, int] = {"interactive": 0, "background": 0}
        # GNU OpenMP's threads are not in a forked child, and waiting for them would hang.
        self.pools: dict[Priority, list[_Pool]] = {
            priority: [_Pool(1 if self.forked else runner.threads) for runner in runners]
            for priority, runners in self.runners.items()
        }

    def submit(self, job: _Job, priority: Priority) -> None:
        with self.lock:
            if self.closed:
                raise closed_error(self.name)
            if self.forked and any(_overlaps(runner) for runner in self.runners[priority]):
                msg = (
                    f"{self.name!r} was loaded onto a GPU before this process was forked, and no "
                    "child can use CUDA then: start processes by multiprocessing's 'spawn', or use "
                    "the model in the children only."
                )
                raise ComputationError(msg)
            self._wake(priority)  # which waits for the lock then
            self.waiting[priority].setdefault(job.caller, deque()).append(job)
            self.waiting_tokens[priority] += job.tokens
        # Weakly: a job and its future that know each other would wait for the garbage collector.
        mine = weakref.ref(job)
        job.future.add_done_callback(lambda future: self._drop_cancelled(future, mine(), priority))

    def _drop_cancelled(self, future: Future[Rows], job: _Job | None, priority: Priority) -> None:
        """Release what was cancelled before its turn, which may be far away."""
        if job is None or not future.cancelled():
            return
        job.gone = True
        with self.lock:
            jobs = self.waiting[priority].get(job.caller)
            if jobs is not None and job in jobs:
                jobs.remove(job)
                self.waiting_tokens[priority] -= job.tokens
                if not jobs:
                    del self.waiting[priority][job.caller]

    def _wake(self, priority: Priority) -> None:
        """Have one more worker look at what waits; called under the lock.

        Always the first that has nothing to do, so that queries one after the other find the same
        thread, and what it has ready.
        """
        for index, pool in enumerate(self.pools[priority]):
            if not pool.shares.any_free:
                continue
            if pool.idle:
                pool.idle.pop(min(pool.idle)).notify()
                return
            if len(pool.threads) < pool.shares.workers:
                self._start(priority, index, pool)
                return

    def _start(self, priority: Priority, index: int, pool: _Pool) -> None:
        number = len(pool.threads)
        thread = threading.Thread(
            target=self._work,
            args=(priority, index, number),
            name=f"bge-{priority}-{index}" + (f"-{number}" if number else ""),
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError:  # no room for another: those that there are do it
            if not any(other.threads for other in self.pools[priority]):
                raise
        else:
            pool.threads.append(thread)

    def _work(self, priority: Priority, index: int, number: int) -> None:
        self._serve(priority, index, number)
        if not is_exiting():
            trim_heap()
        note_threads_end()

    def _serve(self, priority: Priority, index: int, number: int) -> None:
        """Compute what comes until the engine is closed; nothing of the model outlives it."""
        with self.lock:
            if self.closed:
                return
            runner = self.runners[priority][index]
        if priority == "background":
            lower_thread_priority()
        if self.forked:
            torch.set_num_threads(1)
        if _overlaps(runner):
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(runner.on_thread(urgent=priority == "interactive"))
                except Exception as exc:  # noqa: BLE001 -- a pass says it to its callers, too
                    _log(logging.WARNING, "A worker has no stream of its own: %s", exc)
                self._loop(priority, index, number, runner, _Pace())
        else:
            self._loop(priority, index, number, runner, None)

    def _loop(
        self, priority: Priority, index: int, number: int, runner: Runner, pace: _Pace | None
    ) -> None:
        """Compute pack by pack; with a pace, the next one is made while the device computes."""
        pool, limit = self.pools[priority][index], self.token_limits[index]
        work = threading.Condition(self.lock)
        computing: _Pass | None = None
        idle_since: float | None = None
        finished = 0.0
        threads = 0
        while True:
            with self.lock:
                if threads:
                    pool.shares.give_back(threads)
                pack, threads = self._next_pack(priority, pool, runner, limit, pace)
                if not pack and computing is None:
                    if self.closed:
                        return
                    pool.idle[number] = work
                    # Queries wake it, too, and are no reason to rest longer.
                    work.wait(idle_since and max(0.0, idle_since - time.monotonic()))
                    pool.idle.pop(number, None)
            if threads and pool.shares.workers > 1:
                use_threads(threads)
            following = _Pass(pack, runner, overlapping=pace is not None) if pack else None
            done = computing if pace else following
            # Small packs are the first worker's, whose threads stay.
            if done is not None and (number or done.tokens > SMALL_PACK_TOKENS):
                done.computed = partial(self._end_threads, priority)
            if done is not None:
                # It began when the device had done the pass before.
                done.begun = max(done.begun, finished)
                self._finish(done, runner, limit)
                finished = time.perf_counter()
                if pace:
                    pace.note(done.tokens, finished - done.begun)
                idle_since = time.monotonic() + _IDLE_SECONDS if priority == "background" else None
            elif following is None and idle_since and time.monotonic() >= idle_since:
                trim_heap()
                idle_since = None
            computing = following if pace else None
            # Nothing of a pack may outlive it while the worker waits.
            del pack, following, done

    def _end_threads(self, priority: Priority) -> None:
        """End the threads that this one shared a pack with, unless there is more to compute."""
        if not self.waiting[priority]:
            end_waiting_threads()

    def _next_pack(
        self,
        priority: Priority,
        pool: _Pool,
        runner: Runner,
        limit: _TokenLimit,
        pace: _Pace | None,
    ) -> tuple[list[_Entry], int]:
        """Take a pack and the threads that compute it; called under the lock.

        A device that computes beside its thread has no threads to share out.
        """
        if pace is None and not pool.shares.any_free:
            return [], 0
        before = self.waiting_tokens[priority]
        most = min(limit.tokens, pool.shares.pack_tokens(before))
        pack = self._take(priority, runner, most, pace.tokens if pace else None)
        if not pack:
            return [], 0
        waiting = self.waiting_tokens[priority]
        threads = 0 if pace else pool.shares.claim(before - waiting, waiting)
        if waiting:
            self._wake(priority)
        return pack, threads

    def _take(
        self, priority: Priority, runner: Runner, limit: int, most: int | None = None
    ) -> list[_Entry]:
        """Fill a pack from the callers that wait, each in its turn; called under the lock.

        It has `limit` tokens at the most, and `most` unless a caller has a budget of its own.

        `submit` waits for the lock, on an event loop, too: each caller costs a few steps, however
        many there are.
        """
        waiting = self.waiting[priority]
        padded, default_budget = runner.padded, min(runner.default_budget, most or _UNLIMITED)
        pack: list[_Entry] = []
        size = BatchSize()
        while waiting and size.count < _MOST_SEQUENCES:
            caller, jobs = waiting.popitem(last=False)
            taken = len(pack)
            while jobs:
                job = jobs[0]
                if job.gone:
                    self.waiting_tokens[priority] -= job.tokens
                    jobs.popleft()
                    continue
                start = job.cursor
                own = min(limit, job.budget or default_budget)
                end = next_batch_end(
                    job.lengths, start=start, limit=own, padded=padded, packed=size
                )
                if end > start:
                    limit = own
                    tokens = sum(job.lengths[start:end])
                    job.tokens -= tokens
                    self.waiting_tokens[priority] -= tokens
                    for place, sequence in job.order[start:end]:
                        pack.append((job, place, sequence))
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

    def _run(self, pack: list[_Entry], runner: Runner, limit: _TokenLimit) -> None:
        """Compute a pack and hand its rows out."""
        self._finish(_Pass(pack, runner, overlapping=False), runner, limit)

    def _finish(self, computed: _Pass, runner: Runner, limit: _TokenLimit) -> None:
        """Hand a pass's rows out; whatever goes wrong is its callers' to hear."""
        try:
            self._fetch(computed, runner, limit)
        except BaseException as exc:  # noqa: BLE001 -- a worker lives on and its callers must hear
            for job in _jobs(computed.pack):
                job.fail(exc)

    def _fetch(self, computed: _Pass, runner: Runner, limit: _TokenLimit) -> None:
        pack, tokens = computed.pack, computed.tokens
        try:
            rows = computed.rows()
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            # Its traceback holds every tensor of the failed pass.
            shortage = exc.with_traceback(None)
        else:
            self._scatter_results(pack, rows, computed.begun)
            limit.succeed(tokens)
            return
        self._retry_in_smaller_batches(computed, runner, limit, shortage)

    def _scatter_results(self, pack: list[_Entry], rows: Iterable[Any], started: float) -> None:
        computed = time.perf_counter()
        done: dict[int, tuple[_Job, list[int], Rows]] = {}
        for (job, place, _), row in zip(pack, rows, strict=True):
            _, positions, own = done.setdefault(id(job), (job, [], []))
            positions.append(place)
            own.append(row)
        waits: dict[Counters, float] = {}
        for job, _, _ in done.values():
            waits[job.counters] = waits.get(job.counters, 0.0) + job.waited(started)
        for counters, wait in waits.items():
            counters.add_pack(computed - started, wait)
        for job, positions, own in done.values():
            job.accept(positions, own)
        for counters in waits:
            counters.add_hand_out(time.perf_counter() - computed)

    def _retry_in_smaller_batches(
        self,
        failed: _Pass,
        runner: Runner,
        limit: _TokenLimit,
        shortage: BaseException,
    ) -> None:
        """Run a pack that was too large in parts, and remember the smaller size."""
        pack, lengths, tokens = failed.pack, failed.lengths, failed.tokens
        if len(pack) == 1:
            msg = (
                f"{self.name!r} ran out of memory on one text of {tokens} tokens: pass a smaller "
                "max_length or dtype='float16', or free memory on the device."
            )
            raise ComputationError(msg) from shortage
        free_cached_memory()
        trim_heap()
        limit.lower(tokens)
        _log(
            logging.WARNING,
            "Out of memory on a pack of %d tokens: going on with %d.",
            tokens,
            limit.tokens,
        )
        start = 0
        while start < len(pack):
            # The limit may fall while the parts run. A part is smaller than the whole.
            most = min(limit.tokens, max(tokens // 2, 1))
            end = next_batch_end(lengths, start=start, limit=most, padded=runner.padded)
            self._run(pack[start:end], runner, limit)
            start = end

    def count_waiting(self) -> dict[Priority, Waiting]:
        """Count what no pack has taken yet."""
        with self.lock:
            return {
                priority: Waiting(
                    callers=len(callers),
                    sequences=sum(
                        len(job.order) - job.cursor
                        for jobs in callers.values()
                        for job in jobs
                        if not job.gone
                    ),
                )
                for priority, callers in self.waiting.items()
            }

    def close(self) -> None:
        """Stop the workers after the pack that they are at, and release the weights."""
        with self.lock:
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
            for pool in self.all_pools():
                for work in pool.idle.values():
                    work.notify()
        for job in dropped:
            job.fail(closed_while_waiting_error(self.name))

    def all_pools(self) -> list[_Pool]:
        """Return the pools of both priorities."""
        return [pool for pools in self.pools.values() for pool in pools]

    def all_threads(self) -> list[threading.Thread]:
        """Return the threads of both priorities."""
        return [thread for pool in self.all_pools() for thread in pool.threads]

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

    def tokens_ahead(self, priority: Priority, budget: int | None = None) -> int:
        """Return how many tokens of one caller keep every device busy.

        Args:
            priority: Whose devices.
            budget: Tokens a pack may have; None for the devices' defaults.
        """
        runners = self._workers.runners.get(priority, ())
        pools = self._workers.pools.get(priority, ())
        return _PACKS_AHEAD * sum(
            pool.shares.tokens_at_once(budget or runner.default_budget)
            for runner, pool in zip(runners, pools, strict=False)
        )

    @property
    def cache_hits(self) -> int:
        """How often a pass found an output that an earlier one had left."""
        return 0 if self.output_cache is None else self.output_cache.hits

    def waiting(self) -> Mapping[Priority, Waiting]:
        """Count what waits, whoever asked."""
        return self._workers.count_waiting()

    def submit(
        self,
        sequences: Sequence[TokenSequence],
        *,
        priority: Priority,
        caller: Hashable = None,
        budget: int | None = None,
        progress: Callable[[int], None] | None = None,
        counters: Counters | None = None,
    ) -> Future[Rows]:
        """Queue sequences for computing.

        Args:
            sequences: At least one.
            priority: `"interactive"` for what somebody waits for, `"background"` for the rest.
            caller: Who asks: callers take turns, and a caller's own jobs follow one another. None
                for a caller of its own.
            budget: Tokens a pack may have; None for the device's default.
            progress: Called in a worker with the number of sequences done.
            counters: What counts them, and their packs; None for nothing.

        Returns:
            A future of one row a sequence, in order, as the runner gives it. Cancelling it drops
            what has not been computed.

        Raises:
            ClosedError: The engine was closed.
        """
        job = _Job(sequences, object() if caller is None else caller, budget, progress, counters)
        self._workers.submit(job, priority)
        job.counters.add_sequences(len(job.lengths), sum(job.lengths))
        return job.future
