"""One loaded model for everybody who names it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from bge_core.engine.process import hold_interpreter_exit

if TYPE_CHECKING:
    from bge_core.engine.scheduler import Engine

__all__ = ["shared_engine"]

_engines: weakref.WeakValueDictionary[Hashable, Engine] = weakref.WeakValueDictionary()
_loading = threading.RLock()


def shared_engine(key: Hashable, load: Callable[[], Engine]) -> Engine:
    """Give the engine of a key, loading it if no one has it.

    Args:
        key: Everything that changes the weights in memory.
        load: Loads the model.

    Returns:
        An engine that lives as long as somebody holds it.
    """
    with _loading, hold_interpreter_exit():
        engine = _engines.get(key)
        if engine is None:
            engine = load()
            _engines[key] = engine
        return engine


def _in_child() -> None:
    global _loading  # noqa: PLW0603 -- a lock that another thread held at the fork stays locked
    _loading = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
