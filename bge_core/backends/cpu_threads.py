"""How many of a CPU's threads compute a pack, and whether they spin or sleep between its steps.

A short query is some hundred small steps, each shared out among threads that wait for the next.
Threads that spin meanwhile take two thirds of one thread's time where nothing else wants the cores.
Where something does, they take the core of the one that they wait for, and one thread alone is
faster: that can't be known but by measuring. The steps of a large pack are long, and its threads
sleep between them (docs/decisions/30).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import statistics
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any, NamedTuple

import torch

__all__ = [
    "SMALL_PACK_TOKENS",
    "PackThreads",
    "end_waiting_threads",
    "note_threads_end",
    "shareable_threads",
    "use_threads",
]

logger = logging.getLogger(__name__)

SMALL_PACK_TOKENS = 64
"""A pack of no more tokens is small."""
# Small packs whose numbers of tokens differ by less count as one size.
_ALIKE = 16
# Besides one and all: a query's steps are too small for dozens.
_SOME = 4
# Passes that say what a way takes, at the least and at the most: the last ones.
_SAMPLES = 3
_LAST = 7
# Threads have ended after so many seconds, on a busy machine, too.
_END_SECONDS = 0.05
# A pass that takes so many seconds has steps as long as a large pack's.
_LONG = 0.1
# Part of the time that goes to finding out whether another way is faster by now.
_TRIALS = 0.01


class _Way(NamedTuple):
    """How a pack is computed: by how many threads, and whether they spin."""

    threads: int
    spin: bool


class PackThreads:
    """Chooses the threads for each pack of one model."""

    def __init__(self) -> None:
        self._sizes: defaultdict[int, _Size] = defaultdict(_Size)
        if torch.get_num_threads() > 1:
            _sleepers.hold()

    @contextmanager
    def computing(self, tokens: int) -> Iterator[None]:
        """Return a context that computes a pack of so many tokens, all of its texts' together."""
        most = torch.get_num_threads()
        openmp = _openmp()
        if openmp is None or most == 1:
            yield
            return
        if tokens > SMALL_PACK_TOKENS:
            _sleepers.hold()
            yield
            return
        size = self._sizes[tokens // _ALIKE]
        way = size.choose(most)
        if way.spin:
            _sleepers.release()
        else:
            _sleepers.hold()
        # Of this thread alone; torch's own function changes the user's threads, too.
        openmp.omp_set_num_threads(way.threads)
        start = perf_counter()
        try:
            yield
            size.note(way, perf_counter() - start)
        finally:
            openmp.omp_set_num_threads(most)


class _Size:
    """What the passes of one size took. Two workers may use it without a lock, and lose a note."""

    def __init__(self) -> None:
        self._seconds: dict[_Way, tuple[float, ...]] = {}
        self._since: dict[_Way, float] = {}
        """Seconds that passes took in other ways since one was last tried."""
        self._last: _Way | None = None

    def choose(self, most: int) -> _Way:
        """Return the way that has been fastest, or one that it's time to try.

        Args:
            most: Threads that there are.
        """
        asleep = _Way(most, spin=False)
        counts = (most, _SOME, 1) if most > _SOME else (most, 1)
        median: dict[_Way, float] = {}
        for way in (asleep, *(_Way(threads, spin=threads > 1) for threads in counts)):
            if way.spin and not _sleepers.may_go:
                continue
            seconds = self._seconds.get(way, ())
            best = min(median.values(), default=math.inf)
            # One pass that takes twice as long says enough.
            if len(seconds) < _SAMPLES and not any(took > 2 * best for took in seconds):
                return way
            median[way] = statistics.median(seconds)
            if way == asleep and min(seconds) > _LONG:
                return way
        best = min(median.values())
        for way, took in median.items():
            # Two passes a trial; a quarter more, for two that take the same.
            if took > best and self._since[way] * _TRIALS > 2 * (took - best) + best / 4:
                return way
        return min(median, key=median.__getitem__)

    def note(self, way: _Way, seconds: float) -> None:
        """Note what a pass took; the first after a change of ways has threads to end and make."""
        last, self._last = self._last, way
        if way != last and not (way.spin and seconds > _LONG):
            return
        rest = {other: since + seconds for other, since in self._since.items()}
        others = (took for other, took in self._seconds.items() if other != way)
        best = min(map(statistics.median, others), default=0.0)
        # One that was faster for once is tried again at once.
        self._since = {**rest, way: math.inf if seconds < best else 0.0}
        self._seconds[way] = (*self._seconds.get(way, ()), seconds)[-_LAST:]
        if way.spin and seconds > 2 * best > 0.0:
            _sleepers.stay((seconds - best) / _TRIALS)


def shareable_threads() -> int:
    """Return how many threads packs may share out; 1 where they can't be set for each."""
    return 1 if _openmp() is None else torch.get_num_threads()


def use_threads(count: int) -> None:
    """Have so many threads compute what the calling thread computes from here on."""
    if (openmp := _openmp()) is None:
        return
    # In each thread's first call of it, torch sets what the user asked for.
    torch.get_num_threads()
    openmp.omp_set_num_threads(count)


def end_waiting_threads() -> None:
    """End the threads that compute for this one, of which GNU's OpenMP would keep some for each.

    The next pass makes new ones. That isn't done after a small pack: a new thread often starts on
    the core of the one that waits for it, and a query takes half as long again.
    """
    openmp = _openmp()
    if openmp is not None and _is_gnu(openmp):
        pause = getattr(openmp, "omp_pause_resource_all", None)
        if pause is not None:
            note_threads_end()
            pause(1)


_last_end = [-math.inf]


def note_threads_end() -> None:
    """Note that threads that computed end about now: a fork waits until they have."""
    _last_end[0] = monotonic()


def _wait_for_ending_threads() -> None:
    """Wait before a fork for threads that are ending.

    Each gives MKL's buffers back as it ends, with a lock that a child would find taken for good.
    """
    sleep(min(max(_last_end[0] + _END_SECONDS - monotonic(), 0.0), _END_SECONDS))


class _Sleepers:
    """Two threads that do nothing: with them OpenMP has more than there are cores.

    By that GNU's decides whether threads sleep between steps, or spin for some milliseconds.
    """

    def __init__(self) -> None:
        self.after_fork()

    def after_fork(self) -> None:
        """Start over in a forked child, where no other thread is."""
        self._lock = threading.Lock()
        self._end: threading.Event | None = None
        self._stay_until = 0.0

    @property
    def may_go(self) -> bool:
        """Whether spinning may be tried."""
        return monotonic() >= self._stay_until

    def stay(self, seconds: float) -> None:
        """Let nothing spin for so long, whatever model and size it is.

        Where two processes spin at once, a pass takes thirty times as long.
        """
        self._stay_until = monotonic() + seconds

    def hold(self) -> None:
        """Let threads sleep."""
        openmp = _openmp()
        if openmp is None or not _is_gnu(openmp):
            return
        with self._lock:
            if self._end is not None:
                return
            started, end = threading.Event(), threading.Event()
            work = (openmp, started, end)
            thread = threading.Thread(target=_wait, args=work, name="bge-sleeper", daemon=True)
            # No room for another thread: then they spin.
            with contextlib.suppress(RuntimeError):
                thread.start()
                started.wait()
                self._end = end

    def release(self) -> None:
        """Let threads spin."""
        with self._lock:
            if self._end is not None:
                self._end.set()
                self._end = None


def _wait(openmp: Any, started: threading.Event, end: threading.Event) -> None:
    try:
        openmp.omp_set_num_threads(2)
        torch.zeros(1 << 16).add_(1)  # large enough to be shared out
    finally:  # whatever went wrong, somebody waits with a lock
        started.set()
    end.wait()


_sleepers = _Sleepers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_ending_threads, after_in_child=_sleepers.after_fork)


def _is_gnu(openmp: Any) -> bool:
    # Intel's and LLVM's share threads among all.
    return not hasattr(openmp, "kmp_get_blocktime")


@cache
def _openmp() -> Any:
    """Find the OpenMP that torch computes with; None where it's another platform's."""
    if sys.platform != "linux":
        return None
    folder = Path(torch.__file__).parent
    bundled = [*folder.glob("lib/lib*omp*.so*"), *folder.parent.glob("torch.libs/lib*omp*.so*")]
    before = torch.get_num_threads()
    for name in [*map(str, bundled), "libgomp.so.1", "libomp.so", "libiomp5.so"]:
        try:
            # Only what torch has loaded.
            openmp = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            openmp.omp_set_num_threads(before + 1)
            followed = torch.get_num_threads() == before + 1
            openmp.omp_set_num_threads(before)
        except (OSError, AttributeError):
            continue
        if followed:
            return openmp
    logger.debug("torch's OpenMP wasn't found: all threads compute every pack.")
    return None
