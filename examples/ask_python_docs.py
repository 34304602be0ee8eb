"""Ask the Python documentation, in LangChain and in LlamaIndex.

The corpus is the language reference that every CPython carries, or your own files with --docs.
It is split with each framework's own splitter and stored in Qdrant, embedded on disk. Each
question is answered by the embedder's first 20 passages, reranked by a cross-encoder. The second
run finds the index and the measurements of the first.

With a model hub at hand:
    python examples/ask_python_docs.py --embedder BAAI/bge-small-en-v1.5 \
        --reranker BAAI/bge-reranker-base
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import corpora
import stand_in
from hosts import HOSTS, Hit, Host
from qdrant_client import QdrantClient
from quality import FIRST, Row, measure, read_questions, table
from rich.console import Console
from rich.table import Table

from bge_core import Embedder

SHOWN = 5
QUESTIONS = (
    "How do I run cleanup code even when my function raises?",
    "Why does my default list argument keep its values between calls?",
    "What is the difference between is and ==?",
)


def main() -> None:
    """Run the demo."""
    options = _options()
    # Piped into a file or a pager, 80 columns would make the passages tall and thin.
    console = Console(width=None if sys.stdout.isatty() else 120)
    logging.getLogger("bge_core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Payload indexes have no effect in the local Qdrant")
    started = time.perf_counter()
    corpus = corpora.folder(options.docs) if options.docs else corpora.python_reference()
    embedder = options.embedder or str(stand_in.embedder_folder())
    reranker = options.reranker or str(stand_in.reranker_folder())
    # The stand-in was trained without an instruction; a BGE checkpoint has its own.
    instruction = None if options.embedder else ""
    client = _client(options.store)
    console.print(f"Searching [bold]{corpus.title}[/bold], {len(corpus.texts)} documents.")
    names = list(HOSTS) if options.host == "both" else [options.host]
    hosts: list[Host] = [
        HOSTS[name](corpus, client, embedder=embedder, reranker=reranker, instruction=instruction)
        for name in names
    ]
    for question in _questions(options, console):
        for host in hosts:
            hits = host.search(question, FIRST)
            console.print(_table(host.name, question, host.rerank(question, hits)))
    if not options.docs and not options.question:
        key = f"{corpus.key()}-{hosts[0].name}-{hosts[0].fingerprint}"
        instructed = Embedder(embedder, query_instruction=instruction).query_instruction
        console.print(table(_measured(hosts[0], key, corpus.title, instructed)))
    console.print(f"Done in {time.perf_counter() - started:.0f} seconds.")
    client.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, help="a folder of .md, .txt and .rst files")
    parser.add_argument("--embedder", help="a hub id or folder (default: the PyPI stand-in)")
    parser.add_argument("--reranker", help="a hub id or folder (default: the PyPI stand-in's)")
    parser.add_argument("--host", choices=[*HOSTS, "both"], default="both")
    parser.add_argument("--question", action="append", help="your question; may be repeated")
    parser.add_argument(
        "--store",
        default=str(stand_in.cache_folder() / "qdrant"),
        help="a folder for the embedded Qdrant, or a server's URL",
    )
    return parser.parse_args()


def _questions(options: argparse.Namespace, console: Console) -> Iterator[str]:
    if options.question:
        yield from options.question
    elif not options.docs:
        yield from QUESTIONS
    else:
        while question := console.input("Your question (an empty line ends): ").strip():
            yield question


def _client(store: str) -> QdrantClient:
    # Moving to a server is a URL.
    return QdrantClient(url=store) if "://" in store else QdrantClient(path=store)


def _table(host: str, question: str, hits: Sequence[Hit]) -> Table:
    table = Table(title=f"{host}: {question}", title_justify="left", expand=True)
    for heading in ("rank", "before", "relevance", "cosine"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("document", no_wrap=True)
    table.add_column("passage", ratio=1)
    for rank, hit in enumerate(hits[:SHOWN], start=1):
        table.add_row(
            str(rank),
            str(hit.place),
            f"{hit.relevance:.3f}",
            f"{hit.similarity:.3f}",
            hit.name,
            " ".join(hit.text.split())[:160],
        )
    return table


def _measured(host: Host, key: str, title: str, instruction: str) -> list[Row]:
    """Measure on the questions about Python, or recall what an earlier run measured."""
    file = stand_in.cache_folder() / "quality.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if key not in known:
        rows = measure(read_questions(), host, data=title, instruction=instruction)
        known[key] = [asdict(row) for row in rows]
        file.write_text(json.dumps(known))
    return [Row(**row) for row in known[key]]


if __name__ == "__main__":
    main()
