"""Questions, passages and which answers which: a folder in BEIR format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_core.errors import ArgumentError

__all__ = ["Questions", "json_lines", "read_beir"]


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


def read_beir(folder: Path) -> tuple[Questions, list[tuple[str, str]]]:
    """Read corpus.jsonl, queries.jsonl, and qrels.tsv or qrels/test.tsv.

    Args:
        folder: A folder in BEIR format.

    Returns:
        The questions that have an answer, and (id, title and text) of each passage.

    Raises:
        ArgumentError: A file is missing or damaged, or lacks what another one names.
    """
    places = [folder / "qrels.tsv", folder / "qrels" / "test.tsv"]
    qrels = next((place for place in places if place.is_file()), places[0])
    for file in (folder / "corpus.jsonl", folder / "queries.jsonl", qrels):
        if not file.is_file():
            msg = (
                f"{folder} has no {file.name}: a folder in BEIR format has corpus.jsonl, "
                "queries.jsonl, and qrels.tsv or qrels/test.tsv."
            )
            raise ArgumentError(msg)
    passages = [
        (str(row["_id"]), f"{row.get('title') or ''} {row['text']}".strip())
        for row in json_lines(folder / "corpus.jsonl", "_id", texts=("text",))
    ]
    relevant: dict[str, dict[str, int]] = {}
    for line in _lines(qrels)[1:]:
        if not line.strip():
            continue
        try:
            query, passage, grade = line.split("\t")
            judged = int(grade)
        except ValueError as exc:
            msg = f"{qrels} has the line {line!r}: expected query-id, corpus-id and score, by tabs."
            raise ArgumentError(msg) from exc
        if judged > 0:
            relevant.setdefault(query, {})[passage] = judged
    if not relevant:
        msg = f"{qrels} has no score above 0 after its first line, the heading."
        raise ArgumentError(msg)
    asked = json_lines(folder / "queries.jsonl", "_id", texts=("text",))
    texts = {str(row["_id"]): row["text"] for row in asked}
    if unknown := sorted(relevant.keys() - texts.keys()):
        many = "1 question" if len(unknown) == 1 else f"{len(unknown):,} questions"
        msg = f"{qrels} judges {many} that queries.jsonl lacks: {unknown[:3]}."
        raise ArgumentError(msg)
    return Questions({query: texts[query] for query in relevant}, relevant), passages


def json_lines(file: Path, *names: str, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Read a file of one JSON object a line; blank lines count for nothing.

    Args:
        file: The file, in UTF-8.
        names: What each object must have.
        texts: What each must have that is a string.

    Raises:
        ArgumentError: The file can't be read, or a line is no such object.
    """
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not row.keys() >= {*names, *texts}:
            wanted = ", ".join(f'"{name}"' for name in (*texts, *names))
            msg = f"{file} has in line {number} no JSON object with {wanted}: {line[:80]!r}."
            raise ArgumentError(msg)
        for name in texts:
            if not isinstance(row[name], str):
                msg = f'{file} has in line {number} a "{name}" that is no string: {line[:80]!r}.'
                raise ArgumentError(msg)
        yield row


def _lines(file: Path) -> list[str]:
    """Read a file's lines; Windows' programs may begin it with a byte order mark."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        msg = f"{file} can't be read: {exc}."
        raise ArgumentError(msg) from exc
    # Not by splitlines: a text may hold U+2028 or U+0085, which JSON leaves as they are.
    return text.split("\n")
