"""How many threads compute a pack: what was fastest of late, and never the caller's business."""

import multiprocessing
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bge_core import Embedder
from bge_core.backends import cpu_threads
from bge_core.backends.cpu_threads import PackThreads, _Size, _Way, end_waiting_threads
from bge_core.backends.int8 import int8_works

ASLEEP, SPINNING, ALONE = _Way(2, spin=False), _Way(2, spin=True), _Way(1, spin=False)

openmp_only = pytest.mark.skipif(
    cpu_threads._openmp() is None, reason="torch's OpenMP is out of reach here"
)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Give a clock that passes move on, and sleepers that no other test holds back."""
    monkeypatch.setattr(cpu_threads._sleepers, "_stay_until", 0.0)
    clock = [1000.0]
    monkeypatch.setattr(cpu_threads, "monotonic", lambda: clock[0])
    return clock


@pytest.fixture
def passes(clock):
    """Run so many passes, of which each takes what its way takes."""

    def run(size, took, count, most=2):
        ways = []
        for _ in range(count):
            way = size.choose(most)
            size.note(way, took[way])
            clock[0] += took[way]
            ways.append(way)
        return ways

    return run


@pytest.mark.parametrize("best", [ASLEEP, SPINNING, ALONE])
def test_the_fastest_way_is_taken(passes, best):
    took = dict.fromkeys((ASLEEP, SPINNING, ALONE), 0.03) | {best: 0.02}
    ways = passes(_Size(), took, 300)
    assert set(ways[:12]) == {ASLEEP, SPINNING, ALONE}
    assert ways[12:].count(best) > 0.9 * 288


@pytest.mark.parametrize("worse", [1.1, 1.5, 3.0, 30.0])
def test_what_is_slower_is_tried_for_a_hundredth_of_the_time(passes, worse):
    took = {ASLEEP: 0.02 * min(worse, 3.0), SPINNING: 0.02 * worse, ALONE: 0.02}
    size = _Size()
    passes(size, took, 12)
    ways = passes(size, took, 20_000)
    lost = sum(took[way] - 0.02 for way in ways)
    assert 0 < lost < 0.025 * sum(took[way] for way in ways)


def test_what_takes_twice_as_long_is_tried_once(passes):
    took = {ASLEEP: 0.02, SPINNING: 0.6, ALONE: 0.018}
    assert passes(_Size(), took, 7).count(SPINNING) == 1


def test_a_change_is_noticed(passes):
    size = _Size()
    quiet, busy = (
        {ASLEEP: 0.024, SPINNING: 0.014, ALONE: 0.02},
        {ASLEEP: 0.025, SPINNING: 0.6, ALONE: 0.021},
    )
    passes(size, quiet, 50)
    assert passes(size, busy, 10)[-1] == ALONE
    # What it cost last counts: half a second for each minute.
    assert passes(size, quiet, 10_000)[-1] == SPINNING


def test_a_long_pass_has_all_threads(passes):
    took = {ASLEEP: 0.3, SPINNING: 0.1, ALONE: 0.1}
    assert set(passes(_Size(), took, 50)) == {ASLEEP}


def test_of_many_threads_a_few_are_tried_too(passes):
    took = {_Way(64, spin=False): 0.02, _Way(64, spin=True): 0.03, _Way(4, spin=True): 0.004}
    assert passes(_Size(), took | {ALONE: 0.008}, 50, most=64)[-1] == _Way(4, spin=True)


@pytest.fixture
def two_threads(monkeypatch):
    """Have two: the suite's processes have one each."""
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    yield
    if (openmp := cpu_threads._openmp()) is not None:
        openmp.omp_set_num_threads(before)


@pytest.fixture
def ways(monkeypatch):
    """Have the ways taken that are asked for; gives the numbers of threads."""
    seen: list[Any] = []
    monkeypatch.setattr(_Size, "choose", lambda size, most: seen.pop(0))
    return seen


@openmp_only
def test_the_threads_are_this_thread_s_and_come_back(ways, two_threads):
    openmp = cpu_threads._openmp()
    before = openmp.omp_get_max_threads()

    def other_thread_s():
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(openmp.omp_get_max_threads()))
        thread.start()
        thread.join()
        return seen[0]

    ways[:] = [_Way(5, spin=True), _Way(6, spin=False), _Way(7, spin=False)]
    others = other_thread_s()
    for expected in (5, 6):
        with PackThreads().computing(10):
            assert openmp.omp_get_max_threads() == expected
            assert other_thread_s() == others
        assert openmp.omp_get_max_threads() == 2
    with pytest.raises(ZeroDivisionError), PackThreads().computing(10):
        _ = 1 / 0
    assert openmp.omp_get_max_threads() == 2
    openmp.omp_set_num_threads(before)


@openmp_only
def test_a_pass_that_fails_says_nothing_of_its_time(two_threads):
    threads = PackThreads()
    with pytest.raises(ZeroDivisionError), threads.computing(10):
        _ = 1 / 0
    assert threads._sizes[0]._seconds == {}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_vector_is_the_same_in_every_way(en_folder, dtype, monkeypatch, two_threads):
    if dtype == "int8" and not int8_works():
        pytest.skip("no int8")
    with Embedder(str(en_folder), dtype=dtype) as embedder:
        vectors = []
        for way in (ASLEEP, SPINNING, ALONE):
            monkeypatch.setattr(_Size, "choose", lambda size, most, way=way: way)
            vectors.append(embedder.embed_queries(["How many threads?"]))
        monkeypatch.setattr(cpu_threads, "_openmp", lambda: None)
        vectors.append(embedder.embed_queries(["How many threads?"]))
    for vector in vectors[1:]:
        np.testing.assert_allclose(vector, vectors[0], atol=1e-6)


def openmp_threads():
    """Count the threads of this process, Python's own not among them."""
    return len(list(Path("/proc/self/task").iterdir())) - threading.active_count()


@openmp_only
def test_threads_that_compute_nothing_are_ended(en_folder, two_threads):
    end_waiting_threads()
    before = openmp_threads()
    with Embedder(str(en_folder)) as embedder:
        embedder.embed_documents(["a text " * 100] * 20)
        embedder.embed_queries(["a query"])
        for _ in range(100):
            if openmp_threads() <= before + 1:  # the sleepers' second
                break
            threading.Event().wait(0.02)
        assert openmp_threads() <= before + 1


@openmp_only
def test_sleepers_come_with_a_large_pack_and_go_with_a_small_one(ways, two_threads):
    def sleeping():
        return any(thread.name == "bge-sleeper" for thread in threading.enumerate())

    for _ in range(3):
        with PackThreads().computing(2000):
            assert sleeping()
        assert sleeping()
        ways[:] = [ASLEEP, SPINNING]
        with PackThreads().computing(20):
            assert sleeping()
        with PackThreads().computing(20):
            for _ in range(100):
                if not sleeping():
                    break
                threading.Event().wait(0.02)
            assert not sleeping()


def _in_child(answers):
    cpu_threads._sleepers.release()
    with PackThreads().computing(2000):
        answers.put(cpu_threads._sleepers._end is not None)


@openmp_only
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_has_sleepers_of_its_own(two_threads):
    with PackThreads().computing(2000), cpu_threads._sleepers._lock:
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        child = context.Process(target=_in_child, args=(answers,))
        child.start()
    assert answers.get(timeout=30)
    child.join(30)
    assert child.exitcode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_another_platform_s_openmp_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cpu_threads._openmp.__wrapped__() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_waits_for_threads_that_are_ending(clock, monkeypatch):
    """Each holds a lock of MKL's for a moment, which the child would find taken for good."""
    slept: list[float] = []
    monkeypatch.setattr(cpu_threads, "sleep", slept.append)

    def fork():
        if (pid := os.fork()) == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    cpu_threads.note_threads_end()
    clock[0] += 0.02
    fork()
    clock[0] += 10.0
    fork()
    assert slept == pytest.approx([0.03, 0.0])
