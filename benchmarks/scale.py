"""Tokens per second on this machine, and what a large corpus takes at that rate.

The number that docs/scale.md wants of you, from your model, your texts and your device:
    python benchmarks/scale.py --model BAAI/bge-base-en-v1.5 --texts passages.txt \
        --devices 8 --price 3.50
Without --model it has random weights in the shape of bge-small.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import shapes
from rich.console import Console
from rich.table import Table

from bge_core import Embedder
from bge_core.backends.loading import load_tokenizer


def main() -> None:
    """Measure, and reckon."""
    options = _options()
    logging.getLogger("bge_core").setLevel(logging.ERROR)
    if options.texts:
        texts = options.texts.read_text(encoding="utf-8").splitlines()
    else:
        texts = shapes.texts(options.count)
    texts = list(dict.fromkeys(texts))[: options.count]  # equal ones would be computed once
    with tempfile.TemporaryDirectory() as work:
        model = options.model or shapes.make(shapes.SHAPES["small"], Path(work))
        embedder = Embedder(model, device=options.device)
        tokenizer = load_tokenizer(embedder.checkpoint, trust_remote_code=False)
        sequences, cut = tokenizer.encode(texts, max_length=embedder.max_length)
        lengths = [len(sequence) for sequence in sequences]
        tokens = sum(lengths)

        # Processor seconds of one thread: what a core does, however busy the machine is.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        clock = time.process_time
        core = tokens / _best(
            lambda: tokenizer.encode(texts, max_length=embedder.max_length), clock, options.rounds
        )
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        embedder.embed_documents(texts[:64])
        clock = time.perf_counter
        rate = tokens / _best(lambda: embedder.embed_documents(texts), clock, options.rounds)

        each = tokens / len(texts)
        hours = options.passages * each / rate / 3600
        gigabytes = options.passages * embedder.dimension * 4 / 1e9
        table = Table("", "measured here")
        table.add_row("model, number format", f"{Path(embedder.model).name}, {embedder.dtype}")
        table.add_row(
            "tokens a passage, mean / median / cut",
            f"{each:.0f} / {statistics.median(lengths):.0f} / {sum(cut)} of {len(texts)}",
        )
        table.add_row("tokenizer, tokens per second of one core", f"{core:,.0f}")
        table.add_row("embed_documents, tokens per second", f"{rate:,.0f}")
        table.add_section()
        table.add_row(f"[bold]{options.passages:,.0f} passages[/bold]", "[bold]at that rate[/bold]")
        table.add_row("hours of one device", f"{hours:,.0f}")
        table.add_row(f"days on {options.devices}", f"{hours / options.devices / 24:,.2f}")
        if options.price:
            table.add_row("cost", f"{hours * options.price:,.0f}")
        table.add_row(
            f"cores for the tokenizer on {options.devices}",
            f"{options.devices * rate / core:,.1f}",
        )
        table.add_row(
            "GB of vectors, float32 / float16 / int8",
            f"{gigabytes:,.0f} / {gigabytes / 2:,.0f} / {gigabytes / 4:,.0f}",
        )
        Console().print(table)
        embedder.close()


def _best(work: Callable[[], object], clock: Callable[[], float], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        started = clock()
        work()
        taken.append(clock() - started)
    return min(taken)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens per second, and a large corpus by them.")
    parser.add_argument("--model", help="hub id or folder")
    parser.add_argument("--device", help="cuda, mps or cpu; the best one if not given")
    parser.add_argument("--texts", type=Path, help="a passage a line")
    parser.add_argument("--count", type=int, default=200, help="passages to measure with")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many")
    parser.add_argument("--passages", type=float, default=1e8, help="passages to reckon with")
    parser.add_argument("--devices", type=int, default=8, help="devices to reckon with")
    parser.add_argument("--price", type=float, help="of one device for an hour")
    return parser.parse_args()


if __name__ == "__main__":
    main()
