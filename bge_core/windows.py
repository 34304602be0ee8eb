"""Passages that don't fit, read to their end: split into windows that are passages themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bge_core.engine.call import Item, slices_of
from bge_core.engine.process import hold_interpreter_exit
from bge_core.errors import ArgumentError
from bge_core.tokenizer import room_remedy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.engine.call import Steps
    from bge_core.tokenizer import SequenceLayout, Tokenizer

__all__ = ["Span", "best_window", "compute_windows", "score_windows", "split"]

Span = tuple[int, int]
"""Characters [start, end) of a passage."""

# Neighbours share a quarter of a window or more, so that a sentence which one of them cuts in
# two is whole in the other; twice the share would cost half as many windows again.
_SHARED = 4
# Windows are made of so much text at a time: of 512 books at once they would fill the memory.
_SLICE_CHARACTERS = 1 << 20


def split(
    tokenizer: Tokenizer,
    text: str,
    layout: SequenceLayout,
    *,
    capacity: int | None = None,
    prefix: str = "",
    otherwise: str = "long_passages='truncate'",
) -> list[Span]:
    """Split a passage into windows that fit as passages of their own.

    Args:
        tokenizer: The checkpoint's.
        text: The passage.
        layout: What stands around it, and how much of it fits.
        capacity: The largest `max_length` that the model can take; None for any.
        prefix: Text in front of each window that is no part of the passage, such as an
            instruction.
        otherwise: What makes room, beside a larger `max_length`.

    Returns:
        The windows' characters, in order: all of a passage that fits; else windows of one size in
        tokens at even distances, of which neighbours share a quarter or more.

    Raises:
        ArgumentError: No token of a passage would fit.
    """
    (offsets,) = tokenizer.offsets([prefix + text])
    size, prefix_length = layout.max_text_tokens, len(prefix)
    if len(offsets) <= size:
        return [(0, len(text))]
    own = [
        (max(start - prefix_length, 0), end - prefix_length)
        for start, end in offsets
        if not prefix_length or end > prefix_length
    ]
    head = len(offsets) - len(own)
    if size <= head:
        fixed = len(layout.before) + head + len(layout.after)
        remedy = room_remedy(fixed + 1, capacity=capacity, otherwise=otherwise)
        msg = f"No room is left for a passage: what stands around it takes {fixed} tokens. {remedy}"
        raise ArgumentError(msg)
    tokens = size - head
    while True:
        spans = [(own[first][0], own[first + tokens - 1][1]) for first in _starts(len(own), tokens)]
        # A window that begins or ends inside a word may have other tokens than the passage there.
        longest = max(tokenizer.count([prefix + text[start:end] for start, end in spans]))
        if longest <= size or tokens == 1:
            return spans
        tokens = max(tokens - (longest - size), 1)


def _starts(count: int, size: int) -> Iterator[int]:
    """Spread windows evenly over tokens that are as many as one window holds, or more."""
    step = size - size // _SHARED
    spare = max(count - size, 0)
    steps = -(-spare // step)
    for index in range(steps + 1):
        yield index * spare // max(steps, 1)


def compute_windows(
    items: Sequence[Item],
    *,
    split_item: Callable[[Item], list[Span]],
    window_of: Callable[[Item, Span], Item],
    compute: Callable[[list[Item], set[Item]], Steps[NDArray[np.float32]]],
) -> Steps[tuple[list[NDArray[np.float32]], list[list[Span]]]]:
    """Split items, compute their windows as items, and sort out which rows are whose.

    Args:
        items: All items, in order; equal ones are split and computed once.
        split_item: Returns an item's windows.
        window_of: Returns a window as an item of its own.
        compute: Computes items, a row each; it is told which of them are parts of one.

    Returns:
        Of each item the rows of its windows, [windows, ...], and their characters.
    """
    distinct = list(dict.fromkeys(items))
    rows: dict[Item, NDArray[np.float32]] = {}
    spans: dict[Item, list[Span]] = {}
    for part in slices_of(distinct, characters=_SLICE_CHARACTERS) if distinct else ():
        chosen = distinct[part]
        with hold_interpreter_exit():
            spans |= {item: split_item(item) for item in chosen}
        windows, parts = list[Item](), set[Item]()
        for item in chosen:
            if len(spans[item]) == 1:
                windows.append(item)  # all of it: the same row as without windows
            else:
                found = [window_of(item, span) for span in spans[item]]
                windows += found
                parts.update(found)
        computed = yield from compute(windows, parts)
        start = 0
        for item in chosen:
            end = start + len(spans[item])
            rows[item] = computed[start:end]
            start = end
    return [rows[item] for item in items], [spans[item] for item in items]


def best_window(scores: NDArray[np.float32]) -> int:
    """Return the index of the highest score, of equal ones the first.

    A score that is not finite comes first, so that it is refused as it is without windows.
    """
    return int(np.where(np.isfinite(scores), scores, np.inf).argmax())


def score_windows(
    pairs: Sequence[tuple[str, str]],
    *,
    split_item: Callable[[tuple[str, str]], list[Span]],
    compute: Callable[[list[tuple[str, str]], set[tuple[str, str]]], Steps[NDArray[np.float32]]],
) -> Steps[tuple[NDArray[np.float32], list[Span]]]:
    """Score each passage's windows as passages; the best one's score is the passage's.

    Args:
        pairs: (query, passage) pairs.
        split_item: Returns the windows of a pair's passage.
        compute: Scores pairs, as in `compute_windows`.

    Returns:
        Of each pair the best score, [n] float32, and the characters that it is of.
    """
    rows, spans = yield from compute_windows(
        pairs,
        split_item=split_item,
        window_of=lambda pair, span: (pair[0], pair[1][slice(*span)]),
        compute=compute,
    )
    best = [best_window(row) for row in rows]
    scores = [row[index] for row, index in zip(rows, best, strict=True)]
    chosen = [found[index] for found, index in zip(spans, best, strict=True)]
    return np.array(scores, dtype=np.float32), chosen
