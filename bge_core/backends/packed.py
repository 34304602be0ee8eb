"""The runner of packs: every linear layer computes real tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bge_core.backends.base import POOLS, to_numpy
from bge_core.backends.packing import Pack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.backends.base import Encoder, Head
    from bge_core.tokenizer import TokenSequence

__all__ = ["PackedRunner"]


class PackedRunner:
    """Runs an encoder on packs, without padding to the longest.

    Args:
        encoder: Computes rows of the last layer.
        pooling: Which of them make a sequence's row: `"cls"`, `"mean"` or `"last"`.
        head: Makes the outcome of a sequence's row.
        device: Where the model is.
        padding_position: Where positions are counted from; None for 0 (see `Pack`).
        budget: Tokens a pack may have unless the user says otherwise.
    """

    padded = False

    def __init__(
        self,
        encoder: Encoder,
        pooling: str,
        head: Head,
        *,
        device: torch.device,
        padding_position: int | None,
        budget: int,
    ) -> None:
        self._encoder = encoder
        self._pooling = pooling
        self._head = head
        self._device = device
        self._padding_position = padding_position
        self.default_budget = budget

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> NDArray[np.float32] | list[Any]:
        """Compute one row a sequence, [n, width] float32."""
        return self._outcome(self._pack(sequences))

    def _pack(self, sequences: Sequence[TokenSequence]) -> Pack:
        return Pack(sequences, self._device, self._padding_position, self._encoder.bucketed)

    def _outcome(self, pack: Pack) -> NDArray[np.float32]:
        """Make one row a sequence, [n, width] float32."""
        if self._pooling == "cls":
            rows = self._encoder.first_rows(pack)
        else:
            rows = POOLS[self._pooling](self._encoder.rows(pack), pack)
        return to_numpy(self._head(rows))[: len(pack.sequences)]
