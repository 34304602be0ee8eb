"""The backends by name: a new one is a file beside this one and a row here.

Importing this loads no torch: a backend's own module is imported when it loads a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from bge_core import arguments
from bge_core.errors import ArgumentError, CheckpointError, needs_extra

if TYPE_CHECKING:
    from bge_core.arguments import Priority
    from bge_core.backends.base import Runner
    from bge_core.backends.runner_options import RunnerOptions
    from bge_core.checkpoints.metadata import Checkpoint

__all__ = ["BACKENDS", "Backend", "BackendName", "check_backend", "choose_backends", "load_runners"]

logger = logging.getLogger(__name__)

BackendName = Literal["torch", "openvino", "auto"]
"""What `backend=` takes: a row's name, or `"auto"`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One way to execute packs.

    Attributes:
        load: Loads a checkpoint's weights; returns a runner a device.
        unsupported: Says why it can't run a checkpoint, in a sentence; None if it can.
        device: The only type of device that it runs on; None for any that torch has.
        dtype: The only number format that it computes in; None for all three.
        package: What has to be installed beside torch; None for nothing.
        for_queries: Whether `"auto"` prefers it for an embedder's queries.
    """

    load: Callable[[Checkpoint, RunnerOptions, Sequence[str]], list[Runner]]
    unsupported: Callable[[Checkpoint, RunnerOptions], str | None] = lambda *_: None
    device: str | None = None
    dtype: str | None = None
    package: str | None = None
    for_queries: bool = False

    def runs_on(self, devices: Sequence[str]) -> bool:
        """Return whether it runs on all of some devices."""
        return self.device is None or all(
            device.partition(":")[0] == self.device for device in devices
        )


def _load_torch(
    checkpoint: Checkpoint, options: RunnerOptions, devices: Sequence[str]
) -> list[Runner]:
    from bge_core.backends.cpu_threads import end_waiting_threads
    from bge_core.backends.loading import Originals
    from bge_core.backends.select import load_runner

    # Several workers of one CPU compute with one model; GPUs get copies of what was read once.
    on_cpu: Runner | None = None
    originals = Originals(checkpoint.name) if len(devices) > 1 else None
    runners = []
    for device in devices:
        if device.partition(":")[0] == "cpu":
            on_cpu = on_cpu or load_runner(checkpoint, options, device=device)
            runners.append(on_cpu)
        else:
            runners.append(load_runner(checkpoint, options, device=device, originals=originals))
    end_waiting_threads()  # those that laid weights out
    return runners


def _load_openvino(
    checkpoint: Checkpoint, options: RunnerOptions, devices: Sequence[str]
) -> list[Runner]:
    from bge_core.backends.openvino import load_openvino_runner

    # One model serves all of them: they are the same CPU.
    return [load_openvino_runner(checkpoint, options)] * len(devices)


def _unsupported_by_openvino(checkpoint: Checkpoint, options: RunnerOptions) -> str | None:
    what = None
    if options.kind == "embedder" and (
        not checkpoint.only_standard_modules or options.pooling not in ("cls", "mean", "last")
    ):
        what = "has modules of its own"
    elif options.pooling == "last" or checkpoint.pair_prompt is not None:
        what = "is a decoder"
    if what is None:
        return None
    return (
        f"{checkpoint.name!r} {what}, which backend='openvino' does not run: pass backend='torch'."
    )


BACKENDS: dict[str, Backend] = {
    "torch": Backend(load=_load_torch),
    "openvino": Backend(
        load=_load_openvino,
        unsupported=_unsupported_by_openvino,
        device="cpu",
        dtype="float32",
        package="openvino",
        for_queries=True,
    ),
}
_AUTO = "auto"


def check_backend(name: object, *, devices: Sequence[str], dtype: str) -> str:
    """Check what a user wrote as `backend=`, against the device and dtype beside it.

    Args:
        name: A row's name, or `"auto"`.
        devices: The devices that were asked for; empty for the best one.
        dtype: `"auto"` or a number format.

    Returns:
        The name.

    Raises:
        ArgumentError: There is no such backend, or it doesn't run there.
        MissingExtraError: Its package is not installed.
    """
    known = arguments.one_of("backend", name, (*BACKENDS, _AUTO))
    if known == _AUTO:
        return known
    backend = BACKENDS[known]
    if not backend.runs_on(devices):
        device = backend.device or ""
        msg = (
            f"backend={known!r} runs on the {device.upper()}, not on device={list(devices)}: "
            f"pass device={device!r}, or backend='torch'."
        )
        raise ArgumentError(msg)
    if backend.dtype is not None and dtype not in ("auto", backend.dtype):
        msg = (
            f"backend={known!r} computes in {backend.dtype}, not in dtype={dtype!r}: leave "
            "dtype out, or pass backend='torch'."
        )
        raise ArgumentError(msg)
    if backend.package is not None and find_spec(backend.package) is None:
        raise needs_extra(
            ModuleNotFoundError(name=backend.package),
            f"backend={known!r}",
            packages=(backend.package,),
            install=f"'bge-adapters[{known}]'",
            instead=", or pass backend='torch'.",
        )
    return known


def choose_backends(
    name: str, checkpoint: Checkpoint, options: RunnerOptions, devices: Sequence[str]
) -> dict[Priority, str]:
    """Choose the backend of each priority.

    `"auto"` is torch, but for an embedder's queries where a backend that is faster at them is
    installed and runs the checkpoint. A reranker's work is bulk even when somebody waits for it,
    and bulk is level between the two.

    Args:
        name: A row's name, or `"auto"`.
        checkpoint: What the checkpoint says of itself.
        options: How it is to be run.
        devices: The devices, as they were found.

    Returns:
        A row's name for each priority.

    Raises:
        CheckpointError: The backend that was asked for can't run the checkpoint.
    """
    if name != _AUTO:
        if (reason := BACKENDS[name].unsupported(checkpoint, options)) is not None:
            raise CheckpointError(reason)
        return {"interactive": name, "background": name}
    faster = (
        row
        for row, backend in BACKENDS.items()
        if backend.for_queries
        and options.kind == "embedder"
        and backend.dtype in (None, options.dtype)
        and backend.runs_on(devices)
        and (backend.package is None or find_spec(backend.package) is not None)
        and backend.unsupported(checkpoint, options) is None
    )
    return {"interactive": next(faster, "torch"), "background": "torch"}


def load_runners(
    chosen: Mapping[Priority, str],
    checkpoint: Checkpoint,
    options: RunnerOptions,
    devices: Sequence[str],
) -> dict[Priority, list[Runner]]:
    """Load a checkpoint's weights, ready to execute packs.

    Args:
        chosen: The backend of each priority, from `choose_backends`.
        checkpoint: What the checkpoint says of itself.
        options: How it is to be run.
        devices: Devices that this machine has.

    Returns:
        A runner a device, for each priority; both may have the same.

    Raises:
        CheckpointError: The weights are missing or damaged, or the backend can't run them.
        ComputationError: They don't fit on a device.
        MissingExtraError: The backend's package is not installed.
    """
    bulk = chosen["background"]
    loaded: dict[str, list[Runner]] = {}
    for name in dict.fromkeys(chosen.values()):
        try:
            loaded[name] = BACKENDS[name].load(checkpoint, options, devices)
        except CheckpointError as exc:
            if name == bulk:
                raise
            logger.debug("backend=%r serves queries, too: %s", bulk, exc)
    return {priority: loaded[name if name in loaded else bulk] for priority, name in chosen.items()}
