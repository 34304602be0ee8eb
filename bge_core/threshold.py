r"""Which score is high enough: `python -m bge_core.threshold --data DATA --model MODEL`.

Scores pairs of your own, shows how the scores of relevant and of other pairs are spread, and
proposes thresholds: the one of the best F1, and the highest that keeps 95 % of the relevant pairs.

DATA is a folder in BEIR format or a .jsonl file. In a folder, a pair is relevant if it is judged
above 0; the others are what --model finds first and nobody judged relevant. A line of the file is
a pair: {"query": "...", "passage": "...", "label": 1}, with a label above 0 if it is relevant.

    python -m bge_core.threshold --data folder --model BAAI/bge-small-en-v1.5
    python -m bge_core.threshold --data folder --model BAAI/bge-small-en-v1.5 \
        --reranker BAAI/bge-reranker-base --plot scores.png
    python -m bge_core.threshold --data pairs.jsonl --reranker BAAI/bge-reranker-base
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_core.beir import json_lines, read_beir
from bge_core.command import check_writable, run_command
from bge_core.embedder import Embedder
from bge_core.errors import ArgumentError, needs_extra
from bge_core.factory import make_reranker
from bge_core.progress import progress_bar

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.reranker import Scorer

__all__ = ["Proposal", "Scores", "from_folder", "from_pairs", "main", "propose"]

FIRST = 20
KEPT = 95.0
_BINS = 20
_BAR = 24


@dataclass(frozen=True)
class Scores:
    """Scores of pairs, on the scale of the model.

    Attributes:
        relevant: Those of the pairs that are relevant, float64.
        other: Those of all the others, float64.
    """

    relevant: NDArray[np.float64]
    other: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Refuse what has no threshold."""
        for name, scores in (("relevant", self.relevant), ("other", self.other)):
            if not len(scores):
                msg = f"The data has no {name} pair, so that no threshold can tell them apart."
                raise ArgumentError(msg)


@dataclass(frozen=True)
class Proposal:
    """A threshold and what reaches it: a score that is equal or above.

    Attributes:
        rule: How it was chosen.
        threshold: On the scale of the model.
        relevant: How many relevant pairs reach it.
        other: How many others do.
        recall: The first of all relevant pairs, 0 to 1.
        precision: The first of all that reach it, 0 to 1.
        f1: The harmonic mean of both, 0 to 1.
    """

    rule: str
    threshold: float
    relevant: int
    other: int
    recall: float
    precision: float
    f1: float


def from_folder(
    folder: Path, embedder: Embedder, *, reranker: Scorer | None = None, first: int = FIRST
) -> Scores:
    """Score what is judged relevant in a folder in BEIR format, and what is found beside it.

    Args:
        folder: The folder.
        embedder: Finds the other passages, and scores without a reranker: by the dot product of
            its vectors, which is their cosine.
        reranker: Scores all pairs; None for the embedder's scores.
        first: How many passages are found for a question.

    Returns:
        The scores.

    Raises:
        ArgumentError: The folder lacks something, or has no pair of one kind.
    """
    questions, passages = read_beir(folder)
    rows = {name: row for row, (name, _) in enumerate(passages)}
    texts = [text for _, text in passages]
    for query, judged in questions.relevant.items():
        if lost := sorted(judged.keys() - rows.keys()):
            msg = f"{folder} judges passages of question {query!r} that it lacks: {lost[:3]}."
            raise ArgumentError(msg)
    vectors = embedder.embed_documents(texts, show_progress=True)
    asked = embedder.embed_queries(list(questions.texts.values()))
    relevant: list[float] = []
    other: list[float] = []
    with progress_bar(len(asked), show=reranker is not None, unit="question") as move:
        for (query, text), vector in zip(questions.texts.items(), asked, strict=True):
            similarities = vectors @ vector
            found = np.argsort(-similarities, kind="stable")[:first].tolist()
            right = {rows[name] for name in questions.relevant[query]}
            every = list(dict.fromkeys([*sorted(right), *found]))
            scores = (
                similarities[every].tolist()
                if reranker is None
                else reranker.score(text, [texts[row] for row in every])
            )
            for row, score in zip(every, scores, strict=True):
                (relevant if row in right else other).append(float(score))
            if move:
                move(1)
    return Scores(np.array(relevant), np.array(other))


def from_pairs(
    file: Path, *, embedder: Embedder | None = None, reranker: Scorer | None = None
) -> Scores:
    """Score the pairs of a file, each a line of JSON with query, passage and label.

    Args:
        file: The file.
        embedder: Scores by the dot product of its vectors, if there is no reranker.
        reranker: Scores.

    Returns:
        The scores.

    Raises:
        ArgumentError: A line is damaged, there is no pair of one kind, or nothing that scores.
    """
    passages: dict[str, list[str]] = {}
    labels: dict[str, list[bool]] = {}
    for row in json_lines(file, "label", texts=("query", "passage")):
        try:
            label = float(row["label"])
        except (TypeError, ValueError, OverflowError):
            label = math.nan
        if math.isnan(label):
            msg = f"{file} has the label {row['label']!r}: expected a number, above 0 if relevant."
            raise ArgumentError(msg)
        passages.setdefault(row["query"], []).append(row["passage"])
        labels.setdefault(row["query"], []).append(label > 0)
    relevant: list[float] = []
    other: list[float] = []
    for query, scores in _scored(passages, embedder, reranker):
        for is_relevant, score in zip(labels[query], scores, strict=True):
            (relevant if is_relevant else other).append(float(score))
    return Scores(np.array(relevant), np.array(other))


def propose(scores: Scores, *, kept: float = KEPT) -> tuple[Proposal, Proposal]:
    """Choose two thresholds; each is a number that can be typed and keeps exactly what it says.

    Args:
        scores: Scores of pairs.
        kept: How many percent of the relevant pairs the second one keeps, above 0 and up to 100.

    Returns:
        The threshold with the best F1, the highest one where several have it; and the highest one
        that keeps so many.

    Raises:
        ArgumentError: `kept` is no such number.
    """
    if not 0 < kept <= 100:
        msg = f"kept={kept} must be above 0 and at most 100: percent of the relevant pairs."
        raise ArgumentError(msg)
    every = np.unique(np.concatenate([scores.relevant, scores.other]))[::-1]  # highest first
    found = _reaching(scores.relevant, every)
    f1 = 2 * found / (found + _reaching(scores.other, every) + len(scores.relevant))
    wanted = math.ceil(kept / 100 * len(scores.relevant) - 1e-9)
    best, most = int(np.argmax(f1)), int(np.argmax(found >= wanted))
    return (
        _proposal("best F1", scores, every, best),
        _proposal(f"{kept:g} % of relevant kept", scores, every, most),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Score, show and propose.

    Args:
        arguments: Those of the command line; None for the process's own.

    Returns:
        The exit code: 0 if all is well, 1 if something was missing, which is then said.
    """
    options = _options(arguments)
    return run_command(lambda: _run(options))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bge_core.threshold",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="a BEIR folder or a .jsonl file")
    parser.add_argument("--model", help="an embedder: a hub id or folder")
    parser.add_argument("--reranker", help="a hub id or folder; then its scores count")
    parser.add_argument("--instruction", help="put in front of queries (default: the model's own)")
    parser.add_argument(
        "--first", type=int, default=FIRST, help=f"passages found a question (default: {FIRST})"
    )
    parser.add_argument(
        "--kept",
        type=float,
        default=KEPT,
        help=f"percent of relevant pairs that the second threshold keeps (default: {KEPT:g})",
    )
    parser.add_argument("--plot", type=Path, help="draw the scores into this .png or .svg file")
    options = parser.parse_args(arguments)
    if options.first < 1:
        parser.error(f"--first must be 1 or more, got {options.first}.")
    if not 0 < options.kept <= 100:
        parser.error(f"--kept must be above 0 and at most 100, got {options.kept:g}.")
    if options.data.is_dir() and options.model is None:
        parser.error("a folder needs --model MODEL, an embedder, to find passages.")
    if not options.data.is_dir() and (options.model is None) == (options.reranker is None):
        parser.error("a file of pairs needs one of --model and --reranker, and not both.")
    return options


def _run(options: argparse.Namespace) -> None:
    if options.plot:
        _check_plot(options.plot)  # before the work, so that it isn't lost
    embedder = options.model and Embedder(options.model, query_instruction=options.instruction)
    reranker = options.reranker and make_reranker(options.reranker)
    if options.data.is_dir():
        scores = from_folder(options.data, embedder, reranker=reranker, first=options.first)
    else:
        scores = from_pairs(options.data, embedder=embedder, reranker=reranker)
    proposals = propose(scores, kept=options.kept)
    scored_by = Path(options.reranker or options.model).name
    if options.plot:
        _plot(scores, proposals, options.plot, scored_by)
    data = options.data.resolve().name
    sys.stdout.write(f"{scored_by} on {data}\n\n{_shown(scores, proposals)}\n")


def _scored(
    passages: Mapping[str, Sequence[str]], embedder: Embedder | None, reranker: Scorer | None
) -> Iterator[tuple[str, Sequence[float]]]:
    """Give each query and the scores of its passages."""
    if reranker is not None:
        for query, texts in passages.items():
            yield query, reranker.score(query, texts).tolist()
        return
    if embedder is None:
        msg = "Nothing scores the pairs: pass embedder= or reranker=."
        raise ArgumentError(msg)
    every = list(dict.fromkeys(text for texts in passages.values() for text in texts))
    vectors = dict(zip(every, embedder.embed_documents(every, show_progress=True), strict=True))
    asked = embedder.embed_queries(list(passages))
    for (query, texts), vector in zip(passages.items(), asked, strict=True):
        yield query, [float(vectors[text] @ vector) for text in texts]


def _reaching(scores: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count the scores that reach each threshold."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")


def _proposal(rule: str, scores: Scores, every: NDArray[np.float64], place: int) -> Proposal:
    lower = float(every[place + 1]) if place + 1 < len(every) else -math.inf
    threshold = _shortest(float(every[place]), lower)
    relevant, other = (
        int(_reaching(kind, np.array([threshold]))[0]) for kind in (scores.relevant, scores.other)
    )
    return Proposal(
        rule=rule,
        threshold=threshold,
        relevant=relevant,
        other=other,
        recall=relevant / len(scores.relevant),
        precision=relevant / max(1, relevant + other),
        f1=2 * relevant / (relevant + other + len(scores.relevant)),
    )


def _shortest(score: float, lower: float) -> float:
    """Give the number of fewest decimals that is at most a score and above the next lower one."""
    for decimals in range(2, 17):
        rounded: float = math.floor(score * 10**decimals) / 10**decimals
        if lower < rounded <= score:
            return rounded
    return score


def _shown(scores: Scores, proposals: Sequence[Proposal]) -> str:
    """Write the spread of scores and the thresholds as text."""
    counted, edges = _counted(scores)
    heads = [f"relevant ({len(scores.relevant)})", f"other ({len(scores.other)})"]
    lines = [f"{'score':>14}  {heads[0]:<{_BAR + 8}}{heads[1]}"]
    for number, (low, high) in enumerate(pairwise(edges)):
        cells = [
            f"{kind[number]:>6} {'█' * round(_BAR * kind[number] / kind.max()):<{_BAR}} "
            for kind in counted
        ]
        lines.append(f"{low:6.3f} {high:7.3f}  {''.join(cells)}".rstrip())
    row = "{:<24} {:>10} {:>20} {:>20} {:>10} {:>6}"
    lines += [
        "",
        row.format("rule", "threshold", "relevant kept", "others kept", "precision", "F1"),
    ]
    for one in proposals:
        kept = [
            f"{count} of {len(kind)} ({100 * count / len(kind):.1f} %)"
            for count, kind in ((one.relevant, scores.relevant), (one.other, scores.other))
        ]
        shares = (f"{100 * one.precision:.1f} %", f"{100 * one.f1:.1f}")
        lines.append(row.format(one.rule, f"{one.threshold:.10g}", *kept, *shares))
    return "\n".join(lines)


def _counted(
    scores: Scores,
) -> tuple[list[NDArray[np.int64]], NDArray[np.float64]]:
    both = np.concatenate([scores.relevant, scores.other])
    edges = np.histogram_bin_edges(both, bins=_BINS)
    return [np.histogram(kind, edges)[0] for kind in (scores.relevant, scores.other)], edges


def _figure() -> Any:
    """Make an empty picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise needs_extra(
            exc,
            "--plot",
            packages=("matplotlib",),
            install="matplotlib",
            instead=". The same numbers are printed without it",
        ) from exc
    return Figure(figsize=(8, 4), layout="constrained")


def _check_plot(file: Path) -> None:
    check_writable(file, "--plot")
    known = _figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        msg = f"--plot={file} has an ending that matplotlib can't write: use .png or .svg."
        raise ArgumentError(msg)


def _plot(scores: Scores, proposals: Sequence[Proposal], file: Path, scored_by: str) -> None:
    counted, edges = _counted(scores)
    figure = _figure()
    axes = figure.add_subplot()
    for kind, label, colour in zip(
        counted, ("relevant", "other"), ("#2a6f97", "#c9ada7"), strict=True
    ):
        share = 100 * kind / kind.sum()
        axes.stairs(
            share, edges, fill=True, alpha=0.6, color=colour, label=f"{label} ({kind.sum()})"
        )
    for one, line in zip(proposals, ("-", "--"), strict=True):
        label = f"{one.rule}: {one.threshold:.10g}"
        axes.axvline(one.threshold, color="#333333", linestyle=line, label=label)
    axes.set_xlabel(f"score of {scored_by}")
    axes.set_ylabel("percent of the pairs of its kind")
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    sys.exit(main())
