"""Embed Parquet shards on Ray, write Parquet, load it into Qdrant, and search.

On one machine Ray starts by itself. On a cluster, with folders and a model that every machine can
reach, RAY_ADDRESS says where it is:
    RAY_ADDRESS=auto python examples/embed_on_ray.py --source s3://bucket/passages \
        --target s3://bucket/embedded --model BAAI/bge-small-en-v1.5 --qdrant http://qdrant:6333

A job that was stopped goes on where it was when it is called again. Without --source it embeds the
language reference that every CPython carries.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpora
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import stand_in
from qdrant_client import QdrantClient, models
from rich.console import Console

from bge_core import Embedder
from bge_core.ray import Embed, write_shards

COLLECTION = "passages"
SHARDS = 4
FOUND = 3


def main() -> None:
    """Run the job."""
    options = _options()
    console = Console(soft_wrap=True)
    warnings.filterwarnings("ignore", message="Local mode is not recommended")
    logging.getLogger("bge_core").setLevel(logging.ERROR)
    embedder = (
        Embedder(options.model)
        if options.model
        else Embedder(stand_in.embedder_folder(), query_instruction="")
    )
    source = options.source or str(_reference(stand_in.cache_folder() / "reference"))
    target = options.target or str(stand_in.cache_folder() / "reference-embedded")
    started = time.perf_counter()
    report = write_shards(
        source,
        target,
        Embed(embedder=embedder, text_column=options.text_column),
        actors=options.actors,
        cpus=options.cpus,
    )
    seconds = time.perf_counter() - started
    console.print(
        f"{report.rows} passages in {report.written} shards took {seconds:.1f} s, "
        f"the start of Ray and of the actors included; {report.skipped} shards were there already."
    )
    client = QdrantClient(options.qdrant) if options.qdrant else QdrantClient(":memory:")
    started = time.perf_counter()
    count = load(client, target, embedder.dimension)
    console.print(f"{count} points in Qdrant, {time.perf_counter() - started:.1f} s.")
    console.print(f"\n[bold]{options.question}[/bold]")
    for score, passage in ask(client, embedder, options.question):
        text = " ".join(str(passage[options.text_column]).split())
        console.print(f"{score:.3f}  {text[:90]}", markup=False)


def load(client: QdrantClient, target: str, dimension: int) -> int:
    """Put the shards' rows into a new collection, and count them."""
    client.delete_collection(COLLECTION)
    client.create_collection(
        COLLECTION,
        vectors_config=models.VectorParams(
            size=dimension, distance=models.Distance.DOT, on_disk=True
        ),
    )
    # A batch at a time, so that the memory that it takes is that of a batch.
    client.upload_points(COLLECTION, _points(target))
    return client.count(COLLECTION).count


def ask(
    client: QdrantClient, embedder: Embedder, question: str
) -> list[tuple[float, dict[str, Any]]]:
    """Give the best passages' scores and columns."""
    vector = embedder.embed_queries([question])[0].tolist()
    found = client.query_points(COLLECTION, vector, limit=FOUND).points
    return [(point.score, point.payload or {}) for point in found]


def _points(target: str) -> Iterator[models.PointStruct]:
    files = pa.dataset.dataset(target, format="parquet")
    number = 0
    for batch in files.to_batches(batch_size=1024):
        payload = batch.drop_columns(["embedding"]).to_pylist()
        vectors = batch["embedding"].flatten().to_numpy().reshape(len(batch), -1)
        for fields, vector in zip(payload, vectors, strict=True):
            yield models.PointStruct(id=number, vector=vector.tolist(), payload=fields)
            number += 1


def _reference(folder: Path) -> Path:
    """Write the language reference's paragraphs as Parquet shards."""
    passages: list[dict[str, Any]] = [
        {"topic": topic.name, "text": text.strip()}
        for topic in corpora.python_reference().texts
        for text in topic.text.split("\n\n")
        if len(text.split()) > 5  # headings and signatures say little for themselves
    ]
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        pq.write_table(pa.Table.from_pylist(passages[shard::SHARDS]), folder / f"{shard}.parquet")
    return folder


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Embed Parquet shards on Ray, and search them.")
    parser.add_argument("--source", help="folder or URI of Parquet shards")
    parser.add_argument("--target", help="folder or URI for the shards with vectors")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--model", help="hub id or folder; the demo's embedder if not given")
    parser.add_argument("--actors", type=int, help="engines; one a GPU, or a CPU but one")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs an engine, without GPUs")
    parser.add_argument("--qdrant", help="URL of a server; in memory if not given")
    parser.add_argument("--question", default="How do I run cleanup code when a function raises?")
    options = parser.parse_args()
    if bool(options.source) != bool(options.target):
        parser.error("--source and --target go together")
    return options


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
