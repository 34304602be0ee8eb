"""transformers' own models on packs: the attention function that they take by name.

The stock modelling code runs unchanged: a pack's boundaries travel as the keyword `pack` through
the model's `forward` to the function below. `bert.py` needs none of this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from bge_core.errors import ComputationError
from bge_core.packing import Pack, attend

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PACKED_ATTENTION", "StockEncoder"]

PACKED_ATTENTION = "bge_packed"
"""The name under which transformers finds the packed attention."""


class StockEncoder:
    """A transformers base model with the packed attention set.

    Args:
        model: The model.
        types: Whether it takes token types.
    """

    few_sizes = False

    def __init__(self, model: Any, *, types: bool) -> None:
        self._model = model
        self._types = types

    def rows(self, pack: Pack) -> Tensor:
        """Compute the last layer's row of every token, [tokens, hidden]."""
        inputs = pack.inputs()
        if not self._types:
            del inputs["token_type_ids"]
        hidden: Tensor = self._model(**inputs, pack=pack)[0][0]
        return hidden

    def first_rows(self, pack: Pack) -> Tensor:
        """Compute the last layer's row of each sequence's first token, [n, hidden]."""
        return self.rows(pack)[pack.first_rows()]


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
    # A view, since the projections are laid out that way.
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    attended = attend(
        queries,
        keys,
        values,
        pack,
        causal=bool(getattr(module, "is_causal", False)),
        scaling=scaling,
        sliding_window=sliding_window,
    )
    return attended[None], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
