"""bge-m3 in full, against plain transformers and the matrices of its further layers."""

import asyncio
import copy
import functools
import gc
import json
import logging
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import bge_core.m3
from bge_core import (
    ArgumentError,
    CheckpointError,
    ClosedError,
    ComputationError,
    Embedder,
    InputTypeError,
    M3Embedder,
    M3Weights,
    TruncationError,
)
from bge_core.backends.output_cache import OutputCache

TEXTS = [
    "Paris is the capital and the largest city of France, on the river Seine.",
    "大熊猫是中国特有的一种熊科动物，主要吃竹子。",
    "القطة نائمة على الأريكة بينما يهطل المطر في الخارج.",
    "🐼🐼 a panda 大熊猫 and القطة together 👩‍👩‍👧 in one",
    "",
    "cat cat cat cat cat",
    "Paris is the capital and the largest city of France, on the river Seine.",
    "with </s> and <pad> and <unk> and <s> inside",
    "one two three " * 60,
]
PAIRS = [(query, passage) for query in TEXTS[:5] for passage in TEXTS]


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Keep expected warnings out of the report; files about logging have their own tests."""
    caplog.set_level(logging.ERROR)


@pytest.fixture
def embedder(m3_folder):
    with M3Embedder(m3_folder) as embedder:
        yield embedder


@pytest.fixture(scope="session")
def reference(m3_folder):
    """Encode one text by transformers and three matrix products."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(m3_folder)
    model = transformers.AutoModel.from_pretrained(m3_folder).float().eval()
    sparse_head, token_head = (
        torch.load(m3_folder / f"{name}_linear.pt", weights_only=True)
        for name in ("sparse", "colbert")
    )

    @functools.cache
    def encode(text, max_length=8192):
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state[0]
        ids = inputs["input_ids"][0].tolist()
        strengths = hidden @ sparse_head["weight"].T + sparse_head["bias"]
        sparse: dict[int, float] = {}
        for token, strength in zip(ids, strengths[:, 0].tolist(), strict=True):
            if token not in (0, 1, 2, 3) and strength > 0:
                sparse[token] = max(strength, sparse.get(token, 0.0))
        vectors = hidden[1:] @ token_head["weight"].T + token_head["bias"]
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        return (hidden[0] / hidden[0].norm()).numpy(), sparse, vectors.numpy()

    return encode


@pytest.fixture(scope="session")
def reference_scores(reference):
    def scores(query, passage):
        (dense, sparse, multi), (other, other_sparse, other_multi) = (
            reference(query),
            reference(passage),
        )
        return (
            float(dense @ other),
            sum(sparse[token] * other_sparse[token] for token in sparse.keys() & other_sparse),
            float((multi @ other_multi.T).max(1).mean()),
        )

    return scores


def check(encoded, reference, texts, **options):
    expected = [reference(text, **options) for text in texts]
    dense, sparse, multi = zip(*expected, strict=True)
    np.testing.assert_allclose(encoded.dense, dense, atol=1e-5)
    for weights, wanted in zip(encoded.sparse, sparse, strict=True):
        assert weights == pytest.approx(wanted, abs=1e-5)
    for vectors, wanted in zip(encoded.multi_vector, multi, strict=True):
        np.testing.assert_allclose(vectors, wanted, atol=1e-5)


# The outputs.


async def test_all_outputs_are_those_of_plain_transformers(call, embedder, reference):
    encoded = await call(embedder, "encode", TEXTS, multi_vector=True)
    check(encoded, reference, TEXTS)
    assert (encoded.dense.dtype, encoded.dense.shape) == (np.float32, (len(TEXTS), 32))
    assert {vectors.dtype for vectors in encoded.multi_vector} == {np.dtype(np.float32)}
    for weights in encoded.sparse:
        assert {(type(token), type(weight)) for token, weight in weights.items()} <= {(int, float)}
        assert not weights.keys() & {0, 1, 2, 3}
    assert sum(map(len, encoded.sparse)) > 40
    json.dumps(encoded.sparse)


@pytest.mark.parametrize("asked", [("dense",), ("sparse",), ("multi_vector",), ("dense", "sparse")])
async def test_only_what_is_asked_for_is_given(call, embedder, reference, asked):
    options = {name: name in asked for name in ("dense", "sparse", "multi_vector")}
    encoded = await call(embedder, "encode", TEXTS, **options)
    whole = embedder.encode(TEXTS, multi_vector=True)
    assert encoded.tokens is None
    for name in options:
        given = getattr(encoded, name)
        assert (given is not None) == (name in asked)
        if name == "sparse" and given:
            for weights, wanted in zip(given, whole.sparse, strict=True):
                assert weights == pytest.approx(wanted, abs=1e-6)


async def test_tokens_are_spelled_as_the_vocabulary_does_the_heaviest_first(call, embedder):
    encoded = await call(embedder, "encode", ["panda 大熊猫"], return_tokens=True)
    (tokens,), (sparse,) = encoded.tokens, encoded.sparse
    assert sorted(tokens.values()) == sorted(sparse.values())
    assert list(tokens.values()) == sorted(tokens.values(), reverse=True)
    assert "".join(tokens).replace("▁", "")
    assert all(isinstance(token, str) and token for token in tokens)


async def test_no_texts_need_no_model(call, m3_folder, computed):
    embedder = M3Embedder(m3_folder)
    encoded = await call(embedder, "encode", [], multi_vector=True, return_tokens=True)
    assert encoded.dense.shape == (0, 32)
    assert (encoded.sparse, encoded.multi_vector, encoded.tokens) == ([], [], [])
    assert (await call(embedder, "score", [])).shape == (0,)
    assert not computed.passes


def test_equal_texts_are_computed_once_and_are_nobody_s_but_the_caller_s(embedder, computed):
    encoded = embedder.encode(["cat sat"] * 5 + ["dog"])
    assert len(computed.passes) == 1
    assert computed.tokens < 20
    encoded.sparse[0].clear()
    assert encoded.sparse[1]


async def test_one_pass_gives_all_outputs(call, embedder, computed):
    await call(embedder, "encode", TEXTS, multi_vector=True)
    distinct = sum(
        vectors.shape[0] + 1
        for vectors in embedder.encode(
            list(dict.fromkeys(TEXTS)), dense=False, sparse=False, multi_vector=True
        ).multi_vector
    )
    assert computed.passes == [distinct, distinct]


@pytest.mark.parametrize("length", [3, 7, 8192])
async def test_length(call, m3_folder, reference, length):
    with M3Embedder(m3_folder, max_length=length) as embedder:
        encoded = await call(embedder, "encode", TEXTS, multi_vector=True)
    check(encoded, reference, TEXTS, max_length=length)


def test_long_texts_are_read_whole_and_take_one_pass_each(embedder, reference, computed):
    texts = ["panda cat " * 2700, "大熊猫 rain " * 1500]
    encoded = embedder.encode(texts, multi_vector=True)
    lengths = [len(vectors) + 1 for vectors in encoded.multi_vector]
    assert min(lengths) > 7900
    # No pack has more than one of them: the memory of a pass is that of its longest text.
    assert sorted(computed.passes) == sorted(lengths)
    check(encoded, reference, texts)


def test_8192_tokens_are_read_by_default_and_what_is_longer_is_counted(m3_folder, caplog):
    caplog.set_level(logging.WARNING)
    embedder = M3Embedder(m3_folder)
    assert embedder.max_length == 8192
    encoded = embedder.encode(["a " * 9000, "b"], dense=False, sparse=False, multi_vector=True)
    assert len(encoded.multi_vector[0]) == 8191
    (record,) = caplog.records
    assert "1 of 2 texts is longer than max_length=8192" in record.getMessage()


@pytest.mark.parametrize("method", ["encode", "score"])
async def test_truncation_can_be_an_error_before_anything_is_computed(
    call, m3_folder, computed, method
):
    embedder = M3Embedder(m3_folder, max_length=8, on_truncation="error")
    given = ["a", "a " * 20] if method == "encode" else [("a", "a " * 20)]
    with pytest.raises(TruncationError, match="1 of 2 texts"):
        await call(embedder, method, given)
    assert not computed.passes


async def test_an_error_policy_gives_the_same_outputs(call, m3_folder, reference):
    embedder = M3Embedder(m3_folder, on_truncation="error")
    check(await call(embedder, "encode", TEXTS, multi_vector=True), reference, TEXTS)


def test_packs_make_no_difference(m3_folder, reference):
    for tokens in (1, 40, 100_000):
        encoded = M3Embedder(m3_folder, batch_tokens=tokens).encode(TEXTS, multi_vector=True)
        check(encoded, reference, TEXTS)


# Scores.


async def test_scores_are_weighted_means_of_three(call, embedder, reference_scores):
    parts = np.array([reference_scores(*pair) for pair in PAIRS])
    for weights in (
        M3Weights(),
        M3Weights(dense=0.4, sparse=0.2, multi_vector=0.4),
        {"dense": 1, "sparse": 0, "multi_vector": 0},
        {"dense": 0, "sparse": 2},
        M3Weights(dense=0, sparse=0),
    ):
        scores = await call(embedder, "score", PAIRS, weights=weights)
        named = np.array(list(M3Weights.of(weights).named().values()))
        assert (scores.dtype, scores.shape) == (np.float32, (len(PAIRS),))
        np.testing.assert_allclose(scores, parts @ named / named.sum(), atol=1e-5)
    assert len(set(np.round(parts[:, 1], 4))) > 10


async def test_the_default_weights_are_those_of_training(call, embedder):
    pairs = PAIRS[:5]
    named = M3Weights(dense=1.0, sparse=0.3, multi_vector=1.0)
    np.testing.assert_array_equal(
        await call(embedder, "score", pairs), await call(embedder, "score", pairs, weights=named)
    )


async def test_scoring_encodes_each_distinct_text_once(call, embedder, computed):
    pairs = [*PAIRS, ("cat", "cat"), ("cat", TEXTS[0]), (TEXTS[0], "cat")]
    await call(embedder, "score", pairs)
    tokens = computed.tokens
    computed.passes.clear()
    embedder.encode(sorted({text for pair in pairs for text in pair}), multi_vector=True)
    assert computed.tokens == tokens


async def test_few_token_vectors_are_held_while_scoring(
    call, embedder, monkeypatch, reference_scores
):
    monkeypatch.setattr(bge_core.m3, "_SCORED_CHARACTERS", 100)
    held = []
    take = bge_core.m3._Scoring.add_rows

    def counting(self, rows):
        take(self, rows)
        held.append(sum(text is not None for text in self._held))

    monkeypatch.setattr(bge_core.m3._Scoring, "add_rows", counting)
    pairs = [("cat", f"{text} {n}") for n in range(8) for text in TEXTS]
    scores = await call(embedder, "score", pairs, weights={"sparse": 0})
    assert len(held) > 20
    assert max(held) == 1
    expected = [reference_scores(*pair) for pair in pairs]
    np.testing.assert_allclose(scores, np.array(expected)[:, [0, 2]].mean(1), atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "error", "said"),
    [
        ({"dense": 0, "sparse": 0, "multi_vector": 0}, ArgumentError, "All three"),
        ({"dense": -1}, ArgumentError, "0 or more"),
        ({"dense": float("nan")}, ArgumentError, "finite"),
        ({"colbert": 1}, ArgumentError, "'colbert' is no weight"),
        ({"dense": "1"}, InputTypeError, "number"),
        ([1, 0.3, 1], InputTypeError, "name each"),
        (1.0, InputTypeError, "mapping"),
    ],
)
def test_weights_that_give_no_score_are_refused(embedder, weights, error, said):
    with pytest.raises(error, match=said):
        embedder.score([("a", "b")], weights=weights)


CARD = [
    "What is BGE M3?",
    "Defination of BM25",
    (
        "BGE M3 is an embedding model supporting dense retrieval, lexical matching and "
        "multi-vector interaction."
    ),
    (
        "BM25 is a bag-of-words retrieval function that ranks a set of documents based on the "
        "query terms appearing in each document"
    ),
]


def _cached():
    # The tests' own home is empty: this is the user's.
    home = Path(os.environ.get("HF_HUB_CACHE") or Path.home() / ".cache" / "huggingface" / "hub")
    return home if (home / "models--BAAI--bge-m3" / "snapshots").is_dir() else None


@pytest.mark.skipif(_cached() is None, reason="BAAI/bge-m3 is not in the local hub cache")
def test_the_model_card_s_scores():
    pairs = [(query, passage) for query in CARD[:2] for passage in CARD[2:]]
    only = {"dense": 0, "sparse": 0, "multi_vector": 0}
    with M3Embedder("BAAI/bge-m3", cache_folder=_cached(), local_files_only=True) as embedder:
        dense = embedder.score(pairs, weights=only | {"dense": 1})
        # The card compares the two queries for its second one.
        sparse = embedder.score([pairs[0], (CARD[0], CARD[1])], weights=only | {"sparse": 1})
        multi = embedder.score(pairs, weights=only | {"multi_vector": 1})
    np.testing.assert_allclose(dense, [0.6265, 0.3477, 0.3499, 0.678], atol=2e-3)
    np.testing.assert_allclose(sparse, [0.19555, 0.0], atol=2e-3)
    np.testing.assert_allclose(multi[:2], [0.7797, 0.4620], atol=2e-3)


# What is shared.


def test_an_embedder_and_an_m3_embedder_share_one_model(m3_folder, computed):
    with Embedder(m3_folder) as dense, M3Embedder(m3_folder) as m3:
        vectors = dense.embed_documents(TEXTS)
        np.testing.assert_allclose(m3.encode(TEXTS).dense, vectors, atol=1e-6)
    assert len(computed.embeddings) == 1


@pytest.mark.parametrize("first", ["dense", "sparse"])
async def test_the_second_asker_needs_no_pass(call, m3_folder, computed, reference, first):
    with M3Embedder(m3_folder, share_outputs=True) as m3, Embedder(m3_folder) as dense:

        async def ask(output):
            if output == "dense":
                return await call(dense, "embed_documents", TEXTS)
            return (await call(m3, "encode", TEXTS, dense=False)).sparse

        outcomes = {first: await ask(first)}
        tokens = computed.tokens
        second = "sparse" if first == "dense" else "dense"
        outcomes[second] = await ask(second)
        assert computed.tokens == tokens
        assert len(m3.local.loaded().output_cache) == 0
        # What was taken is gone: a third asker computes, and leaves the other half again.
        await ask(second)
        assert computed.tokens == 2 * tokens
        assert await ask(first) is not None
        assert computed.tokens == 2 * tokens
    expected = [reference(text) for text in TEXTS]
    np.testing.assert_allclose(outcomes["dense"], [row[0] for row in expected], atol=1e-5)
    for weights, row in zip(outcomes["sparse"], expected, strict=True):
        assert weights == pytest.approx(row[1], abs=1e-5)


async def test_two_halves_of_one_m3_embedder_take_one_pass(call, m3_folder, computed):
    with M3Embedder(m3_folder, share_outputs=True) as m3:
        await call(m3, "encode", TEXTS, sparse=False)
        tokens = computed.tokens
        await call(m3, "encode", TEXTS, dense=False, priority="interactive")
        assert computed.tokens == tokens


def test_devices_share_what_passes_leave(m3_folder, computed):
    texts = [f"{text} {n}" for n in range(20) for text in TEXTS]
    devices = ["cpu", "cpu:0"]
    with (
        M3Embedder(m3_folder, share_outputs=True, device=devices, batch_tokens=64) as m3,
        Embedder(m3_folder, device=devices, batch_tokens=64) as dense,
    ):
        dense.embed_documents(texts)
        tokens = computed.tokens
        m3.encode(texts, dense=False)
        assert len(computed.threads) == 2
        assert computed.tokens == tokens


def test_other_texts_and_other_cuts_are_computed(m3_folder, computed, reference):
    texts = ["panda " * 30, "cat"]
    with (
        M3Embedder(m3_folder, share_outputs=True, max_length=12) as short,
        Embedder(m3_folder) as dense,
    ):
        dense.embed_documents(texts)
        computed.passes.clear()
        encoded = short.encode(texts, dense=False)
        # "cat" is the same sequence under either length.
        assert computed.passes == [12]
    for text, weights in zip(texts, encoded.sparse, strict=True):
        assert weights == pytest.approx(reference(text, max_length=12)[1], abs=1e-5)


@pytest.mark.parametrize("policy", ["warn", "error"])
def test_the_second_asker_s_texts_are_counted_too(m3_folder, caplog, policy):
    caplog.set_level(logging.WARNING)
    text = ["panda " * 30]
    with (
        M3Embedder(m3_folder, share_outputs=True, max_length=9, on_truncation=policy) as m3,
        Embedder(m3_folder, max_length=9, on_truncation="ignore") as dense,
    ):
        dense.embed_documents(text)
        if policy == "error":
            with pytest.raises(TruncationError):
                m3.encode(text, dense=False)
        else:
            m3.encode(text, dense=False)
            assert len(caplog.records) == 1


def test_nothing_is_kept_unless_somebody_wants_it(m3_folder, computed):
    with M3Embedder(m3_folder) as m3, Embedder(m3_folder) as dense:
        dense.embed_documents(TEXTS)
        tokens = computed.tokens
        m3.encode(TEXTS, dense=False)
        cache = m3.local.loaded().output_cache
        assert not cache.is_shared
        assert len(cache) == 0
        assert computed.tokens == 2 * tokens
        sharing = M3Embedder(m3_folder, share_outputs=True)
        assert cache.is_shared
        dense.embed_documents(TEXTS)
        assert len(cache) == len(set(TEXTS))
        sharing.close()
        assert not cache.is_shared
        with pytest.raises(ClosedError):
            sharing.encode(["a"])
        dense.embed_queries(["b"])
        assert (len(cache), cache.size) == (0, 0)


def test_what_is_shared_is_let_go_with_the_last_one_who_wants_it(m3_folder):
    with Embedder(m3_folder) as dense:
        sharing = [M3Embedder(m3_folder, share_outputs=True) for _ in range(3)]
        sharing[0].encode(TEXTS, dense=False)
        cache = sharing[0].local.loaded().output_cache
        assert len(cache) == len(set(TEXTS))
        sharing.pop().close()
        del sharing[1]  # not closed, and collected
        gc.collect()
        assert cache.is_shared
        assert len(cache) == len(set(TEXTS))
        sharing.pop().close()
        assert len(cache) == 0
        dense.embed_documents(TEXTS)
        assert len(cache) == 0


def test_scores_leave_nothing(m3_folder):
    with M3Embedder(m3_folder, share_outputs=True) as m3:
        m3.score([("cat", "panda")], weights={"dense": 1, "sparse": 0, "multi_vector": 0})
        assert len(m3.local.loaded().output_cache) == 0


def test_engines_of_one_checkpoint_share_what_passes_leave(m3_folder, copy_of, computed):
    """Whatever the folder's name or the engine's other arguments are."""
    with (
        M3Embedder(m3_folder, share_outputs=True) as m3,
        Embedder(copy_of(m3_folder), device="cpu:0") as dense,
    ):
        dense.embed_queries(["loaded"])
        m3.encode(["loaded"])
        dense.embed_documents(TEXTS)
        tokens = computed.tokens
        m3.encode(TEXTS, dense=False)
        assert computed.tokens == tokens


def test_a_query_with_an_instruction_is_another_text(m3_folder, computed):
    with (
        M3Embedder(m3_folder, share_outputs=True) as m3,
        Embedder(m3_folder, query_instruction="find: ") as dense,
    ):
        dense.embed_queries(["cat"])
        computed.passes.clear()
        m3.encode(["cat"], dense=False, priority="interactive")
        assert computed.passes


def test_mean_pooling_is_no_half_of_m3(m3_folder, reference_embed, reference):
    with (
        M3Embedder(m3_folder, share_outputs=True) as m3,
        Embedder(m3_folder, pooling="mean") as mean,
    ):
        encoded = m3.encode(TEXTS, dense=False)
        vectors = mean.embed_documents(TEXTS)
    np.testing.assert_allclose(vectors, reference_embed(m3_folder, TEXTS, "mean"), atol=1e-5)
    assert encoded.sparse[0] == pytest.approx(reference(TEXTS[0])[1], abs=1e-5)


def test_threads_get_their_own(m3_folder, reference):
    texts = [f"{text} {n}" for n in range(4) for text in TEXTS]
    expected = [reference(text) for text in texts]
    wrong = []
    start = threading.Barrier(6)
    with M3Embedder(m3_folder, share_outputs=True) as m3, Embedder(m3_folder) as dense:

        def work(index):
            start.wait()
            for _ in range(3):
                if index % 2:
                    vectors = dense.embed_documents(texts)
                    if not np.allclose(vectors, [row[0] for row in expected], atol=1e-5):
                        wrong.append("dense")
                    continue
                for weights, row in zip(
                    m3.encode(texts, dense=False).sparse, expected, strict=True
                ):
                    if weights != pytest.approx(row[1], abs=1e-5):
                        wrong.append("sparse")

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        cache = m3.local.loaded().output_cache
        assert not wrong
        assert cache.size < 1 << 20


async def test_tasks_share_packs(m3_folder, computed):
    with M3Embedder(m3_folder) as m3:
        await m3.aencode(["warm"])
        computed.passes.clear()
        await asyncio.gather(*(m3.aencode([f"cat {n}"], priority="interactive") for n in range(20)))
        assert len(computed.passes) < 20


class TestOutputCache:
    def test_gives_once(self):
        cache = OutputCache()
        half = (np.zeros(4, dtype=np.float32),)
        cache.keep([5, 6], "dense", half)
        assert cache.take([5, 6], "sparse") is None
        assert cache.take([5, 6, 7], "dense") is None
        assert cache.take([5, 6], "dense") is half
        assert cache.take([5, 6], "dense") is None
        assert (len(cache), cache.size) == (0, 0)

    def test_is_bounded_and_forgets_the_oldest(self):
        cache = OutputCache(max_bytes=10_000)
        for token in range(100):
            cache.keep([token], "dense", (np.zeros(250, dtype=np.float32),))
            cache.keep([token], "dense", (np.zeros(250, dtype=np.float32),))
        assert 0 < cache.size <= 10_000
        assert len(cache) == 7
        assert cache.take([99], "dense") is not None
        assert cache.take([92], "dense") is None


# Refusals.


@pytest.fixture(params=["sparse", "multi_vector"])
def output(request):
    return request.param


FILES = {"sparse": "sparse_linear.pt", "multi_vector": "colbert_linear.pt"}
ALONE = {
    "sparse": {"dense": False},
    "multi_vector": {"dense": False, "sparse": False, "multi_vector": True},
}


async def test_without_its_file_an_output_is_refused(call, m3_folder, copy_of, reference, output):
    folder = copy_of(m3_folder)
    (folder / FILES[output]).unlink()
    embedder = M3Embedder(folder)
    with pytest.raises(CheckpointError, match=FILES[output]) as refused:
        await call(embedder, "encode", ["a"], **ALONE[output])
    assert "noise" in str(refused.value)
    with pytest.raises(CheckpointError, match=FILES[output]):
        await call(embedder, "score", [("a", "b")])
    with pytest.raises(CheckpointError, match=FILES[output]):
        embedder.require(output)
    scores = await call(embedder, "score", [("a", "b")], weights={output: 0})
    assert np.isfinite(scores).all()
    encoded = await call(embedder, "encode", TEXTS, sparse=False)
    np.testing.assert_allclose(encoded.dense, [reference(text)[0] for text in TEXTS], atol=1e-5)


def test_without_files_of_its_own_a_checkpoint_gives_dense_vectors(m3_folder, copy_of, reference):
    folder = copy_of(m3_folder)
    for name in FILES.values():
        (folder / name).unlink()
    encoded = M3Embedder(folder).encode(TEXTS, sparse=False)
    np.testing.assert_allclose(encoded.dense, [reference(text)[0] for text in TEXTS], atol=1e-5)


def _cut(path):
    path.write_bytes(path.read_bytes()[:100])


def _reshape(path):
    import torch

    torch.save({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, path)


def _rename(path):
    import torch

    torch.save({"kernel": torch.zeros(1, 32)}, path)


def _pickle(path):
    path.write_bytes(pickle.dumps(os.getcwd))


@pytest.mark.parametrize("damage", [_cut, _reshape, _rename, _pickle])
async def test_a_damaged_file_is_refused_and_dense_vectors_are_not(
    call, m3_folder, copy_of, reference, computed, output, damage
):
    folder = copy_of(m3_folder)
    damage(folder / FILES[output])
    with M3Embedder(folder, share_outputs=True) as embedder, Embedder(folder) as dense:
        vectors = await call(dense, "embed_documents", TEXTS)
        computed.passes.clear()
        for _ in range(2):
            with pytest.raises(CheckpointError, match=FILES[output]):
                await call(embedder, "encode", ["a"], **ALONE[output])
    # It was refused before it came into a pack with others.
    assert not computed.passes
    np.testing.assert_allclose(vectors, [reference(text)[0] for text in TEXTS], atol=1e-5)


def test_other_models_are_refused(en_folder, reranker_folder, bare_unknown_folder):
    for folder in (en_folder, bare_unknown_folder):
        with pytest.raises(CheckpointError, match="not of bge-m3's make"):
            M3Embedder(folder)
    with pytest.raises(CheckpointError, match="reranker"):
        M3Embedder(reranker_folder)
    with pytest.raises(CheckpointError, match="gives no sparse outputs"):
        M3Embedder("BAAI/bge-small-en-v1.5")
    with pytest.raises(CheckpointError, match="gives no sparse outputs"):
        M3Embedder("BAAI/bge-m3-unsupervised").require("sparse")
    M3Embedder("BAAI/bge-m3").require("dense", "sparse", "multi_vector")


def test_a_folder_under_any_name_is_known_by_its_files(m3_folder, copy_of, reference):
    folder = copy_of(m3_folder, "my-own")
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    check(M3Embedder(folder).encode(TEXTS, multi_vector=True), reference, TEXTS)


def test_nothing_asked_for_is_an_error(embedder):
    with pytest.raises(ArgumentError, match="at least one output"):
        embedder.encode(["a"], dense=False, sparse=False)
    with pytest.raises(ArgumentError, match="sparse=True"):
        embedder.encode(["a"], sparse=False, return_tokens=True)


@pytest.mark.parametrize("texts", ["a", None, [1], {"a": 1}])
def test_wrong_texts_are_refused(embedder, texts):
    with pytest.raises(InputTypeError):
        embedder.encode(texts)


@pytest.mark.parametrize("pairs", ["ab", None, ["ab"], [("a",)], [("a", 1)]])
def test_wrong_pairs_are_refused(embedder, pairs):
    with pytest.raises(InputTypeError):
        embedder.score(pairs)


def test_openvino_is_refused(m3_folder):
    with pytest.raises(ArgumentError, match="backend='torch'"):
        M3Embedder(m3_folder, backend="openvino")
    assert M3Embedder(m3_folder, backend="auto").encode(["a"]).sparse


async def test_nan_is_refused(call, m3_folder, copy_of, output):
    import torch

    folder = copy_of(m3_folder)
    state = torch.load(folder / FILES[output], weights_only=True)
    state["bias"][0] = float("nan")
    torch.save(state, folder / FILES[output])
    with pytest.raises(ComputationError, match=r"texts\[0\]"):
        await call(M3Embedder(folder), "encode", ["cat sat"], **ALONE[output])


# Configuration.


def test_copies_and_pickles_carry_the_configuration(m3_folder, reference):
    embedder = M3Embedder(m3_folder, share_outputs=True, max_length=20)
    embedder.encode(["a"])
    carried = pickle.dumps(embedder)
    assert len(carried) < 2000
    for other in (pickle.loads(carried), copy.copy(embedder), copy.deepcopy(embedder)):
        assert other.max_length == 20
        check(other.encode(TEXTS, multi_vector=True), reference, TEXTS, max_length=20)
        assert other.local.loaded().output_cache.is_shared


def test_fingerprint(m3_folder, copy_of):
    folder = copy_of(m3_folder)
    one = M3Embedder(m3_folder).fingerprint
    assert M3Embedder(folder, batch_tokens=7).fingerprint == one
    assert M3Embedder(m3_folder, max_length=7).fingerprint != one
    (folder / "colbert_linear.pt").write_bytes(b"other")
    assert M3Embedder(folder).fingerprint != one


def test_half_precision_stays_close(m3_folder, reference):
    encoded = M3Embedder(m3_folder, dtype="bfloat16").encode(TEXTS[:3], multi_vector=True)
    assert encoded.dense.dtype == np.float32
    for vector, text in zip(encoded.dense, TEXTS[:3], strict=True):
        assert vector @ reference(text)[0] > 0.99
