"""The process around the workers: its exit, its forks, its heap, its threads' niceness."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import torch

from bge_core.errors import ClosedError

__all__ = [
    "IDLE_SECONDS",
    "exit_guard",
    "hold_interpreter_exit",
    "live_workers",
    "lower_thread_priority",
    "trim_heap",
]

# How long the interpreter's end waits for threads that are in C++, and would crash it.
_EXIT_SECONDS = 4.0
# After bulk work, what the allocator kept goes back to the system once no more came for so long.
IDLE_SECONDS = 1.0
# Bulk work gets a third of the CPU that queries get while both want it, and all of it otherwise.
_BULK_NICENESS = 5
live_workers: weakref.WeakSet[Any] = weakref.WeakSet()

_ENDING = "The interpreter is ending: nothing is loaded or computed any more."


def lower_thread_priority() -> None:
    """Let the queries of this process come first on a busy CPU: threads inherit the niceness."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        nice = os.getpriority(os.PRIO_PROCESS, thread) + _BULK_NICENESS
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, thread, min(nice, 19))


def trim_heap() -> None:
    """Have glibc return what was freed: it would keep a gigabyte of weights and activations.

    Each worker has a part of the heap of its own, and the next model's workers get others. It
    takes some 10 ms, and the next pass a few more, which is why it is not done while work comes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class _ExitGuard:
    """Counts the callers' threads that are where the interpreter must not end around them."""

    def __init__(self) -> None:
        self.ending = False
        self.after_fork()

    def after_fork(self) -> None:
        """Start over in a forked child, where a lock may stay locked for ever."""
        self.changed = threading.Condition()
        self.count = 0


exit_guard = _ExitGuard()


@contextlib.contextmanager
def hold_interpreter_exit() -> Iterator[None]:
    """Let the interpreter's end wait for this thread, for a few seconds at most.

    A daemon thread that comes back from C++ or Rust to an interpreter that has ended is unwound
    through frames that forbid it, and the process aborts.

    Raises:
        ClosedError: The interpreter is ending.
    """
    with exit_guard.changed:
        if exit_guard.ending:
            raise ClosedError(_ENDING)
        exit_guard.count += 1
    try:
        yield
    except Exception as exc:
        # Libraries fail in ways of their own then, which say nothing of the model.
        if exit_guard.ending:
            raise ClosedError(_ENDING) from exc
        raise
    finally:
        with exit_guard.changed:
            exit_guard.count -= 1
            exit_guard.changed.notify_all()


def _at_exit() -> None:
    with exit_guard.changed:
        exit_guard.ending = True
    live = list(live_workers)
    for workers in live:
        workers.close()
    _stop_between_modules({thread for workers in live for thread in workers.all_threads()})
    deadline = time.monotonic() + _EXIT_SECONDS
    for workers in live:
        workers.join(deadline)
    with exit_guard.changed:
        exit_guard.changed.wait_for(lambda: not exit_guard.count, deadline - time.monotonic())


def _stop_between_modules(threads: AbstractSet[threading.Thread]) -> None:
    """Have threads leave a long pass at its next module."""

    def stop(_module: torch.nn.Module, _inputs: Any) -> None:
        if threading.current_thread() in threads:
            raise ClosedError(_ENDING)

    torch.nn.modules.module.register_module_forward_pre_hook(stop)


def _in_child() -> None:
    exit_guard.after_fork()
    for workers in list(live_workers):
        workers.after_fork()


atexit.register(_at_exit)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
