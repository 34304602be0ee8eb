"""What a model here and one on a server share: how they are closed, waited for and known again."""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

from bge_core.errors import closed_error, closed_while_waiting_error

__all__ = ["Closeable", "ContextManaged", "fingerprint_of"]

Done = TypeVar("Done")


class ContextManaged(ABC):
    """What `with` closes: a model, or an adapter of one."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the model."""

    def __enter__(self) -> Self:
        """Give the object itself."""
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

    Pickles and copies carry the configuration: what `_start` makes anew is in `_of_a_process`.
    """

    _closed: bool
    _unpickled_attributes: ClassVar[frozenset[str]]

    @property
    @abstractmethod
    def model(self) -> str:
        """The hub id or folder."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the model; callers that still wait get a `ClosedError`."""

    @abstractmethod
    def _start(self) -> None:
        """Make what belongs to this process."""

    def __getstate__(self) -> dict[str, Any]:
        """Give the configuration, without weights, locks, connections or work in flight."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in self._unpickled_attributes
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a configuration; what else is needed is made at first use."""
        self.__dict__.update(state)
        self._start()

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error(self.model)

    def _wait(self, future: Future[Done]) -> Done:
        try:
            return future.result()
        except CancelledError as exc:
            raise closed_while_waiting_error(self.model) from exc
        except BaseException:
            # Ctrl-C in the waiting thread: nobody wants the rest any more.
            future.cancel()
            raise

    async def _await(self, future: Future[Done]) -> Done:
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise
            raise closed_while_waiting_error(self.model) from exc


def fingerprint_of(*parts: object) -> str:
    """Return 16 hexadecimal digits that change with any of the parts, by their repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
