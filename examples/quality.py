"""The demo's questions with known answers, and how well a framework's ranking finds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from corpora import ENCYCLOPAEDIA, encyclopaedia
from hosts import Hit, distinct
from tqdm import tqdm

from bge_core.beir import Questions, json_lines, read_beir
from bge_core.evaluate import DEPTH, FIRST, Row, figures

QUESTIONS = Path(__file__).with_name("python_questions.jsonl")


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
    rows = list(json_lines(file, "topics", texts=("question",)))
    return Questions(
        {str(number): row["question"] for number, row in enumerate(rows)},
        {str(number): dict.fromkeys(row["topics"], 1) for number, row in enumerate(rows)},
    )


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
