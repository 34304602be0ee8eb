"""What the reranker learns from: lists of one question and passages that its embedder confuses."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import sysconfig
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
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
    "question": 9999, "rewritten": 9999, "heading": 4000, "docstring": 3000, "glossary": 250,
    "keyword": 1200, "note": 50, "faq": 9999, "nqg": 99999, "squadshifts": 99999, "boolq": 99999,
}  # fmt: skip
SHARES = {
    "question": 0.8, "rewritten": 1.2, "heading": 0.6, "docstring": 0.5, "glossary": 0.1,
    "keyword": 0.3, "note": 0.05, "faq": 1.7, "said question": 0.2, "said faq": 0.3,
    "nqg": 1.8, "squadshifts": 1.6, "boolq": 0.5,
}  # fmt: skip
UNLABELLED = 3.0  # the share of lists that teach the embedder's ranking alone
HELD_OUT_PART = 12  # one document in so many is held out
NEAREST = 36
NEAR_DUPLICATE = 0.95

Vectors = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Example:
    """A passage and what it answers.

    Attributes:
        queries: The question, then paraphrases of it.
        passage: The text.
        document: Where it is from, `source/document`.
        kind: A key of SHARES, or "chunk".
        pool: Passages of one pool look alike: "tech", "faq", "chunks" or "encyclopaedia".
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


def chunks(generator: random.Random, count: int = 6000) -> list[Example]:
    """Cut docstrings of Python's library as splitters cut manuals: in mid-sentence, with tables.

    No question belongs to them: the embedder's ranking of them is learnt.

    Args:
        generator: Source of chance.
        count: How many at most.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    files += sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*/[a-z_]*.py"))
    found: list[tuple[str, str]] = []
    for file in files:
        if {"pydoc_data", "idlelib", "site-packages", "test"} & set(file.parts):
            continue
        if len(found) > 4 * count:
            break
        for text in _docstrings(file):
            start = generator.choice((0, 0, generator.randrange(200)))
            while len(text) - start > 150:
                size = generator.choice((220, 300, 380, 460, 540))
                found.append((text[start : start + size].strip(), file.stem))
                start += size
    generator.shuffle(found)
    found = found[:count]
    passages = [
        (_table(text, other), name) if generator.random() < 0.12 else (text, name)
        for (text, name), (other, _) in zip(found, reversed(found), strict=True)
    ]
    return [
        Example((text.strip("+-| \n")[:80],), text, f"library/{name}", "chunk", "chunks")
        for text, name in passages
    ]


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def _table(left: str, right: str) -> str:
    """Write two texts as the columns of a table, as reStructuredText draws them."""
    cells = [textwrap.wrap(" ".join(text.split())[:200], 28) for text in (left, right)]
    rule = f"+{'-' * 30}+{'-' * 30}+"
    lines = [f"| {a:28} | {b:28} |" for a, b in zip_longest(*cells, fillvalue="")]
    return "\n".join([rule, *lines, rule])


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


class Pool:
    """Passages that look alike, and which of them an embedder takes for an example's."""

    def __init__(self, name: str, texts: Mapping[str, str], vectors: Vectors, device: str) -> None:
        """Keep the passages.

        Args:
            name: What an example calls it.
            texts: Each passage's document.
            vectors: A normalised row for each passage.
            device: Where similarities are computed.
        """
        self.name = name
        self.texts = list(texts)
        self.vectors = np.stack([vectors[text] for text in texts])
        self._rows = torch.from_numpy(self.vectors).to(device)
        self._row_of = {text: row for row, text in enumerate(texts)}
        self._documents = {
            name: number for number, name in enumerate(dict.fromkeys(texts.values()))
        }
        self._document_of = torch.tensor([self._documents[name] for name in texts.values()]).to(
            device
        )

    def nearest(self, examples: Sequence[Example], vectors: Vectors) -> list[list[int]]:
        """Find the rows nearest to each example's question that don't answer it.

        Args:
            examples: Of this pool or another.
            vectors: A normalised row for each question and passage.
        """
        found: list[list[int]] = []
        for start in range(0, len(examples), 512):
            block = examples[start : start + 512]
            asked, right = (
                torch.from_numpy(np.stack([vectors[text] for text in texts])).to(self._rows.device)
                for texts in ([one.queries[0] for one in block], [one.passage for one in block])
            )
            barred = right @ self._rows.T > NEAR_DUPLICATE
            if self.name != "encyclopaedia":  # there, an article's other sentences are fair
                own = [self._documents.get(one.document, -1) for one in block]
                barred |= torch.tensor(own).to(self._rows.device)[:, None] == self._document_of
            for number, one in enumerate(block):
                rows = [self._row_of[text] for text in one.parts if text in self._row_of]
                barred[number, rows] = True
            cosines = (asked @ self._rows.T).masked_fill(barred, -9.0)
            best = cosines.topk(min(NEAREST, cosines.shape[1]))
            found += [
                [row for row, cosine in zip(*one, strict=True) if cosine > -9.0]
                for one in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        return found


class Lists:
    """Draws training lists for ever."""

    def __init__(
        self,
        examples: Sequence[Example],
        vectors: Vectors,
        *,
        negatives: int,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        """Sort the examples into pools.

        Args:
            examples: Everything; what is held out is left out.
            vectors: A normalised row for each query, passage and part.
            negatives: How many other passages a list has.
            seed: Of all chance here.
            device: Where the nearest passages are found.
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
        self._pools = {
            name: Pool(name, texts, vectors, device) for name, texts in documents.items()
        }
        kept = [one for kind in self._by_kind.values() for one in kind]
        self._near = {
            name: dict(zip(kept, pool.nearest(kept, vectors), strict=True))
            for name, pool in self._pools.items()
        }

    def seed(self, seed: int) -> None:
        """Begin all chance here anew, in a process of its own say.

        Args:
            seed: Its seed.
        """
        self._chance = random.Random(seed)
        self._queues.clear()

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
        near = self._near[pool.name][example]
        # The nearest more often, and one that may be far.
        ranks = np.arange(len(near)) + 4.0 if labelled else np.ones(len(near))
        count = min(self._negatives - labelled, len(near))
        draws = np.random.default_rng(self._chance.getrandbits(32))
        picks = draws.choice(len(near), count, replace=False, p=(1 / ranks) / (1 / ranks).sum())
        rows = [*(near[pick] for pick in picks), int(draws.integers(len(pool.texts)))]
        passages = [pool.texts[row] for row in rows]
        similarities = (pool.vectors[rows] @ self._vectors[query]).tolist()
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

    def _pool(self, example: Example, *, labelled: bool) -> Pool:
        if not labelled:
            own = self._pools[example.pool]
            return self._chance.choice([own, own, own, *self._pools.values()])
        # A plain passage competes with FAQ entries or cut manuals at times, a FAQ entry too.
        others = {"faq": ("tech", "chunks"), "tech": ("faq", "chunks")}.get(example.pool, ("",))
        other = self._chance.choice(others)
        mixed = other in self._pools and self._chance.random() < 0.3
        return self._pools[other if mixed else example.pool]

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
