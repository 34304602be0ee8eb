"""Packs: sequences laid end to end under a token budget, and the attention that keeps them apart.

Every linear layer of the encoder then runs on real tokens only. transformers lets a model take an
attention function by name, so the stock modelling code runs unchanged: the boundaries travel as
the keyword `pack` through the model's `forward` to the function below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from bge_core.errors import ComputationError
from bge_core.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PACKED_ATTENTION", "Pack", "fill"]

PACKED_ATTENTION = "bge_packed"
"""The name under which transformers finds the packed attention."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring sequences of equal length.

    Attributes:
        start: Row of the first token.
        count: How many sequences.
        length: Tokens a sequence.
    """

    start: int
    count: int
    length: int

    @property
    def end(self) -> int:
        """Row after the last token."""
        return self.start + self.count * self.length


@dataclass(frozen=True, slots=True)
class Pack:
    """Sequences laid end to end.

    Attributes:
        sequences: The sequences, equal lengths side by side.
        device: Where its tensors are made.
        first_position: Position of a sequence's first token.
    """

    sequences: Sequence[Tokens]
    device: torch.device
    first_position: int = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(sequence) for sequence in self.sequences]

    @property
    def runs(self) -> list[Run]:
        """Neighbouring sequences of equal length, in order."""
        runs, start = [], 0
        for length, group in groupby(self.lengths):
            run = Run(start, sum(1 for _ in group), length)
            runs.append(run)
            start = run.end
        return runs

    def inputs(self) -> dict[str, Tensor]:
        """Make the model's inputs, each of shape [1, tokens], int64."""
        ids = list(chain.from_iterable(sequence.ids for sequence in self.sequences))
        types = chain.from_iterable(
            chain(bytes(sequence.second), b"\1" * (len(sequence) - sequence.second))
            for sequence in self.sequences
        )
        first = self.first_position
        positions = chain.from_iterable(range(first, first + n) for n in self.lengths)
        return {
            "input_ids": self._tensor(ids)[None],
            "position_ids": self._tensor(list(positions))[None],
            "token_type_ids": self._tensor(list(types))[None],
        }

    def first_rows(self) -> Tensor:
        """Give the row of each sequence's first token, [n] int64."""
        return self._tensor([0, *accumulate(self.lengths)][:-1])

    def last_rows(self) -> Tensor:
        """Give the row of each sequence's last token, [n] int64."""
        return self._tensor([end - 1 for end in accumulate(self.lengths)])

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)


def fill(lengths: Sequence[int], *, start: int, room: int, padded: bool) -> int:
    """Say how far a pack that starts at `start` may go.

    Args:
        lengths: Sequence lengths, sorted.
        start: Index of the pack's first sequence, which always fits.
        room: Tokens that the pack may have.
        padded: Whether each sequence costs as much as the longest.

    Returns:
        The index after the pack's last sequence.
    """
    total, longest, end = 0, 0, start
    while end < len(lengths):
        longest = max(longest, lengths[end])
        total = longest * (end - start + 1) if padded else total + lengths[end]
        if total > room and end > start:
            break
        end += 1
    return end


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 -- the interface's, always None here
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    pack: Pack,
    **_: Any,  # transformers hands every attention function more than it needs
) -> tuple[Tensor, None]:
    """Attend within each sequence of a pack.

    Args:
        module: The attention layer; its `is_causal` says whether later tokens are hidden.
        query: [1, heads, tokens, head_dim].
        key: [1, key heads, tokens, head_dim].
        value: Like `key`.
        attention_mask: None, since the pack has the boundaries.
        scaling: Factor on the scores; None for 1 / sqrt(head_dim).
        softcap: Refused: soft-capped scores need arithmetic of their own.
        sliding_window: Refused where a sequence is longer than the window.
        pack: The boundaries.

    Returns:
        [1, tokens, heads, head_dim] and no weights.

    Raises:
        ComputationError: The layer asks for what this function does not do.
    """
    if softcap is not None or sliding_window is not None:
        msg = f"{type(module).__name__} wants a soft cap or a sliding window: run it padded."
        raise ComputationError(msg)
    # [tokens, heads, head_dim]: a view, since the projections are laid out that way.
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    out = torch.empty_like(rows[0], memory_format=torch.contiguous_format)
    for run in pack.runs:
        shape = (run.count, run.length)
        q, k, v = (
            row[run.start : run.end].view(*shape, *row.shape[1:]).transpose(1, 2) for row in rows
        )
        attended = scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=bool(getattr(module, "is_causal", False)),
            scale=scaling,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        out[run.start : run.end].view(*shape, *out.shape[1:]).copy_(attended.transpose(1, 2))
    return out[None], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
