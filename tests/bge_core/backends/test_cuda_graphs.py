"""CUDA graphs without CUDA: what is launched is written down and repeated by torch's dispatcher.

tests/cuda tests them on a GPU.
"""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bge_core.backends import packing
from bge_core.backends.bert import load_bert
from bge_core.backends.cuda_graphs import GraphedEncoder, StaticPack, room_for
from bge_core.backends.memory import Budget
from bge_core.backends.packing import Pack
from bge_core.checkpoints.metadata import read
from bge_core.checkpoints.source import Source
from bge_core.tokenizer import TokenSequence

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=20)
STEPS = ["first_token_states", "hidden_states"]


class Recorder(TorchDispatchMode):
    """Writes operators down with their arguments, and repeats them into the same memory."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def capture_begin(self, *, pool, capture_error_mode):
        assert capture_error_mode == "thread_local", "other threads compute meanwhile"
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)

    def replay(self):
        for func, args, kwargs, out in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(*map(tensors, (out, again)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors(out):
    return out if isinstance(out, (tuple, list)) else [out]


def attend_by_bounds(queries, keys, values, asked):
    """Attention in one call from the numbers on the device alone; NaN in rows of no sequence."""
    pack, query_bounds = asked.pack, asked.query_bounds
    segments = [
        torch.searchsorted(bounds[1:].contiguous(), torch.arange(len(rows)), right=True)
        for bounds, rows in ((query_bounds, queries), (pack.cu_seqlens, keys))
    ]
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * queries.shape[-1] ** -0.5
    apart = segments[0][:, None] != segments[1][None, :]
    weights = scores.masked_fill(apart, float("-inf")).softmax(-1)
    # A key beside the sequences may be NaN, too, which no weight of 0 takes away.
    known = values.masked_fill((segments[1] == len(pack.cu_seqlens) - 1)[:, None, None], 0.0)
    attended = torch.einsum("hqk,khd->qhd", weights.nan_to_num(), known)
    outside = segments[0] == len(query_bounds) - 1
    return attended.masked_fill(outside[:, None, None], float("nan"))


@pytest.fixture
def _on_a_device(monkeypatch):
    monkeypatch.setattr(packing, "_one_call", lambda *_, **__: attend_by_bounds)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def encoders(en_folder, m3_folder):
    """BERT, and XLM-RoBERTa with the offset of its positions."""
    found = {}
    for name, folder in (("bert", en_folder), ("xlm-roberta", m3_folder)):
        checkpoint = read(Source.of(folder), folder)
        encoder = load_bert(checkpoint, kind="embedder", dtype=torch.float32, device=CPU)
        found[name] = encoder, checkpoint.position_offset
    return found


def pack_of(*lengths, offset=None):
    rng = np.random.default_rng(sum(lengths))
    # The families whose positions have an offset have one token type.
    sequences = [
        TokenSequence(rng.integers(5, 60, size=length), length if offset else length // 2)
        for length in lengths
    ]
    return Pack(sequences, CPU, offset)


@given(LENGTHS, st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([None, 1]))
def test_a_room_holds_a_pack_s_numbers_and_nothing_of_the_pack_before(lengths, before, offset):
    pack = pack_of(*lengths, offset=offset)
    room = room_for(pack)
    static = StaticPack((), CPU, room=room)
    if room_for(pack_of(*before)).rows <= room.rows and len(before) <= room.slots:
        static.fill(pack_of(*before))
    static.fill(pack)
    count, tokens = len(lengths), sum(lengths)
    for name, tensor in static.inputs().items():
        expected = pack.inputs()[name]
        assert tensor.shape == (1, room.rows)
        assert tensor.dtype == expected.dtype
        assert tensor[:, :tokens].equal(expected)
        assert set(tensor[0, tokens:].tolist()) <= {0, offset or 0}
    assert static.cu_seqlens[: count + 1].equal(pack.cu_seqlens)
    assert set(static.cu_seqlens[count + 1 :].tolist()) <= {tokens}, "the rest has no tokens"
    assert static.first_token_indices()[:count].equal(pack.first_token_indices())
    assert static.first_token_indices().max() < tokens
    assert static.ordinals.tolist() == list(range(room.slots + 1))
    assert pack.longest <= static.longest
    assert {one.dtype for one in (static.cu_seqlens, static.ordinals)} == {torch.int32}


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([1], 32),
        ([16, 16], 32),
        ([2, 2, 2], 64),
        ([33], 64),
        ([512], 512),
        ([8] * 64, 1024),
        ([2] * 65, None),
        ([513], None),
        ([512, 513], None),
        ([512, 512], 1024),
        ([500, 500, 25], None),
    ],
)
def test_the_smallest_room_is_taken(lengths, rows):
    room = room_for(pack_of(*lengths))
    assert (room and room.rows) == rows


@pytest.mark.usefixtures("_on_a_device")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["bert", "xlm-roberta"])
def test_a_graph_computes_what_the_encoder_does(encoders, name, step):
    encoder, offset = encoders[name]
    graphed = GraphedEncoder(encoder, CPU)
    packs = [(1,), (32,), (2, 30), (31, 1), (5, 5), (3, 20, 10), (60,), (7,), (16, 16), (1, 1)]
    for turn in range(3):
        for lengths in packs:
            pack = pack_of(*lengths, offset=offset)
            expected = getattr(encoder, step)(pack)
            found = getattr(graphed, step)(pack)
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        # The first of each size runs plainly, and the second is what its graph is compared with.
        assert graphed.replays == (turn + 1) * len(packs) - 4
    assert graphed.works


@pytest.mark.usefixtures("_on_a_device")
def test_a_pack_that_has_no_room_is_computed_plainly(encoders):
    encoder, _ = encoders["bert"]
    graphed = GraphedEncoder(encoder, CPU)
    large = pack_of(*[2] * 65)
    for _ in range(4):
        rows = graphed.first_token_states(large)
    assert rows.equal(encoder.first_token_states(large))
    assert (graphed.replays, graphed.works) == (0, True)


class Refusing(Recorder):
    def capture_end(self):
        super().capture_end()
        msg = "operation not permitted when stream is capturing"
        raise RuntimeError(msg)


class Forgetful(Recorder):
    """Repeats all but what reads the ids."""

    def replay(self):
        self.steps = [step for step in self.steps if "embedding" not in str(step[0])]
        for _, _, _, out in self.steps[-1:]:
            out.zero_()


class BreaksLater(Recorder):
    def replay(self):
        super().replay()
        self.steps[0] = (None, (), {}, None)  # the second replay raises


@pytest.mark.usefixtures("_on_a_device")
@pytest.mark.parametrize("broken", [Refusing, Forgetful, BreaksLater])
def test_what_goes_wrong_with_a_graph_is_nobody_s_error(encoders, broken, monkeypatch, caplog):
    encoder, _ = encoders["bert"]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", broken)
    graphed = GraphedEncoder(encoder, CPU)
    with caplog.at_level("DEBUG", logger="bge_core"):
        for length in (4, 5, 6, 7):
            pack = pack_of(length)
            assert graphed.first_token_states(pack).equal(encoder.first_token_states(pack))
    assert caplog.text.count("CUDA graphs are not used") == 1
    assert (graphed.replays, graphed.works) == (0, False)


@pytest.mark.usefixtures("_on_a_device")
def test_without_a_kernel_for_all_sequences_nothing_is_captured(encoders, monkeypatch):
    encoder, _ = encoders["bert"]
    monkeypatch.setattr(packing, "_one_call", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", None)
    graphed = GraphedEncoder(encoder, CPU)
    for _ in range(3):
        pack = pack_of(3, 4)
        assert graphed.hidden_states(pack).equal(encoder.hidden_states(pack))
    assert not graphed.works


@pytest.mark.usefixtures("_on_a_device")
def test_rows_that_overflow_say_nothing_of_the_graph(encoders, monkeypatch):
    encoder, _ = encoders["bert"]
    graphed = GraphedEncoder(encoder, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(encoder.norm, "eps", float("nan"))
        for _ in range(3):
            assert not torch.isfinite(graphed.first_token_states(pack_of(9))).any()
    for _ in range(2):
        pack = pack_of(8)
        torch.testing.assert_close(
            graphed.first_token_states(pack), encoder.first_token_states(pack)
        )
    assert (graphed.replays, graphed.works) == (1, True)


def test_it_belongs_to_the_thread_that_made_it_and_to_the_weights_number_format(encoders):
    graphed = GraphedEncoder(encoders["bert"][0], CPU)
    elsewhere: list[bool] = []
    thread = threading.Thread(target=lambda: elsewhere.append(graphed.is_here))
    thread.start()
    thread.join()
    assert graphed.is_here
    assert elsewhere == [False]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not graphed.is_here


def test_only_the_queries_thread_of_a_device_has_graphs(encoders, monkeypatch):
    from bge_core.backends.base import TorchRunner
    from bge_core.backends.packed import PackedRunner, PooledHead

    encoder, _ = encoders["bert"]
    runner = PackedRunner(
        encoder,
        PooledHead("cls", lambda rows: rows),
        device=CPU,
        position_offset=None,
        budget=Budget(1024),
    )
    monkeypatch.setattr(TorchRunner, "on_thread", lambda *_, **__: contextlib.nullcontext())
    for overlaps, urgent in ((False, True), (True, False), (True, True)):
        runner.overlaps = overlaps
        with runner.on_thread(urgent=urgent):
            assert (runner._graphed is not None) == (overlaps and urgent)
        assert runner._graphed is None, "its graphs go with the thread"
