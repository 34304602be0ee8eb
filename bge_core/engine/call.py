"""One call: each distinct item once, in slices, and the two ways to wait for what comes of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from bge_core.errors import ComputationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.checkpoints.catalog import Output
    from bge_core.engine.scheduler import Rows

__all__ = [
    "Call",
    "Item",
    "Progress",
    "Steps",
    "adrive",
    "drive",
    "non_finite_error",
    "run_off_loop",
    "slices_of",
]

Done = TypeVar("Done")
Item = TypeVar("Item", bound=str | tuple[str, str])
"""What is tokenised to one sequence: a text, or a (query, passage) pair."""

Progress = Callable[[int], None] | None
"""Called with the number of sequences that were computed since the last time."""

Steps = Generator[Future[Any], Any, Done]
"""Work that never waits: it yields each future that it needs the outcome of, and goes on with it.

`drive` waits for them on the caller's thread, `adrive` without blocking an event loop.
"""

# Tokenised ahead of the workers: enough to sort by length, little enough for a flat memory.
_SLICE = 512


class Call(Generic[Item]):
    """One call's items, each distinct one once, and what has come of them.

    Args:
        items: All items, in order.
        requested_outputs: The outputs of bge-m3 that make a row; None for a plain one.
        around: Text in front of and behind each item that is never truncated.
        reports: Whether the model says which of them were truncated.
        what: What they are, in the plural, for messages.
        windows: Whether `long_passages="window"` would read them whole.
        parts: Those of the items that are parts of a text.

    Attributes:
        items: The distinct items, in order of their first appearance.
        inverse: Of each of all items its index among the distinct ones, as in `numpy.unique`.
        truncated: Of each distinct item that was tokenised its length in tokens where it was
            truncated, else 0.
        rows: The row of each distinct item that was computed.
    """

    shares_outputs = True
    """See `TokenSequence`."""
    rows_are_small = True
    """Whether many slices' rows may wait to be added."""

    def __init__(
        self,
        items: Sequence[Item],
        *,
        requested_outputs: frozenset[Output] | None = None,
        prompt: str = "",
        around: tuple[str, str] = ("", ""),
        reports: bool = True,
        what: str = "texts",
        windows: bool = False,
        parts: Collection[Item] = frozenset(),
    ) -> None:
        index: dict[Item, int] = {}
        self.inverse = [index.setdefault(item, len(index)) for item in items]
        self.items: list[Item] = list(index)
        self.requested_outputs = requested_outputs
        self.prompt = prompt
        self.around = around
        self.reports = reports
        self.what = what
        self.windows = windows
        self.parts = parts
        self.truncated: list[int] = []
        self.rows: Rows = []

    def slices(self) -> Iterator[slice]:
        """Return which items are tokenised and submitted together, in order."""
        for start in range(0, len(self.items), _SLICE):
            yield slice(start, start + _SLICE)

    def add_rows(self, rows: Rows) -> None:
        """Add the rows of the next slice."""
        self.rows += rows

    def truncated_lengths(self) -> list[int]:
        """Return `truncated` of all items, in order."""
        return [self.truncated[index] for index in self.inverse]

    def truncated_pairs(self) -> list[int] | None:
        """Return the places of the pairs with a truncated text; None where no item is in one."""
        return None

    def describe_item(self, index: int) -> str:
        """Return a distinct item's name for a message: where it came first."""
        return f"texts[{self.inverse.index(index)}]"

    def to_array(self) -> NDArray[np.float32]:
        """Return a row for each of all items, in order, [n, width] float32."""
        rows = np.empty((len(self.rows), len(self.rows[0])), dtype=np.float32)
        # Slice by slice, so that other threads get their turn between two of them.
        for start in range(0, len(rows), _SLICE):
            end = start + _SLICE
            np.concatenate(self.rows[start:end], out=rows[start:end].reshape(-1))
        self.rows.clear()
        return rows if len(self.items) == len(self.inverse) else rows[self.inverse]


def drive(steps: Steps[Done]) -> Done:
    """Do the steps on this thread, waiting for each future that they yield."""
    try:
        future = next(steps)
        while True:
            try:
                rows = future.result()
            except Exception as exc:  # noqa: BLE001 -- the steps decide what becomes of it
                future = steps.throw(exc)
            except BaseException:
                # Ctrl-C in the waiting thread: nobody wants the rest any more.
                future.cancel()
                raise
            else:
                future = steps.send(rows)
    except StopIteration as stop:
        done: Done = stop.value
        return done
    finally:
        steps.close()


async def adrive(steps: Steps[Done], *, inline: bool, at_once: bool = True) -> Done:
    """Do the steps without blocking the event loop.

    Args:
        steps: What is to be done.
        inline: Whether a step is so little that the event loop does it itself; else each is done
            in a thread.
        at_once: Whether that is so of the first step, too, which may have to load a model.
    """
    flow = _Flow(steps)
    try:
        future = await run_off_loop(flow.advance, None, None, inline=inline and at_once)
        while future is not None:
            rows, error = await _outcome(future)
            future = await run_off_loop(flow.advance, rows, error, inline=inline)
    finally:
        flow.abandon()
    done: Done = flow.done
    return done


class _Flow:
    """Steps that are done in turns by several threads, and may be abandoned at any time.

    A generator that runs can't be closed: where the caller leaves while a step is done in a
    thread, that thread closes it afterwards.
    """

    def __init__(self, steps: Steps[Any]) -> None:
        self._steps = steps
        self._lock = threading.Lock()
        self._abandoned = False
        self.done: Any = None

    def advance(self, rows: Any, error: BaseException | None) -> Future[Any] | None:
        """Do the next step; None when there is none left."""
        try:
            with self._lock:
                return self._steps.send(rows) if error is None else self._steps.throw(error)
        except StopIteration as stop:
            self.done = stop.value
            return None
        finally:
            if self._abandoned:
                self.abandon()

    def abandon(self) -> None:
        """Close the steps, now or after the step that is being done."""
        self._abandoned = True
        if self._lock.acquire(blocking=False):
            try:
                self._steps.close()
            finally:
                self._lock.release()


async def _outcome(future: Future[Any]) -> tuple[Any, BaseException | None]:
    try:
        return await asyncio.wrap_future(future), None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if not future.cancelled() or (task is not None and task.cancelling()):
            raise
        return None, CancelledError()  # the model was closed, and not this task cancelled
    except Exception as exc:  # noqa: BLE001 -- the steps decide what becomes of it
        return None, exc


async def run_off_loop(work: Callable[..., Done], *arguments: object, inline: bool) -> Done:
    """Work in a thread, or at once where it is too little to stop an event loop."""
    return work(*arguments) if inline else await asyncio.to_thread(work, *arguments)


def slices_of(items: Sequence[Any], *, characters: int) -> Iterator[slice]:
    """Cut items into slices of so many characters, and no more items than any slice has.

    A longer item is a slice of its own.
    """
    start = total = 0
    for end, item in enumerate(items):
        length = len(item) if isinstance(item, str) else sum(map(len, item))
        if end > start and (total + length > characters or end - start == _SLICE):
            yield slice(start, end)
            start = end
            total = 0
        total += length
    yield slice(start, len(items))


def non_finite_error(model: str, which: str) -> ComputationError:
    """Return the error that says that a model gave NaN or infinity for one text."""
    msg = (
        f"{model!r} gave NaN or infinity for {which}: half precision overflows on some texts. "
        "Pass dtype='float32' or dtype='bfloat16'; if that is what runs, the weights are damaged."
    )
    return ComputationError(msg)
