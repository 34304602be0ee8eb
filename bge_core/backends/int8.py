"""Linear layers on a CPU in eight bits: a scale for each output channel and for each token.

FBGEMM, which torch brings along, multiplies bytes: twice as fast as float32 on AVX2, faster with
VNNI, and a quarter of the weights to stream for one query. Each token's row is divided by its own
largest number first, so a text's vector doesn't depend on the texts beside it. Embeddings, layer
norms, attention and heads stay in float32.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from bge_core.backends.bert import Bert

__all__ = ["Int8Linear", "int8_works", "quantize_linear_weights"]

logger = logging.getLogger(__name__)

_ENGINE = "fbgemm"
_TINY = 1e-12  # a row or a channel of zeros is divided by this
_LOWEST_GELU = 0.17  # GELU gives nothing below -0.17


class Int8Linear(torch.nn.Module):
    """A linear layer that multiplies bytes.

    Args:
        linear: The layer to compute; its weights are copied.
        after_gelu: Whether its rows come from GELU. Nearly all bytes then go to what is above 0.
    """

    def __init__(self, linear: torch.nn.Linear, *, after_gelu: bool = False) -> None:
        super().__init__()
        ops: Any = torch.ops.quantized
        # Takes float32 rows, a scale and a zero point; gives float32.
        self._compute = ops.linear_with_input_q_dq_qweight_dq_output_fp32.default
        self._bias = linear.bias.detach().clone()
        self._packed = _pack(linear.weight.detach())
        # A row's bytes are 0 to 255: its largest number is 255, and 0 is the zero point.
        self._zero = 16 if after_gelu else 128
        self._step = 1 / (255 - self._zero)
        self._after_gelu = after_gelu
        self._least = _LOWEST_GELU / (self._zero * self._step) if after_gelu else _TINY

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute [rows, in] -> [rows, out], float32."""
        largest = (rows if self._after_gelu else rows.abs()).amax(-1, keepdim=True)
        largest = largest.clamp_min_(self._least)
        out: torch.Tensor = self._compute(rows / largest, self._step, self._zero, self._packed)
        return torch.addcmul(self._bias, out, largest, out=out)

    def plus(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Compute as `forward`, and add others of the outcome's shape."""
        return self.forward(rows).add_(others)


def quantize_linear_weights(bert: Bert) -> None:
    """Have the linear layers of an encoder on this CPU multiply bytes.

    Args:
        bert: Changed in place; its head stays as it is.
    """
    for layer in bert.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, Int8Linear(child, after_gelu=name == "output"))


def channel_scales(weight: torch.Tensor) -> torch.Tensor:
    """Give each output channel the finest scale at which no product overflows.

    Without VNNI, FBGEMM adds the products of two neighbours, each a byte of the row up to 255
    times one of the weight, in 16 bits: 255 * 128 is the most that they hold. So two neighbours
    of one sign may add up to 128. With VNNI there is no such limit; it is kept, so that every
    processor computes with the same numbers.

    Args:
        weight: [out, in].

    Returns:
        The step between a channel's bytes, [out] float32.
    """
    pairs = torch.nn.functional.pad(weight, (0, weight.shape[1] % 2)).reshape(len(weight), -1, 2)
    same_sign = torch.where(pairs.prod(-1) > 0, pairs.sum(-1).abs(), 0)
    # Rounding adds 0.5 at most to each of the two.
    steps = torch.maximum(weight.abs().amax(1) / 127, same_sign.amax(1) / 127.5)
    return steps.clamp_min(_TINY)


def _pack(weight: torch.Tensor) -> Any:
    steps = channel_scales(weight)
    ops: Any = torch.ops.quantized
    before = torch.backends.quantized.engine
    try:
        with warnings.catch_warnings():
            # torch moves its quantised tensors elsewhere; without them the check below fails.
            warnings.simplefilter("ignore")
            torch.backends.quantized.engine = _ENGINE
            zeros = torch.zeros(len(weight), dtype=torch.long)
            bytes_ = torch.quantize_per_channel(
                weight.contiguous(), steps.double(), zeros, 0, torch.qint8
            )
            return ops.linear_prepack(bytes_, None)
    finally:
        torch.backends.quantized.engine = before


@cache
def int8_works() -> bool:
    """Return whether this torch has the operators on this processor, and they count correctly."""
    # Neighbours that add up to the most, in rows of the largest bytes.
    weight = torch.tensor([[127.0, 1.0] * 8, [-64.0, -64.0] * 8, [1.0, -127.0] * 8])
    try:
        with torch.inference_mode():
            with torch.random.fork_rng(devices=[]):  # the random numbers are the user's
                linear = torch.nn.Linear(16, 3)
            linear.weight.copy_(weight / 127)
            linear.bias.zero_()
            out = Int8Linear(linear)(torch.ones(4, 16))
            return torch.allclose(out, (weight / 127).sum(1).expand(4, 3), rtol=1e-2, atol=1e-2)
    except Exception as exc:  # noqa: BLE001 -- whatever another torch says
        logger.debug("FBGEMM's linear layer: %s", exc)
        return False
