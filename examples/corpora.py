"""What the demo searches: sentences of an encyclopaedia, the Python language reference, or files.

The encyclopaedia's questions and those about Python come with the documents that answer them.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".md", ".txt", ".rst")
ENCYCLOPAEDIA = Path(__file__).with_name("encyclopaedia")


@dataclass(frozen=True)
class Text:
    """One document before it is split.

    Attributes:
        name: An article and which of its sentences, a topic of the reference, or a file's path
            inside the folder.
        text: All of it.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents under a title.

    Attributes:
        title: For people.
        texts: The documents.
    """

    title: str
    texts: Sequence[Text]

    def key(self) -> str:
        """Give a short name that changes with the content."""
        content = repr([(text.name, text.text) for text in self.texts])
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def encyclopaedia() -> Corpus:
    """Give the sentences beside this file, each behind its article's title."""
    texts = []
    counts = Counter[str]()
    with (ENCYCLOPAEDIA / "corpus.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            counts[row["title"]] += 1
            name = f"{row['title']}, sentence {counts[row['title']]}"
            texts.append(Text(name, f"{row['title']}\n{row['text']}"))
    return Corpus("sentences of an encyclopaedia", texts)


def python_reference() -> Corpus:
    """Give the language reference that every CPython carries for its own help()."""
    from pydoc_data.topics import topics

    texts = [Text(name, text.strip()) for name, text in sorted(topics.items()) if text.strip()]
    return Corpus(f"the language reference of Python {platform.python_version()}", texts)


def folder(path: Path) -> Corpus:
    """Give the .md, .txt and .rst files below a folder.

    Raises:
        SystemExit: There are none.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    texts = [
        Text(file.relative_to(path).as_posix(), file.read_text(encoding="utf-8", errors="replace"))
        for file in files
    ]
    texts = [text for text in texts if text.text.strip()]
    if not texts:
        msg = f"{path} has no {', '.join(SUFFIXES)} files with text in them."
        raise SystemExit(msg)
    return Corpus(str(path), texts)


def near_duplicates(texts: Sequence[str], *, share: float = 0.7, run: int = 3) -> list[int]:
    """Find the texts that say what an earlier one says.

    Args:
        texts: Passages.
        share: How many of the shorter one's runs of words two of them must have in common.
        run: Words in a run.

    Returns:
        For each text the position of the first one that is nearly the same, often its own.
    """
    first: list[int] = []
    holders: dict[tuple[str, ...], list[int]] = {}
    sizes: dict[int, int] = {}
    for number, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        runs = set(zip(*(words[start:] for start in range(run)), strict=False)) or {tuple(words)}
        shared = Counter(holder for one in runs for holder in holders.get(one, ()))
        same = [
            holder
            for holder, count in shared.items()
            if count >= share * min(len(runs), sizes[holder])
        ]
        first.append(min(same, default=number))
        if not same:
            sizes[number] = len(runs)
            for one in runs:
                holders.setdefault(one, []).append(number)
    return first
