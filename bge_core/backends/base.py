"""What every backend shares: the protocols, poolings, padded inputs and token budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from bge_core.backends.packing import Pack

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from bge_core.tokenizer import TokenSequence

__all__ = [
    "POOLS",
    "Runner",
    "default_budget",
    "identity",
    "padded_inputs",
    "pooled",
    "takes_types",
    "to_numpy",
]

Pool = Callable[["Tensor", Pack], "Tensor"]
"""Hidden rows [rows, hidden] and their pack -> one row a sequence, [n, hidden]."""
Head = Callable[["Tensor"], "Tensor"]
"""One row a sequence, [n, hidden] -> what the caller wants of it, [n, width]."""


class Encoder(Protocol):
    """Computes the last layer's rows of a pack; what it is padded with has rows at the end."""

    bucketed: bool
    """Whether its packs should come in few sizes (see `Pack`)."""

    def hidden_states(self, pack: Pack) -> Tensor:
        """Compute the row of every token, [rows, hidden]."""
        ...

    def first_token_states(self, pack: Pack) -> Tensor:
        """Compute the row of each sequence's first token, [rows, hidden]."""
        ...


class Runner(Protocol):
    """Executes packs on one device."""

    padded: bool
    """Whether a short sequence costs as much as the longest of its pack."""
    default_budget: int
    """Tokens a pack may have unless the user says otherwise."""

    def run(self, sequences: Sequence[TokenSequence]) -> NDArray[np.float32] | list[Any]:
        """Compute one row a sequence: [n, width] float32, or a list of what was asked for."""
        ...


def padded_inputs(
    sequences: Sequence[TokenSequence], *, pad: int, types: bool
) -> dict[str, NDArray[np.int64]]:
    """Make a padded batch's inputs.

    Args:
        sequences: The sequences.
        pad: The padding token's id.
        types: Whether the model takes token types.

    Returns:
        input_ids, attention_mask and, if asked for, token_type_ids, each [n, longest].
    """
    shape = (len(sequences), max(len(sequence) for sequence in sequences))
    ids = np.full(shape, pad, dtype=np.int64)
    mask, second = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence.id_array
        mask[row, : len(sequence)] = 1
        second[row, sequence.second_segment_start : len(sequence)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "token_type_ids": second} if types else inputs


def takes_types(encoder: Any) -> bool:
    """Return whether a model takes token types."""
    return (getattr(encoder.config, "type_vocab_size", None) or 0) > 0


def _first(hidden: Tensor, pack: Pack) -> Tensor:
    return hidden[pack.first_token_indices()]


def _last(hidden: Tensor, pack: Pack) -> Tensor:
    return hidden[pack.last_token_indices()]


def _mean(hidden: Tensor, pack: Pack) -> Tensor:
    # In float32: a half-precision sum over hundreds of tokens loses digits.
    return torch.cat(
        [
            hidden[group.start : group.end].float().view(group.count, group.length, -1).mean(1)
            for group in pack.length_groups
        ]
    )


POOLS: dict[str, Pool] = {"cls": _first, "last": _last, "mean": _mean}


def pooled(pooling: str, head: Head) -> Pool:
    """Pool hidden states by a pooling mode's name."""
    return lambda hidden, pack: head(POOLS[pooling](hidden, pack))


def identity(rows: Tensor) -> Tensor:
    """Return the rows as they are."""
    return rows


def default_budget(config: Any, device: torch.device, dtype: str) -> int:
    """Compute the tokens that a batch may have on a device."""
    if device.type == "cpu":
        # A small working set: activations stay in the cache (docs/decisions/16).
        return 2048
    if device.type != "cuda":
        return 8192
    # Live at once in a layer: a few rows of hidden size and one of the feed-forward.
    wide = getattr(config, "intermediate_size", 4 * config.hidden_size) + 8 * config.hidden_size
    size = getattr(torch, dtype).itemsize
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(max(free // 2 // (wide * size), 2048), 131_072))


def to_numpy(rows: Tensor) -> NDArray[np.float32]:
    """Copy rows to the CPU as float32."""
    return rows.float().cpu().numpy()
