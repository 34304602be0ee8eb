"""How a model here and one on a server are closed, copied, pickled and known again."""

from __future__ import annotations

import hashlib
import threading
import weakref
from abc import ABC, abstractmethod
from concurrent.futures import Future
from types import TracebackType
from typing import Any, ClassVar, Self

from bge_core.errors import closed_error

__all__ = ["Closeable", "ContextManaged", "fingerprint_of"]


class ContextManaged(ABC):
    """What `with` closes: a model, or an adapter of one."""

    @abstractmethod
    def close(self) -> None:
        """Release the model."""

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the model."""
        self.close()


class Closeable(ContextManaged):
    """A model that can be closed while others wait for it.

    Pickles and copies carry the configuration. The rest is `_unpickled_attributes`, which
    `_init_process_state` makes anew in each process.
    """

    _closed: bool
    _unpickled_attributes: ClassVar[frozenset[str]] = frozenset(
        {"_closed", "_flight_lock", "_in_flight"}
    )

    @property
    @abstractmethod
    def model(self) -> str:
        """The hub id or folder."""

    def close(self) -> None:
        """Release the model. Callers that still wait get a `ClosedError`.

        Closing twice is harmless.
        """
        self._closed = True
        with self._flight_lock:
            waiting = list(self._in_flight)
        for future in waiting:
            future.cancel()

    def check_open(self) -> None:
        """Refuse to go on where the model was closed.

        Raises:
            ClosedError: It was.
        """
        if self._closed:
            raise closed_error(self.model)

    def after_fork(self) -> None:
        """Start over in a forked child: what another thread held there stays locked for ever."""
        # A signal's handler may close the model while its own thread holds the lock.
        self._flight_lock = threading.RLock()
        self._in_flight: weakref.WeakSet[Future[Any]] = weakref.WeakSet()

    def _init_process_state(self) -> None:
        """Make what belongs to this process."""
        self._closed = False
        Closeable.after_fork(self)

    def _track(self, future: Future[Any]) -> None:
        """Remember work in flight, which closing cancels."""
        with self._flight_lock:
            self._in_flight.add(future)
        if self._closed:
            future.cancel()

    def __getstate__(self) -> dict[str, Any]:
        """Return the configuration, without weights, locks, connections or work in flight."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in self._unpickled_attributes
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a configuration; what else is needed is made at first use."""
        self.__dict__.update(state)
        self._init_process_state()


def fingerprint_of(*parts: object) -> str:
    """Return 16 hexadecimal digits that change with any of the parts, by their repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
