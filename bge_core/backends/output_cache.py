"""What one pass of bge-m3 leaves for whoever asks for the same texts next.

A vector store in hybrid mode asks for dense vectors and then, elsewhere, for sparse ones of the
same texts. One forward pass gives both, so the output that was not asked for is kept until it is.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from bge_core.checkpoints.catalog import Output

__all__ = ["CachedOutput", "OutputCache", "share_outputs"]

CachedOutput = tuple["NDArray[Any]", ...]
"""A dense vector alone, or a sparse output's token ids and weights."""

# An output has about 4 kB (1,024 float32) or 2 kB (250 tokens): some 15,000 texts at the least.
_MOST_BYTES = 64 << 20
# What Python adds to an output: key, tuple and array headers.
_OVERHEAD = 400

# Who wants outputs shared, by identity, and of which model; changed by one bytecode at a time.
_sharers: dict[int, Hashable] = {}


def share_outputs(owner: object, model: Hashable) -> Callable[[], object]:
    """Have the passes of a model leave their other outputs, while the owner lives.

    Args:
        owner: Held weakly.
        model: The model's name as the user wrote it: nothing need be loaded yet.

    Returns:
        Ends it; calling it twice is harmless.
    """
    _sharers[id(owner)] = model
    end = weakref.finalize(owner, _sharers.pop, id(owner), None)
    end.atexit = False
    return end


class OutputCache:
    """Outputs that were computed and that nobody has asked for yet; any thread may use it.

    It belongs to the engines of one checkpoint and dtype. An output is given once and forgotten,
    and the oldest go first when there are too many: its memory is bounded, and empty again when an
    index has been built. What is not here is computed again, so it never changes a result.

    Args:
        max_bytes: Bytes that it may hold.

    Attributes:
        hits: Outputs that it gave.
    """

    def __init__(self, *, max_bytes: int = _MOST_BYTES) -> None:
        self._max_bytes = max_bytes
        self._models: frozenset[Hashable] = frozenset()
        self.hits = 0
        self.after_fork()

    def after_fork(self) -> None:
        """Start over in a forked child, where a lock may stay locked for ever."""
        self._lock = threading.Lock()
        self._outputs: OrderedDict[Hashable, CachedOutput] = OrderedDict()
        self._size = 0

    def add_model(self, model: Hashable) -> None:
        """Serve a model, by the name that `share_outputs` got."""
        self._models |= {model}

    @property
    def is_shared(self) -> bool:
        """Whether anybody wants the outputs of these models shared."""
        return any(model in _sharers.values() for model in self._models)

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return self._size

    def __len__(self) -> int:
        """Count the outputs."""
        return len(self._outputs)

    def clear_unless_shared(self) -> None:
        """Release everything when nobody is left to ask for it."""
        if self._outputs and not self.is_shared:
            with self._lock:
                self._outputs.clear()
                self._size = 0

    def keep(self, ids: ArrayLike, output: Output, arrays: CachedOutput) -> None:
        """Keep an output for the next one who asks.

        Args:
            ids: The sequence's token ids as they were computed, cut to whatever length: the same
                text under another `max_length` is another sequence, unless neither was cut.
            output: Which output it is.
            arrays: Its arrays.
        """
        key = _key(ids, output)
        with self._lock:
            if (old := self._outputs.pop(key, None)) is not None:
                self._size -= _bytes(old)
            self._outputs[key] = arrays
            self._size += _bytes(arrays)
            while self._size > self._max_bytes:
                _, oldest = self._outputs.popitem(last=False)
                self._size -= _bytes(oldest)

    def take(self, ids: ArrayLike, output: Output) -> CachedOutput | None:
        """Return an output and forget it; None where it is not here."""
        if not self._outputs:
            return None
        key = _key(ids, output)
        with self._lock:
            arrays = self._outputs.pop(key, None)
            if arrays is not None:
                self._size -= _bytes(arrays)
                self.hits += 1
        return arrays


def _key(ids: ArrayLike, output: Output) -> Hashable:
    # A digest: 8,192 ids would take more room than what is kept of them.
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=16).digest()
    return output, digest


def _bytes(arrays: CachedOutput) -> int:
    return sum(part.nbytes for part in arrays) + _OVERHEAD
