"""What windows are worth: passages of 2,000 words with the answer at the end, cut or in windows.

A passage is a topic of the Python language reference behind other text of the reference that
answers none of the questions. Embedders search all passages; rerankers order, for each question,
what answers it and its nearest others.

    python examples/long_passages.py [--embedder ...] [--reranker ...]
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice

import corpora
import numpy as np
import stand_in
from numpy.typing import NDArray
from quality import read_questions
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bge_core import Embedder, Reranker
from bge_core.beir import Questions
from bge_core.evaluate import figures

WORDS = 2000
# Longer topics are what stands in front; a question about one of them is not asked.
LONGEST_TOPIC = 1100
CANDIDATES = 10
MODES = ("truncate", "window")

Rank = Callable[[str, Sequence[str]], Sequence[str]]
"""A question's text and names of passages -> these names, best first."""


def long_passages(words: int = WORDS) -> dict[str, str]:
    """Give a passage of so many words for each short topic, by its name; the topic is its end."""
    texts = {text.name: text.text.split() for text in corpora.python_reference().texts}
    short = {name: text for name, text in texts.items() if len(text) <= LONGEST_TOPIC}
    other = [word for name, text in texts.items() if name not in short for word in text]
    passages = {}
    for place, (name, text) in enumerate(short.items()):
        start = place * len(other) // len(short)
        ahead = islice(cycle(other), start, start + words - len(text))
        passages[name] = " ".join([*ahead, *text])
    return passages


def asked(passages: Mapping[str, str]) -> Questions:
    """Give the questions that are answered by passages alone."""
    every = read_questions()
    relevant = {
        number: names for number, names in every.relevant.items() if names.keys() <= passages.keys()
    }
    return Questions({number: every.texts[number] for number in relevant}, relevant)


def measure(
    questions: Questions, candidates: Mapping[str, Sequence[str]], rank: Rank, label: str
) -> list[str]:
    """Give in percent how often the first passage is right, and nDCG@10."""
    rankings = {
        number: rank(question, candidates[number])
        for number, question in tqdm(questions.texts.items(), desc=label, unit="question")
    }
    first = [ranked[0] in questions.relevant[number] for number, ranked in rankings.items()]
    passages = {number: [(name,) for name in ranked] for number, ranked in rankings.items()}
    return [f"{100 * np.mean(first):.1f}", f"{figures(questions, passages)['nDCG@10']:.1f}"]


def by_embedder(embedder: Embedder, passages: Mapping[str, str]) -> Rank:
    """Rank by similarity."""
    vectors: NDArray[np.float32] = embedder.embed_documents(passages.values(), show_progress=True)
    rows = dict(zip(passages, vectors, strict=True))

    def rank(question: str, names: Sequence[str]) -> Sequence[str]:
        query = embedder.embed_queries([question])[0]
        return sorted(names, key=lambda name: -float(rows[name] @ query))

    return rank


def by_reranker(reranker: Reranker, passages: Mapping[str, str]) -> Rank:
    """Rank by the reranker's score."""

    def rank(question: str, names: Sequence[str]) -> Sequence[str]:
        ranked = reranker.rank(question, [passages[name] for name in names])
        return [names[found.index] for found in ranked]

    return rank


def main() -> None:
    """Measure an embedder and a reranker, both ways."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embedder", help="a hub id or folder (default: the PyPI stand-in)")
    parser.add_argument("--reranker", help="a hub id or folder (default: the stand-in's)")
    parser.add_argument("--reranker-length", type=int, help="its max_length (default: its own)")
    options = parser.parse_args()
    logging.getLogger("bge_core").setLevel(logging.ERROR)
    passages = long_passages()
    questions = asked(passages)
    everything = {number: list(passages) for number in questions.texts}
    table = Table(title=f"{len(questions.texts)} questions, percent", title_justify="left")
    for heading in ("", "passages", "long_passages", "the first is right", "nDCG@10"):
        table.add_column(heading)

    nearest: dict[str, Sequence[str]] = {}
    for mode in MODES:
        # The stand-in was trained without an instruction; a BGE checkpoint has its own.
        with Embedder(
            options.embedder or stand_in.embedder_folder(),
            query_instruction=None if options.embedder else "",
            long_passages=mode,
        ) as embedder:
            rank = by_embedder(embedder, passages)
            found = measure(questions, everything, rank, f"embedder, {mode}")
            for number, question in questions.texts.items():
                right = questions.relevant[number]
                others = [name for name in rank(question, list(passages)) if name not in right]
                # Sorted, so that an undecided reranker gains nothing from the order.
                nearest[number] = sorted([*right, *others[: CANDIDATES - len(right)]])
        table.add_row("embedder", str(len(passages)), mode, *found)
    for mode in MODES:
        with Reranker(
            options.reranker or stand_in.reranker_folder(),
            max_length=options.reranker_length,
            long_passages=mode,
        ) as reranker:
            rank = by_reranker(reranker, passages)
            found = measure(questions, nearest, rank, f"reranker, {mode}")
        table.add_row("reranker", str(CANDIDATES), mode, *found)
    Console().print(table)


if __name__ == "__main__":
    main()
