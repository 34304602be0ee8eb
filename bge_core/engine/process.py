"""The process: its forks, its exit, its heap and its threads' priorities.

Whatever has locks, threads or connections registers itself here, and is held weakly.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any, Protocol, TypeVar

from bge_core.errors import ClosedError

__all__ = [
    "at_exit",
    "hold_interpreter_exit",
    "is_exiting",
    "lower_thread_priority",
    "on_fork",
    "trim_heap",
]

# How long the interpreter's end waits for threads that are in C++, and would crash it.
_EXIT_SECONDS = 4.0
# Bulk work gets a third of the CPU that queries get while both want it, and all of it otherwise.
_BULK_NICENESS = 5

Owner = TypeVar("Owner")

_ENDING = "The interpreter is ending: nothing is loaded or computed any more."


def lower_thread_priority() -> None:
    """Let the queries of this process come first on a busy CPU: threads inherit the niceness."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            nice = os.getpriority(os.PRIO_PROCESS, thread) + _BULK_NICENESS
            os.setpriority(os.PRIO_PROCESS, thread, min(nice, 19))


def trim_heap() -> None:
    """Make glibc return what was freed: it would keep a gigabyte of weights and activations.

    Each worker has a part of the heap of its own, and the next model's workers get others. It
    takes some 10 ms, and the next pass a few more, which is why it is not done while work comes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Stoppable(Protocol):
    """Threads that compute, as the interpreter's exit sees them."""

    def close(self) -> None:
        """Stop the threads after their current work."""

    def all_threads(self) -> list[threading.Thread]:
        """Return the threads."""

    def join(self, deadline: float) -> None:
        """Wait for the threads until a time of `time.monotonic()`."""


# In the order of registration, in which a child calls them.
_fork_hooks: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()
_stopped_at_exit: weakref.WeakSet[Stoppable] = weakref.WeakSet()


def on_fork(owner: Owner, callback: Callable[[Owner], None]) -> None:
    """Call `callback(owner)` in each forked child, for as long as the owner lives.

    A lock that another thread holds at the fork stays locked in the child for ever, and no other
    thread is there.

    Args:
        owner: Held weakly; hashed by identity.
        callback: An unbound method or a function, which must not refer to the owner.
    """
    _fork_hooks[owner] = callback


def at_exit(threads: Stoppable) -> None:
    """Stop threads at the interpreter's exit, and wait a few seconds for them.

    Args:
        threads: Held weakly.
    """
    _stopped_at_exit.add(threads)
    # Moved behind what torch and others registered since, and so called before them.
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)


def is_exiting() -> bool:
    """Return whether the interpreter is ending."""
    return _exit_guard.ending


class _ExitGuard:
    """Counts the callers' threads that are where the interpreter must not end around them."""

    def __init__(self) -> None:
        self.ending = False
        self.after_fork()

    def after_fork(self) -> None:
        """Start over in a forked child."""
        self.changed = threading.Condition()
        self.count = 0


_exit_guard = _ExitGuard()


@contextlib.contextmanager
def hold_interpreter_exit() -> Iterator[None]:
    """Let the interpreter's end wait for this thread, for a few seconds at most.

    A daemon thread that comes back from C++ or Rust to an interpreter that has ended is unwound
    through frames that forbid it, and the process aborts.

    Raises:
        ClosedError: The interpreter is ending.
    """
    with _exit_guard.changed:
        if _exit_guard.ending:
            raise ClosedError(_ENDING)
        _exit_guard.count += 1
    try:
        yield
    except Exception as exc:
        # Libraries fail in ways of their own then, which say nothing of the model.
        if _exit_guard.ending:
            raise ClosedError(_ENDING) from exc
        raise
    finally:
        with _exit_guard.changed:
            _exit_guard.count -= 1
            _exit_guard.changed.notify_all()


def _at_exit() -> None:
    with _exit_guard.changed:
        _exit_guard.ending = True
    live = list(_stopped_at_exit)
    for workers in live:
        workers.close()
    _stop_between_modules({thread for workers in live for thread in workers.all_threads()})
    deadline = time.monotonic() + _EXIT_SECONDS
    for workers in live:
        workers.join(deadline)
    with _exit_guard.changed:
        _exit_guard.changed.wait_for(lambda: not _exit_guard.count, deadline - time.monotonic())


def _stop_between_modules(threads: AbstractSet[threading.Thread]) -> None:
    """Make threads leave a long pass at its next module."""
    # Not imported here: where nothing has loaded torch, nothing computes with it.
    torch = sys.modules.get("torch")
    if torch is None or not threads:
        return

    def stop(_module: object, _inputs: object) -> None:
        if threading.current_thread() in threads:
            raise ClosedError(_ENDING)

    torch.nn.modules.module.register_module_forward_pre_hook(stop)


def _in_child() -> None:
    for owner, callback in list(_fork_hooks.items()):
        callback(owner)


on_fork(_exit_guard, _ExitGuard.after_fork)
atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
