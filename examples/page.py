"""What the demo prints: passages before and after reranking, side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hosts import Hit
from rich.markup import escape
from rich.table import Table

SHOWN = 5
EXCERPT = 220  # characters: about four lines of half a page
LONGEST = 340  # what a single sentence may have


def side_by_side(
    title: str,
    question: str,
    found: Sequence[Hit],
    reranked: Sequence[Hit],
    *,
    search_ms: float,
    rerank_ms: float,
) -> Table:
    """Lay a question's passages out, as found on the left and as reranked on the right.

    Args:
        title: Above the table.
        question: What was asked.
        found: Passages by the embedder, best first.
        reranked: The same by the reranker.
        search_ms: What the search took, in milliseconds.
        rerank_ms: What the reranker took.
    """
    table = Table(
        title=f"[bold]{escape(title)}[/]",
        title_justify="left",
        caption=(
            f"search {search_ms:.0f} ms, reranking {len(found)} passages {rerank_ms:.0f} ms; "
            "from N: the place before reranking"
        ),
        caption_justify="left",
        expand=True,
        show_lines=True,
    )
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("found by the embedder", ratio=1)
    table.add_column("", no_wrap=True)
    table.add_column("after reranking", ratio=1)
    pairs = zip(found[:SHOWN], reranked[:SHOWN], strict=True)
    for place, (before, after) in enumerate(pairs, start=1):
        table.add_row(
            str(place),
            _passage(before, question),
            moved(place, after.place),
            _passage(after, question),
        )
    return table


def moved(place: int, before: int) -> str:
    """Say how a passage came to its place.

    Args:
        place: Where it is now, from 1.
        before: Where it was.
    """
    if before == place:
        return "[dim]=[/]"
    if before > place:
        return f"[bold green]▲ from {before}[/]"
    return f"[red]▼ from {before}[/]"


def excerpt(text: str, question: str, limit: int = EXCERPT) -> str:
    """Choose whole sentences of a passage, from the one with most of the question's words on.

    Args:
        text: The passage, which may begin and end in the middle of a sentence.
        question: What was asked.
        limit: Characters at most, but for a single sentence: it is cut, at a word, if it is longer
            than LONGEST.
    """
    # A line of signs under a heading ends it, as a full stop would.
    plain = re.sub(r"\s*\n\s*[*=~^-]{3,}\s*\n", ".\n", text)
    plain = " ".join(re.sub(r"\*\*|``", "", plain).split())
    sentences = re.split(r"(?<=[.!?:])\s+(?=[A-Z\"“‘'(*\[])", plain)
    if len(sentences) > 1 and sentences[0][:1].islower():
        del sentences[0]  # its beginning is in another passage
    wanted = {word for word in re.findall(r"\w+", question.lower()) if len(word) > 3}
    shared = [len(wanted.intersection(re.findall(r"\w+", one.lower()))) for one in sentences]
    start = shared.index(max(shared))
    chosen = sentences[start]
    for sentence in sentences[start + 1 :]:
        if len(chosen) + len(sentence) >= limit:
            break
        chosen = f"{chosen} {sentence}"
    if len(chosen) <= LONGEST:
        return chosen
    return chosen[:LONGEST].rsplit(" ", 1)[0] + " …"


def _passage(hit: Hit, question: str) -> str:
    heading, _, body = hit.text.partition("\n")
    text = body if body and hit.name.startswith(heading) else hit.text
    names = ", ".join(hit.names[:2]) + (", …" if len(hit.names) > 2 else "")
    score = f"{hit.similarity:.2f}" if hit.relevance is None else f"{hit.relevance:.2f}"
    return f"[cyan]{escape(names)}[/] [dim]{score}[/]\n{escape(excerpt(text, question))}"
