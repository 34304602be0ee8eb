"""One text on a CPU, such as a query, in as few steps as its layers take.

The weights of a layer push everything else out of the cache, the interpreter included: a step of
Python then costs several times what it does alone. Modules, slices of packs and the like take a
tenth of such a pass. The numbers are those of `Bert`, whose layers these are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor

    from bge_core.backends.bert import Bert

__all__ = ["OneText"]


class OneText:
    """All layers but the last, of a model whose linear layers are ours.

    Args:
        bert: Its layers are kept.
    """

    def __init__(self, bert: Bert) -> None:
        layers: list[Any] = list(bert.layers)
        shape = bert.shape
        self._heads = (shape.num_attention_heads, shape.hidden_size // shape.num_attention_heads)
        self._layers = [
            (
                layer.query_key_value.forward,
                layer.attention_output.plus,
                _arguments(layer.attention_output_norm),
                layer.intermediate[0].forward,
                layer.intermediate[1].forward,
                layer.output.plus,
                _arguments(layer.output_norm),
            )
            for layer in layers[:-1]
        ]

    def __call__(self, hidden: Tensor, tokens: int) -> Tensor:
        """Compute every row, [rows, hidden] -> [rows, hidden].

        Args:
            hidden: The embedded tokens, then padding, of which something comes out, too.
            tokens: How many tokens there are.
        """
        count, padded = len(hidden), tokens < len(hidden)
        for query_key_value, output, norm, widen, activate, narrow, last_norm in self._layers:
            together = query_key_value(hidden).view(1, count, 3, *self._heads)
            queries, keys, values = together.permute(2, 0, 3, 1, 4).unbind(0)
            if padded:
                keys, values = keys[:, :, :tokens], values[:, :, :tokens]
            attended = scaled_dot_product_attention(queries, keys, values)
            attended = attended.transpose(1, 2).reshape(count, -1)
            rows = torch.layer_norm(output(attended, hidden), *norm)
            hidden = torch.layer_norm(narrow(activate(widen(rows)), rows), *last_norm)
        return hidden


def _arguments(norm: torch.nn.LayerNorm) -> tuple[Any, ...]:
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps
