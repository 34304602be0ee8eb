"""What the demo searches: sentences of an encyclopaedia, the Python language reference, or files.

The encyclopaedia's questions and those about Python come with the documents that answer them.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

SUFFIXES = (".md", ".txt", ".rst")
DROPPED = (*SUFFIXES, ".html", ".htm", ".pdf")
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


def read_file(name: str, content: bytes) -> Text:
    """Give the text of a file of one of the kinds in DROPPED.

    Args:
        name: The file's name, with its ending.
        content: All of it.

    Raises:
        ValueError: It has no text that can be read; the message is a sentence that says why.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in DROPPED:
        msg = f"{name} is none of the kinds that are read here: {', '.join(DROPPED)}."
        raise ValueError(msg)
    text = _pdf_text(name, content) if suffix == ".pdf" else _decoded(name, content)
    if suffix in (".html", ".htm"):
        text = _html_text(text)
    if not text.strip():
        hint = " If it was scanned, run it through a text recognition first." * (suffix == ".pdf")
        msg = f"{name} has no text in it.{hint}"
        raise ValueError(msg)
    return Text(name, text.strip())


def _decoded(name: str, content: bytes) -> str:
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    for encoding in ["utf-16"] if wide else ["utf-8-sig", "cp1252"]:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if not re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text):
            return text
    msg = f"{name} is no text file: it has bytes in it that no text has. Save it as UTF-8 text."
    raise ValueError(msg)


def _pdf_text(name: str, content: bytes) -> str:
    try:
        from pypdf import PdfReader
    except ImportError as exc:
        msg = f"{name} can't be read without pypdf: run pip install pypdf."
        raise ValueError(msg) from exc
    try:
        pages = [page.extract_text() for page in PdfReader(io.BytesIO(content)).pages]
    except Exception as exc:
        # A damaged file makes pypdf raise almost anything.
        msg = f"{name} can't be read as a PDF: it is damaged, or it needs a password."
        raise ValueError(msg) from exc
    return "\n\n".join(pages)


class _Reader(HTMLParser):
    """Collects the text that a browser would show."""

    hidden = ("script", "style", "template", "noscript", "svg")
    inline = frozenset(
        [
            "a",
            "abbr",
            "b",
            "code",
            "em",
            "i",
            "mark",
            "q",
            "small",
            "span",
            "strong",
            "sub",
            "sup",
            "u",
        ]
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self._depth += tag in self.hidden
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        self._depth = max(self._depth - (tag in self.hidden), 0)
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if not self._depth:
            self.parts.append(re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if tag not in self.inline:
            self.parts.append("\n")


def _html_text(markup: str) -> str:
    reader = _Reader()
    reader.feed(markup)
    reader.close()
    lines = (line.strip() for line in "".join(reader.parts).splitlines())
    return "\n".join(line for line in lines if line)


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
