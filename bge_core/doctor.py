"""One screen for a bug report: `python -m bge_core.doctor [MODEL]`.

Versions and devices; of a model where it was found, what it says of itself, and whether it
computes. A problem is a sentence and exit code 1. No token is shown, and the home folder is `~`.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_core.arguments import counted
from bge_core.checkpoints.catalog import PROFILES, find_profile
from bge_core.checkpoints.metadata import is_m3_architecture, read
from bge_core.checkpoints.source import Source, locate
from bge_core.devices import Placement
from bge_core.embedder import Embedder
from bge_core.errors import BGEError, ComputationError
from bge_core.reranker import Reranker

if TYPE_CHECKING:
    from bge_core.checkpoints.metadata import Checkpoint

__all__ = ["main"]

logger = logging.getLogger(__name__)

_PACKAGES = (
    *("bge-adapters", "torch", "transformers", "sentence-transformers", "tokenizers"),
    *("huggingface-hub", "numpy", "langchain-core", "llama-index-core", "openvino"),
)
# Flags of Linux's /proc/cpuinfo, and what they are called elsewhere.
_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 bfloat16",
    "amx_int8": "AMX int8",
    "amx_bf16": "AMX bfloat16",
}
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_QUERY = "What is a panda?"
# Of several lengths, so that the first one is in a pack with others.
_PASSAGES = ("The giant panda is a bear.", "Paris.", "Water boils at 100 degrees. " * 8)


class _Report(logging.Handler):
    """Prints rows of a name and a value; the package's own warnings are rows, too."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.failed = False

    def row(self, name: str, value: object) -> None:
        print(f"{name:<21}  {_plain(str(value))}", flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        self.row("warning", record.getMessage())

    def attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        """Run a step; whatever goes wrong in it is a sentence."""
        try:
            step(self, *arguments)
        except BGEError as exc:
            self._problem(str(exc))
        except Exception as exc:  # noqa: BLE001 -- a report of what is broken may not break
            said = next(iter(str(exc).strip().splitlines()), "no message")
            self._problem(f"{type(exc).__name__}: {said}")

    def _problem(self, sentence: str) -> None:
        self.failed = True
        self.row("PROBLEM", sentence)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report.

    Args:
        arguments: Those of the command line; None for the process's own.

    Returns:
        The exit code: 0 if all is well, 1 if the report has a problem.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bge_core.doctor", description="One screen for a bug report."
    )
    parser.add_argument("model", nargs="?", help="a hub id or a folder; none for versions alone")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; the best one if not given")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16 or int8")
    parser.add_argument("--backend", default="torch", help="torch, openvino or auto")
    parser.add_argument("--revision", help="a branch, tag or commit on the hub")
    parser.add_argument("--cache-folder", help="the hub's cache; the usual one if not given")
    parser.add_argument("--local-files-only", action="store_true", help="download nothing")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that can't show Chinese shall not end the report.
        sys.stdout.reconfigure(errors="backslashreplace")
    report, logger = _Report(), logging.getLogger("bge_core")
    logger.addHandler(report)
    try:
        report.attempt(_versions)
        report.attempt(_devices)
        report.attempt(_cached if options.model is None else _model, options)
    finally:
        logger.removeHandler(report)
    return int(report.failed)


def _versions(report: _Report) -> None:
    report.row("python", f"{platform.python_version()}, {platform.platform()}")
    for name in _PACKAGES:
        try:
            report.row(name, version(name))
        except PackageNotFoundError:
            report.row(name, "not installed")


def _devices(report: _Report) -> None:
    import torch

    from bge_core.backends.int8 import int8_works

    cores = counted(os.cpu_count() or 1, "core")
    if hasattr(os, "sched_getaffinity"):
        cores += f", {len(os.sched_getaffinity(0))} of them for this process"
    report.row("cpu", f"{cores}, {counted(torch.get_num_threads(), 'thread')} of torch")
    flags = _cpu_flags()
    known = [name for flag, name in _INSTRUCTIONS.items() if flag in flags]
    report.row("cpu instructions", ", ".join(known) or torch.backends.cpu.get_cpu_capability())
    report.row("dtypes that pay", "; ".join(_dtypes(flags, int8=int8_works())))
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        report.row(f"cuda:{index}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        report.row("mps", "available")
    devices, dtype = Placement.of().resolve()
    report.row("by default", f"{devices[0]}, {dtype}")


def _cpu_flags() -> frozenset[str]:
    """Return what Linux says that the processor can; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def _dtypes(flags: frozenset[str], *, int8: bool) -> Iterator[str]:
    """Say which `dtype=` pays on the CPU."""
    yield "float32 always"
    if int8:
        yield "int8 for BERT and XLM-RoBERTa, 1.2 to 1.5 times as fast in bulk"
    if "amx_bf16" in flags:
        yield "bfloat16, twice as fast in bulk"
    elif "avx512_bf16" in flags:
        yield "bfloat16: compare it with float32"
    else:
        yield "not bfloat16, which is slower here"


def _cached(report: _Report, options: argparse.Namespace) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    source = Source(model="", cache_folder=options.cache_folder)
    cache = Path(source.hub_cache or HF_HUB_CACHE)
    found = [
        name
        for name in tuple(PROFILES)
        if any((cache / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json"))
    ]
    report.row("hub cache", cache)
    report.row("published models", ", ".join(found) or "none in the cache")


def _model(report: _Report, options: argparse.Namespace) -> None:
    where: dict[str, Any] = {
        "revision": options.revision,
        "cache_folder": options.cache_folder,
        "local_files_only": options.local_files_only,
    }
    source = Source.of(options.model, **where)
    report.row("model", source.model)
    found = read(source, locate(source))
    profile = found.profile
    report.row("folder" if source.is_local else "hub cache", found.folder)
    kind = found.kind
    report.row("kind", f"{kind}, {found.family}, {profile.id if profile else 'not in the table'}")
    if profile and find_profile(source.model, kind) is None and not found.folder.is_symlink():
        # What it was trained from says nothing of its own licence.
        report.row("trained from", profile.id)
    elif profile:
        report.row("licence", " ".join(filter(None, (profile.licence, profile.licence_note))))
    make: Any = Reranker if kind == "reranker" else Embedder
    placed = {"device": options.device, "dtype": options.dtype, "backend": options.backend}
    with make(options.model, **where, **placed) as model:
        if isinstance(model, Embedder):
            _embedder(report, model, found)
        report.row("max_length", f"{model.max_length} tokens of {found.max_length}")
        start = time.perf_counter()
        runners = model.local.loaded().runners
        report.row("loaded in", f"{time.perf_counter() - start:.1f} s")
        report.row("computes on", f"{', '.join(model.local.placed()[0])}, {model.dtype}")
        for priority, (runner, *_) in runners.items():
            how = "padded" if runner.padded else "packed"
            report.row(f"runs ({priority})", f"{how}, {type(runner).__name__}")
        report.row("fingerprint", model.fingerprint)
        _self_check(report, model)


def _embedder(report: _Report, model: Embedder, found: Checkpoint) -> None:
    query, document = model.query_instruction, model._template.document_prefix
    if found.profile:
        origin = f"published for {found.profile.id}"
    elif "query" in found.prompts:
        origin = "config_sentence_transformers.json"
    else:
        origin = "nothing says one"
    report.row("query instruction", f"{query!r} ({origin})")
    report.row("document instruction", repr(document))
    report.row("pooling", f"{found.pooling}, vectors are scaled to unit length")
    if is_m3_architecture(found, found.pooling):
        report.row("outputs", ", ".join(["dense", *sorted(found.m3_heads)]))


def _self_check(report: _Report, model: Embedder | Reranker) -> None:
    first = _PASSAGES[:1]
    if isinstance(model, Embedder):
        alone, packed = model.embed_documents(first)[0], model.embed_documents(_PASSAGES)[0]
        result = f"a vector of {len(alone)}, norm {np.linalg.norm(alone):.6f}, finite"
    else:
        alone, packed = model.score(_QUERY, first)[0], model.score(_QUERY, _PASSAGES)[0]
        result = f"a score of {alone:.6f}, finite"
    apart = float(np.abs(alone - packed).max())
    report.row("self-check", f"{result}; alone and among others {apart:.1e} apart")
    most = 1e-4 if model.dtype == "float32" else 2e-2
    if apart > most:
        msg = (
            f"A text alone and among others differ by more than {most:g}: the model computes "
            "other numbers in other company. Please report it, with this page."
        )
        raise ComputationError(msg)


def _plain(text: str) -> str:
    """Leave out what is private: the home folder's name and tokens."""
    for secret in filter(None, map(os.environ.get, _TOKENS)):
        text = text.replace(secret, "***")
    text = re.sub(r"\bhf_\w{8,}", "***", text)
    home = os.path.expanduser("~")  # noqa: PTH111 -- Path.home() raises where there is none
    return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text


if __name__ == "__main__":
    sys.exit(main())
