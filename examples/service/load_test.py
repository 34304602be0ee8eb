"""Put the service under load, and say how fast it answers and how well requests share passes.

    python examples/service/load_test.py --seconds 30
    python examples/service/load_test.py --model BAAI/bge-small-en-v1.5

Without --model it runs on the stand-in, which needs no model hub. It starts the service itself, on
loopback, and the clients share the machine with it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

HERE = Path(__file__).parent
DATA = HERE.parent / "encyclopaedia"
BULK = 32
PASSAGES = 10


def main() -> None:
    """Run the load."""
    options = _options()
    asyncio.run(_run(options))


async def _run(options: argparse.Namespace) -> None:
    queries, passages = _texts()
    environment = {"BGE_MODEL": options.model, "BGE_RERANKER": options.reranker}
    if not options.model:
        environment = _stand_in()
    async with _service(environment) as http:
        before = await _counters(http)
        seconds: dict[str, list[float]] = defaultdict(list)
        errors: list[str] = []
        started = time.perf_counter()
        until = started + options.seconds
        work: dict[str, tuple[int, Any]] = {
            "query": (options.queries, _queries(queries)),
            "rerank": (options.reranks, _reranks(queries, passages)),
            "bulk": (options.bulk, _bulk(passages)),
        }
        await asyncio.gather(
            *(
                _client(http, bodies, until, seconds[name], errors)
                for name, (count, bodies) in work.items()
                for _ in range(count)
            )
        )
        took = time.perf_counter() - started
        after = await _counters(http)
    _print(seconds, errors, took, {name: after[name] - before[name] for name in after})


async def _client(
    http: httpx.AsyncClient,
    bodies: Iterator[tuple[str, dict[str, Any]]],
    until: float,
    seconds: list[float],
    errors: list[str],
) -> None:
    """Ask one request after another, as a user who waits for each answer."""
    while time.perf_counter() < until:
        path, body = next(bodies)
        started = time.perf_counter()
        try:
            answer = await http.post(path, json=body)
            if answer.status_code != httpx.codes.OK:
                errors.append(f"{answer.status_code}: {answer.text:.200}")
        except httpx.HTTPError as exc:
            errors.append(repr(exc))
        seconds.append(time.perf_counter() - started)


def _queries(queries: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for query in itertools.cycle(queries):
        yield "/embed", {"texts": [query], "kind": "query"}


def _reranks(queries: list[str], passages: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, query in enumerate(itertools.cycle(queries)):
        start = place * PASSAGES % (len(passages) - PASSAGES)
        yield "/rerank", {"query": query, "passages": passages[start : start + PASSAGES]}


def _bulk(passages: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for start in itertools.cycle(range(0, len(passages) - BULK, BULK)):
        yield "/embed", {"texts": passages[start : start + BULK]}


def _texts() -> tuple[list[str], list[str]]:
    """Give questions and passages, of the encyclopaedia beside the examples."""
    passages, queries = (
        [
            json.loads(line)["text"]
            for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("corpus", "queries")
    )
    return queries, passages


def _stand_in() -> dict[str, str]:
    sys.path.append(str(HERE.parent))
    import stand_in

    return {
        "BGE_MODEL": str(stand_in.embedder_folder()),
        "BGE_RERANKER": str(stand_in.reranker_folder()),
        "BGE_QUERY_INSTRUCTION": "",
    }


@asynccontextmanager
async def _service(environment: dict[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """Start the service, and stop it as an orchestrator does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--factory", "app:make_app", "--app-dir", str(HERE)]
    command += ["--port", str(port), "--log-level", "warning"]
    with subprocess.Popen(command, env={**os.environ, **environment}) as process:  # noqa: S603, ASYNC220
        try:
            limits = httpx.Limits(max_connections=None)
            address = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(
                base_url=address, timeout=60, limits=limits, trust_env=False
            ) as http:
                await _wait_until_ready(http, process)
                yield http
        finally:
            process.send_signal(signal.SIGTERM)


async def _wait_until_ready(http: httpx.AsyncClient, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if (await http.get("/ready")).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            await asyncio.sleep(0.2)
    sys.exit("The service didn't start.")


async def _counters(http: httpx.AsyncClient) -> dict[tuple[str, str], float]:
    """Read the service's counters, by name and by role or stage."""
    found = {}
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            role, stage = sample.labels.get("role", "process"), sample.labels.get("stage", "")
            if "path" not in sample.labels and sample.name.endswith("_total"):
                found[f"{family.name.removeprefix('bge_')} {stage}".strip(), role] = sample.value
    return found


def _print(
    seconds: dict[str, list[float]],
    errors: list[str],
    took: float,
    counted: dict[tuple[str, str], float],
) -> None:
    print(f"\n{'':8} {'requests/s':>10} {'p50':>8} {'p95':>8} {'p99':>8}   ms")
    for name, found in {
        **seconds,
        "all": [each for own in seconds.values() for each in own],
    }.items():
        if found:
            p50, p95, p99 = 1000 * np.percentile(found, [50, 95, 99])
            print(f"{name:8} {len(found) / took:10.1f} {p50:8.0f} {p95:8.0f} {p99:8.0f}")
    cpu = counted.get(("process_cpu_seconds", "process"), 0.0)
    print(f"the service had {cpu / took:.2f} of {os.cpu_count()} cores; errors: {len(errors)}")
    for error in dict.fromkeys(errors):
        print(f"  {error}")
    for role in ("embedder", "reranker"):
        packs = counted.get(("packs", role), 0)
        if not packs:
            continue
        print(
            f"{role}: {counted['requests', role] / packs:.1f} requests and "
            f"{counted['sequences', role] / packs:.1f} texts a pass, "
            f"{counted['tokens', role] / took:,.0f} tokens/s; seconds of "
            + ", ".join(
                f"{stage} {counted[f'stage_seconds {stage}', role]:.1f}"
                for stage in ("tokenize", "wait", "compute", "hand_out")
            )
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="", help="hub id or folder; the stand-in by default")
    parser.add_argument("--reranker", default="", help="hub id or folder, with --model; none")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--queries", type=int, default=32, help="clients that ask single queries")
    parser.add_argument("--reranks", type=int, default=4, help=f"clients with {PASSAGES} passages")
    parser.add_argument("--bulk", type=int, default=2, help=f"clients with {BULK} documents")
    options = parser.parse_args()
    if options.model and not options.reranker:
        options.reranks = 0
    return options


if __name__ == "__main__":
    main()
