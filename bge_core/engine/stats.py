"""What a model has done so far: counters that are always on, and the snapshot of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import RLock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bge_core.arguments import Priority

__all__ = ["Counters", "ModelStats", "StageSeconds", "Waiting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How much waits for a loaded model at one priority, whoever asked.

    Attributes:
        callers: Calls that have work in the queue.
        sequences: Texts, pairs or windows in it that no pass has taken yet.
    """

    callers: int = 0
    sequences: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Seconds that each stage took, added up; what runs side by side counts side by side.

    Attributes:
        tokenize: Texts to token ids, on the callers' threads.
        wait: From the queue to the first pass, of each slice of at most 512 sequences that was
            queued: by `requests` it is how long a short call waited.
        compute: Forward passes, by each worker. On a server, from a request to its answer.
        hand_out: Rows to their callers, by each worker; counted once they have them.
    """

    tokenize: float = 0.0
    wait: float = 0.0
    compute: float = 0.0
    hand_out: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStats:
    """What a model has done since it was made, as `Embedder.stats()` and others give it.

    Everything is this object's own, save `cache_hits` and what waits: those are the loaded
    model's, which everybody on the same weights shares. A copy, and a forked process, start at 0.

    Attributes:
        requests: Calls whose arguments were accepted.
        texts: Texts, or pairs, that they brought.
        sequences: What was given to the model: each distinct text, pair or window of a call.
        tokens: Tokens of these as they are read, instruction and special ones included; 0 on a
            server, which doesn't say.
        packs: Forward passes that had any of them; `sequences / packs` is how well calls share.
            On a server, its answers.
        cache_hits: Outputs of bge-m3 that an earlier pass had left (`share_outputs`).
        interactive: What waits at this priority; nothing on a server, which has its own queue.
        background: The same.
        seconds: Of each stage.

    Example:
        >>> stats = ModelStats(requests=8, sequences=8, packs=2)
        >>> stats.sequences / stats.packs, stats.interactive.callers, stats.seconds.compute
        (4.0, 0, 0.0)
    """

    requests: int = 0
    texts: int = 0
    sequences: int = 0
    tokens: int = 0
    packs: int = 0
    cache_hits: int = 0
    interactive: Waiting = Waiting()
    background: Waiting = Waiting()
    seconds: StageSeconds = StageSeconds()


class Counters:
    """What `ModelStats` is made of: plain numbers, changed a few times a call and a pack.

    Args:
        lock: The model's lock for its work in flight, which is taken for it anyway; None for one
            of its own.
    """

    __slots__ = (
        "_cache_hits",
        "_compute",
        "_hand_out",
        "_lock",
        "_packs",
        "_requests",
        "_sequences",
        "_texts",
        "_tokenize",
        "_tokens",
        "_wait",
    )

    def __init__(self, lock: AbstractContextManager[bool] | None = None) -> None:
        self._lock = RLock() if lock is None else lock
        self._requests = self._texts = self._sequences = self._tokens = self._packs = 0
        self._cache_hits = 0
        self._tokenize = self._wait = self._compute = self._hand_out = 0.0

    def __reduce__(self) -> tuple[type[Counters], tuple[()]]:
        """Start a copy at 0."""
        return Counters, ()

    def add_request(self, texts: int) -> None:
        """Count a call with so many texts."""
        with self._lock:
            self._requests += 1
            self._texts += texts

    def add_tokenizing(self, seconds: float) -> None:
        """Count what tokenising a slice took."""
        with self._lock:
            self._tokenize += seconds

    def add_sequences(self, count: int, tokens: int) -> None:
        """Count what was given to the model."""
        with self._lock:
            self._sequences += count
            self._tokens += tokens

    def add_pack(self, compute: float, wait: float) -> None:
        """Count a pass, and how long what it took up first had waited, in seconds."""
        with self._lock:
            self._packs += 1
            self._compute += compute
            self._wait += wait

    def add_hand_out(self, seconds: float) -> None:
        """Count what giving a pass's rows to their callers took."""
        with self._lock:
            self._hand_out += seconds

    def note_cache_hits(self, hits: int) -> None:
        """Keep the loaded model's count, which goes when that does."""
        self._cache_hits = hits

    def stats(self, waiting: Mapping[Priority, Waiting] | None = None) -> ModelStats:
        """Return all of it, as it was at one moment.

        Args:
            waiting: What waits for the loaded model; None where none is.
        """
        queues = waiting or {}
        with self._lock:
            return ModelStats(
                requests=self._requests,
                texts=self._texts,
                sequences=self._sequences,
                tokens=self._tokens,
                packs=self._packs,
                cache_hits=self._cache_hits,
                seconds=StageSeconds(
                    tokenize=self._tokenize,
                    wait=self._wait,
                    compute=self._compute,
                    hand_out=self._hand_out,
                ),
                **{str(priority): queue for priority, queue in queues.items()},
            )
