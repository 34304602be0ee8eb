"""How much of a reranker with a score after each layer is computed: its last layer, its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

from bge_core import arguments
from bge_core.arguments import shown
from bge_core.errors import ArgumentError, InputTypeError

if TYPE_CHECKING:
    from bge_core.checkpoints.catalog import LayerHeads

__all__ = ["Depth", "LayerOptions"]

_RATIOS = (1, 2, 4, 8)
_COMPRESSED = (8,)  # the layer, unless the user says otherwise
_TAKEN_BY = {
    "cutoff_layers": (
        "BAAI/bge-reranker-v2-minicpm-layerwise and BAAI/bge-reranker-v2.5-gemma2-lightweight, "
        "which have a score after each layer"
    ),
    "compress_layers": "BAAI/bge-reranker-v2.5-gemma2-lightweight, which was trained for it",
}
_TAKEN_BY["compress_ratio"] = _TAKEN_BY["compress_layers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """What of a reranker's layers is computed.

    Attributes:
        cutoff: Layers that are computed; the score is read after the last of them.
        compress_layers: Layers, counted from 0, before which the passage is shortened.
        compress_ratio: How many neighbouring tokens of the passage become one there.
    """

    cutoff: int
    compress_layers: tuple[int, ...] = ()
    compress_ratio: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """What the user asked for, before it is known what the checkpoint has.

    Attributes:
        cutoff: The layer after which the score is read; None for the last.
        compress_layers: Layers before which the passage is shortened; None for the default.
        compress_ratio: How many neighbouring tokens become one; 1 for none.
    """

    cutoff: int | None = None
    compress_layers: tuple[int, ...] | None = None
    compress_ratio: int = 1

    @classmethod
    def of(
        cls,
        *,
        cutoff_layers: int | Sequence[int] | None,
        compress_layers: int | Sequence[int] | None,
        compress_ratio: int,
    ) -> LayerOptions:
        """Check what needs no checkpoint.

        Raises:
            ArgumentError: More than one cutoff layer, no layer, or another ratio.
            InputTypeError: No whole numbers.
        """
        cutoff = _layers("cutoff_layers", cutoff_layers)
        if cutoff is not None and len(cutoff) > 1:
            msg = (
                f"cutoff_layers={list(cutoff)} would give {len(cutoff)} scores a pair, and a "
                "ranking takes one: pass one layer, such as cutoff_layers=28."
            )
            raise ArgumentError(msg)
        ratio = arguments.whole_number("compress_ratio", compress_ratio)
        if ratio not in _RATIOS:
            msg = f"compress_ratio={shown(ratio)} is not supported: use 1 (off), 2, 4 or 8."
            raise ArgumentError(msg)
        return cls(
            cutoff=None if cutoff is None else cutoff[0],
            compress_layers=_layers("compress_layers", compress_layers),
            compress_ratio=ratio,
        )

    def resolve(self, model: str, heads: LayerHeads | None) -> Depth | None:
        """Return what is computed of a checkpoint; None for one without such scores.

        Args:
            model: The hub id or folder, for messages.
            heads: Where it has scores.

        Raises:
            ArgumentError: It doesn't take an argument, or has no such layer.
        """
        given = {
            "cutoff_layers": self.cutoff is not None,
            "compress_layers": self.compress_layers is not None,
            "compress_ratio": self.compress_ratio != 1,
        }
        for name in (name for name, is_given in given.items() if is_given):
            if heads is None or (name != "cutoff_layers" and not heads.compresses):
                msg = f"{name} is for {_TAKEN_BY[name]}, and not for {model!r}: leave it out."
                raise ArgumentError(msg)
        if heads is None:
            return None
        cutoff = heads.last if self.cutoff is None else self.cutoff
        if cutoff not in heads.cutoffs:
            step = f" in steps of {heads.step}" if heads.step > 1 else ""
            msg = (
                f"cutoff_layers={shown(cutoff)} is no layer after which {model!r} has a score: it "
                f"has them from {heads.first} to {heads.cutoffs[-1]}{step}."
            )
            raise ArgumentError(msg)
        for layer in self.compress_layers or ():
            if not 1 <= layer < heads.last:
                msg = (
                    f"compress_layers={shown(list(self.compress_layers or ()))}: {model!r} can "
                    f"shorten a passage before its layers 1 to {heads.last - 1}, not before "
                    f"{shown(layer)}."
                )
                raise ArgumentError(msg)
        if self.compress_ratio == 1:
            return Depth(cutoff=cutoff)
        layers = _COMPRESSED if self.compress_layers is None else self.compress_layers
        # Those behind the cutoff are never reached.
        reached = tuple(sorted({layer for layer in layers if layer < cutoff}))
        if not reached:
            return Depth(cutoff=cutoff)
        return Depth(cutoff=cutoff, compress_layers=reached, compress_ratio=self.compress_ratio)


def _layers(name: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, Integral):
        value = [value]
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        msg = f"{name} must be a layer's number, a list of them or None, got {shown(value)}."
        raise InputTypeError(msg)
    if not value:
        msg = f"{name} is empty: pass a layer's number, or None for the default."
        raise ArgumentError(msg)
    return tuple(
        arguments.whole_number(f"{name}[{index}]", layer, least=0)
        for index, layer in enumerate(value)
    )
