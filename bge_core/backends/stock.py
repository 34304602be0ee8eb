"""transformers' own models on packs: the attention function that they take by name.

The stock modelling code runs unchanged: a pack's boundaries travel as the keyword `pack` through
the model's `forward` to the function below. `bert.py` needs none of this.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AttentionInterface

from bge_core.backends.base import takes_types, to_numpy
from bge_core.backends.packing import Pack, attend
from bge_core.errors import ComputationError
from bge_core.tokenizer import TokenSequence

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from bge_core.backends.base import Encoder, Head
    from bge_core.checkpoints.metadata import Checkpoint

__all__ = ["PACKED_ATTENTION", "TransformersEncoder", "classifier_head", "transformers_encoder"]

logger = logging.getLogger(__name__)

PACKED_ATTENTION = "bge_packed"
"""The name under which transformers finds the packed attention."""


class TransformersEncoder:
    """A transformers base model with the packed attention set.

    Args:
        model: The model.
        types: Whether it takes token types.
    """

    bucketed = False
    capturable = False  # transformers' code may look at numbers on the way

    def __init__(self, model: Any, *, types: bool) -> None:
        self._model = model
        self._types = types

    def hidden_states(self, pack: Pack) -> Tensor:
        """Compute the last layer's row of every token, [tokens, hidden]."""
        inputs = pack.inputs()
        if not self._types:
            del inputs["token_type_ids"]
        hidden: Tensor = self._model(**inputs, pack=pack)[0][0]
        return hidden

    def first_token_states(self, pack: Pack) -> Tensor:
        """Compute the last layer's row of each sequence's first token, [n, hidden]."""
        return self.hidden_states(pack)[pack.first_token_indices()]


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


def classifier_head(model: Any, answer: int | None) -> Head | None:
    """Return the model's own head on one row a sequence; None if it needs more."""
    if answer is not None:
        # The other words' logits, a quarter of a million of them, are nobody's business.
        word = model.get_output_embeddings().weight[answer].float()
        return lambda rows: (rows.float() @ word)[:, None]
    name = type(model).__name__
    if name == "BertForSequenceClassification":
        return lambda rows: model.classifier(model.bert.pooler(rows[:, None]))
    if name in ("XLMRobertaForSequenceClassification", "RobertaForSequenceClassification"):
        return lambda rows: model.classifier(rows[:, None])
    return None


def _agree(some: NDArray[np.float32], others: NDArray[np.float32], *, half: bool) -> bool:
    """Return whether two computations of hidden states, [tokens, hidden], gave the same numbers.

    One step of bfloat16 at 4 is 0.03, and another attention may round each number another way. So
    in half precision it is the direction and the length of each state that count.
    """
    if not half:
        return np.allclose(some, others, atol=1e-4)
    lengths = np.linalg.norm(some, axis=1), np.linalg.norm(others, axis=1)
    cosines = (some * others).sum(axis=1) / (lengths[0] * lengths[1])
    return bool((cosines > 0.999).all()) and np.allclose(*lengths, rtol=2e-2)


def transformers_encoder(
    model: Any, checkpoint: Checkpoint, device: torch.device
) -> Encoder | None:
    """Set the packed attention where the model's own code carries it; None where it doesn't."""
    if not getattr(model, "_supports_attention_backend", False):
        return None
    before = model.config._attn_implementation
    encoder = TransformersEncoder(model, types=takes_types(model))
    with contextlib.suppress(Exception):
        # Anything that goes wrong here goes right on padded batches.
        model.set_attn_implementation(PACKED_ATTENTION)
        short, long = (
            TokenSequence(np.array(ids, np.int32), len(ids)) for ids in ([5, 6, 7], [7, 8, 9, 6, 5])
        )

        def rows(*sequences: TokenSequence) -> NDArray[np.float32]:
            return to_numpy(
                encoder.hidden_states(Pack(sequences, device, checkpoint.position_offset))
            )

        with torch.inference_mode():
            together = rows(short, long)
            apart = np.concatenate([rows(short), rows(long)])
            model.set_attn_implementation(before)
            alone = to_numpy(model(input_ids=torch.tensor([long.ids], device=device))[0][0])
        half = next(model.parameters()).dtype != torch.float32
        if _agree(together, apart, half=half) and _agree(alone, apart[3:], half=half):
            model.set_attn_implementation(PACKED_ATTENTION)
            return encoder
        logger.warning(
            "%r gives other numbers on packs than alone: it runs on padded batches, more slowly.",
            checkpoint.name,
        )
    model.set_attn_implementation(before)
    return None
