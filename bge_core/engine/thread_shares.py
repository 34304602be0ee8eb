"""A CPU's threads, shared out among the packs that are computed at the same time.

Threads that compute one pack together wait for each other after each of its steps. As many packs at
once, with a thread each, take a sixth less time on 2 cores and half of it on 16. Where less waits
than that, a pack gets more threads, and one that is alone gets all of them
(docs/decisions/32).
"""

from __future__ import annotations

__all__ = ["ThreadShares"]

_UNLIMITED = 1 << 60
# No pack is cut for others to have some of it if they would have less.
_LEAST_TOKENS = 128
# A pack beside others has no more: larger ones are no faster, and take memory each.
_MOST_TOKENS = 1024
# Packs at once; where there are more threads, each gets several. More weren't measured.
_MOST_PACKS = 16


class ThreadShares:
    """Which threads are free, and how many of them a pack gets. It has no lock of its own.

    Args:
        threads: How many there are.

    Attributes:
        workers: How many packs may be computed at once.
    """

    __slots__ = ("_free", "_packs", "workers")

    def __init__(self, threads: int) -> None:
        self.workers = min(threads, _MOST_PACKS)
        self._free = threads
        self._packs = 0

    @property
    def any_free(self) -> bool:
        """Whether another pack could be computed now."""
        return self._free > 0 and self._packs < self.workers

    def pack_tokens(self, waiting: int) -> int:
        """Return how many tokens the next pack may have, so that all threads get some.

        Args:
            waiting: Tokens that wait, those of the next pack included.
        """
        parts = min(self.workers, waiting // _LEAST_TOKENS)
        return min(-(-waiting // parts), _MOST_TOKENS) if parts > 1 else _UNLIMITED

    def tokens_at_once(self, budget: int) -> int:
        """Return how many tokens are computed at once where many wait, by a pack's budget."""
        return budget if self.workers == 1 else self.workers * min(budget, _MOST_TOKENS)

    def claim(self, tokens: int, waiting: int) -> int:
        """Take threads for a pack, and return how many.

        Args:
            tokens: Those of the pack.
            waiting: Tokens that still wait, and may be computed beside it.
        """
        packs = 0 if waiting < _LEAST_TOKENS else -(-waiting // max(tokens, 1))
        beside = min(packs, self.workers - self._packs - 1)
        threads = max(self._free // (1 + beside), 1)
        self._free -= threads
        self._packs += 1
        return threads

    def give_back(self, threads: int) -> None:
        """Return the threads of a pack that is done."""
        self._free += threads
        self._packs -= 1
