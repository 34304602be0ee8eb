"""One call: each distinct item once, in slices, and what came of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from bge_core.engine.progress import progress_bar
from bge_core.errors import ComputationError
from bge_core.tokenizer import TokenSequence

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.checkpoints.catalog import Output
    from bge_core.engine.scheduler import Rows
    from bge_core.tokenizer import Tokenizer

__all__ = ["Call", "Item", "non_finite_error", "progress_bar", "run_off_loop", "slices_of"]

Done = TypeVar("Done")
Item = TypeVar("Item", bound=str | tuple[str, str])
"""What is tokenised to one sequence: a text, or a (query, passage) pair."""

Encode = Callable[["Tokenizer", Sequence[Item]], tuple[list[TokenSequence], list[bool]]]
"""Items -> a sequence an item, and of each item whether it was cut."""

# Tokenised ahead of the workers: enough to sort by length, little enough for a flat memory.
_SLICE = 512


class Call(Generic[Item]):
    """One call's items, each distinct one once, and what has come of them.

    Args:
        items: All items, in order.
        requested_outputs: The outputs of bge-m3 that make a row; None for a plain one.
        encode: Tokenises them; None for the model's own way.
    """

    windowed = False
    shares_outputs = True
    """See `TokenSequence`."""
    unit = "text"

    def __init__(
        self,
        items: Sequence[Item],
        *,
        requested_outputs: frozenset[Output] | None = None,
        encode: Encode[Item] | None = None,
    ) -> None:
        index: dict[Item, int] = {}
        self.places = [index.setdefault(item, len(index)) for item in items]
        self.items: list[Item] = list(index)
        self.requested_outputs = requested_outputs
        self.encode: Encode[Item] | None = encode
        self.cut: list[bool] = []
        self.rows: Rows = []

    @property
    def total(self) -> int | None:
        """How many sequences there will be; None where only tokenising tells."""
        return len(self.items)

    def slices(self) -> Iterator[slice]:
        """Say which items are tokenised and submitted together, in order."""
        for start in range(0, len(self.items), _SLICE):
            yield slice(start, start + _SLICE)

    def take(self, rows: Rows) -> None:
        """Take the rows of the next slice."""
        self.rows += rows

    def name_of(self, place: int) -> str:
        """Name a distinct item for a message, by where it came first."""
        return f"texts[{self.places.index(place)}]"

    def stacked(self) -> NDArray[np.float32]:
        """Give a row for each of all items, in order, [n, width]."""
        rows = np.empty((len(self.rows), len(self.rows[0])), dtype=np.float32)
        # Slice by slice, so that other threads get their turn between two of them.
        for start in range(0, len(rows), _SLICE):
            end = start + _SLICE
            np.stack(self.rows[start:end], out=rows[start:end])
        self.rows.clear()
        return rows if len(self.items) == len(self.places) else rows[self.places]


async def run_off_loop(work: Callable[..., Done], *arguments: object, inline: bool) -> Done:
    """Work in a thread, or at once where it is too little to stop an event loop."""
    return work(*arguments) if inline else await asyncio.to_thread(work, *arguments)


def slices_of(items: Sequence[Any], *, characters: int) -> Iterator[slice]:
    """Cut items into slices of so many characters, and no more items than any slice has.

    A longer item is a slice of its own.
    """
    start = total = 0
    for end, item in enumerate(items):
        length = _characters(item)
        if end > start and (total + length > characters or end - start == _SLICE):
            yield slice(start, end)
            start = end
            total = 0
        total += length
    yield slice(start, len(items))


def _characters(item: str | tuple[str, str]) -> int:
    return len(item) if isinstance(item, str) else sum(map(len, item))


def non_finite_error(model: str, which: str) -> ComputationError:
    """Say that a model gave NaN or infinity for one text."""
    msg = (
        f"{model!r} gave NaN or infinity for {which}: half precision overflows on some texts. "
        "Pass dtype='float32' or dtype='bfloat16'; if that is what runs, the weights are damaged."
    )
    return ComputationError(msg)
