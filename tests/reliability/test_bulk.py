"""Bulk scoring is bulk: somebody who waits for an answer doesn't stand behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from bge_core import ArgumentError, Embedder, M3Embedder, M3Reranker, Reranker
from bge_core.ray import Embed, Rerank

PAIRS = [("what is a panda?", f"document {n}") for n in range(40)]
QUERIES = [query for query, _ in PAIRS]


@pytest.fixture
def background() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Hold background passes: an event that says that one has begun, and one that lets them go."""
    begun, go = threading.Event(), threading.Event()

    def hold(module: torch.nn.Module, inputs: Any) -> None:
        if threading.current_thread().name.startswith("bge-background"):
            begun.set()
            assert go.wait(60)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(hold)
    yield begun, go
    go.set()
    hook.remove()


def score_pairs(folders: dict[str, Path]) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    model = Reranker(folders["reranker"])
    return model, lambda: model.score_pairs(PAIRS), lambda: model.rank("q", ["p"])


def score_for_a_job(folders: dict[str, Path]) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    model = Reranker(folders["reranker"])
    passages = [passage for _, passage in PAIRS]
    job = lambda: model.score("q", passages, priority="background")  # noqa: E731
    return model, job, lambda: model.score("q", ["p"])


def windows_of_a_job(folders: dict[str, Path]) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    model = Reranker(folders["reranker"], long_passages="window", max_length=20)
    pairs = [("q", passage * 40) for _, passage in PAIRS]
    return model, lambda: model.score_pairs(pairs), lambda: model.rank("q", ["p " * 90])


def m3_pairs(folders: dict[str, Path]) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    model = M3Embedder(folders["m3"])
    reranker = M3Reranker(model)
    return model, lambda: model.score(PAIRS), lambda: reranker.rank("q", ["p"])


def m3_reranker(folders: dict[str, Path]) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    model = M3Reranker(M3Embedder(folders["m3"]))
    return model, lambda: model.score_pairs(PAIRS), lambda: model.score("q", ["p"])


def rerank_step(folders: dict[str, Path]) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    model = Reranker(folders["reranker"])
    table = pa.table({"query": ["q"], "passages": [[passage for _, passage in PAIRS]]})
    return model, lambda: Rerank(reranker=model)(table), lambda: model.rank("q", ["p"])


def queries_of_a_step(folders: dict[str, Path]) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    model = Embedder(folders["en"])
    step = Embed(embedder=model, role="query")
    table = pa.table({"text": QUERIES})
    return model, lambda: step(table), lambda: model.embed_queries(["q"])


def mteb_predicts(folders: dict[str, Path]) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    from bge_core.mteb import MTEBCrossEncoder

    class Loader:
        def __init__(self, texts: list[str]) -> None:
            self.dataset = texts

        def __iter__(self) -> Iterator[dict[str, list[str]]]:
            yield {"text": self.dataset}

    model = Reranker(folders["reranker"])
    wrapped = MTEBCrossEncoder(model)
    where: dict[str, Any] = {"task_metadata": None, "hf_split": "", "hf_subset": ""}

    def job() -> Any:
        first, second = (Loader([pair[end] for pair in PAIRS]) for end in (0, 1))
        return wrapped.predict(first, second, show_progress_bar=False, **where)

    return model, job, lambda: model.rank("q", ["p"])


def langchain_reranks(
    folders: dict[str, Path],
) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    from langchain_bge import BGEReranker

    model = BGEReranker(model=folders["reranker"], priority="background", top_n=None)
    live = Reranker(folders["reranker"])
    texts = [passage for _, passage in PAIRS]
    return model, lambda: model.rerank(texts, "q"), lambda: live.rank("q", ["p"])


def langchain_scores(
    folders: dict[str, Path],
) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    from langchain_bge import BGECrossEncoder

    model = BGECrossEncoder(model=folders["m3"], priority="background")
    live = BGECrossEncoder(model=folders["m3"])
    return model, lambda: model.score(PAIRS), lambda: live.score([("q", "p")])


def llamaindex_reranks(
    folders: dict[str, Path],
) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    from llama_index.core.schema import NodeWithScore, TextNode

    from llamaindex_bge import BGEReranker

    job = BGEReranker(model=str(folders["reranker"]), priority="background", top_n=None)
    live = BGEReranker(model=str(folders["reranker"]))
    nodes = [NodeWithScore(node=TextNode(text=passage)) for _, passage in PAIRS]
    return (
        job,
        lambda: job.postprocess_nodes(nodes, query_str="q"),
        lambda: live.postprocess_nodes(nodes[:1], query_str="q"),
    )


@pytest.mark.parametrize(
    "make",
    [
        langchain_reranks,
        langchain_scores,
        llamaindex_reranks,
        score_pairs,
        score_for_a_job,
        windows_of_a_job,
        m3_pairs,
        m3_reranker,
        rerank_step,
        queries_of_a_step,
        mteb_predicts,
    ],
)
def test_who_waits_is_answered_while_bulk_is_computed(
    make, background, reranker_folder: Path, m3_folder: Path, en_folder: Path
):
    begun, go = background
    model, job, ask = make({"reranker": reranker_folder, "m3": m3_folder, "en": en_folder})
    with model, ThreadPoolExecutor(1) as pool:
        bulk = pool.submit(job)
        try:
            assert begun.wait(60), "the job is no background work"
            assert len(ask()) == 1
            assert not bulk.done()
        finally:
            go.set()
        assert len(bulk.result(60)) in (1, len(PAIRS))


async def test_a_priority_is_one_of_two_words(call, reranker_folder: Path, m3_folder: Path):
    with Reranker(reranker_folder) as reranker, M3Embedder(m3_folder) as m3:
        for model, verb, given in (
            (reranker, "score", ("q", ["p"])),
            (reranker, "rank", ("q", ["p"])),
            (reranker, "score_pairs", ([("q", "p")],)),
            (m3, "encode", (["p"],)),
            (m3, "score", ([("q", "p")],)),
        ):
            with pytest.raises(ArgumentError, match="use 'interactive' or 'background'"):
                await call(model, verb, *given, priority="bulk")
