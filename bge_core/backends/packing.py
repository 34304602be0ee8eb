"""Packs: sequences laid end to end under a token budget, and the attention that keeps them apart.

Every linear layer of the encoder then runs on real tokens only, or next to it (`bucketed`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from bge_core.tokenizer import TokenSequence

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "BatchSize",
    "Pack",
    "attend",
    "attend_first",
    "next_batch_end",
    "round_up_to_bucket",
]


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LengthGroup:
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

    Its tensors are made by numpy, a few nanoseconds a token: a device waits meanwhile.

    Attributes:
        sequences: The sequences, equal lengths side by side.
        device: Where its tensors are made.
        position_offset: Where positions are counted from in the families of RoBERTa: the
            padding token's id. None where they start at 0.
        bucketed: Have the tensors end in some padding, so that they come in few sizes.
    """

    sequences: Sequence[TokenSequence]
    device: torch.device
    position_offset: int | None = None
    bucketed: bool = False

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(sequence) for sequence in self.sequences]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self._bounds[-1])

    @cached_property
    def length_groups(self) -> list[LengthGroup]:
        """Neighbouring sequences of equal length, in order."""
        groups, start = [], 0
        for length, group in groupby(self.lengths):
            groups.append(LengthGroup(start, sum(1 for _ in group), length))
            start = groups[-1].end
        return groups

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        """0 and the row after each sequence, [n + 1]."""
        bounds = np.zeros(len(self.sequences) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=bounds[1:])
        return bounds

    @property
    def rows(self) -> int:
        """Rows that its inputs have: the tokens, and what pads them."""
        return self._padded_size(self.tokens)

    @property
    def slots(self) -> int:
        """Sequences that its tensors have room for."""
        return self._padded_size(len(self.sequences))

    def values(self, rows: int, slots: int) -> NDArray[np.int64]:
        """Lay all that its tensors hold into one array, which goes to a device in one copy.

        Args:
            rows: Rows of the inputs, no fewer than the tokens.
            slots: Sequences that there is room for; those beyond the pack's have no tokens.

        Returns:
            Ids, positions and types [3, rows], the rows of first tokens [slots], and, of int32,
            bounds and ordinals [2, slots + 1], end to end.
        """
        tokens, count = self.tokens, len(self.sequences)
        values = np.zeros(3 * rows + 2 * slots + 1, dtype=np.int64)
        inputs = values[: 3 * rows].reshape(3, rows)
        ids, positions, types = inputs[:, :tokens]
        np.concatenate([sequence.id_array for sequence in self.sequences], out=ids)
        starts = np.repeat(self._bounds[:-1], self.lengths)
        np.subtract(np.arange(tokens), starts, out=positions)
        seconds = [sequence.second_segment_start for sequence in self.sequences]
        if seconds != self.lengths:
            np.greater_equal(positions, np.repeat(seconds, self.lengths), out=types)
        if (pad := self.position_offset) is not None:
            inputs[:2, tokens:] = pad
            self._offset(ids, positions, starts, pad)
        values[3 * rows :][:count] = self._bounds[:-1]
        ends = values[3 * rows + slots :].view(np.int32).reshape(2, slots + 1)
        ends[0] = tokens
        ends[0, : count + 1] = self._bounds
        ends[1] = np.arange(slots + 1)
        return values

    @cached_property
    def _all(self) -> Tensor:
        """All of `values`, on the device."""
        return self._tensor(self.values(self.rows, self.slots))

    @cached_property
    def _ends(self) -> Tensor:
        """Bounds and ordinals, [2, slots + 1] int32."""
        return self._all[3 * self.rows + self.slots :].view(torch.int32).view(2, -1)

    def inputs(self) -> dict[str, Tensor]:
        """Return the model's inputs, each of shape [1, rows], int64: the tokens, then padding."""
        inputs = self._all[: 3 * self.rows].view(3, 1, self.rows)
        return dict(zip(("input_ids", "position_ids", "token_type_ids"), inputs, strict=True))

    @staticmethod
    def _offset(
        ids: NDArray[np.int64], positions: NDArray[np.int64], starts: NDArray[np.int64], pad: int
    ) -> None:
        """Count positions from the padding token's id."""
        real = ids != pad
        if real.all():
            positions += pad + 1
            return
        # A text that spells the padding token out: it is not counted, as in the models' own code.
        counted = np.cumsum(real)
        before = counted[starts] - real[starts]
        np.multiply(counted - before, real, out=positions)
        positions += pad

    def first_token_indices(self) -> Tensor:
        """Return the row of each sequence's first token, [n] int64, or more of few sizes."""
        return self._all[3 * self.rows :][: self.slots]

    def last_token_indices(self) -> Tensor:
        """Return the row of each sequence's last token, [n] int64."""
        return self.cu_seqlens[1:].long() - 1

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Return 0 and each sequence's end, [n + 1] int32, as CUDA's kernel takes them."""
        return self._ends[0, : len(self.sequences) + 1]

    @cached_property
    def ordinals(self) -> Tensor:
        """Return 0 to n, [n + 1] int32: `cu_seqlens` of one token a sequence."""
        return self._ends[1, : len(self.sequences) + 1]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def _padded_size(self, rows: int) -> int:
        return round_up_to_bucket(rows) if self.bucketed else rows

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda":
            # From pinned memory, the copy doesn't wait for what the device computes.
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


@dataclass(slots=True)
class BatchSize:
    """How much is in a batch that is being filled.

    Attributes:
        total: Tokens of all sequences.
        longest: Tokens of the longest.
        count: How many sequences.
    """

    total: int = 0
    longest: int = 0
    count: int = 0


def round_up_to_bucket(rows: int) -> int:
    """Round a number of rows up to a multiple of four, by less than an eighth from 24 rows on.

    oneDNN keeps what it made for each size of each layer's input, half a megabyte: up to 1,024
    rows, which packs beside others have at the most, there are 56 sizes that way. Its convolutions
    take images of four rows and more.
    """
    most = 32 if rows <= 1024 else 64
    step = min(most, max(4, 1 << max(0, rows.bit_length() - 4)))
    return -(-rows // step) * step


def next_batch_end(
    lengths: Sequence[int], *, start: int, limit: int, padded: bool, packed: BatchSize | None = None
) -> int:
    """Return how far a batch that goes on at `start` may go.

    Args:
        lengths: Sequence lengths, sorted.
        start: Index of the first sequence to add; alone in its batch, it always fits.
        limit: Tokens that the batch may have.
        padded: Whether each sequence costs as much as the longest.
        packed: What is in the batch already; what is added is counted there. None for nothing.

    Returns:
        The index after the last sequence that fits.
    """
    size = BatchSize() if packed is None else packed
    total, longest, count = size.total, size.longest, size.count
    end = start
    for end in range(start, len(lengths)):
        length = lengths[end]
        more = max(longest, length)
        if count and (more * (count + 1) if padded else total + length) > limit:
            break
        total += length
        longest = more
        count += 1
    else:
        end = max(start, len(lengths))
    size.total, size.longest, size.count = total, longest, count
    return end


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    pack: Pack,
    *,
    causal: bool = False,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Attend within each sequence of a pack.

    Args:
        queries: [rows, heads, head_dim].
        keys: [rows, key heads, head_dim].
        values: Like `keys`.
        pack: The boundaries.
        causal: Later tokens are hidden.
        scaling: Factor on the scores; None for 1 / sqrt(head_dim).
        sliding_window: Tokens see others less than so many places away; None for all.

    Returns:
        [rows, heads, head_dim]; zero where there is no sequence.
    """
    whole = sliding_window is None or pack.longest <= sliding_window
    one_call = _one_call(queries, windowed=not whole)
    if one_call is not None:
        seen = None if whole else sliding_window
        asked = _Asked(pack, pack.cu_seqlens, pack.longest, causal, scaling, window=seen)
        return one_call(queries, keys, values, asked)
    grouped = keys.shape[1] != queries.shape[1]
    parts = []
    for group in pack.length_groups:
        mask = _window(group.length, sliding_window, causal=causal, device=queries.device)
        part = scaled_dot_product_attention(
            _split(queries, group),
            _split(keys, group),
            _split(values, group),
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        parts.append(part.transpose(1, 2).flatten(0, 1))
    return _joined(parts, queries)


def attend_first(queries: Tensor, keys: Tensor, values: Tensor, pack: Pack) -> Tensor:
    """Attend from the first token of each sequence only, to all of its tokens.

    Args:
        queries: [rows, heads, head_dim], of the first tokens.
        keys: [rows, heads, head_dim], of all tokens.
        values: Like `keys`.
        pack: The boundaries.

    Returns:
        [rows, heads, head_dim]; zero where there is no sequence.
    """
    one_call = _one_call(queries, windowed=False)
    if one_call is not None:
        return one_call(queries, keys, values, _Asked(pack, pack.ordinals, most_queries=1))
    parts, done = [], 0
    for group in pack.length_groups:
        own = queries[done : done + group.count, :, None]
        part = scaled_dot_product_attention(own, _split(keys, group), _split(values, group))
        parts.append(part[:, :, 0])
        done += group.count
    return _joined(parts, queries)


def _joined(parts: list[Tensor], queries: Tensor) -> Tensor:
    """Lay the outcomes of all runs end to end, as many rows as there are queries."""
    more = len(queries) - sum(len(part) for part in parts)
    if more:
        parts.append(queries.new_zeros(more, *queries.shape[1:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one call for all sequences of a pack is to compute.

    Attributes:
        pack: The boundaries of keys and values.
        query_bounds: 0 and each sequence's end among the queries, [n + 1] int32.
        most_queries: Queries of a sequence, at the most.
        causal: Later tokens are hidden.
        scale: Factor on the scores; None for 1 / sqrt(head_dim).
        window: Tokens see others less than so many places away; None for all.
    """

    pack: Pack
    query_bounds: Tensor
    most_queries: int
    causal: bool = False
    scale: float | None = None
    window: int | None = None


# Of queries, keys and values.
_OneCall = Callable[["Tensor", "Tensor", "Tensor", _Asked], "Tensor"]


def _one_call(queries: Tensor, *, windowed: bool) -> _OneCall | None:
    """Return CUDA's kernel for sequences of unequal length; None where none can run."""
    if not queries.is_cuda:
        return None
    return _kernel(queries.device, queries.dtype, queries.shape[-1], windowed)


@cache
def _kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, windowed: bool
) -> _OneCall | None:
    for kernel in (_flash,) if windowed else (_flash, _efficient):
        if _works(kernel, device, dtype, head_dim):
            return kernel
    return None


def _works(kernel: _OneCall, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether a kernel gives what one call a sequence does.

    The operators are torch's own for nested tensors, and promised to nobody. Flash attention
    takes half precision, heads of some widths, and an Ampere card or a newer one.
    """
    lengths = (3, 1, 5)
    pack = Pack([TokenSequence(np.zeros(n, np.int32), n) for n in lengths], device)
    rows = torch.linspace(-1, 1, pack.tokens * 2 * head_dim, device=device, dtype=dtype)
    heads: Any = rows.view(-1, 2, head_dim)
    try:
        with torch.inference_mode():
            together = kernel(heads, heads, heads, _Asked(pack, pack.cu_seqlens, pack.longest))
            apart = torch.cat(
                [
                    scaled_dot_product_attention(*[own.transpose(0, 1)] * 3).transpose(0, 1)
                    for own in heads.split(lengths)
                ]
            )
            return torch.allclose(together, apart, atol=1e-4 if dtype == torch.float32 else 2e-2)
    except Exception as exc:  # noqa: BLE001 -- whatever another torch, or another card, says
        logger.debug("%s of torch in %s: %s", getattr(kernel, "__name__", kernel), dtype, exc)
        return False


def _flash(queries: Tensor, keys: Tensor, values: Tensor, asked: _Asked) -> Tensor:
    """Attend in half precision; what `torch.nn.attention.varlen` calls, without its Python."""
    far = -1 if asked.window is None else asked.window - 1
    attended: Tensor = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        asked.query_bounds,
        asked.pack.cu_seqlens,
        asked.most_queries,
        asked.pack.longest,
        0.0,  # dropout
        False,  # noqa: FBT003 -- the operator takes it by position: causal, which the window says
        False,  # noqa: FBT003 -- the same: no mask is returned
        scale=asked.scale,
        window_size_left=far,
        window_size_right=0 if asked.causal else far,
        **_flash_keywords(),
    )[0]
    return attended


@cache
def _flash_keywords() -> dict[str, Any]:
    # More splits are faster on one long text, and make a vector depend on its pack. Before torch
    # 2.12 there is no word for it, and no split.
    taken = torch.ops.aten._flash_attention_forward.default._schema.arguments
    return {"num_splits": 1} if any(one.name == "num_splits" for one in taken) else {}


def _efficient(queries: Tensor, keys: Tensor, values: Tensor, asked: _Asked) -> Tensor:
    """Attend in float32, and on cards before Ampere; no window is asked for: see `_kernel`."""
    shared = queries.shape[1] // keys.shape[1]
    if shared > 1:
        keys, values = (rows.repeat_interleave(shared, 1) for rows in (keys, values))
    attended: Tensor = torch.ops.aten._efficient_attention_forward(
        queries[None],
        keys[None],
        values[None],
        None,  # what is added to the scores
        asked.query_bounds,
        asked.pack.cu_seqlens,
        asked.most_queries,
        asked.pack.longest,
        0.0,  # dropout
        int(asked.causal),
        False,  # noqa: FBT003 -- the operator takes it by position: no sums for a backward pass
        scale=asked.scale,
    )[0]
    return attended[0]


def _split(rows: Tensor, group: LengthGroup) -> Tensor:
    """View a group's rows [tokens, heads, head_dim] as [count, heads, length, head_dim]."""
    own = rows[group.start : group.end]
    return own.view(group.count, group.length, *rows.shape[1:]).transpose(1, 2)


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
