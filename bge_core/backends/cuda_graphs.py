"""CUDA graphs: a small pack's kernels are launched by one call, where each had one of its own.

A query's kernels take a tenth of the time that Python takes to launch them. A graph repeats the
launches as they were once, addresses and sizes included, so a pack is copied to where the graph
reads, in a room of fixed size.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch

from bge_core.backends.packing import LengthGroup, Pack
from bge_core.errors import ComputationError

if TYPE_CHECKING:
    from torch import Tensor

    from bge_core.backends.base import Encoder

__all__ = ["GraphedEncoder", "Room", "StaticPack", "room_for"]

logger = logging.getLogger(__name__)

Step = Literal["hidden_states", "first_token_states"]


@dataclass(frozen=True, slots=True)
class Room:
    """The packs that one graph computes.

    Attributes:
        rows: Tokens of all sequences, at the most.
        slots: Sequences, at the most.
        longest: Tokens of a sequence, at the most.
    """

    rows: int
    slots: int
    longest: int


# The attention starts a block for each slot and part of the longest sequence, filled or not, so
# both are as small as will do.
_ROOMS = tuple(
    Room(rows, slots=rows // 16, longest=min(rows, 512)) for rows in (32, 64, 128, 256, 512, 1024)
)
# By then the plain passes before have set the libraries up, and the size isn't a rare one.
_USES_BEFORE = 1
# Of the graph's rows and the plain ones: their sizes differ, and so may their rounding.
_LEAST_COSINE = 0.999
# torch captures one graph at a time in a process, and older ones have none freed meanwhile.
_capturing = threading.Lock()
# torch's allocators may refer to a graph whose capture failed.
_failed: list[Any] = []


def room_for(pack: Pack) -> Room | None:
    """Return the smallest room that a pack fits into; None for a pack that is too large."""
    for room in _ROOMS:
        if (
            pack.tokens <= room.rows
            and len(pack.sequences) <= room.slots
            and pack.longest <= room.longest
        ):
            return room
    return None


@dataclass(frozen=True)
class StaticPack(Pack):
    """A pack whose tensors stay where they are and get other packs' numbers.

    It has as many rows and sequences as its room. Sequences beyond those of the pack that fills it
    have no tokens. Rows beyond its tokens are padding in no sequence: what is computed of them is
    anything, NaN included, and no other row depends on it.
    """

    room: Room = field(kw_only=True)

    def fill(self, pack: Pack) -> None:
        """Take a pack's numbers, on the current stream."""
        values = torch.from_numpy(pack.values(self.rows, self.slots))
        if self.device.type == "cuda":
            # New each time: the copy of the one before may still be going on.
            values = values.pin_memory()
        self._all.copy_(values, non_blocking=True)

    @property
    def rows(self) -> int:
        """Rows that its inputs have."""
        return self.room.rows

    @property
    def slots(self) -> int:
        """Sequences that its tensors have room for."""
        return self.room.slots

    @property
    def longest(self) -> int:
        """Tokens that the longest sequence may have."""
        return self.room.longest

    @property
    def length_groups(self) -> list[LengthGroup]:
        """Nothing: attention that needs lengths can't be repeated.

        Raises:
            ComputationError: Always.
        """
        msg = "No kernel attends in all sequences of a pack by one call here."
        raise ComputationError(msg)

    @cached_property
    def _all(self) -> Tensor:
        size = 3 * self.rows + 2 * self.slots + 1
        return torch.zeros(size, dtype=torch.int64, device=self.device)

    @property
    def cu_seqlens(self) -> Tensor:
        """Return 0 and each sequence's end, [slots + 1] int32."""
        return self._ends[0]

    @property
    def ordinals(self) -> Tensor:
        """Return 0 to the number of slots, [slots + 1] int32."""
        return self._ends[1]


class _Graph:
    """One step of an encoder on the packs of one room.

    Args:
        encoder: Whose step it is.
        step: Its method.
        static: Where it reads, with a pack's numbers.
        pool: The graphs' own memory, by torch's name for it.
    """

    def __init__(self, encoder: Encoder, step: Step, static: StaticPack, pool: Any) -> None:
        compute = getattr(encoder, step)
        # Plainly at first: libraries load and choose their kernels for these sizes.
        compute(static)
        self._static = static
        self._graph: Any = torch.cuda.CUDAGraph()
        # Without torch's context for it, which collects garbage, waits for the whole device and
        # empties the allocator's cache: bulk work goes on meanwhile.
        with _capturing:
            try:
                self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self._rows: Tensor = compute(static)
                finally:
                    self._graph.capture_end()
            except Exception:
                _clean_up(self._graph, static.device, pool)
                raise

    def replay(self, pack: Pack) -> Tensor:
        """Compute a pack's rows, and more; they are overwritten by the next replay."""
        self._static.fill(pack)
        self._graph.replay()
        return self._rows


def _clean_up(failed: Any, device: torch.device, pool: Any) -> None:
    """Set right what a capture that failed leaves in torch, as far as it can be."""
    _failed.append(failed)
    index = torch.cuda.current_device()
    with contextlib.suppress(Exception):
        # Where this has been done, it is an error.
        torch._C._cuda_endAllocateToPool(index, pool)
    with contextlib.suppress(Exception):
        # Older ones think that random numbers are still being captured, until a capture succeeds.
        number = torch.zeros(1, device=device)
        small: Any = torch.cuda.CUDAGraph()
        small.capture_begin(capture_error_mode="thread_local")
        try:
            number.add_(1)
        finally:
            small.capture_end()


class GraphedEncoder:
    """An encoder whose small packs are computed by CUDA graphs, from the second of a size on.

    It belongs to the thread and the stream that it is made on. A graph's rows are looked at, once,
    beside those that the encoder computes plainly; where they differ, or anything else goes wrong,
    all is computed plainly from there on. What it returns is used on that stream before its next
    call, and never later.

    Args:
        encoder: What launches the same kernels for all packs of a size, and never waits for them.
        device: Where it is.

    Attributes:
        replays: How many packs graphs computed.
        works: Whether graphs are used; False after one failed.
    """

    bucketed = False
    capturable = False

    def __init__(self, encoder: Encoder, device: torch.device) -> None:
        self._encoder = encoder
        self._device = device
        self._thread = threading.get_ident()
        self._uses: Counter[tuple[Step, Room]] = Counter()
        self._graphs: dict[tuple[Step, Room], _Graph] = {}
        self._pool: object = None
        self.replays = 0
        self.works = True

    @property
    def is_here(self) -> bool:
        """Whether this is the thread that it belongs to, and number formats are the weights'."""
        # What overflowed in float16 is computed again under autocast.
        autocast = torch.is_autocast_enabled(self._device.type)
        return self._thread == threading.get_ident() and not autocast

    def close(self) -> None:
        """Free the graphs and their memory; all is computed plainly from here on."""
        self.works = False
        with contextlib.suppress(Exception):
            if self._graphs:
                torch.cuda.current_stream(self._device).synchronize()
        with _capturing:
            self._graphs.clear()
        self._pool = None

    def hidden_states(self, pack: Pack) -> Tensor:
        """Compute the last layer's row of every token, [tokens, hidden]."""
        return self._computed("hidden_states", pack)[: pack.tokens]

    def first_token_states(self, pack: Pack) -> Tensor:
        """Compute the last layer's row of each sequence's first token, [n, hidden]."""
        return self._computed("first_token_states", pack)[: len(pack.sequences)]

    def _computed(self, step: Step, pack: Pack) -> Tensor:
        compute = getattr(self._encoder, step)
        room = room_for(pack) if self.works else None
        if room is None:
            rows: Tensor = compute(pack)
            return rows
        key = (step, room)
        if (graph := self._graphs.get(key)) is not None:
            try:
                rows = graph.replay(pack)
            except Exception as exc:  # noqa: BLE001 -- what is really broken says so again below
                self._give_up(exc)
                return self._computed(step, pack)
            self.replays += 1
            return rows
        rows = compute(pack)
        self._uses[key] += 1
        if self._uses[key] > _USES_BEFORE:
            try:
                self._add(key, pack, rows)
            except Exception as exc:  # noqa: BLE001 -- the rows are there: nobody need hear
                self._give_up(exc)
        return rows

    def _add(self, key: tuple[Step, Room], pack: Pack, rows: Tensor) -> None:
        """Capture a graph, and keep it if it computes what was computed plainly."""
        if not torch.isfinite(rows).all():
            return  # which says nothing of the graph: it is for the next pack to compare
        step, room = key
        static = StaticPack((), self._device, room=room)
        static.fill(pack)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = _Graph(self._encoder, step, static, self._pool)
        if not _agree(graph.replay(pack)[: len(rows)], rows):
            msg = f"A graph of {room.rows} rows gives other numbers."
            raise ComputationError(msg)
        self._graphs[key] = graph

    def _give_up(self, error: Exception) -> None:
        logger.debug("CUDA graphs are not used: %s", error)
        self.close()


def _agree(some: Tensor, others: Tensor) -> bool:
    """Return whether rows [n, hidden] have the same direction and length, and are numbers."""
    some, others = some.float(), others.float()
    cosines = torch.nn.functional.cosine_similarity(some, others, dim=-1)
    lengths = some.norm(dim=-1) / others.norm(dim=-1)
    # NaN is neither.
    return bool(((cosines > _LEAST_COSINE) & ((lengths - 1).abs() < 0.02)).all())
