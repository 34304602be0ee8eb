"""Linear layers on a CPU in float32: weights laid out once for oneDNN.

torch's own layer hands every call's weights to the matrix product in the checkpoint's layout, and
writes what is added in a pass of its own. oneDNN, which torch brings along, takes weights in the
layout that its kernels stream best: the same numbers, in two thirds of the time for one short
query. GELU isn't left to it, since its own takes four times as long as torch's on AVX2.
"""

from __future__ import annotations

import logging
import platform
from functools import cache
from typing import Any

import torch

__all__ = ["prepack_linear_weights"]

logger = logging.getLogger(__name__)

_X86 = ("x86_64", "AMD64")


class CpuLinear(torch.nn.Module):
    """A linear layer whose weights are in oneDNN's own layout.

    Args:
        linear: The layer to compute; its weights are copied.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        ops: Any = torch.ops.mkldnn
        self._compute = ops._linear_pointwise.default
        self._compute_plus = ops._linear_pointwise.binary
        self._weight: torch.Tensor = ops._reorder_linear_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute [..., in] -> [..., out], float32."""
        out: torch.Tensor = self._compute(rows, self._weight, self._bias, "none", [], None)
        return out

    def plus(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Compute [..., in] -> [..., out] and add others of that shape."""
        out: torch.Tensor = self._compute_plus(rows, others, self._weight, self._bias, "add")
        return out


def prepack_linear_weights(model: torch.nn.Module) -> bool:
    """Put the linear layers of a float32 model on an x86 CPU into oneDNN's layout.

    Where this torch lacks the operators, which are those of its own compiler and promised to
    nobody else, the model stays as it is.

    Args:
        model: Changed in place.

    Returns:
        Whether it was; its inputs should then come in few sizes (see `Pack`).
    """
    if platform.machine() not in _X86 or not _works():
        logger.debug("oneDNN's linear layers are not to be had: torch's own run.")
        return False
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # A subclass may compute something else.
            if type(child) is torch.nn.Linear:
                setattr(parent, name, CpuLinear(child))
    return True


@cache
def _works() -> bool:
    """Return whether the operators give what torch's own layers do."""
    with torch.random.fork_rng(devices=[]):  # the random numbers are the user's
        linear = torch.nn.Linear(8, 8)
    rows = torch.linspace(-1, 1, 24).view(1, 3, 8)
    try:
        with torch.inference_mode():
            plain = linear(rows)
            ours = CpuLinear(linear)
            given = torch.stack([ours(rows), ours.plus(rows, rows)])
            return torch.allclose(given, torch.stack([plain, plain + rows]), atol=1e-5)
    except Exception as exc:  # noqa: BLE001 -- whatever another torch says
        logger.debug("oneDNN's linear layer: %s", exc)
        return False
