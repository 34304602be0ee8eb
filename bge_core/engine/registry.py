"""One loaded model for everybody who names it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from bge_core.backends.output_cache import OutputCache
from bge_core.engine.process import hold_interpreter_exit, on_fork

if TYPE_CHECKING:
    from bge_core.engine.scheduler import Engine

__all__ = ["shared_engine", "shared_output_cache"]


class _Registry:
    def __init__(self) -> None:
        self.engines: weakref.WeakValueDictionary[Hashable, Engine] = weakref.WeakValueDictionary()
        self.output_caches: weakref.WeakValueDictionary[Hashable, OutputCache] = (
            weakref.WeakValueDictionary()
        )
        self.after_fork()

    def after_fork(self) -> None:
        self.loading = threading.RLock()


_registry = _Registry()
on_fork(_registry, _Registry.after_fork)


def shared_engine(key: Hashable, load: Callable[[], Engine]) -> Engine:
    """Return the engine of a key, loading it if no one has it.

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


def shared_output_cache(key: Hashable, model: Hashable) -> OutputCache:
    """Return the output cache of all engines whose outputs are the same, while one of them lives.

    Args:
        key: The checkpoint's content and the dtype.
        model: The model's name as the user wrote it.
    """
    with _registry.loading:
        cache = _registry.output_caches.get(key)
        if cache is None:
            cache = OutputCache()
            on_fork(cache, OutputCache.after_fork)
            _registry.output_caches[key] = cache
        cache.add_model(model)
        return cache
