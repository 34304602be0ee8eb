r"""How well a configuration finds: `python -m bge_core.evaluate --data FOLDER --model MODEL`.

nDCG@10, MRR@10 and recall@100, with and without the query instruction, each with and without
reranking, in one table: on your own folder in BEIR format (a passage is its title, a space and its
text), or on retrieval tasks of mteb by name.

    python -m bge_core.evaluate --data path/to/folder \
        --model BAAI/bge-small-en-v1.5 --reranker BAAI/bge-reranker-base
    python -m bge_core.evaluate --tasks NFCorpus SciFact --model BAAI/bge-small-en-v1.5
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_core.beir import Questions, read_beir
from bge_core.command import check_writable, run_command
from bge_core.embedder import Embedder
from bge_core.errors import ArgumentError, MissingExtraError, needs_extra
from bge_core.factory import make_reranker
from bge_core.progress import progress_bar
from bge_core.reranker import Scorer

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.results import TaskResult
    from numpy.typing import NDArray
    from rich.table import Table

__all__ = [
    "DEPTH",
    "FIRST",
    "Row",
    "documents",
    "figures",
    "main",
    "nearest",
    "on_passages",
    "on_task",
    "table",
]

FIRST = 20
DEPTH = 100
# As people call them, as ir-measures does, and as mteb does.
_METRICS = {
    "nDCG@10": ("nDCG@10", "ndcg_at_10"),
    "MRR@10": ("RR@10", "mrr_at_10"),
    "recall@100": ("R@100", "recall_at_100"),
}
_BLOCK = 16


@dataclass(frozen=True)
class Row:
    """What one configuration reached.

    Attributes:
        data: What was searched.
        questions: How many questions.
        instruction: What was put in front of them.
        reranked: How many passages the reranker put in its order; 0 without one.
        figures: Metric to percent.
    """

    data: str
    questions: int
    instruction: str
    reranked: int
    figures: Mapping[str, float]


def on_passages(
    data: str,
    questions: Questions,
    passages: Sequence[tuple[str, str]],
    *,
    embedders: Mapping[str, Embedder],
    reranker: Scorer | None,
    first: int,
) -> list[Row]:
    """Measure on passages in memory.

    Args:
        data: What they are, for people.
        questions: Questions and what answers them.
        passages: (name, text) of each passage: the document that it is or stands in. Several
            passages may stand in one document.
        embedders: Instruction to an embedder that puts it in front of queries; all of one model.
        reranker: Puts what was found in its order; None for no such rows.
        first: How many of each question's passages it gets.

    Returns:
        A row an instruction, then a row each with reranking.
    """
    names = [name for name, _ in passages]
    texts = [text for _, text in passages]
    asked = list(questions.texts.values())
    vectors = next(iter(embedders.values())).embed_documents(texts, show_progress=True)
    runs: dict[tuple[str, int], dict[str, list[int]]] = {
        (instruction, 0): dict(
            zip(
                questions.texts,
                nearest(embedder.embed_queries(asked), vectors, DEPTH),
                strict=True,
            )
        )
        for instruction, embedder in embedders.items()
    }
    if reranker is not None:
        runs |= {(instruction, first): {} for instruction in embedders}
        with progress_bar(len(asked), show=True, unit="question") as move:
            for number, question in questions.texts.items():
                # What the rankings share is scored once.
                heads = [runs[instruction, 0][number][:first] for instruction in embedders]
                every = list(dict.fromkeys(row for head in heads for row in head))
                ranked = reranker.rank(question, [texts[row] for row in every])
                best = [every[found.index] for found in ranked]
                for instruction, head in zip(embedders, heads, strict=True):
                    tail = runs[instruction, 0][number][first:]
                    runs[instruction, first][number] = [row for row in best if row in head] + tail
                if move:
                    move(1)
    return [
        Row(
            data,
            len(asked),
            instruction,
            reranked,
            figures(
                questions,
                {number: [(names[row],) for row in rows] for number, rows in run.items()},
            ),
        )
        for (instruction, reranked), run in runs.items()
    ]


def on_task(
    task: AbsTask, *, embedders: Mapping[str, Embedder], reranker: Scorer | None, first: int
) -> list[Row]:
    """Measure on a retrieval task of mteb, by mteb.

    Args:
        task: The task.
        embedders: Instruction to an embedder that puts it in front of queries.
        reranker: Puts what was found in its order; None for no such rows.
        first: How many of each question's passages it gets. mteb drops the others, so that a
            reranked row has recall@100 only if these are 100.

    Raises:
        ArgumentError: It is no retrieval task.
    """
    import mteb
    from mteb.abstasks import AbsTaskRetrieval

    from bge_core.mteb import MTEBCrossEncoder, MTEBEncoder

    name = task.metadata.name
    if not isinstance(task, AbsTaskRetrieval):
        msg = (
            f"{name} is a task of type {task.metadata.type}, which has no ranking to measure: "
            "give MTEBEncoder(embedder) of bge_core.mteb to mteb.evaluate."
        )
        raise ArgumentError(msg)
    task.load_data()
    options: dict[str, Any] = {"cache": None, "co2_tracker": False}
    reached: list[tuple[str, int, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as root:
        predictions = {instruction: Path(root) / str(n) for n, instruction in enumerate(embedders)}
        for instruction, embedder in embedders.items():
            folder = predictions[instruction]
            done = mteb.evaluate(MTEBEncoder(embedder), task, prediction_folder=folder, **options)
            reached.append((instruction, 0, _scores(done.task_results[0])))
        # Turning the task into one of reranking can't be undone, so this comes last.
        for instruction, folder in predictions.items():
            if reranker is None:
                break
            reranking = task.convert_to_reranking(folder, top_k=first)
            done = mteb.evaluate(MTEBCrossEncoder(reranker), reranking, **options)
            scores = _scores(done.task_results[0])
            if first < DEPTH:
                del scores["recall@100"]
            reached.append((instruction, first, scores))
    splits = [split for subset in task.dataset.values() for split in subset.values()]
    count = sum(len(split["queries"]) for split in splits)
    return [Row(name, count, *row) for row in reached]


def figures(
    questions: Questions, rankings: Mapping[str, Iterable[Sequence[str]]]
) -> dict[str, float]:
    """Give each metric in percent.

    Args:
        questions: Questions and what answers them.
        rankings: Question id to passages, best first, each as the names of the documents in which
            it stands. A document ranks where its best passage does.

    Raises:
        MissingExtraError: ir-measures, of the extra `[evaluate]`, is not installed.
    """
    measures = _measures()
    run = {
        question: {
            name: 1.0 / place
            for place, name in enumerate(documents(passages, questions.relevant[question]), start=1)
        }
        for question, passages in rankings.items()
    }
    metrics = {name: measures.parse_measure(written) for name, (written, _) in _METRICS.items()}
    found = measures.calc_aggregate(metrics.values(), questions.relevant, run)
    return {name: 100 * found[metric] for name, metric in metrics.items()}


def documents(passages: Iterable[Sequence[str]], relevant: Container[str]) -> list[str]:
    """Turn a ranking of passages into one of documents.

    A passage that stands in several documents counts for each that answers the question. Where
    none does, it takes one place, as it takes one line of a result page.

    Args:
        passages: Best first, each as the names of the documents in which it stands.
        relevant: The names of the documents that answer the question.
    """
    ranked: dict[str, None] = {}
    seen: set[str] = set()
    for names in passages:
        new = [name for name in dict.fromkeys(names) if name not in seen]
        ranked |= dict.fromkeys([name for name in new if name in relevant] or new[:1])
        seen.update(new)
    return list(ranked)


def nearest(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], count: int
) -> Iterator[list[int]]:
    """Give the rows of each query's nearest passages, best first.

    Args:
        queries: Their vectors, [queries, dimension], float32.
        vectors: Those of the passages, [passages, dimension], float32.
        count: How many to give at most.

    Returns:
        A list a query, in their order.
    """
    for start in range(0, len(queries), _BLOCK):
        similarities = queries[start : start + _BLOCK] @ vectors.T
        for order in np.argsort(-similarities, axis=1, kind="stable"):
            yield order[:count].tolist()


def table(rows: Iterable[Row], caption: str | None = None) -> Table:
    """Lay figures out, the rows of one set together.

    Args:
        rows: What was reached; those of one set follow each other.
        caption: Below the table.
    """
    from rich.table import Table

    out = Table(title="in percent", title_justify="left", caption=caption, caption_justify="left")
    out.add_column("data")
    for heading in ("questions", "instruction", "reranked", *_METRICS):
        out.add_column(heading, justify="right")
    for _, group in groupby(rows, key=lambda row: row.data):
        for number, row in enumerate(group):
            out.add_row(
                "" if number else row.data,
                "" if number else str(row.questions),
                "yes" if row.instruction else "no",
                f"first {row.reranked}" if row.reranked else "no",
                *(f"{row.figures[name]:.1f}" if name in row.figures else "" for name in _METRICS),
            )
        out.add_section()
    return out


def _measures() -> Any:
    """Import ir-measures."""
    try:
        import ir_measures
    except ImportError as exc:
        raise _needs(exc, "ir_measures") from exc
    return ir_measures


def _needs(exc: ImportError, package: str) -> MissingExtraError:
    return needs_extra(
        exc, "bge_core.evaluate", packages=(package,), install="'bge-adapters[evaluate]'"
    )


def _scores(result: TaskResult) -> dict[str, float]:
    return {
        name: 100 * float(result.get_score(getter=itemgetter(key)))
        for name, (_, key) in _METRICS.items()
    }


def _tasks(names: Sequence[str]) -> list[AbsTask]:
    try:
        import mteb
    except ImportError as exc:
        raise needs_extra(
            exc, "--tasks", packages=("mteb",), install="'bge-adapters[mteb]'"
        ) from exc
    try:
        return list(mteb.get_tasks(tasks=list(names)))
    except KeyError as exc:
        raise ArgumentError(str(exc.args[0])) from exc


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bge_core.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders in BEIR format")
    parser.add_argument("--tasks", nargs="+", default=[], help="retrieval tasks of mteb, by name")
    parser.add_argument("--model", required=True, help="an embedder: a hub id or folder")
    parser.add_argument("--reranker", help="a hub id or folder (default: none)")
    parser.add_argument("--instruction", help="put in front of queries (default: the model's own)")
    parser.add_argument(
        "--first", type=int, default=FIRST, help=f"passages to rerank (default: {FIRST})"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args(arguments)
    if options.first < 1:
        parser.error(f"--first must be 1 or more, got {options.first}.")
    if not options.data and not options.tasks:
        parser.error("give --data FOLDER, in BEIR format, or --tasks NAME, of mteb.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show and write.

    Args:
        arguments: Those of the command line; None for the process's own.

    Returns:
        The exit code: 0 if all is well, 1 if something was missing, which is then said.
    """
    options = _options(arguments)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    _measures()
    if options.json:
        check_writable(options.json, "--json")
    try:
        from rich.console import Console
    except ImportError as exc:
        raise _needs(exc, "rich") from exc
    sets = [(folder.resolve().name, *read_beir(folder)) for folder in options.data]
    tasks = _tasks(options.tasks) if options.tasks else []
    plain = Embedder(options.model, query_instruction="")
    instructed = Embedder(options.model, query_instruction=options.instruction)
    embedders = {one.query_instruction: one for one in (plain, instructed)}
    scorer = make_reranker(options.reranker, normalize=False) if options.reranker else None
    measured: dict[str, Any] = {"embedders": embedders, "reranker": scorer, "first": options.first}
    rows = [row for one in sets for row in on_passages(*one, **measured)]
    rows += [row for task in tasks for row in on_task(task, **measured)]
    own = instructed.query_instruction
    model, reranker = (name and Path(name).name for name in (options.model, options.reranker))
    said = [
        f"model: {model}",
        f"instruction: {own!r}" if own else "instruction: it has none; --instruction gives one",
    ]
    if reranker:
        said.append(f"reranker: {reranker}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(rows, caption="\n".join(said)))
    if options.json:
        written = {"model": model, "reranker": reranker, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(written, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    sys.exit(main())
