r"""How well a configuration finds: nDCG@10, MRR@10 and recall@100.

With and without the query instruction, each with and without reranking, in one table: on your own
folder in BEIR format (a passage is its title, a space and its text), on retrieval tasks of mteb by
name, or, with neither, on the questions about Python beside this file, asked of the language
reference that every CPython carries.

    python examples/evaluate_retrieval.py --data path/to/folder \
        --model BAAI/bge-small-en-v1.5 --reranker BAAI/bge-reranker-base
    python examples/evaluate_retrieval.py --tasks NFCorpus SciFact --model BAAI/bge-small-en-v1.5
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corpora
import numpy as np
import stand_in
from hosts import CHUNK_CHARACTERS
from quality import DEPTH, FIRST, Questions, Row, figures, read_beir, read_questions, table
from rich.console import Console
from tqdm import tqdm

from bge_core import Embedder, Scorer, make_reranker

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.results import TaskResult
    from numpy.typing import NDArray

BLOCK = 16
MTEB_NAMES = {"nDCG@10": "ndcg_at_10", "MRR@10": "mrr_at_10", "recall@100": "recall_at_100"}


def on_passages(
    data: str,
    questions: Questions,
    passages: Sequence[tuple[Sequence[str], str]],
    *,
    embedders: Mapping[str, Embedder],
    reranker: Scorer | None,
    first: int,
) -> list[Row]:
    """Measure on passages in memory.

    Args:
        data: What they are, for people.
        questions: Questions and what answers them.
        passages: (names, text) of each passage: the documents in which it stands. Several passages
            may stand in one document.
        embedders: Instruction to an embedder that puts it in front of queries; all of one model.
        reranker: Puts what was found in its order; None for no such rows.
        first: How many of each question's passages it gets.
    """
    names = [name for name, _ in passages]
    texts = [text for _, text in passages]
    vectors = next(iter(embedders.values())).embed_documents(texts, show_progress=True)
    runs: dict[tuple[str, int], dict[str, list[int]]] = {
        (instruction, 0): dict(
            zip(
                questions.texts,
                _search(embedder.embed_queries(questions.texts.values()), vectors, names),
                strict=True,
            )
        )
        for instruction, embedder in embedders.items()
    }
    if reranker is not None:
        runs |= {(instruction, first): {} for instruction in embedders}
        for number, question in tqdm(questions.texts.items(), desc="reranking", unit="question"):
            # What the rankings share is scored once.
            heads = [runs[instruction, 0][number][:first] for instruction in embedders]
            every = list(dict.fromkeys(row for head in heads for row in head))
            ranked = reranker.rank(question, [texts[row] for row in every])
            best = [every[found.index] for found in ranked]
            for instruction, head in zip(embedders, heads, strict=True):
                tail = runs[instruction, 0][number][first:]
                runs[instruction, first][number] = [row for row in best if row in head] + tail
    count = len(questions.texts)
    return [
        Row(data, count, instruction, reranked, figures(questions, _named(run, names)))
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
        SystemExit: It is no retrieval task.
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
        raise SystemExit(msg)
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


def python_passages() -> list[tuple[tuple[str, ...], str]]:
    """Give (topics, passage) of the language reference, what stands under several topics once."""
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    splitter = RecursiveCharacterTextSplitter(chunk_size=CHUNK_CHARACTERS, chunk_overlap=60)
    parts = [
        (text.name, part)
        for text in corpora.python_reference().texts
        for part in splitter.split_text(text.text)
    ]
    topics: dict[int, dict[str, None]] = {}
    firsts = corpora.near_duplicates([part for _, part in parts])
    for (topic, _), first in zip(parts, firsts, strict=True):
        topics.setdefault(first, {})[topic] = None
    return [(tuple(names), parts[first][1]) for first, names in topics.items()]


def _search(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], names: Sequence[Sequence[str]]
) -> Iterator[list[int]]:
    """Give the rows of each query's nearest passages, until 100 documents are among them."""
    for start in range(0, len(queries), BLOCK):
        similarities = queries[start : start + BLOCK] @ vectors.T
        for order in np.argsort(-similarities, axis=1, kind="stable"):
            rows: list[int] = []
            documents: set[str] = set()
            for row in order:
                documents.update(names[row])
                if len(documents) > DEPTH:
                    break
                rows.append(int(row))
            yield rows


def _named(
    rankings: Mapping[str, Sequence[int]], names: Sequence[Sequence[str]]
) -> dict[str, list[Sequence[str]]]:
    return {number: [names[row] for row in rows] for number, rows in rankings.items()}


def _scores(result: TaskResult) -> dict[str, float]:
    return {
        name: 100 * float(result.get_score(getter=itemgetter(key)))
        for name, key in MTEB_NAMES.items()
    }


def _beir(folder: Path) -> tuple[Questions, list[tuple[tuple[str, ...], str]]]:
    questions, passages = read_beir(folder)
    return questions, [((name,), text) for name, text in passages]


def _tasks(names: Sequence[str]) -> list[AbsTask]:
    try:
        import mteb

        return list(mteb.get_tasks(tasks=list(names)))
    except ImportError as exc:
        msg = "--tasks needs the package mteb: run pip install 'bge-adapters[mteb]'."
        raise SystemExit(msg) from exc
    except KeyError as exc:
        raise SystemExit(str(exc.args[0])) from exc


def _shown(model: str | None) -> str:
    return Path(model).name if model else "the stand-in"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders in BEIR format")
    parser.add_argument("--tasks", nargs="+", default=[], help="retrieval tasks of mteb, by name")
    parser.add_argument("--model", help="a hub id or folder (default: the PyPI stand-in)")
    parser.add_argument(
        "--reranker", help="a hub id or folder (default: none, or the stand-in's beside it)"
    )
    parser.add_argument("--instruction", help="put in front of queries (default: the model's own)")
    parser.add_argument("--first", type=int, default=FIRST, help="passages to rerank")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    if options.first < 1:
        parser.error(f"--first must be 1 or more, got {options.first}.")
    return options


def main() -> None:
    """Measure, show and write."""
    options = _options()
    logging.getLogger("bge_core").setLevel(logging.ERROR)
    model = options.model or stand_in.embedder_folder()
    plain = Embedder(model, query_instruction="")
    instructed = Embedder(model, query_instruction=options.instruction)
    embedders = {one.query_instruction: one for one in (plain, instructed)}
    reranker = options.reranker or (None if options.model else str(stand_in.reranker_folder()))
    scorer = make_reranker(reranker, normalize=False) if reranker else None
    sets = [(folder.resolve().name, *_beir(folder)) for folder in options.data]
    tasks = _tasks(options.tasks) if options.tasks else []
    if not sets and not tasks:
        sets.append(("the Python reference", read_questions(), python_passages()))
    measured: dict[str, Any] = {"embedders": embedders, "reranker": scorer, "first": options.first}
    rows = [row for one in sets for row in on_passages(*one, **measured)]
    rows += [row for task in tasks for row in on_task(task, **measured)]
    own = instructed.query_instruction
    said = [
        f"model: {_shown(options.model)}",
        f"instruction: {own!r}" if own else "instruction: it has none; --instruction gives one",
    ]
    if reranker:
        said.append(f"reranker: {_shown(options.reranker)}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(rows, caption="\n".join(said)))
    if options.json:
        written = {
            "model": _shown(options.model),
            "reranker": _shown(options.reranker) if reranker else None,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(written, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
