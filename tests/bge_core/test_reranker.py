import asyncio
import copy
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bge_core import ArgumentError, ClosedError, ComputationError, InputTypeError, Reranker

QUERY = "Where is the capital of France?"
PASSAGES = [
    "Paris is the capital and the largest city of France, on the river Seine.",
    "",
    "  ",
    "大熊猫是中国特有的一种熊科动物",
    "panda " * 600,
    "a",
    "Berlin is the capital of Germany; Rome is the capital of Italy.",
    "Paris is the capital and the largest city of France, on the river Seine.",
    "with [SEP] and </s> and <s> inside",
    "one two three " * 30,
]
QUERIES = ["", " ", "cat", QUERY, "法国的首都", "query " * 600]
PAIRS = [(query, passage) for query in QUERIES for passage in PASSAGES[:5]]

both = pytest.mark.parametrize("model", ["reranker_folder", "bert_reranker_folder"])


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Keep expected warnings out of the report; files about logging have their own tests."""
    caplog.set_level(logging.ERROR)


@pytest.fixture
def reranker(bert_reranker_folder):
    with Reranker(bert_reranker_folder) as reranker:
        yield reranker


# The right score.


@both
@pytest.mark.parametrize("normalize", [True, False])
async def test_scores_are_those_of_plain_transformers(
    request, call, reference_score, model, normalize
):
    folder = request.getfixturevalue(model)
    with Reranker(folder, normalize=normalize) as reranker:
        scores = await call(reranker, "score", QUERY, PASSAGES)
    pairs = [(QUERY, passage) for passage in PASSAGES]
    expected = reference_score(folder, pairs, normalize=normalize)
    assert (scores.dtype, scores.shape) == (np.float32, (len(PASSAGES),))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert len(set(np.round(expected, 3))) > 5


@both
async def test_pairs_have_a_query_each(request, call, reference_score, model):
    folder = request.getfixturevalue(model)
    with Reranker(folder, normalize=False) as reranker:
        scores = await call(reranker, "score_pairs", PAIRS)
    np.testing.assert_allclose(scores, reference_score(folder, PAIRS), atol=1e-5)


@both
@pytest.mark.parametrize("max_length", [10, 16, 63, 64, 300])
async def test_the_query_is_cut_first_and_then_the_passage(
    request, call, reference_score, model, max_length
):
    folder = request.getfixturevalue(model)
    with Reranker(folder, normalize=False, max_length=max_length) as reranker:
        scores = await call(reranker, "score_pairs", PAIRS)
    expected = reference_score(folder, PAIRS, max_length=max_length)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@both
@pytest.mark.parametrize("max_length", [64, 512])
def test_an_over_long_query_leaves_room_for_the_passage(request, model, max_length):
    folder = request.getfixturevalue(model)
    with Reranker(folder, normalize=False, max_length=max_length) as reranker:
        scores = reranker.score("cat " * 3000, ["Paris is in France.", "", "panda " * 3000])
    assert len(set(np.round(scores, 4))) == 3


def test_a_query_keeps_three_quarters_of_the_length(bert_reranker_folder, computed):
    long = "panda " * 600
    with Reranker(bert_reranker_folder, normalize=False, max_length=40) as reranker:
        in_room = reranker.score("cat " * 30, [long, "dog"])
        np.testing.assert_array_equal(reranker.score("cat " * 31, [long, "dog"]), in_room)
        assert not np.allclose(reranker.score("cat " * 29, [long, "dog"]), in_room)
    assert max(computed.passes) == 40 + 34


@both
def test_normalising_is_a_sigmoid_of_each_score(request, model):
    folder = request.getfixturevalue(model)
    with Reranker(folder) as sigmoid, Reranker(folder, normalize=False) as raw:
        scores, logits = sigmoid.score(QUERY, PASSAGES), raw.score(QUERY, PASSAGES)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits.astype(float))), atol=1e-6)
    assert ((scores > 0) & (scores < 1)).all()
    assert (logits < 0).any() or (logits > 1).any()


@pytest.fixture
def loud_reranker_folder(bert_reranker_folder, copy_of):
    """The same model with logits 100 times as large, beyond what a float32 sigmoid can tell."""
    from safetensors.numpy import load_file, save_file

    folder = copy_of(bert_reranker_folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] *= 100
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


async def test_normalising_never_changes_the_ranks(loud_reranker_folder, call, corpus):
    with (
        Reranker(loud_reranker_folder) as sigmoid,
        Reranker(loud_reranker_folder, normalize=False) as raw,
    ):
        ranked = await call(sigmoid, "rank", QUERY, corpus)
        by_logit = await call(raw, "rank", QUERY, corpus)
    assert sum(score > 20 for score in (found.score for found in by_logit)) > 2
    assert [found.index for found in ranked] == [found.index for found in by_logit]


def test_a_sigmoid_of_large_logits_neither_overflows_nor_warns(loud_reranker_folder):
    with Reranker(loud_reranker_folder) as reranker:
        scores = reranker.score(QUERY, PASSAGES)
    assert ((scores >= 0) & (scores <= 1)).all()


# Any number of pairs, in order.


async def test_none_one_and_many_take_the_same_path(reranker, call):
    none = await call(reranker, "score", QUERY, [])
    one = await call(reranker, "score", QUERY, ["panda"])
    many = await call(reranker, "score", QUERY, ["a", "panda", "cat"])
    assert (none.shape, one.shape, many.shape) == ((0,), (1,), (3,))
    assert {scores.dtype for scores in (none, one, many)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(one[0], many[1], atol=1e-6)
    assert (await call(reranker, "score_pairs", [])).shape == (0,)
    assert await call(reranker, "rank", QUERY, []) == []


async def test_no_passage_means_no_model_work(reranker, call, computed):
    await call(reranker, "score", QUERY, [])
    await call(reranker, "rank", QUERY, [])
    await call(reranker, "score_pairs", [])
    assert computed.tokens == 0


async def test_equal_pairs_are_computed_once(reranker, call, computed):
    scores = await call(reranker, "score", "cat", ["panda", "dog", "panda", "panda"])
    assert computed.tokens == 2 * 5
    assert scores[0] == scores[2] == scores[3] != scores[1]
    await call(reranker, "score_pairs", [("cat", "dog"), ("dog", "cat"), ("cat", "dog")])
    assert computed.tokens == 4 * 5


@pytest.mark.parametrize("batch_tokens", [None, 1, 50, 100_000])
async def test_order_is_kept_whatever_the_lengths_and_the_batches(
    reranker_folder, call, reference_score, batch_tokens
):
    passages = [("panda " * (7 * number % 31)) + str(number) for number in range(40)]
    with Reranker(reranker_folder, normalize=False, batch_tokens=batch_tokens) as reranker:
        scores = await call(reranker, "score", QUERY, passages)
    expected = reference_score(reranker_folder, [(QUERY, passage) for passage in passages])
    np.testing.assert_allclose(scores, expected, atol=1e-5)


# Ranks.


@pytest.mark.parametrize("normalize", [True, False])
async def test_ranks_are_best_first_with_python_numbers(bert_reranker_folder, call, normalize):
    with Reranker(bert_reranker_folder, normalize=normalize) as reranker:
        scores = reranker.score(QUERY, PASSAGES)
        ranked = await call(reranker, "rank", QUERY, PASSAGES)
    assert [(found.index, found.score) for found in ranked] == sorted(
        enumerate(scores.tolist()), key=lambda item: -item[1]
    )
    assert {(type(found.index), type(found.score)) for found in ranked} == {(int, float)}
    assert {found.span for found in ranked} == {None}


async def test_ties_keep_the_order_of_the_input(reranker, call):
    passages = ["cat", "dog", "cat", "panda", "dog", "cat", "panda"]
    ranked = await call(reranker, "rank", QUERY, passages)
    indices = [found.index for found in ranked]
    for text in set(passages):
        own = [index for index in indices if passages[index] == text]
        assert own == sorted(own)
        start = indices.index(own[0])
        assert indices[start : start + len(own)] == own
    assert sorted(indices) == list(range(7))


@pytest.mark.parametrize(("top_n", "count"), [(None, 10), (1, 1), (3, 3), (10, 10), (99, 10)])
async def test_top_n_is_how_many_at_most(reranker, call, top_n, count):
    everything = await call(reranker, "rank", QUERY, PASSAGES)
    assert await call(reranker, "rank", QUERY, PASSAGES, top_n=top_n) == everything[:count]


async def test_the_threshold_belongs_to_what_it_lets_through(reranker, call):
    everything = await call(reranker, "rank", QUERY, PASSAGES)
    for count in (1, 4, 10):
        threshold = everything[count - 1].score
        found = await call(reranker, "rank", QUERY, PASSAGES, score_threshold=threshold)
        assert found == [item for item in everything if item.score >= threshold]
        above = np.nextafter(threshold, 2)
        found = await call(reranker, "rank", QUERY, PASSAGES, score_threshold=float(above))
        assert found == [item for item in everything if item.score > threshold]


async def test_threshold_and_top_n_hold_together(reranker, call):
    everything = await call(reranker, "rank", QUERY, PASSAGES)
    threshold = everything[4].score
    options = {"top_n": 2, "score_threshold": threshold}
    assert await call(reranker, "rank", QUERY, PASSAGES, **options) == everything[:2]
    options = {"top_n": 9, "score_threshold": threshold}
    above = [item for item in everything if item.score >= threshold]
    assert await call(reranker, "rank", QUERY, PASSAGES, **options) == above
    assert await call(reranker, "rank", QUERY, PASSAGES, score_threshold=1) == []
    with pytest.raises(ArgumentError, match="normalize=False"):
        await call(reranker, "rank", QUERY, PASSAGES, score_threshold=1.5)
    assert await call(reranker, "rank", QUERY, PASSAGES, score_threshold=0) == everything


@pytest.mark.parametrize("top_n", [0, -1])
@pytest.mark.parametrize("passages", [PASSAGES, []])
async def test_a_top_n_below_one_is_refused(reranker, call, computed, top_n, passages):
    with pytest.raises(ArgumentError, match=f"top_n.*{top_n}"):
        await call(reranker, "rank", QUERY, passages, top_n=top_n)
    assert computed.tokens == 0


@pytest.mark.parametrize("top_n", [1.5, "3", True])
async def test_a_top_n_that_is_no_whole_number_is_refused(reranker, call, top_n):
    with pytest.raises(InputTypeError, match="top_n"):
        await call(reranker, "rank", QUERY, PASSAGES, top_n=top_n)


async def test_a_threshold_that_is_no_number_is_refused(reranker, call):
    with pytest.raises(InputTypeError, match="score_threshold"):
        await call(reranker, "rank", QUERY, PASSAGES, score_threshold="0.5")
    with pytest.raises(ArgumentError, match="score_threshold"):
        await call(reranker, "rank", QUERY, PASSAGES, score_threshold=float("nan"))


async def test_numpy_s_numbers_are_numbers(reranker, call):
    everything = await call(reranker, "rank", QUERY, PASSAGES)
    assert await call(reranker, "rank", QUERY, PASSAGES, top_n=np.int64(2)) == everything[:2]
    threshold = reranker.score(QUERY, PASSAGES).max()
    found = await call(reranker, "rank", QUERY, PASSAGES, score_threshold=threshold)
    assert found[0] == everything[0]


# Fingerprints, copies, sharing, closing.


def test_a_fingerprint_changes_with_what_changes_scores(reranker_folder, bert_reranker_folder):
    def fingerprint(folder=reranker_folder, **options):
        return Reranker(folder, **options).fingerprint

    plain = fingerprint()
    assert len(plain) == 16
    assert int(plain, 16)
    changed = {
        fingerprint(bert_reranker_folder),
        fingerprint(normalize=False),
        fingerprint(max_length=100),
        fingerprint(dtype="bfloat16"),
    }
    assert len(changed | {plain}) == 5
    assert plain == fingerprint(device="cpu", batch_tokens=10, max_length=512)
    assert plain == fingerprint(dtype="float32", on_truncation="error")


@pytest.mark.parametrize(
    "copied", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy, copy.copy]
)
def test_a_copy_has_the_configuration_and_the_same_scores(bert_reranker_folder, copied):
    with Reranker(bert_reranker_folder, normalize=False, max_length=50) as reranker:
        expected = reranker.score(QUERY, PASSAGES)
        assert len(pickle.dumps(reranker)) < 10_000
        twin = copied(reranker)
    assert (twin.max_length, twin.fingerprint) == (50, reranker.fingerprint)
    with twin:
        np.testing.assert_allclose(twin.score(QUERY, PASSAGES), expected, atol=1e-6)


def test_rerankers_of_one_model_share_its_weights(bert_reranker_folder, computed):
    made = [
        Reranker(bert_reranker_folder),
        Reranker(str(bert_reranker_folder), normalize=False, max_length=64),
        copy.deepcopy(Reranker(bert_reranker_folder)),
    ]
    for reranker in made:
        reranker.score("cat", ["panda"])
    assert len(computed.embeddings) == 1


@pytest.mark.parametrize("used", [False, True])
async def test_a_closed_reranker_says_so(reranker_folder, call, used):
    with Reranker(reranker_folder) as reranker:
        if used:
            await call(reranker, "score", "cat", ["panda"])
    reranker.close()
    for method, arguments in (
        ("score", ("cat", ["panda"])),
        ("score_pairs", ([("cat", "panda")],)),
        ("rank", ("cat", ["panda"])),
    ):
        with pytest.raises(ClosedError, match="closed"):
            await call(reranker, method, *arguments)


def test_weights_that_give_nan_are_an_error(bert_reranker_folder, copy_of):
    from safetensors.numpy import load_file, save_file

    folder = copy_of(bert_reranker_folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"][:] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with Reranker(folder) as reranker, pytest.raises(ComputationError, match="NaN"):
        reranker.score(QUERY, ["panda"])


def test_nothing_is_printed_and_a_progress_bar_only_on_request(bert_reranker_folder, capfd):
    with Reranker(bert_reranker_folder) as reranker:
        reranker.score(QUERY, PASSAGES)
        assert capfd.readouterr() == ("", "")
        reranker.score(QUERY, PASSAGES, show_progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err


# Threads and event loops.


async def test_many_calls_at_a_time_get_their_own_scores(reranker, reference_score):
    queries = [f"{number} {'panda ' * (number % 13)}" for number in range(30)]
    found = await asyncio.gather(*(reranker.ascore(query, PASSAGES[:4]) for query in queries))
    pairs = [(query, passage) for query in queries for passage in PASSAGES[:4]]
    expected = reference_score(reranker.model, pairs, normalize=True)
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)


def test_threads_with_different_lengths_get_their_own_cut(reranker_folder, reference_score):
    lengths = (16, 64, 512)
    expected = {n: reference_score(reranker_folder, PAIRS, max_length=n) for n in lengths}
    rerankers = {n: Reranker(reranker_folder, normalize=False, max_length=n) for n in lengths}

    def work(turn):
        length = lengths[turn % len(lengths)]
        return length, rerankers[length].score_pairs(PAIRS)

    with ThreadPoolExecutor(6) as pool:
        for length, scores in pool.map(work, range(18)):
            np.testing.assert_allclose(scores, expected[length], atol=1e-5)
    for reranker in rerankers.values():
        reranker.close()
