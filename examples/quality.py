"""Questions with known answers, and how well a ranking finds them: nDCG@10, MRR@10, recall@100."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import ir_measures
from corpora import ENCYCLOPAEDIA, encyclopaedia
from hosts import Hit, distinct
from ir_measures import RR, R, nDCG
from rich.table import Table
from tqdm import tqdm

QUESTIONS = Path(__file__).with_name("python_questions.jsonl")
FIRST = 20
DEPTH = 100
METRICS = {"nDCG@10": nDCG @ 10, "MRR@10": RR @ 10, "recall@100": R @ 100}


@dataclass(frozen=True)
class Questions:
    """Questions and what answers them.

    Attributes:
        texts: Question id to text.
        relevant: Question id to the names of the documents that answer it, and how well: 1 or
            more.
    """

    texts: Mapping[str, str]
    relevant: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Row:
    """What one configuration reached.

    Attributes:
        data: What was searched.
        questions: How many questions.
        instruction: What was put in front of them.
        reranked: How many passages the reranker put in its order; 0 without one.
        figures: Metric to percent.
    """

    data: str
    questions: int
    instruction: str
    reranked: int
    figures: Mapping[str, float]


class Search(Protocol):
    """What is measured: a retriever and a reranker."""

    def search(self, question: str, first: int) -> list[Hit]:
        """Find passages, best first, by the embedder."""
        ...

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        """Put passages in the reranker's order, all of them."""
        ...


def encyclopaedia_questions() -> Questions:
    """Read the questions about the encyclopaedia; what answers them are single sentences."""
    questions, passages = read_beir(ENCYCLOPAEDIA)
    names = {key: text.name for (key, _), text in zip(passages, encyclopaedia().texts, strict=True)}
    return Questions(
        questions.texts,
        {
            number: {names[key]: grade for key, grade in judged.items()}
            for number, judged in questions.relevant.items()
        },
    )


def read_questions(file: Path = QUESTIONS) -> Questions:
    """Read the questions about Python; what answers them are topics of the reference."""
    rows = list(_json_lines(file))
    return Questions(
        {str(number): row["question"] for number, row in enumerate(rows)},
        {str(number): dict.fromkeys(row["topics"], 1) for number, row in enumerate(rows)},
    )


def read_beir(folder: Path) -> tuple[Questions, list[tuple[str, str]]]:
    """Read corpus.jsonl, queries.jsonl, and qrels.tsv or qrels/test.tsv.

    Args:
        folder: A folder in BEIR format.

    Returns:
        The questions that have an answer, and (id, title and text) of each passage.

    Raises:
        SystemExit: A file is missing or damaged, or lacks what another one names.
    """
    places = [folder / "qrels.tsv", folder / "qrels" / "test.tsv"]
    qrels = next((place for place in places if place.is_file()), places[0])
    for file in (folder / "corpus.jsonl", folder / "queries.jsonl", qrels):
        if not file.is_file():
            msg = (
                f"{folder} has no {file.name}: a folder in BEIR format has corpus.jsonl, "
                "queries.jsonl, and qrels.tsv or qrels/test.tsv."
            )
            raise SystemExit(msg)
    passages = [
        (str(row["_id"]), f"{row.get('title') or ''} {row['text']}".strip())
        for row in _json_lines(folder / "corpus.jsonl")
    ]
    relevant: dict[str, dict[str, int]] = {}
    for line in qrels.read_text(encoding="utf-8").splitlines()[1:]:
        try:
            query, passage, grade = line.split("\t")
            judged = int(grade)
        except ValueError as exc:
            msg = f"{qrels} has the line {line!r}: expected query-id, corpus-id and score, by tabs."
            raise SystemExit(msg) from exc
        if judged > 0:
            relevant.setdefault(query, {})[passage] = judged
    if not relevant:
        msg = f"{qrels} has no score above 0 after its first line, the heading."
        raise SystemExit(msg)
    texts = {str(row["_id"]): row["text"] for row in _json_lines(folder / "queries.jsonl")}
    if unknown := sorted(relevant.keys() - texts.keys()):
        msg = f"{qrels} judges {len(unknown)} questions that queries.jsonl lacks: {unknown[:3]}."
        raise SystemExit(msg)
    return Questions({query: texts[query] for query in relevant}, relevant), passages


def figures(
    questions: Questions, rankings: Mapping[str, Iterable[Sequence[str]]]
) -> dict[str, float]:
    """Give each metric in percent.

    Args:
        questions: Questions and what answers them.
        rankings: Question id to passages, best first, each as the names of the documents in which
            it stands. A document ranks where its best passage does.
    """
    run = {
        question: {
            name: 1.0 / place
            for place, name in enumerate(documents(passages, questions.relevant[question]), start=1)
        }
        for question, passages in rankings.items()
    }
    found = ir_measures.calc_aggregate(METRICS.values(), questions.relevant, run)
    return {name: 100 * found[metric] for name, metric in METRICS.items()}


def documents(passages: Iterable[Sequence[str]], relevant: Container[str]) -> list[str]:
    """Turn a ranking of passages into one of documents.

    A passage that stands in several documents counts for each that answers the question. Where
    none does, it takes one place, as it takes one line of a result page.

    Args:
        passages: Best first, each as the names of the documents in which it stands.
        relevant: The names of the documents that answer the question.
    """
    ranked: dict[str, None] = {}
    seen: set[str] = set()
    for names in passages:
        new = [name for name in dict.fromkeys(names) if name not in seen]
        ranked |= dict.fromkeys([name for name in new if name in relevant] or new[:1])
        seen.update(new)
    return list(ranked)


def measure(
    questions: Questions, search: Search, *, data: str, instruction: str = ""
) -> tuple[Row, Row]:
    """Measure a retriever alone, and with its first 20 in the reranker's order.

    Args:
        questions: Questions and what answers them.
        search: The retriever and reranker.
        data: What is searched, for people.
        instruction: What the retriever puts in front of questions.
    """
    before: dict[str, list[tuple[str, ...]]] = {}
    after: dict[str, list[tuple[str, ...]]] = {}
    for number, question in tqdm(questions.texts.items(), desc="measuring", unit="question"):
        hits = distinct(search.search(question, DEPTH))
        reranked = [*search.rerank(question, hits[:FIRST]), *hits[FIRST:]]
        before[number] = [hit.names for hit in hits]
        after[number] = [hit.names for hit in reranked]
    count = len(questions.texts)
    return (
        Row(data, count, instruction, 0, figures(questions, before)),
        Row(data, count, instruction, FIRST, figures(questions, after)),
    )


def table(rows: Iterable[Row], caption: str | None = None) -> Table:
    """Lay figures out, the rows of one set together."""
    out = Table(title="in percent", title_justify="left", caption=caption, caption_justify="left")
    out.add_column("data")
    for heading in ("questions", "instruction", "reranked", *METRICS):
        out.add_column(heading, justify="right")
    for _, group in groupby(rows, key=lambda row: row.data):
        for number, row in enumerate(group):
            out.add_row(
                "" if number else row.data,
                "" if number else str(row.questions),
                "yes" if row.instruction else "no",
                f"first {row.reranked}" if row.reranked else "no",
                *(f"{row.figures[name]:.1f}" if name in row.figures else "" for name in METRICS),
            )
        out.add_section()
    return out


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
