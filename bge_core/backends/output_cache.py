"""What one pass of bge-m3 leaves for whoever asks for the same texts next.

A vector store in hybrid mode asks for dense vectors and then, elsewhere, for sparse ones of the
same texts. One forward pass gives both, so the half that was not asked for is kept until it is.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from bge_core.engine.process import on_fork

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.checkpoints.catalog import Output

__all__ = ["Half", "PassMemo", "find_passes", "share_passes"]

Half = tuple["NDArray[Any]", ...]
"""A dense vector alone, or a sparse output's token ids and weights."""

# A half has about 4 kB (1,024 float32) or 2 kB (250 tokens): some 15,000 texts at the least.
_MOST_BYTES = 64 << 20
# What Python adds to a half: key, tuple and array headers.
_OVERHEAD = 400


class PassMemo:
    """Halves that were computed and that nobody has asked for yet; any thread may use it.

    A half is given once and forgotten, and the oldest go first when there are too many: its
    memory is bounded, and empty again when an index has been built. What is not here is computed
    again, so it never changes a result.

    Args:
        most: Bytes that it may hold.
    """

    def __init__(self, *, most: int = _MOST_BYTES) -> None:
        self._most = most
        self.after_fork()
        on_fork(self, PassMemo.after_fork)

    def after_fork(self) -> None:
        """Start over in a forked child, where a lock may stay locked for ever."""
        self._lock = threading.Lock()
        self._halves: OrderedDict[Hashable, Half] = OrderedDict()
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return self._size

    def __len__(self) -> int:
        """Count the halves."""
        return len(self._halves)

    def keep(self, model: Hashable, ids: Sequence[int], output: Output, half: Half) -> None:
        """Keep a half for the next one who asks.

        Args:
            model: What the numbers depend on beside the ids: weights and dtype.
            ids: The sequence's token ids as they were computed, cut to whatever length: the same
                text under another `max_length` is another sequence, unless neither was cut.
            output: Which output it is.
            half: Its arrays.
        """
        key = _key(model, ids, output)
        with self._lock:
            if (old := self._halves.pop(key, None)) is not None:
                self._size -= _bytes(old)
            self._halves[key] = half
            self._size += _bytes(half)
            while self._size > self._most:
                _, oldest = self._halves.popitem(last=False)
                self._size -= _bytes(oldest)

    def take(self, model: Hashable, ids: Sequence[int], output: Output) -> Half | None:
        """Give a half and forget it; None where it is not here."""
        if not self._halves:
            return None
        key = _key(model, ids, output)
        with self._lock:
            half = self._halves.pop(key, None)
            if half is not None:
                self._size -= _bytes(half)
        return half


def _key(model: Hashable, ids: Sequence[int], output: Output) -> Hashable:
    # A digest: 8,192 ids would take more room than what is kept of them.
    digest = hashlib.blake2b(array("I", ids).tobytes(), digest_size=16).digest()
    return model, output, digest


def _bytes(half: Half) -> int:
    return sum(part.nbytes for part in half) + _OVERHEAD


class _Memos:
    def __init__(self) -> None:
        self.by_name: weakref.WeakValueDictionary[Hashable, PassMemo] = (
            weakref.WeakValueDictionary()
        )
        self.after_fork()

    def after_fork(self) -> None:
        self.making = threading.Lock()


_memos = _Memos()
on_fork(_memos, _Memos.after_fork)


def share_passes(name: Hashable) -> PassMemo:
    """Give the memo of a model's name, making it if there is none.

    Args:
        name: The model as the user wrote it: it is known before anything is loaded.

    Returns:
        A memo that lives as long as somebody holds it; while it does, `find_passes` finds it.
    """
    with _memos.making:
        memo = _memos.by_name.get(name)
        if memo is None:
            memo = PassMemo()
            _memos.by_name[name] = memo
        return memo


def find_passes(name: Hashable) -> PassMemo | None:
    """Give the memo of a model's name, if somebody wants passes shared."""
    return _memos.by_name.get(name)
