"""Packs on a CPU share its threads out among themselves."""

import os
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from bge_core import ComputationError, Embedder, Reranker
from bge_core.backends import cpu_threads
from bge_core.engine import scheduler
from bge_core.engine.scheduler import Engine
from bge_core.engine.thread_shares import ThreadShares
from bge_core.tokenizer import TokenSequence

openmp_only = pytest.mark.skipif(
    cpu_threads._openmp() is None, reason="no OpenMP whose threads can be set for each pack"
)


def packs_of(threads, lengths, *, together=True):
    """Take packs of sequences as long as threads are free; gives each one's tokens and threads."""
    shares, waiting, taken = ThreadShares(threads), list(lengths), []
    while waiting and shares.any_free:
        most = shares.pack_tokens(sum(waiting))
        pack: list[int] = []
        while waiting and (not pack or sum(pack) + waiting[0] <= most):
            pack.append(waiting.pop(0))
        taken.append((sum(pack), shares.claim(sum(pack), sum(waiting))))
        if not together:
            shares.give_back(taken[-1][1])
    return taken


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 40, 64, 200])
def test_what_is_alone_gets_all_threads(threads):
    for lengths in ([8192], [12], [60, 60]):
        assert packs_of(threads, lengths) == [(sum(lengths), threads)]


@pytest.mark.parametrize(
    ("threads", "lengths", "expected"),
    [
        (2, [100] * 3, [(100, 1), (200, 1)]),
        (2, [300, 300], [(300, 1), (300, 1)]),
        (2, [400, 50], [(400, 2)]),
        (2, [100] * 90, [(1000, 1)] * 2),
        (4, [100] * 4, [(100, 1), (100, 1), (200, 2)]),
        (4, [500] * 2, [(500, 2), (500, 2)]),
        (16, [128] * 8, [(128, 2)] * 8),
        (16, [50] * 1000, [(1000, 1)] * 16),
        (64, [50] * 1000, [(1000, 4)] * 16),
    ],
)
def test_what_waits_is_computed_side_by_side(threads, lengths, expected):
    assert packs_of(threads, lengths) == expected


@pytest.mark.parametrize("threads", [2, 5, 16, 24, 100])
@pytest.mark.parametrize("total", [130, 300, 1000, 5000, 40_000])
def test_no_more_threads_are_taken_than_there_are(threads, total):
    taken = packs_of(threads, [10] * (total // 10))
    assert sum(count for _, count in taken) <= threads
    assert min(count for _, count in taken) >= 1
    assert len(taken) <= min(threads, 16)
    if len(taken) > 1:
        assert min(tokens for tokens, _ in taken) >= 100
        assert max(tokens for tokens, _ in taken) <= 1024


def test_the_last_packs_of_much_work_are_small():
    sizes = [tokens for tokens, _ in packs_of(2, [10] * 500, together=False)]
    assert sizes[:3] == [1020, 1020, 1020]
    assert sizes[:-2] == sorted(sizes[:-2], reverse=True)
    assert sizes[-1] < 260


class Meeting:
    """A runner whose row is its length; a thread's first pass waits for those of others."""

    padded = False
    default_budget = 2048
    overlaps = False

    def __init__(self, threads, *, together=1):
        self.threads = threads
        self.barrier = threading.Barrier(together)
        self.packs: list[int] = []
        self.names: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)

    def run(self, sequences):
        self.begun.release()
        name = threading.current_thread().name
        self.packs.append(sum(map(len, sequences)))
        if name not in self.names:
            self.barrier.wait(10)
        self.names.append(name)
        self.gate.wait(10)
        if any(len(sequence) == 13 for sequence in sequences):
            msg = "a text of 13 tokens"
            raise ValueError(msg)
        return np.array([len(sequence) for sequence in sequences], dtype=np.float32)[:, None]


def sequences(*lengths):
    return [TokenSequence([7] * length, length) for length in lengths]


def engine(runner):
    return Engine({"interactive": [runner], "background": [runner]}, tokenizer=None, name="meeting")


def held(length, *, priority):
    """An engine of two threads that both compute a first text until the gate opens."""
    runner = Meeting(2)
    runner.gate.clear()
    made = engine(runner)
    first = made.submit(sequences(length), priority=priority)
    assert runner.begun.acquire(timeout=10)
    return made, runner, first


def values(future):
    return [int(row[0]) for row in future.result(10)]


@pytest.fixture
def used(monkeypatch):
    """The numbers of threads that passes were given."""
    given: list[int] = []
    monkeypatch.setattr(scheduler, "use_threads", given.append)
    return given


@pytest.mark.parametrize("priority", ["interactive", "background"])
def test_one_caller_s_work_is_computed_by_all_threads_at_once(priority, used):
    runner = Meeting(3, together=3)
    lengths = [100 + number for number in range(15)]
    made = engine(runner)
    assert values(made.submit(sequences(*lengths), priority=priority)) == lengths
    # Three met, or one had waited in vain.
    assert set(runner.names) == {f"bge-{priority}-0{number}" for number in ("", "-1", "-2")}
    assert used[:2] == [1, 1]


def test_a_lone_pack_gets_all_threads_and_always_the_first_worker(used):
    runner = Meeting(4)
    made = engine(runner)
    for length in (5, 700, 9):
        assert values(made.submit(sequences(length), priority="interactive")) == [length]
    assert used == [4, 4, 4]
    assert set(runner.names) == {"bge-interactive-0"}


def test_what_comes_while_all_threads_compute_waits_and_is_shared_out_then(used):
    made, runner, first = held(40, priority="interactive")
    later = [made.submit(sequences(*[60] * 5), priority="interactive") for _ in range(2)]
    assert not runner.begun.acquire(timeout=0.2)
    runner.gate.set()
    assert [values(future) for future in (first, *later)] == [[40], [60] * 5, [60] * 5]
    assert runner.packs[:2] == [40, 300]
    assert used[:3] == [2, 1, 1]


def test_a_pack_that_fails_is_its_callers_and_gives_its_threads_back(used):
    runner = Meeting(2)
    made = engine(runner)
    for _ in range(5):
        with pytest.raises(ValueError, match="13 tokens"):
            made.submit(sequences(13), priority="interactive").result(10)
    assert values(made.submit(sequences(5), priority="interactive")) == [5]
    assert used == [2] * 6


def test_memory_that_runs_out_is_halved_by_whichever_worker(used, caplog):
    class Small(Meeting):
        def run(self, sequences):
            if sum(map(len, sequences)) > 100:
                raise torch.OutOfMemoryError
            return super().run(sequences)

    made = engine(Small(2))
    assert values(made.submit(sequences(*[40] * 50), priority="background")) == [40] * 50
    assert "Out of memory" in caplog.text


def test_progress_is_told_by_one_worker_at_a_time(used):
    runner = Meeting(4)
    inside = threading.Lock()
    seen: list[int] = []

    def note(count):
        assert inside.acquire(blocking=False)
        time.sleep(0.002)
        seen.append(count)
        inside.release()

    made = engine(runner)
    future = made.submit(sequences(*[64] * 200), priority="background", progress=note)
    assert values(future) == [64] * 200
    assert sum(seen) == 200


def test_a_caller_that_leaves_takes_its_tokens_along(used):
    made, runner, first = held(5, priority="background")
    gone = made.submit(sequences(*[500] * 90), priority="background")
    assert gone.cancel()
    assert made._workers.waiting_tokens["background"] == 0
    stays = made.submit(sequences(*[10] * 20), priority="background")
    runner.gate.set()
    assert (values(first), values(stays)) == ([5], [10] * 20)
    assert runner.packs == [5, 200]
    assert made._workers.waiting_tokens["background"] == 0


def test_closing_waits_for_every_worker_s_pack(used):
    runner = Meeting(3)
    runner.gate.clear()
    made = engine(runner)
    future = made.submit(sequences(*[200] * 30), priority="background")
    for _ in range(3):
        assert runner.begun.acquire(timeout=10)
    workers = made._workers
    workers.close()
    assert all(thread.is_alive() for thread in workers.all_threads())
    runner.gate.set()
    workers.join(time.monotonic() + 10)
    assert not any(thread.is_alive() for thread in workers.all_threads())
    with pytest.raises(Exception, match="closed"):
        future.result(10)


def test_a_worker_that_can_t_be_started_is_not_needed(used, monkeypatch):
    runner = Meeting(4)
    made = engine(runner)
    assert values(made.submit(sequences(5), priority="background")) == [5]

    def start(thread):
        msg = "can't start new thread"
        raise RuntimeError(msg)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert values(made.submit(sequences(*[100] * 30), priority="background")) == [100] * 30
    with pytest.raises(RuntimeError, match="new thread"):
        made.submit(sequences(5), priority="interactive")
    monkeypatch.undo()
    # Nothing of it waits.
    assert values(made.submit(sequences(6), priority="interactive")) == [6]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_one_worker(used):
    runner = Meeting(2)
    made = engine(runner)
    assert values(made.submit(sequences(5), priority="background")) == [5]
    pid = os.fork()
    if pid == 0:
        done = values(made.submit(sequences(*[200] * 20), priority="background")) == [200] * 20
        alone = len(made._workers.all_threads()) == 1
        os._exit(0 if done and alone else 1)
    assert os.waitpid(pid, 0)[1] == 0


@openmp_only
def test_threads_are_the_calling_thread_s_alone():
    openmp = cpu_threads._openmp()
    seen: list[int] = []

    def other():
        cpu_threads.use_threads(3)
        seen.append(openmp.omp_get_max_threads())
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [3, 3]
    assert torch.get_num_threads() == before


@openmp_only
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_vectors_and_scores_are_the_same(dtype, en_folder, bert_reranker_folder, monkeypatch):
    texts = [f"panda number {n} " + "cat " * (n * 37 % 90) for n in range(120)]
    seen: Counter[str] = Counter()

    def computed():
        with (
            Embedder(en_folder, dtype=dtype, on_truncation="ignore") as embedder,
            Reranker(bert_reranker_folder, dtype=dtype, on_truncation="ignore") as reranker,
        ):
            vectors = embedder.embed_documents(texts)
            queries = [embedder.embed_queries([text])[0] for text in texts[:5]]
            scores = reranker.score("a panda", texts)
            for model in (embedder, reranker):
                seen.update(t.name for t in model.local.loaded()._workers.all_threads())
            return np.concatenate([vectors, queries]), scores

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = computed()
    assert not any(name.count("-") > 2 for name in seen)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = computed()
    assert {"bge-background-0-2", "bge-interactive-0-2"} <= seen.keys()
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_text_that_fits_into_no_memory_is_a_sentence(used):
    class Full(Meeting):
        def run(self, sequences):
            raise torch.OutOfMemoryError

    made = engine(Full(2))
    with pytest.raises(ComputationError, match="one text of 50 tokens"):
        made.submit(sequences(50), priority="background").result(10)
