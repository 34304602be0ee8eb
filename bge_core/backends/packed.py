"""The runner of packs: every linear layer computes real tokens only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from bge_core.backends.base import POOLS, TorchRunner, begin_copy
from bge_core.backends.cuda_graphs import GraphedEncoder
from bge_core.backends.packing import Pack

if TYPE_CHECKING:
    import torch

    from bge_core.backends.base import Encoder, Fetch, Head
    from bge_core.backends.memory import Budget
    from bge_core.tokenizer import TokenSequence

__all__ = ["Heads", "PackedRunner", "PooledHead"]

MakePack = Callable[[Sequence["TokenSequence"]], Pack]


class Heads(Protocol):
    """Makes the outcome of sequences with an encoder."""

    def launch(
        self, sequences: Sequence[TokenSequence], encoder: Encoder, make_pack: MakePack
    ) -> Fetch:
        """Begin to compute one row a sequence.

        Returns:
            Waits for the rows: [n, width] float32, or a list of what was asked for.
        """
        ...


class PooledHead:
    """One row a sequence: its pooled hidden states, through a head.

    Args:
        pooling: The hidden states that make a sequence's row: `"cls"`, `"mean"` or `"last"`.
        head: Makes the outcome of a sequence's row.
    """

    def __init__(self, pooling: str, head: Head) -> None:
        self._pooling = pooling
        self._head = head

    def launch(
        self, sequences: Sequence[TokenSequence], encoder: Encoder, make_pack: MakePack
    ) -> Fetch:
        """Begin to compute one row a sequence, [n, width] float32."""
        pack = make_pack(sequences)
        if self._pooling == "cls":
            rows = encoder.first_token_states(pack)
        else:
            rows = POOLS[self._pooling](encoder.hidden_states(pack), pack)
        count = len(sequences)
        fetch = begin_copy(self._head(rows))
        return lambda: fetch()[:count]


class PackedRunner(TorchRunner):
    """Runs an encoder on packs, without padding to the longest.

    Args:
        encoder: Computes hidden states of the last layer.
        heads: Make the outcome of them.
        device: Where the model is.
        position_offset: Where positions are counted from; None for 0 (see `Pack`).
        budget: What a pack may have unless the user says otherwise.
        dtype: The encoder's number format, by name.
    """

    def __init__(
        self,
        encoder: Encoder,
        heads: Heads,
        *,
        device: torch.device,
        position_offset: int | None,
        budget: Budget,
        dtype: str = "float32",
    ) -> None:
        super().__init__(device=device, budget=budget, dtype=dtype)
        self._encoder = encoder
        self._heads = heads
        self._position_offset = position_offset
        self._graphed: GraphedEncoder | None = None

    @contextmanager
    def on_thread(self, *, urgent: bool) -> Iterator[None]:
        """Return a context in which a thread computes: on CUDA with a stream of its own.

        Args:
            urgent: Whether the device takes this thread's work before the others', and CUDA graphs
                compute its small packs.
        """
        with super().on_thread(urgent=urgent):
            if not (urgent and self.overlaps and self._encoder.capturable):
                yield
                return
            graphed = self._graphed = GraphedEncoder(self._encoder, self._device)
            try:
                yield
            finally:
                self._graphed = None
                graphed.close()

    def _launch(self, sequences: Sequence[TokenSequence]) -> Fetch:
        graphed = self._graphed
        here = graphed if graphed is not None and graphed.is_here else self._encoder
        return self._heads.launch(sequences, here, self._pack)

    def _pack(self, sequences: Sequence[TokenSequence]) -> Pack:
        return Pack(sequences, self._device, self._position_offset, self._encoder.bucketed)
