"""Linear layers on a CPU in float32: weights laid out once for oneDNN.

torch's own layer hands every call's weights to the matrix product in the checkpoint's layout, and
writes what is added in a pass of its own. oneDNN, which torch brings along, takes weights in the
layout that its kernels stream best: the same numbers, in two thirds of the time for one short
query. On AVX2 its 1x1 convolutions are faster still in bulk (docs/decisions/31). GELU isn't left to
it: its own takes four times as long as torch's.
"""

from __future__ import annotations

import ctypes
import logging
import platform
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["prepack_linear_weights"]

logger = logging.getLogger(__name__)

_X86 = ("x86_64", "AMD64")
# Rows that an image of a convolution may have, the fastest first: a query in one image takes a
# fifth less time than in images of four. Packs have a multiple of four.
_IMAGE_ROWS = (64, 48, 40, *range(32, 0, -4))
# The operators' words: an activation, its numbers, and which form of it.
_NO_ACTIVATION: Any = ("none", [], None)
# Layers with fewer channels, such as a reranker's last, are none of a kernel's business.
_FEW_CHANNELS = 32


class _PointwiseLinear(torch.nn.Module):
    """What both kinds of layer share: an operator and a bias."""

    def __init__(self, operator: Any, linear: torch.nn.Linear) -> None:
        super().__init__()
        self._compute = operator.default
        self._compute_plus = operator.binary
        self._bias = None if linear.bias is None else linear.bias.detach()


class CpuLinear(_PointwiseLinear):
    """A linear layer whose weights are in oneDNN's own layout.

    Args:
        linear: The layer to compute; its weights are copied.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        ops: Any = torch.ops.mkldnn
        super().__init__(ops._linear_pointwise, linear)
        self._weight: torch.Tensor = ops._reorder_linear_weight(linear.weight.detach())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute [..., in] -> [..., out], float32."""
        out: torch.Tensor = self._compute(rows, self._weight, self._bias, *_NO_ACTIVATION)
        return out

    def plus(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Compute [..., in] -> [..., out] and add others of that shape."""
        out: torch.Tensor = self._compute_plus(rows, others, self._weight, self._bias, "add")
        return out


class ConvolutionLinear(_PointwiseLinear):
    """A linear layer as a 1x1 convolution: rows are pixels, in images of a few rows each.

    oneDNN chooses the layout of the weights by the number of pixels in an image, whatever the
    number of images, and lays them out anew in each call where they have another.

    Args:
        linear: The layer to compute; its weights are copied.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(torch.ops.mkldnn._convolution_pointwise, linear)
        weight = linear.weight.detach()
        self._out, self._in = weight.shape
        self._image_rows = _image_rows(self._out, self._in)
        self._weight = _as_convolution(weight, self._image_rows[0])
        # Padding, stride, dilation and groups.
        self._shape: Any = ([0, 0], [1, 1], [1, 1], 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute [..., in] -> [..., out], float32; faster where rows are a multiple of four."""
        out: torch.Tensor = self._compute(
            self._images(rows, self._in),
            self._weight,
            self._bias,
            *self._shape,
            *_NO_ACTIVATION,
        )
        return out.permute(0, 2, 3, 1).reshape(*rows.shape[:-1], self._out)

    def plus(self, rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Compute [..., in] -> [..., out] and add others of that shape."""
        out: torch.Tensor = self._compute_plus(
            self._images(rows, self._in),
            self._images(others, self._out),
            self._weight,
            self._bias,
            *self._shape,
            "add",
            1.0,
            None,
            [],
            None,
        )
        return out.permute(0, 2, 3, 1).reshape(others.shape)

    def _images(self, rows: torch.Tensor, channels: int) -> torch.Tensor:
        """View rows as images, channels last: [images, channels, rows of an image, 1]."""
        count = rows.numel() // channels
        height = next((size for size in self._image_rows if count % size == 0), 1)
        return rows.reshape(count // height, height, 1, channels).permute(0, 3, 1, 2)


def _as_convolution(weight: torch.Tensor, image_rows: int) -> torch.Tensor:
    """Lay weights, [out, in], out for images of so many rows."""
    size = [1, weight.shape[1], image_rows, 1]
    out: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight[..., None, None], [0, 0], [1, 1], [1, 1], 1, size
    )
    return out


@cache
def _image_rows(out_channels: int, in_channels: int) -> tuple[int, ...]:
    """Return the numbers of rows whose layout of weights is that of four, the fastest first."""
    ops: Any = torch.ops.mkldnn
    numbers = torch.arange(out_channels * in_channels, dtype=torch.float32)

    def laid_out(image_rows: int) -> torch.Tensor:
        return _as_convolution(numbers.view(out_channels, in_channels), image_rows)

    def stored(weight: torch.Tensor) -> NDArray[np.int32]:
        words = ctypes.c_int32 * (ops._nbytes(weight) // 4)
        return np.ctypeslib.as_array(words.from_address(ops.data_ptr(weight)))

    four = laid_out(4)
    found = []
    for rows in _IMAGE_ROWS:
        other = laid_out(rows)  # named, so that it lives while its memory is read
        if np.array_equal(stored(other), stored(four)):
            found.append(rows)
    return tuple(found)


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
                setattr(parent, name, _layer(child))
    return True


def _layer(linear: torch.nn.Linear) -> torch.nn.Module:
    wide = min(linear.in_features, linear.out_features) >= _FEW_CHANNELS
    kind = ConvolutionLinear if wide and _convolutions_pay() else CpuLinear
    return kind(linear)


@cache
def _convolutions_pay() -> bool:
    """Return whether this is a processor on which they were measured to, and they work."""
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return False
    return _is_right(ConvolutionLinear, "convolution")


@cache
def _works() -> bool:
    """Return whether oneDNN's linear layer is to be had, and gives what torch's own gives."""
    return _is_right(CpuLinear, "linear layer")


def _is_right(kind: type[CpuLinear | ConvolutionLinear], name: str) -> bool:
    with torch.random.fork_rng(devices=[]):  # the random numbers are the user's
        linear = torch.nn.Linear(32, 32)
    rows = torch.linspace(-1, 1, 256).view(1, 8, 32)
    try:
        with torch.inference_mode():
            plain = linear(rows)
            ours = kind(linear)
            given = torch.stack([ours(rows), ours.plus(rows, rows)])
            return torch.allclose(given, torch.stack([plain, plain + rows]), atol=1e-5)
    except Exception as exc:  # noqa: BLE001 -- whatever another torch says
        logger.debug("oneDNN's %s: %s", name, exc)
        return False
