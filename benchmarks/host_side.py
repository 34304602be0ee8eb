"""What everything but the model costs: nanoseconds a token, the lock, idle devices, cores.

The model is a stand-in that makes a pack's inputs and gives rows that were made before, so this
says on any machine for which devices the host side is fast enough:
    python benchmarks/host_side.py
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch
from rich.console import Console
from rich.table import Table

from bge_core import Embedder
from bge_core.backends.packing import Pack
from bge_core.engine.scheduler import Engine, Priority
from bge_core.tokenizer import Tokenizer, TokenSequence

WIDTH = 384
SECONDS_A_TOKEN = 2e-6  # of a stand-in that computes: bge-large on a large GPU


class StandIn:
    """A device whose rows are there already.

    Args:
        budget: Tokens a pack may have.
        seconds_a_token: How long it computes a token, without a processor.
        overlaps: Compute while the next pack is made, as a GPU does.
    """

    padded = False
    threads = 1

    def __init__(
        self,
        budget: int = 131_072,
        seconds_a_token: float = 0.0,
        *,
        overlaps: bool = False,
    ) -> None:
        self.default_budget = budget
        self.overlaps = overlaps
        self.busy = 0.0
        self._seconds = seconds_a_token
        self._done = 0.0
        self._rows = np.ones((8192, WIDTH), dtype=np.float32)

    def on_thread(self, *, urgent: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """Have nothing for a thread to do."""
        return nullcontext()

    def launch(self, sequences: Sequence[TokenSequence]) -> Callable[[], Any]:
        """Compute from now on, or from when the pack before is done."""
        inputs = Pack(sequences, torch.device("cpu")).inputs()
        takes = inputs["input_ids"].numel() * self._seconds
        self._done = done = max(self._done, time.perf_counter()) + takes
        self.busy += takes
        count = len(sequences)

        def fetch() -> Any:
            if takes:
                time.sleep(max(0.0, done - time.perf_counter()))
            return self._rows[:count].copy()

        return fetch

    def run(self, sequences: Sequence[TokenSequence]) -> Any:
        """Give a row a sequence."""
        return self.launch(sequences)()


class Tokenised:
    """A tokenizer that has done its work already."""

    def __init__(self, encodings: dict[str, Any]) -> None:
        self._encodings = encodings

    def encode_batch_fast(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[Any]:
        """Give what was tokenised before, without special tokens."""
        assert not add_special_tokens
        return [self._encodings[text] for text in texts]


def engine(devices: Sequence[StandIn], tokenizer: Tokenizer) -> Engine:
    """Put stand-ins to work."""
    priorities: tuple[Priority, ...] = ("interactive", "background")
    return Engine(dict.fromkeys(priorities, devices), tokenizer, name="stand-in")


def main() -> None:
    """Measure."""
    options = _options()
    logging.getLogger("bge_core").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    texts = list(dict.fromkeys(shapes.texts(options.count)))
    with tempfile.TemporaryDirectory() as work:
        shape = shapes.Shape("bge-small-en-v1.5", WIDTH, 1)
        folder = options.folder or shapes.make(shape, Path(work))
        embedder = Embedder(folder, device="cpu")
        tokenizer = embedder.local.loaded().tokenizer
        if options.folder:  # one of the processes of `_by_cores`
            print(_rate(embedder, tokenizer, texts))
            return
        table = Table("", "measured here")
        _add_costs(table, embedder, tokenizer, texts, options.rounds)
        table.add_section()
        for callers in (1_000, 13_000, 20_000):
            table.add_row(
                f"{callers:,} callers wait: the longest hold of the lock",
                f"{1e3 * _longest_hold(callers):,.1f} ms",
            )
        table.add_section()
        for count, overlaps in ((1, False), (1, True), (8, True)):
            busy = _busy(embedder, tokenizer, texts, count, overlaps=overlaps)
            how = "beside" if overlaps else "in turns with"
            table.add_row(
                f"{count} devices {how} the worker, one caller: busy", f"{busy:.2f} of {count}"
            )
        table.add_section()
        for cores in range(1, options.cores + 1):
            table.add_row(
                f"tokens per second, {cores} core{'s' * (cores > 1)}, tokenising and all",
                f"{_by_cores(cores, folder, options.count):,.0f}",
            )
        Console().print(table)
        embedder.close()


def _add_costs(
    table: Table, embedder: Embedder, tokenizer: Tokenizer, texts: list[str], rounds: int
) -> None:
    """Add processor time a token: all of it, and the tokenizer's share."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backend: Any = tokenizer._backend
    slices = [texts[at : at + 512] for at in range(0, len(texts), 512)]

    def tokenise() -> list[Any]:
        return [backend.encode_batch_fast(part, add_special_tokens=False) for part in slices]

    encodings = [encoding for part in tokenise() for encoding in part]
    tokens = sum(map(len, encodings)) + 2 * len(texts)
    tokenised = _best(tokenise, rounds)
    given = _best(lambda: [encoding.ids for encoding in encodings], rounds)
    embedder.local._engine = engine([StandIn()], tokenizer)
    done: Any = Tokenised(dict(zip(texts, encodings, strict=True)))
    tokenizer._backend = done
    rest = _best(lambda: embedder.embed_documents(texts), rounds) - given
    tokenizer._backend = backend
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    table.add_row("tokens a text, mean", f"{tokens / len(texts):.0f}")
    for name, seconds in (
        ("the tokenizer, processor time a token", tokenised),
        ("ids out of the tokenizer, a token", given),
        ("everything else but the model, a token", rest),
    ):
        table.add_row(name, f"{1e9 * seconds / tokens:,.0f} ns")


def _best(work: Callable[[], object], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def _longest_hold(callers: int) -> float:
    """Return the longest time that a worker held the lock which `submit` takes, in seconds."""
    begun, gate = threading.Event(), threading.Event()

    class Held(StandIn):
        def run(self, sequences: Sequence[TokenSequence]) -> Any:
            begun.set()
            gate.wait()
            return super().run(sequences)

    held = engine([Held(1 << 40)], None)  # type: ignore[arg-type]  # nothing is tokenised
    workers: Any = held._workers
    longest = 0.0
    take = workers._take

    def timed(*arguments: Any) -> Any:
        nonlocal longest
        started = time.thread_time()
        pack = take(*arguments)
        longest = max(longest, time.thread_time() - started)
        return pack

    workers._take = timed
    query = [TokenSequence(np.ones(12, dtype=np.int32), 12)]
    first = held.submit(query, priority="interactive")
    begun.wait()
    futures = [held.submit(query, priority="interactive") for _ in range(callers)]
    gate.set()
    wait([first, *futures])
    return longest


def _busy(
    embedder: Embedder, tokenizer: Tokenizer, texts: list[str], count: int, *, overlaps: bool
) -> float:
    """Return how many devices computed in the mean while one caller's texts were there.

    They compute so slowly, together, that the tokenizer of this machine keeps up with them.
    """
    seconds = SECONDS_A_TOKEN * 4 * count
    devices = [StandIn(16_384, seconds, overlaps=overlaps) for _ in range(count)]
    embedder.local._engine = engine(devices, tokenizer)
    more = [f"{n} {text}" for n in range(4) for text in texts]
    started = time.perf_counter()
    embedder.embed_documents(more)
    return sum(device.busy for device in devices) / (time.perf_counter() - started)


def _rate(embedder: Embedder, tokenizer: Tokenizer, texts: list[str]) -> float:
    embedder.local._engine = engine([StandIn()], tokenizer)
    tokens = sum(tokenizer.count(texts)) + 2 * len(texts)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        embedder.embed_documents(texts)
        best = max(best, tokens / (time.perf_counter() - started))
    return best


def _by_cores(cores: int, folder: Path, count: int) -> float:
    """Measure in a process that has so many cores."""
    command = [sys.executable, __file__, "--folder", str(folder), "--count", str(count)]
    if sys.platform == "linux":
        command = ["taskset", "-c", f"0-{cores - 1}", *command]
    environment = os.environ | {"RAYON_NUM_THREADS": str(cores)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What everything but the model costs.")
    parser.add_argument("--count", type=int, default=4_000, help="texts to measure with")
    parser.add_argument("--rounds", type=int, default=5, help="the best of so many")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
