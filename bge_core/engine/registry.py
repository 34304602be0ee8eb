"""One loaded model for everybody who names it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from bge_core.engine.process import hold_interpreter_exit, on_fork

if TYPE_CHECKING:
    from bge_core.engine.scheduler import Engine

__all__ = ["shared_engine"]


class _Registry:
    def __init__(self) -> None:
        self.engines: weakref.WeakValueDictionary[Hashable, Engine] = weakref.WeakValueDictionary()
        self.after_fork()

    def after_fork(self) -> None:
        self.loading = threading.RLock()


_registry = _Registry()
on_fork(_registry, _Registry.after_fork)


def shared_engine(key: Hashable, load: Callable[[], Engine]) -> Engine:
    """Give the engine of a key, loading it if no one has it.

    Args:
        key: Everything that changes the weights in memory.
        load: Loads the model.

    Returns:
        An engine that lives as long as somebody holds it.

    Raises:
        ClosedError: The interpreter is ending.
    """
    with _registry.loading, hold_interpreter_exit():
        engine = _registry.engines.get(key)
        if engine is None:
            engine = load()
            _registry.engines[key] = engine
        return engine
