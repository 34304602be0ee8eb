"""Passages that don't fit: overlapping windows of them, and what comes of a passage's windows."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_core.engine.call import Call, Item, slices_of
from bge_core.errors import ArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.engine.scheduler import Rows
    from bge_core.tokenizer import Room, Tokenizer, TokenSequence

__all__ = ["BestWindow", "MeanWindow", "Span", "Window", "cut_windows"]

Span = tuple[int, int]
"""Characters [start, end) of a passage."""

# Neighbours share a quarter of a window or more, so that a sentence which one of them cuts in
# two is whole in the other; twice the share would cost half as many windows again.
_SHARED = 4
# A slice's windows are held as ids: some 250,000 tokens, where 512 books would fill the memory.
_SLICE_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a passage that is computed as a sequence of its own.

    Attributes:
        tokens: The sequence.
        span: The characters of the passage that it reads.
    """

    tokens: TokenSequence
    span: Span


def cut_windows(
    tokenizer: Tokenizer, rooms: Sequence[Room], texts: Sequence[str], *, lead: int = 0
) -> list[list[Window]]:
    """Cut passages into windows of token ids.

    A passage that fits is one window, the sequence that is computed without windows. The windows
    of one that doesn't have one size and even distances, and neighbours share a quarter or more.

    Args:
        tokenizer: The checkpoint's.
        rooms: What stands around each passage.
        texts: The passages.
        lead: How many characters in front of each passage are no part of it, such as an
            instruction: each window gets them.

    Returns:
        The windows of each passage, in its order.

    Raises:
        ArgumentError: A room is too small for any token of a passage.
    """
    found = []
    for room, text, (ids, places) in zip(rooms, texts, tokenizer.places(texts), strict=True):
        length = len(text) - lead
        if len(ids) <= room.size:
            found.append([Window(tokenizer.fill(room, ids), (0, length))])
            continue
        own = (token for token, (_, end) in enumerate(places) if not lead or end > lead)
        head = next(own, len(ids))
        size = room.size - head
        if size < 1:
            fixed = len(room.before) + head + len(room.after)
            msg = (
                f"No room is left for a passage: what stands around it takes {fixed} tokens. Pass "
                f"max_length={fixed + 1} or more, or long_passages='truncate'."
            )
            raise ArgumentError(msg)
        found.append(
            [
                Window(
                    tokenizer.fill(room, [*ids[:head], *ids[start : start + size]]),
                    (max(places[start][0] - lead, 0), places[start + size - 1][1] - lead),
                )
                for start in _starts(head, len(ids), size)
            ]
        )
    return found


def _starts(first: int, end: int, size: int) -> Iterator[int]:
    """Spread windows evenly over tokens that are more than one window holds."""
    step = size - size // _SHARED
    spare = end - first - size
    steps = -(-spare // step)
    for index in range(steps + 1):
        yield first + index * spare // steps


Cut = Callable[["Tokenizer", Sequence[Item]], tuple[list[list[Window]], list[bool]]]
"""Items -> the windows of each, and of each whether something was cut all the same."""


class _Windowed(Call[Item]):
    """A call whose items are computed as windows, and get one row each.

    Args:
        items: All items, in order.
        cut: Cuts items into windows.
    """

    windowed = True
    unit = "window"

    def __init__(self, items: Sequence[Item], *, cut: Cut[Item]) -> None:
        super().__init__(items, encode=self._encode)
        self._cut = cut
        self._due: deque[list[list[Span]]] = deque()

    @property
    def total(self) -> int | None:
        """None: only tokenising tells how many windows there are."""
        return None

    def slices(self) -> Iterator[slice]:
        """Cut by characters, since a long text is many sequences."""
        return slices_of(self.items, characters=_SLICE_CHARACTERS)

    def take(self, rows: Rows) -> None:
        """Make a row an item of the rows of the next slice."""
        start = 0
        for spans in self._due.popleft():
            end = start + len(spans)
            self.rows.append(self._pool(np.stack(rows[start:end]), spans))
            start = end

    def _encode(
        self, tokenizer: Tokenizer, items: Sequence[Item]
    ) -> tuple[list[TokenSequence], list[bool]]:
        found, cut = self._cut(tokenizer, items)
        self._due.append([[window.span for window in windows] for windows in found])
        sequences = []
        for windows in found:
            # The outputs of a part of a text are nobody else's.
            whole = len(windows) == 1
            sequences += [replace(window.tokens, shares_outputs=whole) for window in windows]
        return sequences, cut

    @abstractmethod
    def _pool(self, rows: NDArray[Any], spans: Sequence[Span]) -> NDArray[Any]:
        """Make an item's row of its windows' rows, [windows, width]."""


class BestWindow(_Windowed[Item]):
    """A row an item, that of the window with the highest score; of equal ones the first.

    Attributes:
        spans: Where that window is, of each distinct item.
    """

    def __init__(self, items: Sequence[Item], *, cut: Cut[Item]) -> None:
        super().__init__(items, cut=cut)
        self.spans: list[Span] = []

    def _pool(self, rows: NDArray[Any], spans: Sequence[Span]) -> NDArray[Any]:
        scores = rows[:, 0]
        # What is not finite comes first, to be refused as it is without windows.
        best = int(np.where(np.isfinite(scores), scores, np.inf).argmax())
        self.spans.append(spans[best])
        row: NDArray[Any] = rows[best]
        return row


class MeanWindow(_Windowed[Item]):
    """A row an item, the mean of its windows' rows: they have one size, so none counts more."""

    def _pool(self, rows: NDArray[Any], spans: Sequence[Span]) -> NDArray[Any]:  # noqa: ARG002
        mean: NDArray[Any] = rows[0] if len(rows) == 1 else rows.mean(axis=0)
        return mean
