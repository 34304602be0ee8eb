"""How the playground's page shows an answer: HTML, from an answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hosts import Hit
from page import excerpt
from playground_search import Answer, Stage

SHOWN = 8
EXCERPT = 360
AROUND = 90  # characters before and after a marked window

STYLE = """
:root { --ink: #1f2430; --soft: #667085; --line: #e4e7ec; --card: #fff; --ground: #f7f8fa;
  --found: #6b8fd6; --ranked: #2a9d6f; --up: #11794e; --down: #b4442f; --mark: #fff0a8; }
body.body--dark { --ink: #e6e8ee; --soft: #98a2b3; --line: #343b49; --card: #1d222c;
  --ground: #14181f; --found: #7ea2ea; --ranked: #3fbf8a; --up: #5fd3a0; --down: #f08a74;
  --mark: #5c5010; }
body, body.body--dark { background: var(--ground); color: var(--ink); }
.answer { width: 100%; font-size: 14px; line-height: 1.45; color: var(--ink); }
.stages { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-bottom: 10px; color: var(--soft); }
.stages b { color: var(--ink); font-variant-numeric: tabular-nums; font-weight: 600; }
.part { color: var(--soft); margin-bottom: 8px; }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 0 20px; }
.columns.alone { grid-template-columns: 1fr; }
.columns h2 { font-size: 15px; line-height: 1.3; font-weight: 600; margin: 0 0 8px; }
.columns h2 small { font-weight: 400; font-size: 13px; color: var(--soft); }
.hit { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 9px 12px; margin-bottom: 10px; min-width: 0; overflow-wrap: anywhere; }
.top { display: grid; grid-template-columns: 1.6em minmax(0, 1fr) auto 84px 3.2em; gap: 8px;
  align-items: center; }
.place { font-weight: 700; text-align: right; font-variant-numeric: tabular-nums; }
.name { font-weight: 600; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.move { font-size: 12px; white-space: nowrap; color: var(--soft); }
.move.up { color: var(--up); font-weight: 600; }
.move.down { color: var(--down); }
.bar { height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 4px; background: var(--found); }
.ranked .bar i { background: var(--ranked); }
.score { text-align: right; font-variant-numeric: tabular-nums; }
.text { margin: 5px 0 0 calc(1.6em + 8px); white-space: pre-line; }
.text.clamped { max-height: 10.2em; overflow: auto; }
.hit mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 0 1px; }
.hit details { margin: 3px 0 0 calc(1.6em + 8px); color: var(--soft); }
.hit summary { cursor: pointer; font-size: 12px; list-style: none; }
.hit summary::before { content: "▸ "; }
.hit details[open] summary::before { content: "▾ "; }
.hit details div { white-space: pre-line; max-height: 24em; overflow: auto; color: var(--ink); }
.q-uploader { max-height: none; background: var(--card); }
.q-uploader__header { background: transparent; color: var(--ink); }
.q-uploader__subtitle { display: none; }
.q-uploader__list { min-height: 0; padding: 0; }
@media (max-width: 760px) { .columns { grid-template-columns: 1fr; } }
"""


def answer_html(answer: Answer) -> str:
    """Lay an answer out: its stages, what was found on the left, what was reranked on the right."""
    hybrid = answer.switches.hybrid
    kind = "fused score" if hybrid else "cosine"
    # A fused score says who is before whom, and has no scale of its own.
    highest = max((hit.similarity for hit in answer.found), default=1.0) if hybrid else 1.0
    left = [
        _card(place, hit, answer.question, hit.similarity, highest)
        for place, hit in enumerate(answer.found[:SHOWN], start=1)
    ]
    columns = [_column("found", f"Found by the embedder <small>{kind}</small>", left)]
    if answer.reranked is not None:
        right = [
            _card(place, hit, answer.question, hit.relevance or 0.0, 1.0, moved_from=hit.place)
            for place, hit in enumerate(answer.reranked[:SHOWN], start=1)
        ]
        columns.append(_column("ranked", "After reranking <small>relevance, 0 to 1</small>", right))
    alone = " alone" if len(columns) == 1 else ""
    return (
        f'<div class="answer">{_stages(answer.host, answer.stages)}{_part(answer)}'
        f'<div class="columns{alone}">{"".join(columns)}</div></div>'
    )


def _column(name: str, heading: str, cards: Sequence[str]) -> str:
    return f'<section class="{name}"><h2>{heading}</h2>{"".join(cards)}</section>'


def _stages(host: str, stages: Sequence[Stage]) -> str:
    shown = "".join(
        f'<span class="stage">{escape(stage.name)} '
        f"<b>{_milliseconds(stage.milliseconds)}</b></span>"
        for stage in stages
    )
    return f'<div class="stages"><span>{escape(host)}</span>{shown}</div>'


def _milliseconds(value: float) -> str:
    return f"{value:.1f} ms" if value < 10 else f"{value:,.0f} ms"


def _part(answer: Answer) -> str:
    if answer.indexed >= answer.total:
        return ""
    return (
        f'<div class="part">Searched the first {answer.indexed:,} of {answer.total:,} passages; '
        "the question is asked again when all are indexed.</div>"
    )


def _card(
    place: int,
    hit: Hit,
    question: str,
    score: float,
    highest: float,
    *,
    moved_from: int | None = None,
) -> str:
    names = escape(", ".join(hit.names))
    width = 100 * min(max(score / highest, 0.0), 1.0) if highest > 0 else 0.0
    move = "<span></span>" if moved_from is None else _move(place, moved_from)
    return (
        f'<article class="hit"><div class="top"><span class="place">{place}</span>'
        f'<span class="name" title="{names}">{names}</span>{move}'
        f'<span class="bar"><i style="width:{width:.1f}%"></i></span>'
        f'<span class="score">{score:.3f}</span></div>{_text(hit, question)}</article>'
    )


def _move(place: int, before: int) -> str:
    if place == before:
        return '<span class="move same">=</span>'
    kind, arrow = ("up", "▲") if place < before else ("down", "▼")
    return f'<span class="move {kind}">{arrow} from {before}</span>'


def _text(hit: Hit, question: str) -> str:
    heading, _, body = hit.text.partition("\n")
    titled = bool(body) and hit.name.startswith(heading)  # the name says it already
    start, end = hit.span or (0, len(hit.text))
    if end - start < len(hit.text):
        first, last = max(start - AROUND, 0), end + AROUND
        before = ("…" if first else "") + hit.text[first:start]
        after = hit.text[end:last] + ("…" if last < len(hit.text) else "")
        shown = f"{escape(before)}<mark>{escape(hit.text[start:end])}</mark>{escape(after)}"
        every = (
            f"{escape(hit.text[:start])}<mark>{escape(hit.text[start:end])}</mark>"
            f"{escape(hit.text[end:])}"
        )
        return f'<div class="text clamped">{shown}</div>{_whole(every)}'
    plain = body if titled else hit.text
    if len(plain) <= EXCERPT:
        return f'<div class="text">{escape(plain)}</div>'
    chosen = excerpt(plain, question, EXCERPT)
    return f'<div class="text">{escape(chosen)}</div>{_whole(escape(plain))}'


def _whole(text: str) -> str:
    return f"<details><summary>the whole passage</summary><div>{text}</div></details>"
