"""What the service has done, in Prometheus's text form: the models' `stats()`, and its requests."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bge_core import Embedder, ModelStats, Scorer

# A label a path would let anybody make as many series as they like.
_PATHS = ("/embed", "/rerank", "/v1/embeddings")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass
class Seen:
    """A request that is being answered.

    Attributes:
        status: What it was answered with; 500 until it was.
    """

    status: int = 500


class Metrics:
    """The registry of one service.

    Args:
        models: The models, by their role.
    """

    def __init__(self, models: Mapping[str, Embedder | Scorer]) -> None:
        self.in_progress = 0
        self._registry = CollectorRegistry()
        self._registry.register(_Models(models, self))
        ProcessCollector(registry=self._registry)  # CPU seconds and memory, on Linux
        self._responses = Counter(
            "bge_http_responses", "Requests answered.", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "bge_http_seconds",
            "Seconds from a request to its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    @contextmanager
    def request(self, path: str) -> Iterator[Seen]:
        """Count a request while it is answered; probes and scrapes are not counted."""
        if path in ("/health", "/ready", "/metrics"):
            yield Seen()
            return
        path = path if path in _PATHS else "other"
        seen, started = Seen(), time.perf_counter()
        self.in_progress += 1
        try:
            yield seen
        finally:
            self.in_progress -= 1
            self._responses.labels(path, str(seen.status)).inc()
            self._seconds.labels(path).observe(time.perf_counter() - started)

    def text(self) -> bytes:
        """Return all of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Models(Collector):
    """Reads the models' counters when somebody asks for them: nothing is kept twice."""

    def __init__(self, models: Mapping[str, Embedder | Scorer], metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Give each counter of each model."""
        stats = {(role, model.model): model.stats() for role, model in self._models.items()}
        yield GaugeMetricFamily(
            "bge_http_in_progress", "Requests being answered.", self._metrics.in_progress
        )
        for name, what in (
            ("requests", "Calls of the model."),
            ("texts", "Texts, or pairs, that they brought."),
            ("sequences", "Distinct texts or pairs that were given to the model."),
            ("tokens", "Tokens of these; their rate is tokens a second."),
            ("packs", "Forward passes; sequences by packs is how well requests share."),
        ):
            family = CounterMetricFamily(f"bge_{name}", what, labels=["role", "model"])
            for labels, counted in stats.items():
                family.add_metric(labels, getattr(counted, name))
            yield family
        yield from self._stages(stats)
        yield from self._queue(stats)

    def _stages(self, stats: Mapping[tuple[str, str], ModelStats]) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "bge_stage_seconds", "Seconds of each stage.", labels=["role", "model", "stage"]
        )
        for labels, counted in stats.items():
            for stage, seconds in asdict(counted.seconds).items():
                family.add_metric((*labels, stage), seconds)
        yield family

    def _queue(self, stats: Mapping[tuple[str, str], ModelStats]) -> Iterator[Metric]:
        names = ["role", "model", "priority"]
        callers = GaugeMetricFamily("bge_waiting_calls", "Calls in the queue.", labels=names)
        sequences = GaugeMetricFamily("bge_waiting_sequences", "What they wait for.", labels=names)
        for labels, counted in stats.items():
            for priority in ("interactive", "background"):
                waiting = getattr(counted, priority)
                callers.add_metric((*labels, priority), waiting.callers)
                sequences.add_metric((*labels, priority), waiting.sequences)
        yield callers
        yield sequences
