"""Cutting, counting and refusing texts, seen from outside."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bge_core import (
    ArgumentError,
    BGEError,
    Embedder,
    InputTypeError,
    Reranker,
    TruncationError,
)

SHORT = "Paris is the capital of France."
LONG = "panda bear " * 600


@pytest.fixture
def said(caplog):
    """Give the lines that were logged about cut texts."""
    caplog.set_level(logging.DEBUG, logger="bge_core.tokenizer")

    def lines():
        found = [record for record in caplog.records if record.name == "bge_core.tokenizer"]
        assert {record.levelno for record in found} <= {logging.WARNING}
        return [record.getMessage() for record in found]

    return lines


@pytest.mark.parametrize("method", ["embed_queries", "embed_documents"])
async def test_one_line_a_call_says_how_many_texts_were_cut(en_folder, call, said, method):
    with Embedder(en_folder, query_instruction="") as embedder:
        await call(embedder, method, [LONG, SHORT, LONG + "cat", "a", "", LONG + "dog"])
    (line,) = said()
    assert "3 of 6" in line
    assert "max_length=512" in line
    assert str(en_folder) in line


async def test_every_text_that_was_cut_counts_equal_ones_too(en_folder, call, said):
    with Embedder(en_folder) as embedder:
        await call(embedder, "embed_documents", [LONG, LONG, SHORT, LONG])
    assert ["3 of 4" in line for line in said()] == [True]


async def test_every_pair_that_was_cut_counts_equal_ones_too(reranker_folder, call, said):
    with Reranker(reranker_folder) as reranker:
        await call(reranker, "score", "where?", [LONG, LONG, SHORT])
    assert ["2 of 3" in line for line in said()] == [True]


async def test_a_thousand_texts_are_still_one_line(en_folder, call, said):
    texts = [f"{number} {'panda ' * 20}" for number in range(1030)]
    with Embedder(en_folder, max_length=12) as embedder:
        await call(embedder, "embed_documents", texts)
    assert ["1030 of 1030" in line for line in said()] == [True]


@pytest.mark.parametrize("query", ["where?", LONG])
async def test_a_pair_that_was_cut_is_counted(reranker_folder, call, said, query):
    with Reranker(reranker_folder, max_length=64) as reranker:
        await call(reranker, "score", query, [SHORT, LONG])
    (line,) = said()
    assert ("2 of 2" if query == LONG else "1 of 2") in line
    assert "max_length=64" in line


async def test_nothing_is_said_of_a_text_that_just_fits(en_folder, call, said):
    with Embedder(en_folder, max_length=6) as embedder:
        await call(embedder, "embed_documents", ["panda panda panda panda"])
        assert said() == []
        await call(embedder, "embed_documents", ["panda panda panda panda panda"])
        assert len(said()) == 1


async def test_the_instruction_counts_as_part_of_the_text(en_folder, call, said):
    text = ["panda"] * 510
    with Embedder(en_folder) as embedder:
        await call(embedder, "embed_documents", [" ".join(text)])
        assert said() == []
        await call(embedder, "embed_queries", [" ".join(text)])
        assert len(said()) == 1


async def test_ignore_says_nothing(en_folder, reranker_folder, call, said):
    with (
        Embedder(en_folder, on_truncation="ignore") as embedder,
        Reranker(reranker_folder, on_truncation="ignore") as reranker,
    ):
        await call(embedder, "embed_documents", [LONG])
        await call(reranker, "score", LONG, [LONG])
    assert said() == []


async def test_error_refuses_the_whole_call_and_leaves_the_model_usable(en_folder, call, said):
    with Embedder(en_folder, on_truncation="error") as embedder:
        with pytest.raises(TruncationError, match=r"2 of 3.*max_length=512"):
            await call(embedder, "embed_documents", [SHORT, LONG, LONG + "cat"])
        assert (await call(embedder, "embed_documents", [SHORT])).shape == (1, 32)
    assert said() == []


async def test_error_holds_for_pairs(bert_reranker_folder, call):
    with Reranker(bert_reranker_folder, on_truncation="error") as reranker:
        with pytest.raises(TruncationError, match="1 of 2"):
            await call(reranker, "score", "where?", [SHORT, LONG])
        assert (await call(reranker, "score", "where?", [SHORT])).shape == (1,)


@pytest.mark.parametrize("word", ["", "raise", "WARN", None, True])
def test_an_unknown_policy_is_refused(en_folder, word):
    with pytest.raises(ArgumentError, match=r"on_truncation=.*'ignore', 'warn' or 'error'"):
        Embedder(en_folder, on_truncation=word)


@pytest.mark.parametrize("model", ["en_folder", "m3_folder"])
@pytest.mark.parametrize("max_length", [3, 4, 17, 512])
def test_a_text_is_cut_where_transformers_cuts_it(request, reference_embed, model, max_length):
    folder = request.getfixturevalue(model)
    texts = [LONG, SHORT, "法国的首都" * 300, "", "a " * max_length]
    with Embedder(folder, max_length=max_length, on_truncation="ignore") as embedder:
        vectors = embedder.embed_documents(texts)
    expected = reference_embed(folder, texts, max_length=max_length)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("max_length", [1, 2])
def test_a_length_without_room_for_text_is_refused(en_folder, max_length):
    with pytest.raises(ArgumentError, match=f"max_length={max_length}"):
        Embedder(en_folder, max_length=max_length).embed_documents([SHORT])


@pytest.mark.parametrize("max_length", [0, -1])
@pytest.mark.parametrize("cls", [Embedder, Reranker])
def test_a_length_below_one_is_refused(cls, en_folder, reranker_folder, max_length):
    folder = en_folder if cls is Embedder else reranker_folder
    with pytest.raises(ArgumentError, match="max_length"):
        cls(folder, max_length=max_length)
    with pytest.raises(ArgumentError, match="batch_tokens"):
        cls(folder, batch_tokens=max_length)


@pytest.mark.parametrize("value", [1.5, "512", True])
def test_a_length_that_is_no_whole_number_is_a_type_error(en_folder, value):
    with pytest.raises(InputTypeError, match="max_length"):
        Embedder(en_folder, max_length=value)
    with pytest.raises(InputTypeError, match="batch_tokens"):
        Embedder(en_folder, batch_tokens=value)


@pytest.mark.parametrize(
    ("model", "most"), [("en_folder", 512), ("m3_folder", 8192), ("unknown_folder", 512)]
)
def test_more_tokens_than_the_model_has_are_refused_at_once(request, model, most):
    folder = request.getfixturevalue(model)
    assert Embedder(folder, max_length=most).max_length == most
    with pytest.raises(ArgumentError, match=rf"max_length={most + 1}.*\b{most}\b"):
        Embedder(folder, max_length=most + 1)


@pytest.mark.parametrize("model", ["reranker_folder", "bert_reranker_folder"])
def test_more_tokens_than_the_reranker_has_are_refused_at_once(request, model):
    folder = request.getfixturevalue(model)
    assert Reranker(folder).max_length == 512
    with pytest.raises(ArgumentError, match=r"max_length=513.*\b512\b"):
        Reranker(folder, max_length=513)


@pytest.mark.parametrize(
    "texts",
    ["one text", b"bytes", None, 7, {"a": 1}, {"a", "b"}],
    ids=["str", "bytes", "None", "int", "dict", "set"],
)
@pytest.mark.parametrize("method", ["embed_queries", "embed_documents"])
async def test_what_is_no_list_of_texts_is_a_type_error(en_folder, call, method, texts):
    with Embedder(en_folder) as embedder, pytest.raises(InputTypeError, match="texts must be"):
        await call(embedder, method, texts)


@pytest.mark.parametrize("item", [None, 7, b"bytes", ["a"], float("nan")])
@pytest.mark.parametrize("method", ["embed_queries", "embed_documents"])
async def test_an_item_that_is_no_text_is_named_by_its_index(en_folder, call, method, item):
    with Embedder(en_folder) as embedder, pytest.raises(InputTypeError, match=r"texts\[2\]"):
        await call(embedder, method, ["a", "b", item, None])


@pytest.mark.parametrize("method", ["embed_queries", "embed_documents"])
async def test_a_lone_surrogate_is_named_by_its_index(en_folder, call, method):
    with Embedder(en_folder) as embedder, pytest.raises(ArgumentError, match=r"texts\[1\].*D83D"):
        await call(embedder, method, ["fine \U0001f43c", "broken \ud83d"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("q", "one text"), "passages must be"),
        (("q", None), "passages must be"),
        (("q", ["a", None]), r"passages\[1\]"),
        ((None, ["a"]), "query must be"),
        ((["q"], ["a"]), "query must be"),
    ],
)
@pytest.mark.parametrize("method", ["score", "rank"])
async def test_a_reranker_names_what_is_no_text(reranker_folder, call, method, arguments, named):
    with Reranker(reranker_folder) as reranker, pytest.raises(InputTypeError, match=named):
        await call(reranker, method, *arguments)


@pytest.mark.parametrize(
    ("pairs", "named"),
    [
        ("ab", "pairs must be"),
        (None, "pairs must be"),
        (["ab"], r"pairs\[0\]"),
        ([("q", "p"), ("q",)], r"pairs\[1\]"),
        ([("q", "p", "r")], r"pairs\[0\]"),
        ([("q", None)], r"pairs\[0\]\[1\]"),
        ([(1, "p")], r"pairs\[0\]\[0\]"),
        ([None], r"pairs\[0\]"),
    ],
)
async def test_what_is_no_pair_is_named(reranker_folder, call, pairs, named):
    with Reranker(reranker_folder) as reranker, pytest.raises(InputTypeError, match=named):
        await call(reranker, "score_pairs", pairs)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("\udc00", ["a"]), "query"), (("q", ["a", "\udc00"]), r"passages\[1\]")],
)
async def test_a_reranker_names_a_lone_surrogate(reranker_folder, call, arguments, named):
    with Reranker(reranker_folder) as reranker, pytest.raises(ArgumentError, match=named):
        await call(reranker, "score", *arguments)


@pytest.mark.parametrize("sequence", [tuple, iter, np.array])
async def test_any_ordered_collection_of_texts_will_do(en_folder, call, sequence):
    texts = [SHORT, "A cat sat on the mat."]
    with Embedder(en_folder) as embedder:
        expected = embedder.embed_documents(texts)
        found = await call(embedder, "embed_documents", sequence(texts))
    np.testing.assert_array_equal(found, expected)


async def test_lists_that_came_in_are_not_changed(en_folder, reranker_folder, call):
    texts = ["b", "a", "b", ""]
    pairs = [["q", "b"], ["q", "a"]]
    with Embedder(en_folder) as embedder, Reranker(reranker_folder) as reranker:
        await call(embedder, "embed_queries", texts)
        await call(embedder, "embed_documents", texts)
        await call(reranker, "rank", "q", texts)
        await call(reranker, "score_pairs", pairs)
    assert texts == ["b", "a", "b", ""]
    assert pairs == [["q", "b"], ["q", "a"]]


def test_every_refusal_is_a_bge_error(en_folder):
    with Embedder(en_folder) as embedder, pytest.raises(BGEError):
        embedder.embed_queries(None)


def test_threads_with_different_lengths_get_their_own_cut(m3_folder, reference_embed):
    lengths = (8, 32, 100, 500)
    texts = [LONG, SHORT, "cat " * 50]
    expected = {n: reference_embed(m3_folder, texts, max_length=n) for n in lengths}
    embedders = {
        n: Embedder(m3_folder, max_length=n, on_truncation="ignore", device="cpu") for n in lengths
    }

    def work(turn):
        length = lengths[turn % len(lengths)]
        return length, embedders[length].embed_documents(texts)

    with ThreadPoolExecutor(8) as pool:
        for length, vectors in pool.map(work, range(80)):
            np.testing.assert_allclose(vectors, expected[length], atol=1e-5)
    for embedder in embedders.values():
        embedder.close()
