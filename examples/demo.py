"""Ask an encyclopaedia, the Python documentation or your own files, in LangChain and LlamaIndex.

The corpus is split with each framework's own splitter and stored in Qdrant, embedded on disk. Each
question is answered by the embedder's first 20 passages, then by the same in a cross-encoder's
order, side by side. The second run finds the index and the measurements of the first.

The stand-in's reranker is a small one, trained on questions about an encyclopaedia and about
software, but on none of these texts. The three questions are some that it helps with. The figures
at the end are of all 330: it lifts the answer of 60 of them and sinks that of 46, 1.7 points
of nDCG@10 in all. On the Python reference, --docs python, it wins as much.

With a model hub at hand:
    make demo MODELS=bge
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import corpora
import stand_in
from hosts import HOSTS, Host, distinct
from page import side_by_side
from qdrant_client import QdrantClient
from quality import encyclopaedia_questions, measure, read_questions
from rich.console import Console
from tqdm import tqdm

from bge_core import CheckpointError, Embedder, Reranker
from bge_core.beir import Questions
from bge_core.evaluate import DEPTH, FIRST, Row, table

ENCYCLOPAEDIA, PYTHON = "encyclopaedia", "python"
QUESTIONS = {
    ENCYCLOPAEDIA: (
        "when was coffee first made into a drink",
        "where does the red wolf live in the world",
        "what inspired huxley to write brave new world",
    ),
    PYTHON: (
        "How do I run cleanup code even when my function raises?",
        "Why does my default list argument keep its values between calls?",
        "What is the difference between is and ==?",
    ),
}
# What `--models bge` takes from the hub, and how much of it.
BGE = {"BAAI/bge-small-en-v1.5": "135 MB", "BAAI/bge-reranker-base": "1.1 GB"}
# The figures of the stand-ins on the encyclopaedia; `--measure` writes them into the cache folder.
MEASURED = corpora.ENCYCLOPAEDIA / "measured.json"
CHARACTERS_A_SECOND = 10_000  # what the stand-in embeds on two CPU cores


@dataclass(frozen=True)
class Models:
    """What searches and reranks.

    Attributes:
        embedder: A hub id or folder.
        reranker: A hub id or folder.
        instruction: Put in front of questions; None for the checkpoint's own.
    """

    embedder: str
    reranker: str
    instruction: str | None


def main() -> None:
    """Run the demo."""
    options = _options()
    # Piped into a file or a pager, 80 columns would make the passages tall and thin.
    console = Console(width=None if sys.stdout.isatty() else 120)
    logging.getLogger("bge_core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Payload indexes have no effect in the local Qdrant")
    started = time.perf_counter()
    corpus = _corpus(options.docs)
    names = list(HOSTS) if options.host == "both" else [options.host]
    measured = options.docs in QUESTIONS and not options.question
    console.print(f"Searching [bold]{corpus.title}[/bold]: {len(corpus.texts)} documents.")
    models = _models(options, console)
    key = _key(corpus, models)
    measuring = measured and (options.measure or key not in _known())
    console.print(_expected(corpus, len(names), measuring=measuring))
    client = _client(options.store)
    hosts: list[Host] = []
    for name in names:
        with console.status(f"{name}: loading"):
            host: Host = HOSTS[name](
                corpus,
                client,
                embedder=models.embedder,
                reranker=models.reranker,
                instruction=models.instruction,
            )
        _index(host)
        with console.status(f"{name}: loading"):
            host.rerank("warm up", host.search("warm up", 1))  # what is shown is the steady time
        console.print(f"{host.name} is ready after {time.perf_counter() - started:.0f} s.")
        hosts.append(host)
    for question in _questions(options, console):
        for host in hosts:
            _ask(host, question, console)
    if measured:
        key = key or f"{corpus.key()}-{hosts[0].name}-{hosts[0].fingerprint}"
        again = options.measure
        instructed = Embedder(models.embedder, query_instruction=models.instruction)
        asked = encyclopaedia_questions() if options.docs == ENCYCLOPAEDIA else read_questions()
        instruction = instructed.query_instruction
        rows = _measured(hosts[0], asked, key, corpus.title, instruction, again=again)
        console.print(
            table(rows, None if measuring else "measured before; --measure does it again")
        )
    console.print(f"Done in {time.perf_counter() - started:.0f} seconds.")
    client.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--docs",
        default=ENCYCLOPAEDIA,
        help=f"{ENCYCLOPAEDIA}, {PYTHON}, or a folder of .md, .txt and .rst files (default: "
        f"{ENCYCLOPAEDIA})",
    )
    parser.add_argument(
        "--models",
        choices=["stand-in", "bge"],
        default="stand-in",
        help=f"the PyPI stand-in, or {' and '.join(BGE)} from the hub (default: the stand-in)",
    )
    parser.add_argument("--embedder", help="a hub id or folder, in place of that of --models")
    parser.add_argument("--reranker", help="a hub id or folder, in place of that of --models")
    parser.add_argument("--host", choices=[*HOSTS, "both"], default="both")
    parser.add_argument("--measure", action="store_true", help="measure, even if it is known")
    parser.add_argument("--question", action="append", help="your question; may be repeated")
    parser.add_argument(
        "--store",
        default=str(stand_in.cache_folder() / "qdrant"),
        help="a folder for the embedded Qdrant, or a server's URL",
    )
    return parser.parse_args()


def _corpus(docs: str) -> corpora.Corpus:
    if docs == ENCYCLOPAEDIA:
        return corpora.encyclopaedia()
    return corpora.python_reference() if docs == PYTHON else corpora.folder(Path(docs))


def _expected(corpus: corpora.Corpus, hosts: int, *, measuring: bool) -> str:
    """Say how long it takes, on two CPU cores and with the stand-in."""
    characters = hosts * sum(len(text.text) for text in corpus.texts)
    seconds = 10 + characters / CHARACTERS_A_SECOND + (70 if measuring else 0)
    return (
        f"The first time it takes about {10 * round(seconds / 10)} seconds with the stand-in, to "
        "embed them all; after that about 10. Larger models take longer."
    )


def _models(options: argparse.Namespace, console: Console) -> Models:
    """Choose the models, and get them from the hub where that was asked for."""
    if options.models == "bge":
        embedder, reranker = BGE
        embedder, reranker = options.embedder or embedder, options.reranker or reranker
        if failed := _fetch(embedder, reranker, console):
            console.print(f"[yellow]The stand-in searches and reranks instead: {failed}[/]")
        else:
            return Models(embedder, reranker, None)
    with console.status("preparing the stand-in's reranker"):
        return Models(
            options.embedder or str(stand_in.embedder_folder()),
            options.reranker or str(stand_in.reranker_folder()),
            # The stand-in was trained without an instruction; a BGE checkpoint has its own.
            None if options.embedder else "",
        )


def _fetch(embedder: str, reranker: str, console: Console) -> str:
    """Load both models once; give why that can't be done, or an empty string."""
    from huggingface_hub import try_to_load_from_cache

    missing = {
        model: size
        for model, size in BGE.items()
        if model in (embedder, reranker) and not try_to_load_from_cache(model, "config.json")
    }
    if missing:
        sizes = ", ".join(f"{model} ({size})" for model, size in missing.items())
        console.print(f"From the hub, once: {sizes}.")
    try:
        Embedder(embedder).fingerprint  # noqa: B018
        Reranker(reranker).fingerprint  # noqa: B018
    except CheckpointError as exc:
        return str(exc).partition(". ")[0] + "."
    return ""


def _index(host: Host) -> None:
    """Store what isn't yet, behind a progress bar where that is something."""
    steps = host.index()
    stored = next(steps)
    if stored == host.total:
        return
    described = f"{host.name}: indexing"
    with tqdm(total=host.total, initial=stored, desc=described, unit="passage") as bar:
        for stored in steps:
            bar.update(stored - bar.n)


def _ask(host: Host, question: str, console: Console) -> None:
    started = time.perf_counter()
    found = host.search(question, DEPTH)
    searched = time.perf_counter()
    hits = distinct(found)[:FIRST]
    ready = time.perf_counter()
    reranked = host.rerank(question, hits)
    ended = time.perf_counter()
    console.print(
        side_by_side(
            f"{host.name}: {question}",
            question,
            hits,
            reranked,
            search_ms=1000 * (searched - started),
            rerank_ms=1000 * (ended - ready),
        )
    )


def _questions(options: argparse.Namespace, console: Console) -> Iterator[str]:
    if options.question:
        yield from options.question
    elif options.docs in QUESTIONS:
        yield from QUESTIONS[options.docs]
    else:
        while question := console.input("Your question (an empty line ends): ").strip():
            yield question


def _client(store: str) -> QdrantClient:
    # Moving to a server is a URL.
    return QdrantClient(url=store) if "://" in store else QdrantClient(path=store)


def _key(corpus: corpora.Corpus, models: Models) -> str:
    """Name what the stand-ins are measured on; empty for other models, whose fingerprint it takes.

    The merged reranker's own fingerprint may differ in the last digit from processor to processor.
    """
    reranker = stand_in.reranker_folder()
    if (models.embedder, models.reranker) != (str(stand_in.embedder_folder()), str(reranker)):
        return ""
    return f"{corpus.key()}-{reranker.name}"


def _known() -> dict[str, Any]:
    """Give what was measured before: the shipped figures, and those of earlier runs."""
    files = (MEASURED, _figures())
    return {
        key: rows
        for file in files
        if file.exists()
        for key, rows in json.loads(file.read_text()).items()
    }


def _figures() -> Path:
    return stand_in.cache_folder() / "quality.json"


def _measured(
    host: Host,
    asked: Questions,
    key: str,
    title: str,
    instruction: str,
    *,
    again: bool = False,
) -> list[Row]:
    """Measure on the corpus's questions, or recall what was measured before."""
    known = _known()
    if again or key not in known:
        rows = measure(asked, host, data=title, instruction=instruction)
        known[key] = [asdict(row) for row in rows]
        _figures().write_text(json.dumps(known))
    return [Row(**row) for row in known[key]]


if __name__ == "__main__":
    main()
