"""Memory: what each model's packs may take of a device, and what is done when it ran out."""

from __future__ import annotations

import contextlib
import errno
import threading
import weakref
from dataclasses import dataclass

import torch

__all__ = ["Budget", "free_cached_memory", "is_out_of_memory", "share_of_memory"]

_MOST_TOKENS = 131_072
_LEAST_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Budget:
    """What the packs of one model may have on one device; it counts while somebody holds it.

    Attributes:
        tokens: Tokens of a pack, unless the user says otherwise.
        device: The CUDA device whose memory they share; None where no memory is counted.
        size: Bytes that the packs of both priorities take there at once.
    """

    tokens: int
    device: torch.device | None = None
    size: int = 0


_budgets: weakref.WeakSet[Budget] = weakref.WeakSet()
_sharing = threading.Lock()


def share_of_memory(device: torch.device, token_size: int) -> Budget:
    """Give a model that was loaded its share of a CUDA device's memory.

    That is half of what is free and no other model's, a quarter for each priority. The models that
    were loaded before may compute at the same time, so theirs counts as taken. A model that is
    closed gives its share back, to those that are loaded later.

    Args:
        device: The device, which has the model's weights.
        token_size: Bytes that a token takes while a pack is computed.
    """
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    with _sharing:
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps of passes that are over.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free -= sum(budget.size for budget in tuple(_budgets) if budget.device == device)
        tokens = min(max(free // 4 // token_size, _LEAST_TOKENS), _MOST_TOKENS)
        budget = Budget(tokens, device, 2 * tokens * token_size)
        _budgets.add(budget)
    return budget


# torch has a class of its own for CUDA's allocator. The CPU's, MPS's, CUDA's libraries and C++
# raise a plain RuntimeError.
_SAID = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "failed to allocate",
    "status_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER
    "bad_alloc",
    "bad allocation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device's memory, or the machine's, ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _SAID)


def free_cached_memory() -> None:
    """Make torch return what its allocators keep, so that a smaller pack finds room."""
    with contextlib.suppress(Exception):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()
