"""What executes a pack on a CPU with OpenVINO: padded batches through a converted model.

One short query is bound by streaming the weights from memory, and OpenVINO's kernels do that
about twice as fast as torch's; in bulk the two are level (docs/decisions/18).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bge_core.backends.base import padded_inputs, takes_types
from bge_core.backends.loading import load_model, out_of_memory_error
from bge_core.backends.memory import is_out_of_memory
from bge_core.errors import CheckpointError, needs_extra
from bge_core.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from bge_core.backends.runner_options import RunnerOptions
    from bge_core.checkpoints.metadata import Checkpoint, Kind
    from bge_core.tokenizer import TokenSequence

__all__ = ["OpenVINORunner", "load_openvino_runner"]

logger = logging.getLogger(__name__)


class _Rows(torch.nn.Module):
    """A model with its pooling, so that one graph gives one row a text."""

    def __init__(self, model: torch.nn.Module, pooling: str | None) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        out: torch.Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=False, **types
        )[0]
        if self.pooling is None:
            return out
        if self.pooling == "cls":
            return out[:, 0]
        weight = attention_mask.unsqueeze(-1).to(out.dtype)
        if self.pooling == "mean":
            return (out * weight).sum(1) / weight.sum(1)
        last = attention_mask.sum(1) - 1
        return out[torch.arange(out.shape[0]), last]


class OpenVINORunner:
    """Runs padded batches through a compiled OpenVINO model.

    Args:
        compiled: The compiled model; its output is one row a text.
        types: Whether it takes token types.
        pad: The padding token's id.
    """

    padded = True
    # As torch on a CPU: a small working set.
    default_budget = 2048
    # OpenVINO has threads of its own.
    threads = 1

    def __init__(self, compiled: Any, *, types: bool, pad: int) -> None:
        self._compiled = compiled
        self._types = types
        self._pad = pad
        # A request holds one computation's state, so each worker thread needs its own.
        self._own = threading.local()

    def run(self, sequences: Sequence[TokenSequence]) -> NDArray[np.float32]:
        """Compute one row a sequence, [n, width] float32."""
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        inputs = padded_inputs(sequences, pad=self._pad, types=self._types)
        out = self._own.request.infer(inputs)
        return np.array(out[self._compiled.output(0)], dtype=np.float32)


def load_openvino_runner(checkpoint: Checkpoint, options: RunnerOptions) -> OpenVINORunner:
    """Compile a checkpoint for this CPU, converting it at first use.

    The converted model is kept in the user's cache, under a name that changes with the
    checkpoint's content.

    Args:
        checkpoint: What the checkpoint says of itself.
        options: How it is to be run.

    Raises:
        CheckpointError: OpenVINO can't convert it, or its weights are missing or damaged.
        MissingExtraError: OpenVINO is not installed.
    """
    try:
        with _temporary_home():
            import openvino
    except ImportError as exc:
        raise needs_extra(
            exc,
            "backend='openvino'",
            packages=("openvino",),
            install="'bge-adapters[openvino]'",
            instead=", or pass backend='torch'.",
        ) from exc
    core = openvino.Core()
    version, folder = openvino.__version__, options.cache_folder
    file = _cache_path(checkpoint, options.kind, options.pooling, version, folder)
    model: Any = None
    if file is not None and file.exists():
        try:
            model = core.read_model(str(file))
        except RuntimeError:
            logger.warning("%s is damaged: converting %r again.", file, checkpoint.name)
            shutil.rmtree(file.parent, ignore_errors=True)
    if model is None:
        model = _new_model(openvino, core, checkpoint, options, file)
    compiled = core.compile_model(
        model,
        "CPU",
        # Not in bfloat16, which it would choose where the processor has it.
        {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"},
    )
    types = any("token_type_ids" in port.get_names() for port in compiled.inputs)
    return OpenVINORunner(compiled, types=types, pad=checkpoint.pad_token_id)


def _new_model(
    openvino: Any, core: Any, checkpoint: Checkpoint, options: RunnerOptions, file: Path | None
) -> Any:
    """Convert a checkpoint and keep it, with a bar: nothing else says what takes so long."""
    logger.info("Converting %r for OpenVINO, which takes some seconds, once.", checkpoint.name)
    name = Path(checkpoint.name).name
    with progress_bar(3, show=True, unit="step", title=f"Converting {name} for OpenVINO") as bar:
        done = bar or (lambda _: None)
        loaded = load_model(
            checkpoint,
            kind=options.kind,
            dtype="float32",
            trust_remote_code=options.trust_remote_code,
        )
        done(1)
        model = _converted(openvino, checkpoint, loaded, options.pooling)
        done(1)
        try:
            if file is not None:
                _save(openvino, core, model, file)
        except (OSError, RuntimeError) as exc:
            logger.warning(
                "The converted %r can't be kept in %s (%s): free some room there, or pass "
                "cache_folder='...'. Until then each process converts it again.",
                checkpoint.name,
                file.parent.parent if file else "the cache",
                str(exc).strip() or type(exc).__name__,
            )
        done(1)
    return model


def _cache_path(
    checkpoint: Checkpoint,
    kind: Kind,
    pooling: str | None,
    version: str,
    cache_folder: str | None,
) -> Path | None:
    """Return the converted model's place; None for a user who has no home, and so no cache."""
    if cache_folder:
        root = Path(cache_folder)
    elif kept := os.environ.get("XDG_CACHE_HOME"):
        root = Path(kept) / "bge-adapters"
    else:
        try:
            root = Path.home() / ".cache" / "bge-adapters"
        except RuntimeError:
            return None
    key = repr((checkpoint.digest(), kind, pooling, version))
    return root / "openvino" / hashlib.sha256(key.encode()).hexdigest()[:16] / "model.xml"


@contextlib.contextmanager
def _temporary_home() -> Iterator[None]:
    """Set the temporary folder as the home of a user without one: OpenVINO's telemetry needs it."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.gettempdir()
        try:
            yield
        finally:
            os.environ.pop("HOME", None)
    else:
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what others log of a model that is traced, and nobody here can act on, to errors."""
    loggers = [logging.getLogger(name) for name in ("transformers", "torch", "openvino", "nncf")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _converted(openvino: Any, checkpoint: Checkpoint, model: Any, pooling: str | None) -> Any:
    example = {"input_ids": torch.ones(2, 8).long(), "attention_mask": torch.ones(2, 8).long()}
    if takes_types(model):
        example["token_type_ids"] = torch.zeros(2, 8).long()
    try:
        with torch.inference_mode(), warnings.catch_warnings(), _quiet(), _temporary_home():
            # The tracer warns of every shape that transformers looks at; the numbers are tested.
            warnings.simplefilter("ignore")
            return openvino.convert_model(_Rows(model, pooling), example_input=example)
    except Exception as exc:
        if is_out_of_memory(exc):
            raise out_of_memory_error(checkpoint.name, "cpu") from exc
        msg = f"OpenVINO can't convert {checkpoint.name!r} ({exc}): pass backend='torch'."
        raise CheckpointError(msg) from exc


def _save(openvino: Any, core: Any, model: Any, file: Path) -> None:
    file.parent.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there whole: nothing half-written is ever found.
    work = Path(tempfile.mkdtemp(dir=file.parent.parent))
    try:
        openvino.save_model(model, str(work / file.name), compress_to_fp16=False)
        # Older versions don't say that a disk was full.
        core.read_model(str(work / file.name))
        with contextlib.suppress(OSError):  # another process was first, with the same content
            work.rename(file.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
