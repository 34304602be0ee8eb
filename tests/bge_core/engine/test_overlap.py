"""Devices that compute beside their worker's thread: launch and fetch, pace, forks."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import numpy as np
import pytest
import torch

from bge_core import ComputationError
from bge_core.engine import scheduler
from bge_core.engine.scheduler import Engine
from bge_core.tokenizer import TokenSequence


class Device:
    """A runner that computes when its rows are fetched, and writes down what came when.

    A sequence's row is its length.
    """

    padded = False
    threads = 1
    overlaps = True

    def __init__(self, *, budget=100, most=1 << 60) -> None:
        self.default_budget = budget
        self.most = most
        self.log: list[tuple[str, list[int]]] = []
        self.urgent: dict[str, bool] = {}
        self.error: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()

    def on_thread(self, *, urgent):
        self.urgent[threading.current_thread().name] = urgent
        return contextlib.nullcontext()

    def launch(self, sequences):
        lengths = [len(sequence) for sequence in sequences]
        self.log.append(("launch", lengths))
        if self.error is not None:
            raise self.error
        if sum(lengths) > self.most:
            raise torch.OutOfMemoryError

        def fetch():
            self.gate.wait(10)
            self.log.append(("fetch", lengths))
            return np.array(lengths, dtype=np.float32)[:, None]

        return fetch

    def run(self, sequences):
        return self.launch(sequences)()


def sequences(*lengths):
    return [TokenSequence([7] * length, length) for length in lengths]


def engine(*devices):
    return Engine({"interactive": devices, "background": devices}, tokenizer=None, name="recorder")


def values(future):
    return [float(row[0]) for row in future.result(10)]


@pytest.mark.parametrize("priority", ["interactive", "background"])
def test_the_next_pack_is_launched_before_the_one_before_is_fetched(priority):
    device = Device()
    made = engine(device)
    assert values(made.submit(sequences(90, 80, 70), priority=priority)) == [90, 80, 70]
    assert device.log == [
        ("launch", [90]),
        ("launch", [80]),
        ("fetch", [90]),
        ("launch", [70]),
        ("fetch", [80]),
        ("fetch", [70]),
    ]


def test_a_lone_pack_is_handed_out_at_once_and_the_worker_keeps_nothing():
    made = engine(Device())
    for length in (5, 6):
        assert values(made.submit(sequences(length), priority="interactive")) == [length]


def test_a_device_that_does_not_overlap_computes_pack_by_pack():
    device = Device()
    device.overlaps = False
    made = engine(device)
    assert values(made.submit(sequences(90, 80), priority="background")) == [90, 80]
    assert [what for what, _ in device.log] == ["launch", "fetch"] * 2
    assert device.urgent == {}


def test_queries_work_is_urgent_and_bulk_work_is_not():
    device = Device()
    made = engine(device)
    for priority in ("interactive", "background"):
        values(made.submit(sequences(3), priority=priority))
    assert device.urgent == {"bge-interactive-0": True, "bge-background-0": False}


def test_a_launch_that_fails_is_its_own_callers_and_the_pass_before_is_handed_out():
    device = Device()
    device.gate.clear()
    made = engine(device)
    first = made.submit(sequences(90), priority="interactive")
    while not device.log:
        time.sleep(0.001)
    device.error = ValueError("a broken kernel")
    second = made.submit(sequences(80), priority="interactive")
    device.gate.set()
    assert values(first) == [90]
    with pytest.raises(ValueError, match="a broken kernel"):
        second.result(10)
    device.error = None
    assert values(made.submit(sequences(70), priority="interactive")) == [70]


def test_out_of_memory_at_a_launch_goes_on_in_smaller_packs_and_loses_nothing():
    device = Device(most=40)
    lengths = [10] * 30
    made = engine(device)
    assert values(made.submit(sequences(*lengths), priority="background")) == lengths
    fetched = [part for what, part in device.log if what == "fetch"]
    assert sum(map(len, fetched)) == 30, "nothing is computed twice"
    assert max(map(sum, fetched)) <= 40


def test_close_hands_out_what_was_launched_and_names_itself_to_the_rest():
    device = Device()
    device.gate.clear()
    made = engine(device)
    with made._workers.lock:  # all wait before the worker takes the first
        futures = [made.submit(sequences(90), priority="background") for _ in range(4)]
    while len(device.log) < 2:
        time.sleep(0.001)
    made._workers.close()
    device.gate.set()
    done = [future.exception(10) is None for future in futures]
    assert done == [True, True, False, False]


def test_a_pack_has_no_more_than_takes_a_twentieth_of_a_second():
    for tokens_a_second in (20_000, 600_000, 3_000_000):
        pace = scheduler._Pace()
        pace.note(pace.tokens, 3.0)  # the first pass sets the libraries up
        for _ in range(30):
            pace.note(pace.tokens, pace.tokens / tokens_a_second)
        assert 0.04 < pace.tokens / tokens_a_second < 0.06
        before = pace.tokens
        pace.note(10, 0.001)  # a query says nothing of how fast bulk goes
        assert pace.tokens == before


def test_the_first_packs_are_small_and_a_caller_s_own_budget_stays_its_own():
    device = Device(budget=1 << 30)
    made = engine(device)
    values(made.submit(sequences(*[1000] * 100), priority="background"))
    assert sum(device.log[0][1]) == 4000
    device.log.clear()
    values(made.submit(sequences(*[1000] * 100), priority="background", budget=50_000))
    assert [sum(part) for what, part in device.log if what == "launch"] == [50_000] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("overlaps", [True, False])
def test_a_forked_child_is_told_that_it_can_t_use_the_gpu(overlaps):
    device = Device()
    device.overlaps = overlaps
    made = engine(device)
    assert values(made.submit(sequences(3), priority="interactive")) == [3]
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            try:
                said = str(values(made.submit(sequences(4), priority="interactive")))
            except ComputationError as exc:
                said = str(exc)
            os.write(write, said.encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    assert ("'spawn'" in said) if overlaps else said == "[4.0]"
