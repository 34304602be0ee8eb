"""Eight bits: the products are exact, the vectors near float32's, and nobody else's."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from bge_core import ArgumentError, CheckpointError, Embedder, M3Embedder, Reranker
from bge_core.backends import int8, select
from bge_core.backends.int8 import Int8Linear, channel_scales
from bge_core.devices import Placement

here = pytest.mark.skipif(not int8.int8_works(), reason="this torch or this CPU has no FBGEMM")


def layer(inner, outer, *, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(inner, outer)


def by_hand(linear, rows, *, zero):
    """Quantise and multiply in whole numbers, as numpy does it."""
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    steps = channel_scales(linear.weight.detach()).numpy()
    bytes_ = np.rint(weight / steps[:, None]).astype(np.int64)
    assert np.abs(bytes_).max() <= 127
    largest = rows.max(1, keepdims=True) if zero == 16 else np.abs(rows).max(1, keepdims=True)
    least = 0.17 * (255 - zero) / zero if zero == 16 else 1e-12
    largest = np.maximum(largest, np.float32(least))
    step = np.float32(1 / (255 - zero))
    own = np.clip(np.rint(rows / largest / step), -zero, 255 - zero).astype(np.int64)
    return (own @ bytes_.T) * (steps * step) * largest + bias


@here
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("sizes", [(48, 96), (49, 7), (1536, 384)])
@pytest.mark.parametrize("after_gelu", [False, True])
def test_a_layer_gives_what_whole_numbers_give(rows, sizes, after_gelu):
    linear = layer(*sizes)
    given = torch.randn(rows, sizes[0]) * torch.logspace(-2, 1, rows)[:, None]
    if after_gelu:
        given = torch.nn.functional.gelu(given)
    with torch.inference_mode():
        out = Int8Linear(linear, after_gelu=after_gelu)(given).numpy()
    expected = by_hand(linear, given.numpy(), zero=16 if after_gelu else 128)
    # A number in the middle of two bytes may go to either.
    assert np.abs(out - expected).max() <= 3e-3 * np.abs(expected).max()
    assert np.mean(np.abs(out - expected) <= 1e-5 * np.abs(expected).max()) > 0.5


@here
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_don_t_overflow(sign):
    # All weights and numbers at the top of their range: AVX2 adds neighbours in 16 bits.
    linear = layer(64, 8)
    with torch.inference_mode():
        linear.weight.fill_(sign * 0.5)
        linear.bias.zero_()
        out = Int8Linear(linear)(torch.full((5, 64), 3.0))
    torch.testing.assert_close(out, torch.full((5, 8), sign * 96.0), rtol=5e-3, atol=0)


@here
def test_zeros_and_what_is_no_number():
    linear = layer(8, 4)
    with torch.inference_mode():
        own = Int8Linear(linear)
        torch.testing.assert_close(own(torch.zeros(2, 8)), linear.bias.expand(2, 4))
        assert own(torch.zeros(0, 8)).shape == (0, 4)
        broken = torch.ones(3, 8)
        broken[1, 2] = float("nan")
        assert torch.isnan(own(broken)).any(1).tolist() == [False, True, False]
        linear.weight[0] = 0
        assert Int8Linear(linear)(torch.ones(1, 8))[0, 0] == linear.bias[0]


@here
@pytest.mark.parametrize("folder", ["en_folder", "zh_folder", "m3_folder", "stand_in_folder"])
def test_an_embedder_s_vectors_are_near_those_of_float32(folder, request, corpus):
    corpus = corpus[:12]
    name = request.getfixturevalue(folder)
    with (
        Embedder(name, query_instruction="") as exact,
        Embedder(name, query_instruction="", dtype="int8") as fast,
    ):
        assert fast.dtype == "int8"
        assert fast.fingerprint != exact.fingerprint
        for method in ("embed_documents", "embed_queries"):
            ours, theirs = getattr(fast, method)(corpus), getattr(exact, method)(corpus)
            cosines = (ours * theirs).sum(1)
            assert cosines.min() > 0.99
            assert not np.array_equal(ours, theirs)


@here
def test_a_text_s_vector_doesn_t_depend_on_the_others(stand_in_folder, corpus):
    corpus = corpus[:8]
    with Embedder(stand_in_folder, query_instruction="", dtype="int8") as model:
        together = model.embed_documents(corpus)
        alone = np.concatenate([model.embed_documents([text]) for text in corpus])
        with ThreadPoolExecutor(4) as pool:
            threads = np.concatenate(
                list(pool.map(lambda text: model.embed_queries([text]), corpus))
            )
        again = pickle.loads(pickle.dumps(model)).embed_documents(corpus)
    # Attention is in float32, and a last digit there may move a byte by one.
    for other in (alone, threads, again):
        assert np.abs(together - other).max() < 5e-3


@here
@pytest.mark.parametrize("folder", ["reranker_folder", "bert_reranker_folder"])
def test_a_reranker_s_scores_are_near_those_of_float32(folder, request, corpus):
    corpus = corpus[:12]
    name = request.getfixturevalue(folder)
    with (
        Reranker(name, normalize=False) as exact,
        Reranker(name, normalize=False, dtype="int8") as fast,
    ):
        theirs = exact.score(corpus[0], corpus)
        ours = fast.score(corpus[0], corpus)
    assert np.abs(ours - theirs).max() < 0.1 * np.abs(theirs).max()
    assert fast.fingerprint != exact.fingerprint


@here
def test_bge_m3_s_three_outputs(m3_folder, corpus):
    with M3Embedder(m3_folder, dtype="int8") as fast, M3Embedder(m3_folder) as exact:
        ours, theirs = fast.encode(corpus[:4]), exact.encode(corpus[:4])
    assert ours.dense is not None
    assert theirs.dense is not None
    assert (ours.dense * theirs.dense).sum(1).min() > 0.99


@here
def test_the_user_s_engine_stays(en_folder):
    before = torch.backends.quantized.engine
    Int8Linear(layer(8, 4))
    assert torch.backends.quantized.engine == before


@pytest.mark.parametrize("device", ["cuda", "mps", ["cpu", "cuda:1"]])
def test_it_runs_on_the_cpu_alone(device, en_folder):
    with pytest.raises(ArgumentError, match="dtype='int8' runs on the CPU, not on device="):
        Embedder(en_folder, device=device, dtype="int8")


def test_the_best_device_may_be_no_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ArgumentError, match="pass device='cpu'"):
        Placement.of(dtype="int8").resolve()


def test_with_use_fp16_it_is_one_of_the_two(en_folder):
    with pytest.raises(ArgumentError, match="drop one of the two"):
        Embedder(en_folder, dtype="int8", use_fp16=True)


def test_openvino_computes_no_int8(en_folder):
    with pytest.raises(ArgumentError, match="computes in float32, not in dtype='int8'"):
        Embedder(en_folder, dtype="int8", backend="openvino")


@here
@pytest.mark.parametrize("folder", ["code_folder", "gemma_reranker_folder", "minicpm_folder"])
def test_other_models_are_refused_in_a_sentence(folder, request):
    name = request.getfixturevalue(folder)
    make = Embedder if folder == "code_folder" else Reranker
    refused = pytest.raises(CheckpointError, match=r"families bert, .*: pass dtype='float32'")
    with make(name, dtype="int8") as model, refused:
        model.embed_documents(["x"]) if make is Embedder else model.score("x", ["y"])


def test_a_machine_without_it_says_so(en_folder, monkeypatch):
    monkeypatch.setattr(select, "int8_works", lambda: False)
    refused = pytest.raises(ArgumentError, match="needs torch's FBGEMM operators")
    with Embedder(en_folder, dtype="int8") as model, refused:
        model.embed_documents(["x"])


def test_a_torch_without_the_operators_is_noticed(monkeypatch):
    monkeypatch.setattr(Int8Linear, "__init__", lambda *_, **__: torch.ops.quantized.no_such_thing)
    assert not int8.int8_works.__wrapped__()


def test_both_hosts_take_it(en_folder, corpus):
    from langchain_bge import BGEEmbeddings as LangChain
    from llamaindex_bge import BGEEmbedding as LlamaIndex

    with Embedder(en_folder, dtype="int8") as core:
        expected = core.embed_documents(corpus[:3])
        theirs = LangChain(model=en_folder, dtype="int8").embed_documents(list(corpus[:3]))
        np.testing.assert_allclose(theirs, expected, atol=5e-3)
        theirs = LlamaIndex(model=en_folder, dtype="int8").get_text_embedding_batch(
            list(corpus[:3])
        )
        np.testing.assert_allclose(theirs, expected, atol=5e-3)


@here
def test_another_pooling_than_three_is_refused_too(en_folder, copy_of):
    folder = copy_of(en_folder)
    file = folder / "1_Pooling" / "config.json"
    config = json.loads(file.read_text())
    config |= {"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}
    file.write_text(json.dumps(config))
    refused = pytest.raises(CheckpointError, match="dtype='int8' runs encoders")
    with Embedder(folder, dtype="int8", query_instruction="") as model, refused:
        model.embed_documents(["x"])
