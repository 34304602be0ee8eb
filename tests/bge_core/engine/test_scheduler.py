"""The engine: packs from whoever waits, two priorities, several devices, failures and the end."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from bge_core import ClosedError, ComputationError, Embedder
from bge_core.engine import scheduler
from bge_core.engine.scheduler import Engine
from bge_core.tokenizer import TokenSequence


class Recorder:
    """A runner whose row of a sequence is its length, and that writes down its packs."""

    padded = False
    threads = 1
    default_budget = 100

    def __init__(
        self,
        *,
        seconds: float = 0.0,
        most: int = 1 << 60,
        shortage: BaseException | None = None,
    ) -> None:
        self.packs: list[list[int]] = []
        self.seconds = seconds
        self.most = most
        self.shortage = shortage or torch.OutOfMemoryError()
        self.failed = 0
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self.error: BaseException | None = None

    def run(self, sequences):
        error = self.error
        self.begun.set()
        self.gate.wait(10)
        time.sleep(self.seconds)
        lengths = [len(sequence) for sequence in sequences]
        if sum(lengths) > self.most:
            self.failed += 1
            raise self.shortage
        if error is not None:
            raise error
        self.packs.append(lengths)
        return np.array(lengths, dtype=np.float32)[:, None]


def sequences(*lengths):
    return [TokenSequence([7] * length, length) for length in lengths]


def engine(*query, bulk=None):
    return Engine(
        {"interactive": query, "background": bulk or query}, tokenizer=None, name="recorder"
    )


def values(future):
    return [float(row[0]) for row in future.result(10)]


@pytest.fixture
def held():
    """An engine whose worker holds a first pack until the gate opens, so that others gather."""
    runner = Recorder()
    runner.gate.clear()
    made = engine(runner)
    first = made.submit(sequences(1), priority="interactive")
    assert runner.begun.wait(10)
    yield made, runner
    runner.gate.set()
    assert values(first) == [1.0]


def test_callers_that_wait_share_a_pack_and_get_their_own_rows_in_order(held):
    made, runner = held
    futures = [made.submit(sequences(n, 3, n + 1), priority="interactive") for n in (5, 9, 2)]
    runner.gate.set()
    assert [values(future) for future in futures] == [[5, 3, 6], [9, 3, 10], [2, 3, 3]]
    assert runner.packs == [[1], sorted([5, 3, 6, 9, 3, 10, 2, 3, 3])]


def test_a_lone_caller_waits_for_nobody():
    runner = Recorder()
    made = engine(runner)
    for number in (4, 5, 6):
        assert values(made.submit(sequences(number), priority="interactive")) == [number]
    assert runner.packs == [[4], [5], [6]]


def test_a_pack_stays_within_the_budget_whoever_shares_it(held):
    made, runner = held
    futures = [made.submit(sequences(*[30] * 5), priority="interactive") for _ in range(4)]
    runner.gate.set()
    assert [values(future) for future in futures] == [[30.0] * 5] * 4
    assert all(sum(pack) <= 100 for pack in runner.packs)
    assert sum(len(pack) for pack in runner.packs) == 21


def test_a_caller_s_own_budget_counts_for_its_packs():
    runner = Recorder()
    made = engine(runner)
    future = made.submit(sequences(10, 10, 10, 10), priority="background", budget=20)
    assert values(future) == [10.0] * 4
    assert runner.packs == [[10, 10], [10, 10]]


def test_two_bulk_jobs_take_turns(held):
    made, runner = held
    bulk = Recorder()
    bulk.gate.clear()
    made = engine(runner, bulk=[bulk])
    first = made.submit(sequences(*[90] * 4), priority="background")
    assert bulk.begun.wait(10)
    second = made.submit(sequences(*[80] * 3), priority="background")
    bulk.gate.set()
    assert values(first) == [90.0] * 4
    assert values(second) == [80.0] * 3
    order = [pack[0] for pack in bulk.packs]
    assert order[:6] == [90, 90, 80, 90, 80, 90] or order[:6] == [90, 80, 90, 80, 90, 80]
    assert runner.packs == []


def test_a_query_does_not_wait_for_the_bulk_lane():
    query, bulk = Recorder(), Recorder()
    bulk.gate.clear()
    made = engine(query, bulk=[bulk])
    slow = made.submit(sequences(50), priority="background")
    assert bulk.begun.wait(10)
    assert values(made.submit(sequences(3), priority="interactive")) == [3.0]
    assert not slow.done()
    bulk.gate.set()
    assert values(slow) == [50.0]


def test_several_devices_work_on_one_job_and_the_faster_one_does_more():
    slow, fast = Recorder(seconds=0.05), Recorder(seconds=0.005)
    made = engine(slow, fast)
    future = made.submit(sequences(*range(60, 100)), priority="background")
    assert values(future) == list(range(60, 100))
    assert len(slow.packs) + len(fast.packs) == 40
    assert len(fast.packs) > 2 * len(slow.packs) > 0


def test_an_error_is_its_pack_s_callers_own_and_the_next_call_works(held):
    made, runner = held
    with_it = [made.submit(sequences(n), priority="interactive") for n in (2, 3)]
    runner.error = ValueError("a broken kernel")
    runner.gate.set()
    for future in with_it:
        with pytest.raises(ValueError, match="a broken kernel"):
            future.result(10)
    runner.error = None
    assert values(made.submit(sequences(4), priority="interactive")) == [4.0]


def test_an_error_that_stays_reaches_every_caller():
    runner = Recorder()
    runner.error = RuntimeError("no kernel image")
    made = engine(runner)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no kernel image"):
            made.submit(sequences(*[60] * 5), priority="background").result(10)


def test_out_of_memory_goes_on_in_smaller_packs_that_are_remembered():
    runner = Recorder(most=40)
    made = engine(runner)
    lengths = [10] * 30
    assert values(made.submit(sequences(*lengths), priority="background")) == lengths
    assert sum(len(pack) for pack in runner.packs) == 30, "nothing is computed twice"
    runner.packs.clear()
    assert values(made.submit(sequences(*lengths), priority="background")) == lengths
    assert max(sum(pack) for pack in runner.packs) <= 40
    assert len(runner.packs) <= 15


def test_a_failed_pack_s_memory_is_let_go_before_its_parts_run():
    alive: weakref.WeakSet[Activation] = weakref.WeakSet()
    seen = []

    class Greedy(Recorder):
        def run(self, sequences):
            seen.append(len(alive))
            activation = Activation()
            alive.add(activation)
            return super().run(sequences)

    made = engine(Greedy(most=20))
    assert values(made.submit(sequences(*[10] * 8), priority="background")) == [10.0] * 8
    assert max(seen) == 0


class Activation:
    """Stands for the tensors of a forward pass."""


def test_padded_packs_of_several_callers_stay_within_the_budget():
    runner = Recorder()
    runner.padded = True
    runner.gate.clear()
    made = engine(runner)
    first = made.submit(sequences(1), priority="interactive")
    assert runner.begun.wait(10)
    short = made.submit(sequences(*[2] * 30), priority="interactive")
    long = made.submit(sequences(50, 40), priority="interactive")
    runner.gate.set()
    assert (values(first), values(short), values(long)) == ([1.0], [2.0] * 30, [50.0, 40.0])
    assert all(max(pack) * len(pack) <= 100 for pack in runner.packs)


def test_the_smallest_budget_of_those_who_share_a_pack_counts(held):
    made, runner = held
    small = made.submit(sequences(10, 10, 10), priority="interactive", budget=20)
    large = made.submit(sequences(*[10] * 10), priority="interactive")
    runner.gate.set()
    assert values(small) == [10.0] * 3
    assert values(large) == [10.0] * 10
    assert any(sum(pack) > 20 for pack in runner.packs)


def test_a_caller_s_own_jobs_follow_one_another():
    runner = Recorder()
    runner.gate.clear()
    made = engine(runner)
    first = made.submit(sequences(1), priority="background")
    assert runner.begun.wait(10)
    jobs = [
        made.submit(sequences(*[n] * 3), priority="background", caller="me") for n in (90, 80, 70)
    ]
    runner.gate.set()
    assert values(first) == [1.0]
    assert [values(job) for job in jobs] == [[90.0] * 3, [80.0] * 3, [70.0] * 3]
    assert [pack[0] for pack in runner.packs[1:]] == [90] * 3 + [80] * 3 + [70] * 3


@pytest.mark.parametrize("priority", ["interactive", "background"])
@pytest.mark.parametrize("error", [BrokenPipeError(), SystemExit(), KeyboardInterrupt()])
def test_a_progress_callback_that_breaks_is_called_no_more_and_the_rows_come(priority, error):
    calls = []

    def broken(count):
        calls.append(count)
        raise error

    made = engine(Recorder())
    future = made.submit(sequences(60, 60, 60), priority=priority, progress=broken)
    assert values(future) == [60.0] * 3
    assert calls == [1]
    assert values(made.submit(sequences(5), priority=priority)) == [5.0]


@pytest.mark.parametrize("priority", ["interactive", "background"])
def test_a_log_handler_that_raises_ends_no_worker(priority):
    class Broken(logging.Handler):
        def emit(self, record):
            raise BrokenPipeError

    handler = Broken()
    scheduler.logger.addHandler(handler)
    try:
        made = engine(Recorder(most=40))
        rows = values(made.submit(sequences(*[10] * 9), priority=priority, progress=print_nowhere))
        assert rows == [10.0] * 9
    finally:
        scheduler.logger.removeHandler(handler)
    assert values(made.submit(sequences(5), priority=priority)) == [5.0]


def print_nowhere(count):
    raise OSError


OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuda, late": RuntimeError("CUDA error: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other: 1 GB)."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9."),
    "numpy": MemoryError("Unable to allocate 7.45 GiB"),
    "c++": RuntimeError("std::bad_alloc"),
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY.keys())
def test_every_device_s_way_of_saying_out_of_memory_is_understood(error):
    runner = Recorder(most=40, shortage=error)
    made = engine(runner)
    assert values(made.submit(sequences(*[10] * 9), priority="background")) == [10.0] * 9
    assert sum(len(pack) for pack in runner.packs) == 9, "nothing is computed twice"
    with pytest.raises(ComputationError, match="one text of 50 tokens") as caught:
        made.submit(sequences(50), priority="interactive").result(10)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access"), OSError(28, "disk full")]
)
def test_another_failure_is_not_taken_for_it(error):
    runner = Recorder(most=40, shortage=error)
    made = engine(runner)
    with pytest.raises(type(error)) as caught:
        made.submit(sequences(*[10] * 9), priority="background").result(10)
    assert caught.value is error
    assert not runner.packs


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("priority", ["interactive", "background"])
def test_after_a_shortage_packs_grow_again(priority, padded):
    """As when another process had the memory for a while."""
    runner = Recorder()
    runner.padded, runner.default_budget = padded, 2000
    made = engine(runner)
    runner.most = 5
    lengths = [5] * 400
    assert values(made.submit(sequences(*lengths), priority=priority)) == lengths
    assert {len(pack) for pack in runner.packs} == {1}
    runner.most = 1 << 60
    runner.packs.clear()
    values(made.submit(sequences(*lengths * 20), priority=priority))
    sizes = [sum(pack) for pack in runner.packs]
    assert sizes[0] < 100
    assert max(sizes) == 2000
    # And for good.
    runner.packs.clear()
    values(made.submit(sequences(*lengths), priority=priority))
    assert [sum(pack) for pack in runner.packs] == [2000]


def test_a_lasting_shortage_is_met_more_and_more_seldom():
    runner = Recorder(most=100)
    runner.default_budget = 1000
    made = engine(runner)
    failures = []
    for _ in range(4):
        before = runner.failed
        values(made.submit(sequences(*[10] * 2000), priority="background"))
        failures.append(runner.failed - before)
    # Some 200 packs a round, and a round doubles the time to the next try.
    assert failures[0] <= 12
    assert failures[-1] <= 2


def test_filling_a_pack_costs_each_waiting_caller_a_few_steps():
    """`submit` waits meanwhile, on an event loop, too."""

    class Length(int):
        steps = 0

        def __add__(self, other):
            Length.steps += 1
            return Length(int(self) + int(other))

        __radd__ = __add__

        def __gt__(self, other):
            Length.steps += 1
            return int(self) > int(other)

        def __lt__(self, other):
            Length.steps += 1
            return int(self) < int(other)

    def steps(callers):
        runner = Recorder()
        runner.default_budget = 1 << 40
        workers = scheduler._Workers({"interactive": [runner], "background": []}, "recorder")
        for _ in range(callers):
            job = scheduler._Job(sequences(3), object(), None, None)
            job.lengths = [Length(3)]
            workers.waiting["interactive"][job.caller] = deque([job])
        Length.steps = 0
        assert len(workers._take("interactive", runner, 1 << 40)) == callers
        return Length.steps

    few, many = steps(100), steps(1000)
    assert few > 0
    assert many <= 11 * few


def test_one_text_that_does_not_fit_is_a_sentence():
    made = engine(Recorder(most=40))
    with pytest.raises(ComputationError, match="one text of 50 tokens: pass a smaller max_length"):
        made.submit(sequences(50), priority="background").result(10)


def test_what_a_caller_cancels_is_not_computed(held):
    made, runner = held
    gone = made.submit(sequences(8, 9), priority="interactive")
    stays = made.submit(sequences(5), priority="interactive")
    assert gone.cancel()
    runner.gate.set()
    assert values(stays) == [5.0]
    assert runner.packs == [[1], [5]]


def test_what_is_cancelled_is_let_go_of_at_once_however_far_its_turn_is(held):
    made, runner = held
    jobs = [made.submit(sequences(*[90] * 50), priority="interactive") for _ in range(3)]
    own = [made.submit(sequences(8), priority="interactive", caller="me") for _ in range(2)]
    waiting = made._workers.waiting["interactive"]
    assert len(waiting) == 4
    assert own[0].cancel()
    assert jobs[1].cancel()
    assert [len(queue) for queue in waiting.values()] == [1, 1, 1]
    runner.gate.set()
    assert (values(jobs[0]), values(jobs[2]), values(own[1])) == ([90.0] * 50, [90.0] * 50, [8.0])


def test_a_job_that_is_done_needs_no_garbage_collector():
    made = engine(Recorder())
    gc.disable()
    try:
        future = made.submit(sequences(5), priority="interactive")
        assert values(future) == [5.0]
        gone = weakref.ref(future)
        del future
        for _ in range(100):
            if gone() is None:
                break
            time.sleep(0.02)
        assert gone() is None
    finally:
        gc.enable()


def test_bulk_work_gives_memory_back_once_when_nothing_more_comes(monkeypatch):
    given: list[threading.Thread] = []
    monkeypatch.setattr(scheduler, "_IDLE_SECONDS", 0.5)
    monkeypatch.setattr(scheduler, "trim_heap", lambda: given.append(threading.current_thread()))
    made = engine(Recorder())
    made.submit(sequences(5), priority="interactive").result(10)
    for future in [made.submit(sequences(5), priority="background") for _ in range(3)]:
        future.result(10)

    def own() -> list[threading.Thread]:
        # Other engines' workers may end meanwhile.
        return [thread for thread in given if thread in made._workers.all_threads()]

    deadline = time.monotonic() + 10
    while not own() and time.monotonic() < deadline:
        # Queries go on, and are no reason to wait.
        made.submit(sequences(5), priority="interactive").result(10)
        time.sleep(0.05)
    time.sleep(1.5)
    assert own() == made._workers.pools["background"][0].threads
    assert values(made.submit(sequences(7), priority="background")) == [7.0]


def test_an_engine_that_nobody_holds_stops_its_threads_and_fails_who_waits(held):
    runner = Recorder()
    runner.gate.clear()
    made = engine(runner)
    made.submit(sequences(1), priority="interactive")
    assert runner.begun.wait(10)
    waiting = made.submit(sequences(2), priority="interactive")
    before = threading.active_count()
    del made
    gc.collect()
    with pytest.raises(ClosedError, match="'recorder' was closed before this work was done"):
        waiting.result(10)
    runner.gate.set()
    for _ in range(100):
        if threading.active_count() < before:
            break
        time.sleep(0.02)
    assert threading.active_count() < before


async def test_a_task_that_is_cancelled_drops_its_work_and_leaves_the_others(en_folder):
    with Embedder(en_folder, batch_tokens=64) as embedder:
        texts = [f"text number {n} of many" for n in range(2000)]
        await embedder.aembed_queries(["warm"])
        task = asyncio.create_task(embedder.aembed_documents(texts))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        vectors = await asyncio.wait_for(embedder.aembed_documents(texts[:3]), 10)
        assert vectors.shape == (3, 32)


def test_several_devices_give_the_vectors_of_one(en_folder):
    texts = [f"text {n} " * (1 + n % 40) for n in range(300)]
    one = Embedder(en_folder, device="cpu").embed_documents(texts)
    with Embedder(en_folder, device=["cpu", "cpu"], batch_tokens=256) as two:
        np.testing.assert_allclose(two.embed_documents(texts), one, atol=1e-5)


def _run(code: str, folder: Path, **options) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(code).replace("FOLDER", repr(str(folder)))
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_the_interpreter_ends_with_work_in_flight(en_folder):
    done = _run(
        """
        import time
        from bge_core import Embedder
        embedder = Embedder(FOLDER, batch_tokens=64)
        embedder.embed_queries(["warm"])
        engine = embedder.local.loaded()
        sequences, _ = engine.tokenizer.encode(["a text"] * 50_000, max_length=64)
        future = engine.submit(sequences, priority="background", budget=64)
        time.sleep(0.3)
        print("end", future.done())
        """,
        en_folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "end False\n"


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_stops_a_caller_at_once(en_folder):
    script = textwrap.dedent(
        f"""
        import signal
        from bge_core import Embedder
        # A test run in a shell's background inherits that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        embedder = Embedder({str(en_folder)!r}, batch_tokens=64)
        embedder.embed_queries(["warm"])
        texts = [f"text {{n}}" for n in range(500_000)]
        print("ready", flush=True)
        embedder.embed_documents(texts)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert "KeyboardInterrupt" in errors
    assert process.returncode in (1, -signal.SIGINT, 130)
