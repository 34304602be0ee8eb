"""Many callers at a time: right vectors, an event loop that goes on, and errors kept apart."""

from __future__ import annotations

import asyncio
import functools
import gc
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

from bge_core import (
    BGEError,
    ClosedError,
    ComputationError,
    Embedder,
    InputTypeError,
    M3Embedder,
    Reranker,
    TruncationError,
)
from tests.conftest import tokens_in

DOCUMENTS = [f"document {n} tells of a {'panda and a cat ' * (n % 25)}" for n in range(5000)]


@pytest.fixture
def eager_switching():
    """Have threads take turns some fifty times as often as they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


# Threads.


@pytest.mark.usefixtures("eager_switching")
def test_16_threads_and_three_lengths_get_the_vectors_of_one(en_folder: Path):
    texts = [f"{n} {'panda cat dog ' * (1 + n * n % 60)}" for n in range(60)]
    lengths = (12, 32, 128)
    embedders = {n: Embedder(en_folder, max_length=n, on_truncation="ignore") for n in lengths}
    methods = ("embed_queries", "embed_documents")
    alone = {
        (length, method): np.concatenate(
            [getattr(embedders[length], method)([text]) for text in texts]
        )
        for length in lengths
        for method in methods
    }
    chooser = random.Random(7)
    turns = [
        (chooser.choice(lengths), chooser.choice(methods), chooser.sample(range(60), 1 + n % 3))
        for n in range(5000)
    ]

    def work(turn: tuple[int, str, list[int]]) -> float:
        length, method, chosen = turn
        vectors = getattr(embedders[length], method)([texts[n] for n in chosen])
        return float(np.abs(vectors - alone[length, method][chosen]).max())

    with ThreadPoolExecutor(16) as pool:
        assert max(pool.map(work, turns)) < 1e-5
    # The three lengths differ, or nothing was shown.
    assert np.abs(alone[12, methods[0]] - alone[32, methods[0]]).max() > 0.1
    for embedder in embedders.values():
        embedder.close()


# The event loop.


class Stalls:
    """Watches an event loop.

    On a machine that others use, any thread may lie idle for longer than is allowed here, and so
    may the thread that has the interpreter's lock. What is ours is told from that by two measures:

    - `cpu`: the most that the loop's thread computed in one callback, whoever else ran.
    - `wall`: the longest time between two turns, less the time for which the kernel let the loop's
      thread wait for a CPU (Linux tells). A thread of ours that keeps the interpreter's lock shows
      here. `busy` says that the machine was too busy for this to mean anything.
    """

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self._gone = False
        self._own = Path("/proc/thread-self/schedstat")

    @property
    def busy(self) -> bool:
        took, waited = (end - start for end, start in zip(self._now(), self._begun, strict=True))
        return waited > took / 20

    def _now(self) -> tuple[float, float]:
        # "Run time, time waiting to run, slices", nanoseconds.
        waited = int(self._own.read_text().split()[1]) / 1e9 if self._own.exists() else 0.0
        return time.perf_counter(), waited

    async def __aenter__(self) -> Self:
        # A full collection takes 0.2 s where torch and transformers are imported, whoever's
        # allocation starts it: services freeze what they start with, and so does this.
        gc.collect()
        gc.freeze()
        self._begun = self._now()
        handle: Any = asyncio.Handle
        self._run, handle._run = handle._run, self._timed
        self._task = asyncio.create_task(self._tick())
        await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._gone = True
        await self._task
        asyncio.Handle._run = self._run
        gc.unfreeze()

    @property
    def _timed(self) -> Callable[[asyncio.Handle], None]:
        def run(handle: asyncio.Handle) -> None:
            before = time.thread_time()
            self._run(handle)
            self.cpu = max(self.cpu, time.thread_time() - before)

        return run

    async def _tick(self) -> None:
        last, waited = self._now()
        while not self._gone:
            await asyncio.sleep(0.001)
            at, so_far = self._now()
            self.wall = max(self.wall, at - last - (so_far - waited))
            last, waited = at, so_far


async def no_stall(work: Callable[[], Awaitable[object]]) -> None:
    """Do the work, and see that the loop went on; what stalls by itself does so every time."""
    for _ in range(3):
        async with Stalls() as stalls:
            await work()
        assert stalls.cpu < 0.05
        if stalls.wall < 0.05 or stalls.busy:
            return
    assert stalls.wall < 0.05


def core(folder: Path):
    model = Embedder(folder)
    return model, lambda text: model.aembed_queries([text]), model.aembed_documents


def langchain(folder: Path):
    from langchain_bge import BGEEmbeddings

    model = BGEEmbeddings(model=folder)
    return model, model.aembed_query, model.aembed_documents


def llamaindex(folder: Path):
    from llamaindex_bge import BGEEmbedding

    model = BGEEmbedding(model_name=folder)
    return model, model.aget_query_embedding, model.aget_text_embedding_batch


@pytest.mark.parametrize("host", [core, langchain, llamaindex])
async def test_500_queries_are_answered_while_5000_documents_are_indexed(host, en_folder: Path):
    model, query, index = host(en_folder)
    questions = [f"what is number {n}?" for n in range(500)]
    with Embedder(en_folder) as reference:
        expected = reference.embed_queries(questions)
        documents = reference.embed_documents(DOCUMENTS)
    await query("warm")

    async def ask(n: int) -> np.ndarray:
        # They come over half a second, as those of 500 users do.
        await asyncio.sleep(n / 1000)
        return np.reshape(await query(questions[n]), -1)

    async def serve() -> None:
        indexed = asyncio.create_task(index(DOCUMENTS))
        answers = await asyncio.gather(*map(ask, range(500)))
        np.testing.assert_allclose(answers, expected, atol=1e-5)
        kept.append(await indexed)

    kept: list[Any] = []
    await no_stall(serve)
    np.testing.assert_allclose(kept[0], documents, atol=1e-5)
    model.close()


@pytest.mark.parametrize("kind", ["m3", "m3 pairs", "reranker"])
async def test_the_loop_goes_on_while_much_is_encoded_or_scored(
    kind, m3_folder: Path, reranker_folder: Path
):
    model: Any
    if kind == "reranker":
        model = Reranker(reranker_folder, max_length=16, on_truncation="ignore")
        bulk = functools.partial(model.arank, "a panda", DOCUMENTS, top_n=3)
    else:
        model = M3Embedder(m3_folder, max_length=16, on_truncation="ignore")
        pairs = [("a panda", text) for text in DOCUMENTS]
        bulk = (
            functools.partial(model.aencode, DOCUMENTS)
            if kind == "m3"
            else functools.partial(model.ascore, pairs)
        )
    with model:
        await (model.arank("q", ["p"]) if kind == "reranker" else model.aencode(["p"]))
        await no_stall(bulk)


def test_queries_do_not_wait_for_documents_that_are_tokenised(en_folder: Path):
    """The tokenizer's own pool takes one list after another."""
    with Embedder(en_folder, max_length=8) as embedder:
        tokenizer = embedder.local.loaded().tokenizer
        documents = [f"{n} {'panda cat ' * 4000}" for n in range(80)]
        took = [0.0]

        def index() -> None:
            begun = time.perf_counter()
            tokenizer.encode(documents, max_length=8)
            took[0] = time.perf_counter() - begun

        thread = threading.Thread(target=index)
        thread.start()
        longest = 0.0
        while thread.is_alive():
            begun = time.perf_counter()
            tokenizer.encode(["where is the panda?", "and the cat?"], max_length=8)
            longest = max(longest, time.perf_counter() - begun)
            time.sleep(0.001)
    assert longest < took[0] / 2


def remembering(work: Callable[..., Any], threads: set[threading.Thread]) -> Callable[..., Any]:
    """Give a function that does the work and notes the thread that it was done in."""

    def remember(*arguments: Any) -> Any:
        threads.add(threading.current_thread())
        return work(*arguments)

    return remember


async def test_long_lists_are_checked_and_given_off_the_event_loop(
    monkeypatch, en_folder: Path, reranker_folder: Path, m3_folder: Path
):
    import langchain_bge.embeddings
    import llamaindex_bge.embedding
    from bge_core import arguments, factory

    seen: dict[str, set[threading.Thread]] = {}
    for module, names in (
        (arguments, ("texts", "pairs")),
        (langchain_bge.embeddings, ("_rows",)),
        (llamaindex_bge.embedding, ("_rows",)),
    ):
        for name in names:
            work = remembering(getattr(module, name), seen.setdefault(f"{module}{name}", set()))
            monkeypatch.setattr(module, name, work)
    texts = [f"text {n}" for n in range(33)]
    pairs = [("q", text) for text in texts]
    with (
        Embedder(en_folder) as one,
        Reranker(reranker_folder) as two,
        M3Embedder(m3_folder) as three,
        langchain_bge.BGEEmbeddings(model=en_folder) as four,
        llamaindex_bge.BGEEmbedding(model_name=en_folder) as five,
    ):
        await one.aembed_queries(["the instruction is known from now on"])
        for threads in seen.values():
            threads.clear()
        ranker = factory.make_scorer(m3_folder)
        works: tuple[Awaitable[Any], ...] = (
            one.aembed_queries(texts),
            two.ascore("q", texts),
            two.arank("q", texts),
            two.ascore_pairs(pairs),
            three.aencode(texts),
            three.ascore(pairs),
            ranker.arank("q", texts),
            five.aget_agg_embedding_from_queries(texts),
            five.aget_text_embedding_batch(texts),
            four.aembed_documents(texts),
        )
        for awaited in works:
            await awaited
        ranker.close()
    for place, threads in seen.items():
        assert threads, place
        assert threading.main_thread() not in threads, place


# One caller's misfortune.


async def test_what_happens_to_one_caller_happens_to_no_other(en_folder: Path):
    with (
        Embedder(en_folder, batch_tokens=256) as embedder,
        Embedder(en_folder, max_length=12, on_truncation="error") as strict,
        Embedder(en_folder) as closing,
    ):
        texts = [f"{n} {'cat ' * 20}" for n in range(40)]
        expected = embedder.embed_queries(texts)
        await closing.aembed_queries(["warm"])
        waits = [f"document {n} {'panda ' * 100}" for n in range(1500)]

        async def late() -> None:
            async with asyncio.timeout(0.02):
                await embedder.aembed_documents(waits)

        async def cancelled() -> None:
            asyncio.get_running_loop().call_later(0.02, asyncio.current_task().cancel)
            await embedder.aembed_documents(waits)

        async def closed() -> None:
            asyncio.get_running_loop().call_later(0.02, closing.close)
            await closing.aembed_documents(waits)

        unlucky = [
            (embedder.aembed_queries(["fine", None]), InputTypeError),
            (embedder.aembed_queries(["lone \ud83d"]), BGEError),
            (strict.aembed_queries(["panda " * 50]), TruncationError),
            (late(), TimeoutError),
            (cancelled(), asyncio.CancelledError),
            (closed(), ClosedError),
        ]
        lucky = [asyncio.ensure_future(embedder.aembed_queries([text])) for text in texts]
        outcomes = await asyncio.gather(*(work for work, _ in unlucky), return_exceptions=True)
        for outcome, (_, error) in zip(outcomes, unlucky, strict=True):
            assert isinstance(outcome, error), outcome
        np.testing.assert_allclose(
            np.concatenate(await asyncio.gather(*lucky)), expected, atol=1e-5
        )


# A forward pass that fails. The fault is put into torch itself, under everything that is ours.


class Fault:
    """Raises in a model's first module while it wants to, and counts the tokens that went on."""

    def __init__(self, error: BaseException, *, most: int = 0, times: int = 1 << 30) -> None:
        self.error = error
        self.most = most
        self.times = times
        self.computed: list[int] = []
        self._lock = threading.Lock()

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        # Other tables than the words' have as many rows as there are positions or types.
        if type(module).__name__ != "Embedding" or module.num_embeddings in (1, 2, 512, 514):
            return
        with self._lock:
            tokens = tokens_in(inputs[0])
            if tokens > self.most and self.times:
                self.times -= 1
                raise self.error
            self.computed.append(tokens)


@pytest.fixture
def fault():
    hooks = []

    def put(*arguments, **options) -> Fault:
        made = Fault(*arguments, **options)
        hooks.append(torch.nn.modules.module.register_module_forward_pre_hook(made))
        return made

    yield put
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
async def test_a_pass_that_fails_once_fails_its_callers_and_not_the_next(
    kind, call, fault, en_folder: Path, bert_reranker_folder: Path
):
    with Embedder(en_folder) as embedder, Reranker(bert_reranker_folder) as reranker:
        model, work = {
            "embedder": (embedder, ("embed_queries", ["a", "b"])),
            "reranker": (reranker, ("score", "a", ["b", "c"])),
        }[kind]
        expected = await call(model, *work)
        fault(RuntimeError("CUDA error: an illegal memory access"), times=1)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            await call(model, *work)
        np.testing.assert_allclose(await call(model, *work), expected, atol=1e-6)


async def test_a_pass_that_always_fails_is_named_to_every_caller_and_hangs_none(
    call, fault, en_folder: Path
):
    with Embedder(en_folder, batch_tokens=64) as embedder:
        await call(embedder, "embed_queries", ["warm"])
        fault(RuntimeError("no kernel image is available"))
        for method in ("embed_documents", "embed_queries"):
            for _ in range(3):
                with pytest.raises(RuntimeError, match="no kernel image is available"):
                    await asyncio.wait_for(call(embedder, method, DOCUMENTS[:2000]), 20)


async def test_out_of_memory_loses_no_work_that_was_done(call, fault, en_folder: Path):
    texts = [f"{n} {'panda ' * (n % 50)}" for n in range(700)]
    with Embedder(en_folder, batch_tokens=2048) as embedder:
        expected = embedder.embed_documents(texts)
        sequences, _ = embedder.local.loaded().tokenizer.encode(texts, max_length=512)
        short = fault(torch.OutOfMemoryError("CUDA out of memory"), most=300)
        vectors = await call(embedder, "embed_documents", texts)
        assert sum(short.computed) == sum(map(len, sequences)), "each token once"
        assert max(short.computed) <= 300
        # The smaller size is remembered: it does not fail again.
        failures = short.times
        await call(embedder, "embed_documents", texts[:100])
        assert short.times == failures
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


async def test_one_text_that_does_not_fit_is_its_caller_s_alone(call, fault, en_folder: Path):
    with Embedder(en_folder, query_instruction="") as embedder:
        expected = embedder.embed_queries(["panda"])
        fault(torch.OutOfMemoryError("CUDA out of memory"), most=100)
        with pytest.raises(ComputationError, match=r"one text of 302 tokens.*max_length"):
            await call(embedder, "embed_queries", ["panda " * 300])
        np.testing.assert_allclose(await call(embedder, "embed_queries", ["panda"]), expected)
