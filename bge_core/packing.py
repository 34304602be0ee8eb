"""Packs: sequences laid end to end under a token budget, and the attention that keeps them apart.

Every linear layer of the encoder then runs on real tokens only. transformers lets a model take an
attention function by name, so the stock modelling code runs unchanged: the boundaries travel as
the keyword `pack` through the model's `forward` to the function below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import accumulate, chain, groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from bge_core.errors import ComputationError
from bge_core.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 it has not all of the keywords that are needed.
    _varlen_attention: Any = (
        varlen_attn if "num_splits" in signature(varlen_attn).parameters else None
    )
except ImportError:  # an older torch: one call a run on every device
    _varlen_attention = None

__all__ = ["PACKED_ATTENTION", "Pack", "all_rows_of_layer", "fill", "first_rows_of_layer"]

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


@dataclass(frozen=True)
class Pack:
    """Sequences laid end to end.

    Attributes:
        sequences: The sequences, equal lengths side by side.
        device: Where its tensors are made.
        padding_position: Where positions are counted from in the families of RoBERTa: the
            padding token's id. None where they start at 0.
    """

    sequences: Sequence[Tokens]
    device: torch.device
    padding_position: int | None = None

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(sequence) for sequence in self.sequences]

    @cached_property
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
        positions = chain.from_iterable(self._positions(sequence) for sequence in self.sequences)
        return {
            "input_ids": self._tensor(ids)[None],
            "position_ids": self._tensor(list(positions))[None],
            "token_type_ids": self._tensor(list(types))[None],
        }

    def _positions(self, sequence: Tokens) -> Iterable[int]:
        pad = self.padding_position
        if pad is None:
            return range(len(sequence))
        if pad not in sequence.ids:
            return range(pad + 1, pad + 1 + len(sequence))
        # A text that spells the padding token out: it is not counted, as in the models' own code.
        counted = accumulate(int(token != pad) for token in sequence.ids)
        return (
            pad + count * (token != pad) for token, count in zip(sequence.ids, counted, strict=True)
        )

    def first_rows(self) -> Tensor:
        """Give the row of each sequence's first token, [n] int64."""
        return self._tensor([0, *accumulate(self.lengths)][:-1])

    def last_rows(self) -> Tensor:
        """Give the row of each sequence's last token, [n] int64."""
        return self._tensor([end - 1 for end in accumulate(self.lengths)])

    @cached_property
    def ends(self) -> Tensor:
        """Give 0 and each sequence's end, [n + 1] int32, as CUDA's kernel takes them."""
        return self._tensor([0, *accumulate(self.lengths)]).int()

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def fill(
    lengths: Sequence[int], *, start: int, room: int, padded: bool, beside: Sequence[int] = ()
) -> int:
    """Say how far a pack that starts at `start` may go.

    Args:
        lengths: Sequence lengths, sorted.
        start: Index of the pack's first sequence; alone, it always fits.
        room: Tokens that the pack may have.
        padded: Whether each sequence costs as much as the longest.
        beside: Lengths of what is in the pack already.

    Returns:
        The index after the pack's last sequence.
    """
    total, longest, count = sum(beside), max(beside, default=0), len(beside)
    for end in range(start, len(lengths)):
        total += lengths[end]
        longest = max(longest, lengths[end])
        count += 1
        if (longest * count if padded else total) > room and count > 1:
            return end
    return len(lengths)


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
        sliding_window: Tokens see others less than so many places away; None for all.
        pack: The boundaries.

    Returns:
        [1, tokens, heads, head_dim] and no weights.

    Raises:
        ComputationError: The layer asks for what this function does not do.
    """
    if softcap is not None:
        msg = f"{type(module).__name__} soft-caps its scores: run it padded."
        raise ComputationError(msg)
    causal = bool(getattr(module, "is_causal", False))
    # [tokens, heads, head_dim]: a view, since the projections are laid out that way.
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if _takes_varlen(q):
        longest = max(pack.lengths)
        far = -1 if sliding_window is None else sliding_window - 1
        attended: Tensor = _varlen_attention(
            q,
            k,
            v,
            pack.ends,
            pack.ends,
            longest,
            longest,
            scale=scaling,
            window_size=(far, 0 if causal else far),
            enable_gqa=k.shape[1] != q.shape[1],
            # More splits are faster on one long text, and make a vector depend on its pack.
            num_splits=1,
        )
        return attended[None], None
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for run in pack.runs:
        mask = _window(run.length, sliding_window, causal=causal, device=q.device)
        attended = scaled_dot_product_attention(
            _split(q, run),
            _split(k, run),
            _split(v, run),
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=scaling,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        _split(out, run).copy_(attended)
    return out[None], None


def first_rows_of_layer(layer: Any, hidden: Tensor, pack: Pack) -> Tensor:
    """Run a BERT-style last layer for the first token of each sequence only.

    CLS pooling reads no other row of the last layer, so its queries, attention output and feed
    forward are needed for one row a sequence: the keys and values are all that it takes of the
    others. The result is the same.

    Args:
        layer: A `BertLayer`, or one of the families that copied it.
        hidden: [tokens, hidden], what the layer before gave.
        pack: The boundaries.

    Returns:
        [n, hidden], the layer's output for each sequence's first token.
    """
    attention = layer.attention.self
    attention_output = layer.attention.output
    heads = (attention.num_attention_heads, attention.attention_head_size)
    first = hidden[pack.first_rows()]
    queries = attention.query(first).view(-1, *heads)
    keys = attention.key(hidden).view(-1, *heads)
    values = attention.value(hidden).view(-1, *heads)
    attended, done = [], 0
    for run in pack.runs:
        out = scaled_dot_product_attention(
            queries[done : done + run.count, :, None],
            _split(keys, run),
            _split(values, run),
            scale=attention.scaling,
        )
        attended.append(out.flatten(1))
        done += run.count
    rows: Tensor = layer.feed_forward_chunk(attention_output(torch.cat(attended), first))
    return rows


def _takes_varlen(query: Tensor) -> bool:
    """Say whether CUDA's kernel for sequences of unequal length can run here."""
    return (
        _varlen_attention is not None
        and query.is_cuda
        and query.dtype != torch.float32
        # Flash attention, which it is, needs an Ampere card or a newer one.
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def all_rows_of_layer(layer: Any, hidden: Tensor, pack: Pack) -> Tensor:
    """Run a BERT-style last layer for every token, where more than the first is read.

    Args:
        layer: As in `first_rows_of_layer`.
        hidden: [tokens, hidden], what the layer before gave.
        pack: The boundaries.

    Returns:
        [tokens, hidden].
    """
    out: Any = layer(hidden[None], None, pack=pack)
    # transformers 4 gives a tuple.
    rows: Tensor = (out[0] if isinstance(out, tuple) else out)[0]
    return rows


def _split(rows: Tensor, run: Run) -> Tensor:
    """View a run's rows [tokens, heads, head_dim] as [count, heads, length, head_dim]."""
    own = rows[run.start : run.end]
    return own.view(run.count, run.length, *rows.shape[1:]).transpose(1, 2)


def _window(
    length: int, sliding_window: int | None, *, causal: bool, device: torch.device
) -> Tensor | None:
    """Make the mask of a sliding window, [length, length] bool; None where it hides nothing."""
    if sliding_window is None or length <= sliding_window:
        return None
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    visible = distance.abs() < sliding_window
    return visible & (distance >= 0) if causal else visible


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
