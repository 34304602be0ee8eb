"""Where a model runs and in which number format: device and dtype."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bge_core.arguments import shown
from bge_core.errors import ArgumentError, InputTypeError

if TYPE_CHECKING:
    import torch

__all__ = ["Placement"]

logger = logging.getLogger(__name__)

_DTYPES = {
    "auto": "auto",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "int8": "int8",
}
_DEVICE = re.compile(r"[a-z]+(:\d+)?")
_warned_devices: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The devices and the dtype that were asked for, checked without importing torch.

    Attributes:
        devices: Device names such as `("cuda:0", "cuda:1")`; empty means that the best one of
            this machine is picked when the model loads: cuda, then mps, then cpu.
        dtype: `"auto"`, `"float16"`, `"bfloat16"`, `"float32"` or `"int8"`.
    """

    devices: tuple[str, ...] = ()
    dtype: str = "auto"

    @classmethod
    def of(
        cls,
        *,
        device: str | torch.device | Sequence[str] | None = None,
        dtype: str | torch.dtype = "auto",
        use_fp16: bool | None = None,
    ) -> Placement:
        """Check what a user wrote and make a placement of it.

        Args:
            device: A device name, several of them, or None for the best one.
            dtype: A dtype's name or a `torch.dtype`; `"auto"` is float16 on cuda (bfloat16 for
                decoders), else float32.
            use_fp16: FlagEmbedding's word: True means float16, False float32.

        Raises:
            ArgumentError: An unknown word, `use_fp16` and `dtype` disagree, or int8 on another
                device than the CPU.
            InputTypeError: Something that is no device or no dtype at all.
        """
        named = _dtype_name(dtype)
        if use_fp16 is not None:
            if not isinstance(use_fp16, bool):
                msg = f"use_fp16 must be True, False or None, got {shown(use_fp16)}."
                raise InputTypeError(msg)
            wanted = "float16" if use_fp16 else "float32"
            if named not in ("auto", wanted):
                msg = (
                    f"use_fp16={use_fp16} means dtype={wanted!r}, but dtype={named!r} was given "
                    "too: drop one of the two."
                )
                raise ArgumentError(msg)
            named = wanted
        devices = _device_names(device)
        _check_int8(named, devices)
        return cls(devices=devices, dtype=named)

    def resolve(self, half: str = "float16") -> tuple[tuple[str, ...], str]:
        """Pick real devices and a real dtype on this machine; imports torch.

        Args:
            half: What `"auto"` means on cuda.

        Returns:
            The device names, at least one, and the dtype's name. float16 asked for on a CPU is
            float32, which is said once in the log: CPUs have no fast float16 arithmetic.

        Raises:
            ArgumentError: A device that this machine or this torch build lacks, or int8 where the
                best device is no CPU.
        """
        for name in self.devices:
            _check_device(name)
        devices = tuple(_one_name(name) for name in self.devices or (_best_device(),))
        _check_int8(self.dtype, devices)
        on_cpu = [name for name in devices if name.split(":")[0] == "cpu"]
        if self.dtype == "auto":
            on_cuda = all(name.startswith("cuda") for name in devices)
            return devices, half if on_cuda else "float32"
        if self.dtype == "float16" and on_cpu:
            if on_cpu[0] not in _warned_devices:
                _warned_devices.add(on_cpu[0])
                logger.warning(
                    "float16 was asked for on device %r: running float32, since a CPU computes "
                    'float16 slowly or not at all. dtype="auto" picks the right one everywhere.',
                    on_cpu[0],
                )
            return devices, "float32"
        return devices, self.dtype


def _dtype_name(dtype: object) -> str:
    if not isinstance(dtype, str) and type(dtype).__module__.partition(".")[0] != "torch":
        msg = f"dtype must be a name such as 'float16' or a torch.dtype, got {shown(dtype)}."
        raise InputTypeError(msg)
    word = str(dtype).removeprefix("torch.")
    if word not in _DTYPES:
        msg = (
            f"dtype={shown(word)} is not supported: use 'auto', 'float32', 'float16', 'bfloat16' "
            "or, on a CPU, 'int8'."
        )
        raise ArgumentError(msg)
    return _DTYPES[word]


def _check_int8(dtype: str, devices: Sequence[str]) -> None:
    others = [name for name in devices if name.partition(":")[0] != "cpu"]
    if dtype == "int8" and others:
        msg = (
            f"dtype='int8' runs on the CPU, not on device={others[0]!r}: pass device='cpu', or "
            "dtype='auto'."
        )
        raise ArgumentError(msg)


def _device_names(device: object) -> tuple[str, ...]:
    if device is None:
        return ()
    if isinstance(device, str) or type(device).__module__.partition(".")[0] == "torch":
        names: tuple[str, ...] = (str(device),)
    elif isinstance(device, Sequence) and all(isinstance(name, str) for name in device):
        names = tuple(device)
    else:
        msg = (
            "device must be a name such as 'cuda:0', a list of names, or None for the best one, "
            f"got {shown(device)}."
        )
        raise InputTypeError(msg)
    if not names:
        msg = "device is an empty list: name at least one device, or None for the best one."
        raise ArgumentError(msg)
    for name in names:
        if not _DEVICE.fullmatch(name) or name.partition(":")[0] == "gpu":
            msg = f"device={shown(name)} is no device name: write 'cpu', 'cuda', 'cuda:1' or 'mps'."
            raise ArgumentError(msg)
    return names


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def _check_device(name: str) -> None:
    import torch

    try:
        torch.zeros(1, device=torch.device(name)).cpu()
    except Exception as exc:  # torch raises anything for a device that is not here
        said = next(iter(str(exc).strip().splitlines()), type(exc).__name__)
        msg = (
            f"device={name!r} can't compute here with torch {torch.__version__}, which sees "
            f"{torch.cuda.device_count()} CUDA devices ({said[:120]}): pass device='cpu', or "
            "install a torch build for this machine's accelerator."
        )
        raise ArgumentError(msg) from exc


def _one_name(name: str) -> str:
    """Return one name for "cpu:0" and "cpu", and one for "cuda" and "cuda:0": models are shared."""
    import torch

    kind, _, index = name.partition(":")
    if kind == "cpu":
        return "cpu"
    if kind == "cuda" and not index and torch.cuda.device_count():
        return f"cuda:{torch.cuda.current_device()}"
    return name
