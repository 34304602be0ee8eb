"""What several models may take of one GPU's memory, with a stub of the GPU."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from bge_core.backends.base import default_budget

SHAPE = SimpleNamespace(hidden_size=1024, intermediate_size=4096)
TOKEN = (3 * 4096 + 8 * 1024) * 2
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def memory(monkeypatch):
    """Bytes of each device that nobody has, that torch has, and that tensors have."""
    state = SimpleNamespace(free=8 << 30, reserved=0, allocated=0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (state.free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: state.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: state.allocated)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return state


def budget(device=FIRST):
    return default_budget(SHAPE, device, "float16")


def taken(budgets):
    """Bytes of two priorities' packs."""
    return sum(2 * TOKEN * budget.tokens for budget in budgets)


def test_models_that_compute_at_once_fit_together(memory):
    budgets = [budget()]
    assert budgets[0].tokens == memory.free // 4 // TOKEN
    for _ in range(4):
        budgets.append(budget())
        assert taken(budgets) <= memory.free
        assert 2 * taken(budgets[-1:]) <= memory.free - taken(budgets[:-1])
    assert [one.tokens for one in budgets] == sorted({one.tokens for one in budgets})[::-1]


def test_a_closed_model_gives_its_share_back(memory):
    held = [budget(), budget()]
    most = held[0].tokens
    del held[:]
    gc.collect()
    assert budget().tokens == most


def test_each_device_has_its_own_memory_whatever_it_is_called(memory):
    first = budget()
    assert budget(SECOND).tokens == first.tokens
    assert budget(torch.device("cuda")).tokens == (memory.free - taken([first])) // 4 // TOKEN


def test_what_torch_keeps_of_passes_that_are_over_is_free(memory):
    first = budget()
    # It computed: what its packs took is torch's now, and no tensor's.
    memory.free -= taken([first])
    memory.reserved, memory.allocated = taken([first]) + 1000, 1000
    assert budget().tokens == ((8 << 30) - taken([first])) // 4 // TOKEN


def test_a_full_device_leaves_a_pack_of_a_few_texts_and_a_large_one_no_endless_pack(memory):
    memory.free = 1000
    assert budget().tokens == 2048
    memory.free = 80 << 30
    assert budget(SECOND).tokens == 131_072


def test_an_engine_s_model_holds_its_share_until_it_is_closed(en_folder, memory, monkeypatch):
    from bge_core import Embedder
    from bge_core.backends import memory as shares
    from bge_core.backends import select

    monkeypatch.setattr(
        select,
        "default_budget",
        lambda config, _, dtype: default_budget(config, SECOND, dtype),
    )

    def held():
        gc.collect()
        return sum(one.size for one in shares._budgets if one.device == SECOND)

    with Embedder(en_folder, device="cpu") as embedder:
        embedder.embed_queries(["a panda"])
        assert held() == 2 * 131_072 * (3 * 64 + 8 * 32) * 4
        workers = embedder.local.loaded()._workers.all_threads()
    for worker in workers:
        worker.join(10)
    assert held() == 0
