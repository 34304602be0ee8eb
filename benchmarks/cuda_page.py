"""One page that says whether the CUDA path is right on this machine's GPU, and how fast.

It runs the tests of tests/cuda, then measures bulk, queries alone and queries during bulk, on
random weights in real shapes. `make test-cuda` prints it; paste it into an issue. It ends with
exit code 1 if a test failed, and with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import shapes
import torch
import transformers

from bge_core import Embedder
from bge_core.backends import packing
from bge_core.backends.packed import PackedRunner

ROOT = Path(__file__).parents[1]
SHAPES = {**shapes.SHAPES, "large": shapes.Shape("bge-large-en-v1.5", 1024, 24, 16)}


def main() -> int:
    """Test, measure, and write the page to standard output."""
    options = _options()
    if not torch.cuda.is_available():
        _say(
            f"torch {torch.__version__} sees no CUDA device here, so nothing of the CUDA path was "
            "tested: run this on a machine with a GPU and the CUDA build of torch."
        )
        return 2
    logging.getLogger("bge_core").setLevel(logging.ERROR)
    _say("# bge-adapters on CUDA\n")
    _say(_machine())
    with tempfile.TemporaryDirectory() as work:
        failed = _run_tests(Path(work) / "report.xml")
        _say(
            "\n| shape, number format | attention | bulk, tokens/s | query p50 / p99, ms | "
            "without CUDA graphs, ms | during bulk, ms | without CUDA graphs, ms |"
        )
        _say("|---|---|--:|--:|--:|--:|--:|")
        for name in options.shapes:
            folder = shapes.make(SHAPES[name], Path(work))
            for dtype in options.dtypes:
                _say(_measured(folder, dtype, options.seconds))
    return int(failed)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _machine() -> str:
    found = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    count = torch.cuda.device_count()
    return (
        f"{count} x {found.name}, {found.total_memory >> 30} GiB, compute capability "
        f"{found.major}.{found.minor}; driver {driver}; torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}; transformers {transformers.__version__}; Python "
        f"{platform.python_version()}, {platform.system()}\n"
    )


def _run_tests(report: Path) -> bool:
    """Run tests/cuda, say what came of each, and return whether any failed."""
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "tests/cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not report.exists():
        _say(f"The tests did not run:\n\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return True
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    lines = []
    for case in ET.parse(report).getroot().iter("testcase"):
        fault = next((part for part in case if part.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if fault is not None:
            counts["failed"] += 1
            said = (fault.get("message") or "").strip().splitlines()
            lines.append(f"- FAILED {case.get('name')}: {said[0][:150] if said else ''}")
        elif skipped is not None:
            counts["skipped"] += 1
            lines.append(f"- skipped {case.get('name')}: {skipped.get('message')}")
        else:
            counts["passed"] += 1
    _say("Tests: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    for line in lines:
        _say(line)
    return done.returncode != 0


def _measured(folder: Path, dtype: str, seconds: float) -> str:
    """Measure one shape in one number format, and give a row of the table."""
    texts = shapes.texts(20_000)
    queries = shapes.queries(500)
    with Embedder(folder, device="cuda", dtype=dtype, on_truncation="ignore") as embedder:
        embedder.embed_documents(texts[:2_000])
        tokenizer = embedder.local.loaded().tokenizer
        lengths = tokenizer.count(texts)
        # As many as take about so long.
        started = time.perf_counter()
        embedder.embed_documents(texts[2_000:4_000])
        rate = 2_000 / (time.perf_counter() - started)
        count = int(min(max(rate * seconds, 1_000), len(texts)))
        started = time.perf_counter()
        embedder.embed_documents(texts[:count])
        tokens = sum(min(length + 2, 512) for length in lengths[:count])
        bulk = tokens / (time.perf_counter() - started)
        (runner,) = embedder.local.loaded().runners["interactive"]
        assert isinstance(runner, PackedRunner)
        _latencies(embedder, queries, 50)  # which captures the graphs
        graphs, latencies = runner._graphed, []
        for used in (graphs, None):
            runner._graphed = used
            latencies.append(_quantiles(_latencies(embedder, queries, 200)))
            thread = threading.Thread(target=embedder.embed_documents, args=(texts[:count],))
            thread.start()
            during = _latencies(embedder, queries, 10_000, while_alive=thread)
            thread.join()
            latencies.append(_quantiles(during))
        runner._graphed = graphs
        replays = graphs.replays if graphs is not None else 0
        if not replays:
            latencies[0] += " (no graphs)"
    kernel = _kernel_name(folder, dtype)
    cells = [f"{folder.name}, {dtype}", kernel, f"{bulk:,.0f}", latencies[0], latencies[2]]
    return f"| {' | '.join([*cells, latencies[1], latencies[3]])} |"


def _kernel_name(folder: Path, dtype: str) -> str:
    """Name what attends in all sequences of a pack."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width = config["hidden_size"] // config["num_attention_heads"]
    rows = torch.empty(1, 1, width, dtype=getattr(torch, dtype), device="cuda:0")
    kernel = packing._one_call(rows, windowed=False)
    return "a call a length" if kernel is None else getattr(kernel, "__name__", "").strip("_")


def _latencies(
    embedder: Embedder,
    queries: list[str],
    count: int,
    *,
    while_alive: threading.Thread | None = None,
) -> list[float]:
    taken = []
    for number in range(count):
        if while_alive is not None and not while_alive.is_alive():
            break
        started = time.perf_counter()
        embedder.embed_queries([queries[number % len(queries)]])
        taken.append(1e3 * (time.perf_counter() - started))
    return taken


def _quantiles(taken: list[float]) -> str:
    if len(taken) < 2:
        return "too few"
    cuts = statistics.quantiles(taken, n=100)
    return f"{cuts[49]:.1f} / {cuts[98]:.1f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whether the CUDA path is right, and how fast.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=10, help="of bulk work a measurement")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
