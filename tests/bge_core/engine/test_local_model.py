"""A model's calls and the devices that they feed."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

from bge_core import Embedder
from bge_core.backends.table import BACKENDS
from bge_core.engine.call import Call

TEXTS = [f"{number} panda cat" for number in range(6_000)]


class Device:
    """A runner whose row of a sequence is its length."""

    padded = False
    threads = 1

    def __init__(self, devices: Devices) -> None:
        self.default_budget = devices.budget
        self._devices = devices

    def run(self, sequences):
        self._devices.meet()
        lengths = [len(sequence) for sequence in sequences]
        return np.repeat(np.array(lengths, dtype=np.float32)[:, None], 32, axis=1)


class Devices:
    """So many devices, each of which starts when all of them have something to do."""

    def __init__(self, count: int, budget: int) -> None:
        self.budget = budget
        self._barrier = threading.Barrier(count)
        self.met = threading.Event()
        self.devices = [Device(self) for _ in range(count)]

    def meet(self) -> None:
        if not self.met.is_set():
            self._barrier.wait(10)
            self.met.set()


@pytest.fixture
def devices(monkeypatch):
    def put(count: int, budget: int) -> Devices:
        made = Devices(count, budget)
        torch_s = dataclasses.replace(BACKENDS["torch"], load=lambda *_: made.devices)
        monkeypatch.setitem(BACKENDS, "torch", torch_s)
        return made

    return put


@pytest.mark.parametrize(("count", "budget"), [(3, 4_000), (8, 2_000)])
async def test_one_caller_keeps_all_devices_busy(call, devices, en_folder, count, budget):
    made = devices(count, budget)
    with Embedder(en_folder, device=["cpu"] * count) as embedder:
        vectors = await call(embedder, "embed_documents", TEXTS)
    assert made.met.is_set()
    assert vectors.shape == (len(TEXTS), 32)


def test_a_caller_s_own_budget_is_what_the_devices_are_fed_by(devices, en_folder):
    made = devices(8, 100)
    with Embedder(en_folder, device=["cpu"] * 8, batch_tokens=2_000) as embedder:
        embedder.embed_documents(TEXTS)
    assert made.met.is_set()


@pytest.mark.parametrize(("budget", "slices"), [(100, 3), (2_000, 5)])
def test_so_much_and_no_more_is_tokenised_ahead(devices, en_folder, budget, slices):
    devices(2, budget)
    with Embedder(en_folder, device=["cpu"] * 2) as embedder:
        call = Call(TEXTS)
        steps = embedder.local.steps(call, priority="background")
        next(steps)  # until it waits for the first slice
        tokenised = len(call.truncated)
        steps.close()
    assert tokenised == slices * 512
