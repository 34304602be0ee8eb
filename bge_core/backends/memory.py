"""Memory that ran out: how each device says so, and what can be given back."""

from __future__ import annotations

import contextlib
import errno

import torch

__all__ = ["free_cached_memory", "is_out_of_memory"]

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
