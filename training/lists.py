"""What the reranker learns from: lists of one question and passages that its embedder confuses."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from paraphrase import paraphrase

# Documentation under licences that ask for no more than their notices; see README.md.
PERMISSIVE = frozenset(
    re.findall(
        r"[\w.-]+",
        "python django sqlalchemy perl sympy llvm pandas rust-std sqlite flask scrapy httpd numba "
        "sphinx pytest twisted clang postgresql dask drf setuptools zsh pymongo docker nodejs "
        "cmake scipy tornado ant peewee beets gevent borg cython pillow mypy rust-book docutils "
        "werkzeug varnish scons lxml xarray aiohttp jinja pip click cryptography mkdocs ipython "
        "coverage black trio requests networkx supervisor attrs beautifulsoup dplyr gunicorn "
        "structlog fabric",
    )
)
# How many pairs of a kind, and how often a list is of that kind.
MOST = {
    "question": 9999, "rewritten": 1500, "heading": 400, "docstring": 400, "glossary": 250,
    "keyword": 250, "note": 50, "faq": 1700, "nqg": 1300, "squadshifts": 700, "boolq": 120,
}  # fmt: skip
SHARES = {
    "question": 1.4, "rewritten": 1.1, "heading": 0.3, "docstring": 0.3, "glossary": 0.15,
    "keyword": 0.15, "note": 0.05, "faq": 2.2, "said question": 0.5, "said faq": 0.6,
    "nqg": 1.2, "squadshifts": 1.0, "boolq": 0.2,
}  # fmt: skip
UNLABELLED = 1.0  # the share of lists that teach the embedder's ranking alone
HELD_OUT_PART = 12  # one document in so many is held out
NEAREST = 36
NEAR_DUPLICATE = 0.95


@dataclass(frozen=True)
class Example:
    """A passage and what it answers.

    Attributes:
        queries: The question, then paraphrases of it.
        passage: The text.
        document: Where it is from, `source/document`.
        kind: A key of SHARES.
        pool: Passages of one pool look alike: "tech", "faq" or "encyclopaedia".
        parts: The windows of its paragraph, if it was cut: any may be a passage, none a negative.
    """

    queries: tuple[str, ...]
    passage: str
    document: str
    kind: str
    pool: str
    parts: tuple[str, ...] = ()

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training: whole documents are."""
        name = self.document if "/" in self.document else self.passage
        return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % HELD_OUT_PART == 0


@dataclass(frozen=True)
class TrainingList:
    """One question with passages.

    Attributes:
        query: The question.
        passages: The right one first, if `labelled`.
        cosines: The embedder's similarities, as many.
        labelled: Whether the first one is right; else only the embedder's ranking is learnt.
    """

    query: str
    passages: Sequence[str]
    cosines: Sequence[float]
    labelled: bool


def technical(file: Path, generator: random.Random) -> list[Example]:
    """Read pairs of documentation: plain windows, and FAQ entries behind their own question.

    Args:
        file: JSON lines with `query`, `positive`, `group` and `kind`.
        generator: Source of chance.
    """
    pairs = [pair for pair in _json_lines(file) if pair["group"].split("/")[0] in PERMISSIVE]
    generator.shuffle(pairs)
    examples = []
    for pair in pairs:
        query, text, document, kind = (pair[key] for key in ("query", "positive", "group", "kind"))
        passage = window(text, generator)
        examples.append(Example((query,), passage, document, kind, "tech"))
        if kind == "question" or (kind == "rewritten" and generator.random() < 0.5):
            title = query[:1].upper() + query[1:]
            if not title.endswith("?") and generator.random() < 0.8:
                title += "?"
            body = window(text, generator, cut_start=0.0)
            said = (paraphrase(query, generator) for _ in range(4))
            titled = title + generator.choice(("\n", "\n", " ", "\n\n")) + body
            examples.append(
                Example(tuple(dict.fromkeys((query, *said))), titled, document, "faq", "faq")
            )
    return _at_most(examples)


def encyclopaedic(file: Path, generator: random.Random) -> list[Example]:
    """Read pairs of an encyclopaedia: single sentences, and windows of paragraphs.

    Args:
        file: JSON lines with `query`, `positive` and `group`: `source` or `source/article`.
        generator: Source of chance.
    """
    pairs = list(_json_lines(file))
    generator.shuffle(pairs)
    examples = []
    for pair in pairs:
        source, _, title = pair["group"].partition("/")
        text = f"{title} {pair['positive']}".strip()
        parts = () if source == "nqg" else sentence_windows(text, title)
        examples.append(
            Example((pair["query"],), text, pair["group"], source, "encyclopaedia", parts)
        )
    return _at_most(examples)


def window(text: str, generator: random.Random, *, cut_start: float = 0.35) -> str:
    """Cut a passage as splitters do: it may begin, and often ends, in the middle of a sentence.

    Args:
        text: The passage.
        generator: Source of chance.
        cut_start: How often the beginning of a long one goes.
    """
    words = text.split(" ")
    if generator.random() < cut_start and len(words) > 55:
        words = words[generator.randint(2, min(18, len(words) - 40)) :]
    cut = " ".join(words)
    most = generator.choice((220, 300, 380, 460, 540))
    return (cut if len(cut) <= most else cut[:most].rsplit(" ", 1)[0]).strip()


def sentence_windows(paragraph: str, title: str) -> tuple[str, ...]:
    """Cut a paragraph into windows of one to three sentences, each behind the title."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", paragraph.removeprefix(title).strip())
    generator = random.Random(paragraph)
    cut = []
    while sentences:
        count = generator.choice((1, 1, 2, 3))
        cut.append(f"{title} {' '.join(sentences[:count])}".strip())
        sentences = sentences[count:]
    return tuple(dict.fromkeys(cut))


class Lists:
    """Draws training lists for ever."""

    def __init__(
        self,
        examples: Sequence[Example],
        vectors: Mapping[str, NDArray[np.float32]],
        *,
        negatives: int,
        seed: int,
    ) -> None:
        """Sort the examples into pools.

        Args:
            examples: Everything; what is held out is left out.
            vectors: A normalised row for each query, passage and part.
            negatives: How many other passages a list has.
            seed: Of all chance here.
        """
        self._chance = random.Random(seed)
        self._vectors = vectors
        self._negatives = negatives
        self._by_kind = defaultdict(list)
        documents: dict[str, dict[str, str]] = defaultdict(dict)
        for example in examples:
            if not example.held_out:
                self._by_kind[example.kind].append(self._nearest_part(example))
                for text in example.parts or (example.passage,):
                    documents[example.pool].setdefault(text, example.document)
        self._queues: dict[str, list[Example]] = defaultdict(list)
        self._texts = {pool: list(texts) for pool, texts in documents.items()}
        self._rows = {
            pool: np.stack([vectors[text] for text in texts]) for pool, texts in self._texts.items()
        }
        self._documents = {
            pool: np.array(list(texts.values())) for pool, texts in documents.items()
        }

    def draw(self) -> TrainingList:
        """Draw one list."""
        kinds = [kind for kind in SHARES if self._by_kind[kind]]
        weights = [SHARES[kind] for kind in kinds]
        labelled = self._chance.random() * (sum(weights) + UNLABELLED) >= UNLABELLED
        kind = self._chance.choices(kinds, weights if labelled else None)[0]
        if not self._queues[kind]:
            self._queues[kind] = self._chance.sample(self._by_kind[kind], len(self._by_kind[kind]))
        example = self._queues[kind].pop()
        query = example.queries[0]
        if len(example.queries) > 1 and self._chance.random() < 0.8:
            query = self._chance.choice(example.queries[1:])
        pool = self._pool(example, labelled=labelled)
        cosines = self._rows[pool] @ self._vectors[query]
        near = self._near(example, pool, cosines)
        # The nearest more often, and one that may be far.
        ranks = np.arange(len(near)) + 4.0 if labelled else np.ones(len(near))
        count = self._negatives - labelled
        draws = np.random.default_rng(self._chance.getrandbits(32))
        picks = draws.choice(len(near), count, replace=False, p=(1 / ranks) / (1 / ranks).sum())
        rows = [*(near[pick] for pick in picks), int(draws.integers(len(cosines)))]
        passages = [self._texts[pool][row] for row in rows]
        similarities = [float(cosines[row]) for row in rows]
        if labelled:
            passages.insert(0, example.passage)
            similarities.insert(0, float(self._vectors[example.passage] @ self._vectors[query]))
        if kind == "nqg" and self._chance.random() < 0.4:
            title = borrowed_title(query, example.passage, self._chance)
            passages = [title + passage for passage in passages]
        return TrainingList(self._typed(query), passages, similarities, labelled)

    def _nearest_part(self, example: Example) -> Example:
        if not example.parts:
            return example
        query = self._vectors[example.queries[0]]
        nearest = max(example.parts, key=lambda part: float(self._vectors[part] @ query))
        return replace(example, passage=nearest)

    def _pool(self, example: Example, *, labelled: bool) -> str:
        if not labelled:
            return self._chance.choice(list(self._texts))
        # A plain passage competes with FAQ entries at times, and the other way round.
        other = {"faq": "tech", "tech": "faq"}.get(example.pool, "")
        return other if other in self._texts and self._chance.random() < 0.22 else example.pool

    def _near(self, example: Example, pool: str, cosines: NDArray[np.float32]) -> list[int]:
        barred = self._rows[pool] @ self._vectors[example.passage] > NEAR_DUPLICATE
        if pool != "encyclopaedia":  # there, an article's other sentences are fair negatives
            barred |= self._documents[pool] == example.document
        own = {example.passage, *example.parts}
        order = np.argsort(-np.where(barred, -9.0, cosines))[: NEAREST + len(own)]
        rows = [int(row) for row in order if not barred[row]]
        return [row for row in rows if self._texts[pool][row] not in own][:NEAREST]

    def _typed(self, query: str) -> str:
        """Drop the question mark or the capitals at times, as people do in search boxes."""
        if self._chance.random() < 0.4:
            query = query.rstrip("? ")
        return query.lower() if self._chance.random() < 0.15 else query


def borrowed_title(query: str, passage: str, generator: random.Random) -> str:
    """Make up a title for passages without one: words that the question and the answer share.

    The whole list gets the same title, so it gives nothing away; the model learns that a title
    names the subject and that the sentence must answer the rest.

    Args:
        query: The question.
        passage: Its answer.
        generator: Source of chance.

    Returns:
        The title and a space, or an empty string.
    """
    known = set(re.findall(r"\w+", passage.lower()))
    runs: list[list[str]] = [[]]
    for word in re.findall(r"\w+", query.lower()):
        if word in known:
            runs[-1].append(word)
        elif runs[-1]:
            runs.append([])
    runs = [run for run in runs if any(len(word) > 4 for word in run)]
    return " ".join(generator.choice(runs)[-4:]) + " " if runs else ""


def _at_most(examples: Sequence[Example]) -> list[Example]:
    kept: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        if len(kept[example.kind]) < MOST.get(example.kind, 0):
            kept[example.kind].append(example)
    return [example for kind in kept.values() for example in kind]


def _json_lines(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
