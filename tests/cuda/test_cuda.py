"""The CUDA path, on whatever GPU is there: `make test-cuda` prints what came of it.

Without a GPU each test says that it was skipped.
"""

from __future__ import annotations

import gc
import logging
import os
import threading

import numpy as np
import pytest
import torch
import transformers

from bge_core import ComputationError, Embedder, M3Embedder, Reranker
from bge_core.backends import packing
from bge_core.backends.base import POOLS, OverlappingRunner, TorchRunner
from bge_core.backends.bert import Bert
from bge_core.backends.cuda_graphs import room_for
from bge_core.backends.packed import PackedRunner
from bge_core.backends.packing import Pack, attend, attend_first
from bge_core.backends.runner_options import RunnerOptions
from bge_core.backends.select import load_runner
from bge_core.checkpoints.metadata import read
from bge_core.checkpoints.source import Source
from bge_core.tokenizer import TokenSequence

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")

DEVICE = "cuda"
DTYPES = ["float32", "bfloat16", "float16"]
TEXTS = [
    "panda",
    "",
    "a cat and a panda " * 9,
    *(f"{n} {'cat ' * (n * 7 % 60)}" for n in range(60)),
]
PAIRS = [("a panda", text) for text in TEXTS]
EMBEDDERS = {
    "BERT, cls": ("en_folder", {}, "cls"),
    "BERT, mean": ("en_folder", {"pooling": "mean"}, "mean"),
    "XLM-RoBERTa, cls": ("m3_folder", {}, "cls"),
    "decoder, last": ("reasoner_folder", {}, "last"),
}


def agree(found, expected, dtype):
    if dtype == "float32":
        np.testing.assert_allclose(found, expected, atol=1e-4)
        return
    # One step of bfloat16 beside 1 is 0.008.
    cosines = (found * expected).sum(1)
    cosines /= np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert cosines.min() > (0.999 if dtype == "float16" else 0.99)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", EMBEDDERS)
def test_vectors_are_those_of_plain_transformers(kind, dtype, request, reference_embed):
    name, options, pooling = EMBEDDERS[kind]
    folder = request.getfixturevalue(name)
    with Embedder(folder, device=DEVICE, dtype=dtype, **options) as embedder:
        together = embedder.embed_documents(TEXTS)
        alone = np.concatenate([embedder.embed_documents([text]) for text in TEXTS[:9]])
        with Embedder(folder, device="cpu", **options) as on_cpu:
            same = on_cpu.embed_documents(TEXTS)
    agree(together, same, dtype)
    agree(together[:9], alone, dtype)
    if name == "en_folder":
        agree(together, reference_embed(folder, TEXTS, pooling), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["reranker_folder", "bert_reranker_folder"])
def test_scores_are_those_of_plain_transformers(name, dtype, request, reference_score):
    folder = request.getfixturevalue(name)
    with Reranker(folder, device=DEVICE, dtype=dtype, normalize=False) as reranker:
        scores = reranker.score_pairs(PAIRS)
    expected = reference_score(folder, PAIRS)
    atol = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    np.testing.assert_allclose(scores, expected, atol=atol * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", ["gemma_reranker_folder", "minicpm_folder", "lightweight_folder"])
def test_decoders_that_rerank_give_what_they_give_on_a_cpu(name, request):
    folder = request.getfixturevalue(name)
    with (
        Reranker(folder, device=DEVICE, dtype="float32", normalize=False) as here,
        Reranker(folder, device="cpu", normalize=False) as there,
    ):
        np.testing.assert_allclose(
            here.score_pairs(PAIRS), there.score_pairs(PAIRS), atol=1e-3, rtol=1e-3
        )


def test_all_three_outputs_of_bge_m3_are_those_of_a_cpu(m3_folder):
    with (
        M3Embedder(m3_folder, device=DEVICE, dtype="float32") as here,
        M3Embedder(m3_folder, device="cpu") as there,
    ):
        found, expected = (
            one.encode(TEXTS, sparse=True, multi_vector=True) for one in (here, there)
        )
    np.testing.assert_allclose(found.dense, expected.dense, atol=1e-4)
    for one, other in zip(found.multi_vector, expected.multi_vector, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    for weights, others in zip(found.sparse, expected.sparse, strict=True):
        assert weights.keys() == others.keys()
        assert weights == pytest.approx(others, abs=1e-4)


def pack_of(*lengths):
    return Pack([TokenSequence([5] * n, n) for n in lengths], torch.device(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(
    ("causal", "window", "key_heads"),
    [(False, None, 4), (True, None, 2), (True, 8, 2), (False, 8, 4)],
)
def test_attention_of_a_pack_is_that_of_each_sequence(dtype, head_dim, causal, window, key_heads):
    pack = pack_of(1, 3, 3, 17, 40)
    torch.manual_seed(0)
    queries, keys, values = [
        torch.randn(pack.tokens, heads, head_dim, device=DEVICE, dtype=getattr(torch, dtype))
        for heads in (4, key_heads, key_heads)
    ]
    with torch.inference_mode():
        found = attend(queries, keys, values, pack, causal=causal, sliding_window=window)
        if key_heads == 4:  # no encoder shares keys among its heads
            first = attend_first(queries[pack.first_token_indices()], keys, values, pack)
    at = 0
    for number, length in enumerate(pack.lengths):
        query, key, value = (
            rows[at : at + length].float().repeat_interleave(4 // rows.shape[1], 1)
            for rows in (queries, keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", query, key) * head_dim**-0.5
        place = torch.arange(length, device=DEVICE)
        distance = place[:, None] - place[None, :]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if window:
            hidden |= distance.abs() >= window
        expected = torch.einsum(
            "hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value
        )
        atol = 1e-4 if dtype == "float32" else 3e-2
        torch.testing.assert_close(found[at : at + length].float(), expected, atol=atol, rtol=1e-2)
        if key_heads == 4:
            whole = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)[0]
            torch.testing.assert_close(first[number].float(), whole, atol=atol, rtol=1e-2)
        at += length


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_call_attends_in_all_sequences(dtype):
    """Else each length is a call: right, and slow."""
    rows = torch.zeros(1, 1, 32, device=DEVICE, dtype=getattr(torch, dtype))
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    flash = dtype != "float32" and ampere
    kernel = packing._flash if flash else packing._efficient
    assert packing._one_call(rows, windowed=False) is kernel
    assert packing._one_call(rows, windowed=True) is (kernel if flash else None)


def test_the_mean_is_that_of_each_sequence():
    pack = pack_of(1, 3, 3, 17)
    hidden = torch.randn(pack.tokens, 32, device=DEVICE)
    expected = torch.stack([own.mean(0) for own in hidden.split(pack.lengths)])
    torch.testing.assert_close(POOLS["mean"](hidden, pack), expected)


def test_out_of_memory_is_split_and_loses_nothing(en_folder, caplog):
    texts = [f"{n} {'panda ' * 500}" for n in range(600)]
    with Embedder(en_folder, device=DEVICE, dtype="float32", batch_tokens=1 << 24) as embedder:
        embedder.embed_documents(texts[:1])
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        room = torch.cuda.memory_reserved() + (64 << 20)
        torch.cuda.set_per_process_memory_fraction(room / total)
        try:
            with caplog.at_level(logging.WARNING, logger="bge_core"):
                vectors = embedder.embed_documents(texts)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory on a pack" in caplog.text
    with Embedder(en_folder, device="cpu") as on_cpu:
        np.testing.assert_allclose(vectors[:20], on_cpu.embed_documents(texts[:20]), atol=1e-4)
    assert np.isfinite(vectors).all()


def test_queries_are_answered_while_bulk_work_goes_on(en_folder):
    with Embedder(en_folder, device=DEVICE) as embedder:
        (runner,) = embedder.local.loaded().runners["interactive"]
        assert isinstance(runner, OverlappingRunner)
        assert runner.overlaps
        expected = embedder.embed_queries(["a panda"])
        texts = [f"{n} {'panda cat ' * 200}" for n in range(20_000)]
        bulk = threading.Thread(target=embedder.embed_documents, args=(texts,))
        bulk.start()
        answered = 0
        while bulk.is_alive():
            agree(embedder.embed_queries(["a panda"]), expected, "float16")
            answered += 1
        bulk.join()
    assert answered >= 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_what_to_do(en_folder):
    with Embedder(en_folder, device=DEVICE) as embedder:
        embedder.embed_queries(["a panda"])
        read, write = os.pipe()
        child = os.fork()
        if not child:
            said = "computed"
            try:
                embedder.embed_queries(["a panda"])
            except ComputationError as exc:
                said = str(exc)
            finally:
                os.write(write, said.encode())
                os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            assert "'spawn'" in pipe.read()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_what_overflows_in_float16_is_computed_again(pooling, tmp_path):
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.3,
    )
    model = transformers.BertModel(config).eval()
    pattern = torch.tensor([1.0, -1.0]).repeat(16)
    layer = model.encoder.layer[0]
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[99] = 10 * pattern
        layer.attention.output.dense.weight *= 0.01
        layer.intermediate.dense.weight[0] = 3e3 * pattern
    model.save_pretrained(tmp_path)
    options = RunnerOptions(kind="embedder", pooling=pooling, dtype="float16")
    runner = load_runner(read(Source.of(tmp_path), tmp_path), options, device="cuda:0")
    assert isinstance(runner, TorchRunner)
    texts = [TokenSequence(ids, 4) for ids in ([5, 6, 7, 8], [99, 6, 7, 8])]
    with torch.inference_mode():
        assert not np.isfinite(runner._launch(texts)()).all()
        hidden = [model(input_ids=torch.tensor([text.ids]))[0][0] for text in texts]
    expected = torch.stack([own[0] if pooling == "cls" else own.mean(0) for own in hidden]).numpy()
    agree(runner.run(texts), expected, "bfloat16")
    assert isinstance(runner, PackedRunner)
    with runner.on_thread(urgent=True):
        for _ in range(3):
            agree(runner.run(texts[:1]), expected[:1], "float16")
        agree(runner.run(texts), expected, "bfloat16")
        assert runner._graphed is not None
        assert runner._graphed.replays == 2, "what overflowed there is computed again, too"


# Tokens of each sequence: one and the most of each room, a room's borders, several at once, and
# what has no room.
GRAPHED = [
    (1,),
    (2, 30),
    (32,),
    (33,),
    (64,),
    (3, 20, 41),
    (100,),
    (8,) * 8,
    (129,),
    (250,),
    (16,) * 16,
    (512,),
    (500, 1, 11),
    (511, 500),
    (9,) * 64,
    (9,) * 65,
    (512, 512, 3),
]
LANES = {
    "BERT, cls": ("en_folder", "cls"),
    "BERT, mean": ("en_folder", "mean"),
    "BERT, last": ("en_folder", "last"),
    "XLM-RoBERTa, cls": ("m3_folder", "cls"),
    "BERT's cross-encoder": ("bert_reranker_folder", None),
    "RoBERTa's cross-encoder": ("reranker_folder", None),
}


def runner_of(folder, pooling, dtype):
    kind = "reranker" if pooling is None else "embedder"
    options = RunnerOptions(kind=kind, pooling=pooling, dtype=dtype)
    runner = load_runner(read(Source.of(folder), folder), options, device="cuda:0")
    assert isinstance(runner, PackedRunner)
    return runner


def sequences_of(lengths, seed):
    rng = np.random.default_rng(seed)
    return [TokenSequence(rng.integers(5, 60, size=length), length) for length in sorted(lengths)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lane", LANES)
def test_graphs_compute_what_plain_launches_do(lane, dtype, request):
    name, pooling = LANES[lane]
    runner = runner_of(request.getfixturevalue(name), pooling, dtype)
    packs = [(lengths, seed) for seed in range(3) for lengths in GRAPHED]
    given = [sequences_of(lengths, seed) for lengths, seed in packs]
    plain = [runner.run(sequences) for sequences in given]
    with runner.on_thread(urgent=True):
        graphed = runner._graphed
        assert graphed is not None
        found = [runner.run(sequences) for sequences in given]
        # As a worker does it: the next is launched before the rows of the one before are fetched.
        begun = [runner.launch(sequences) for sequences in given]
        overlapped = [fetch() for fetch in begun]
    rooms = [room_for(Pack(sequences, torch.device("cpu"))) for sequences in given]
    assert graphed.replays == 2 * sum(map(bool, rooms)) - 2 * len({*rooms} - {None})
    assert None in rooms
    for rows in (found, overlapped):
        for some, others in zip(rows, plain, strict=True):
            assert some.shape == others.shape
            if pooling is None:
                atol = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
                np.testing.assert_allclose(some, others, atol=atol * max(1, np.abs(others).max()))
            else:
                agree(some, others, dtype)
    assert runner._graphed is None
    assert not graphed._graphs, "their memory is given back"


def graphs_of(model):
    (runner,) = model.local.loaded().runners["interactive"]
    return runner._graphed


def test_queries_of_many_threads_run_in_graphs_beside_bulk_work_and_after_a_second_load(en_folder):
    queries = ["", "a", "panda", *(f"{n} {'cat ' * n}" for n in range(1, 40, 3))]
    bulk = [f"{n} {'panda cat ' * 100}" for n in range(4_000)]
    with Embedder(en_folder, device="cpu") as on_cpu:
        expected = on_cpu.embed_queries(queries)
    for _ in range(2):
        with Embedder(en_folder, device=DEVICE) as embedder:
            found: list[tuple[int, np.ndarray]] = []

            def ask(start, embedder=embedder, found=found):
                for turn in range(3 * len(queries)):
                    place = (start + turn) % len(queries)
                    found.append((place, embedder.embed_queries([queries[place]])))

            threads = [threading.Thread(target=ask, args=(start,)) for start in range(6)]
            threads.append(threading.Thread(target=embedder.embed_documents, args=(bulk,)))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            agree(
                np.concatenate([rows for _, rows in found]),
                expected[[n for n, _ in found]],
                "float16",
            )
            graphs = graphs_of(embedder)
            assert graphs.works
            assert graphs.replays > 10
            assert len(found) == 18 * len(queries)
            assert graphs._graphs
            workers = embedder.local.loaded()._workers.all_threads()
        for worker in workers:
            worker.join(10)
        assert not graphs._graphs


def test_two_models_capture_at_the_same_time(en_folder, reranker_folder):
    with (
        Embedder(en_folder, device=DEVICE, dtype="float32") as embedder,
        Reranker(reranker_folder, device=DEVICE, dtype="float32", normalize=False) as reranker,
        Reranker(reranker_folder, device="cpu", normalize=False) as on_cpu,
    ):
        passages = TEXTS[:4]
        scores = on_cpu.score("panda", passages)
        vectors = embedder.embed_documents(TEXTS[:4])

        done: list[int] = []

        def rank():
            for count in (1, 2, 3, 4) * 5:
                found = reranker.score("panda", passages[:count])
                np.testing.assert_allclose(found, scores[:count], atol=1e-3)
                done.append(count)

        thread = threading.Thread(target=rank)
        thread.start()
        for count in (1, 2, 3, 4) * 5:
            found = embedder.embed_documents(TEXTS[:count], priority="interactive")
            np.testing.assert_allclose(found, vectors[:count], atol=1e-4)
        thread.join()
        assert len(done) == 20
        for model in (embedder, reranker):
            assert graphs_of(model).works
            assert graphs_of(model).replays


def test_sparse_and_dense_outputs_of_bge_m3_come_of_graphs(m3_folder):
    with (
        M3Embedder(m3_folder, device=DEVICE, dtype="float32") as here,
        M3Embedder(m3_folder, device="cpu") as there,
    ):
        for text in ("a panda", "a cat", "panda", "two cats and a panda"):
            found, expected = (
                one.encode([text], multi_vector=True, priority="interactive")
                for one in (here, there)
            )
            np.testing.assert_allclose(found.dense, expected.dense, atol=1e-4)
            np.testing.assert_allclose(found.multi_vector[0], expected.multi_vector[0], atol=1e-4)
            assert found.sparse[0] == pytest.approx(expected.sparse[0], abs=1e-4)
        assert graphs_of(here).replays == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a machine with one GPU")
@pytest.mark.parametrize("name", ["en_folder", "m3_folder", "reasoner_folder"])
def test_every_gpu_has_the_weights_that_were_read_once(name, request):
    devices = ["cuda:0", "cuda:1"]
    given = sequences_of((3, 9, 40), 0)
    with Embedder(request.getfixturevalue(name), device=devices, dtype="float32") as embedder:
        runners = []
        for runner in embedder.local.loaded().runners["background"]:
            assert isinstance(runner, PackedRunner)
            runners.append(runner)
        assert [str(runner._device) for runner in runners] == devices
        first, second = (runner.run(given) for runner in runners)
        np.testing.assert_allclose(second, first, atol=1e-5)
        for runner in runners:  # whichever device is the current one
            with runner.on_thread(urgent=True):
                for _ in range(4):
                    np.testing.assert_allclose(runner.run(given), first, atol=1e-4)
                assert runner._graphed is None or runner._graphed.replays == 2


def test_models_that_were_closed_leave_no_memory_behind(en_folder):
    def allocated_after_another():
        with Embedder(en_folder, device=DEVICE, dtype="float16", on_truncation="ignore") as model:
            model.embed_documents(TEXTS)
            for _ in range(4):
                model.embed_queries(["panda"])
        del model
        gc.collect()
        return torch.cuda.memory_allocated()

    # cuBLAS keeps memory for each pair of a stream and a handle, of which there are four here.
    before = max(allocated_after_another() for _ in range(4))
    assert max(allocated_after_another() for _ in range(6)) <= before + (1 << 20)


def after_four_passes(folder, given):
    """Whether a new model's graphs are used after four equal packs, and how many they computed."""
    runner = runner_of(folder, "cls", "float16")
    expected = runner.run(given)
    with runner.on_thread(urgent=True):
        graphed = runner._graphed
        for _ in range(4):
            agree(runner.run(given), expected, "float16")
        return graphed.works, graphed.replays


def test_a_capture_that_fails_is_nobody_s_error_and_the_next_model_captures(
    en_folder, m3_folder, monkeypatch
):
    plain = Bert.first_token_states
    failed = []

    def looks(self, pack):
        rows = plain(self, pack)
        if torch.cuda.is_current_stream_capturing():
            failed.append(len(rows))
            rows.sum().item()  # which waits for the device
        return rows

    given = sequences_of((3, 9), 0)
    with monkeypatch.context() as patch:
        patch.setattr(Bert, "first_token_states", looks)
        assert after_four_passes(en_folder, given) == (False, 0)
        assert failed == [2], "it is tried once"
    assert torch.isfinite(torch.randn(4, device=DEVICE)).all()
    torch.cuda.synchronize()
    assert after_four_passes(m3_folder, given) == (True, 2)
