"""Progress bars that cost nobody the work that they show."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from bge_core import arguments

__all__ = ["progress_bar", "progress_bar_of_calls"]

logger = logging.getLogger(__name__)

# Moves the bar that stands for all the calls of this context, those of its threads and tasks, too.
_of_calls: ContextVar[Callable[[int], None] | None] = ContextVar("bge_core_bar", default=None)


@contextmanager
def progress_bar(
    total: int | None, *, show: bool, unit: str = "text", title: str | None = None
) -> Iterator[Callable[[int], None] | None]:
    """Show a progress bar; one that can't be drawn any more is dropped, and the work goes on.

    Args:
        total: How much is to be done; None where nobody knows.
        show: Whether to show one.
        unit: What is counted.
        title: What stands in front of it; None for nothing.

    Returns:
        A context with the function that moves the bar on, in any thread; None without a bar.
    """
    bar = _bar(total, unit, title) if arguments.flag("show_progress", show) else None
    if bar is None:
        yield _of_calls.get()
        return

    def move(count: int) -> None:
        try:
            bar.update(count)
        except Exception as exc:  # noqa: BLE001 -- it is a picture
            bar.drop(exc)

    try:
        yield move
    finally:
        try:
            bar.close()
        except Exception as exc:  # noqa: BLE001 -- see above
            bar.drop(exc)


@contextmanager
def progress_bar_of_calls(
    total: int | None, *, show: bool, unit: str = "text", title: str | None = None
) -> Iterator[None]:
    """Show one bar that all calls inside move on, as they get on with their packs.

    What they had no work with, since a cache had it, is added at the end.

    Args:
        total: How much is to be done; None where nobody knows.
        show: Whether to show one.
        unit: What is counted.
        title: What stands in front of it; None for nothing.
    """
    with progress_bar(total, show=show, unit=unit, title=title) as move:
        if move is None:
            yield
            return
        done: list[int] = []  # of several threads

        def count(more: int) -> None:
            done.append(more)
            move(more)

        token = _of_calls.set(count)
        try:
            yield
        finally:
            _of_calls.reset(token)
        if total is not None and sum(done) < total:
            move(total - sum(done))


def _bar(total: int | None, unit: str, title: str | None) -> Any:
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]  # it takes none at run time
        dropped = False

        def display(self, *arguments: Any, **options: Any) -> Any:
            # tqdm calls this with a lock of the whole process taken, and keeps that lock for ever
            # when this raises: every later bar would hang.
            if self.dropped:
                return None
            try:
                return super().display(*arguments, **options)
            except Exception as exc:  # noqa: BLE001 -- whatever a stream or a notebook raises
                self.drop(exc)

        def drop(self, error: Exception) -> None:
            if not self.dropped:
                self.dropped = True
                logger.debug("The progress bar is shown no more: %r", error)

    try:
        return Bar(total=total, unit=unit, desc=title)
    except Exception as exc:  # noqa: BLE001 -- see above
        logger.debug("No progress bar is shown: %r", exc)
        return None
