"""Any list of any strings is served, or refused in a sentence; what is no list of str is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bge_core import BGEError, Embedder, InputTypeError, M3Embedder, Reranker

# Any code point, the surrogates that are half a character included; and what tokenizers trip on.
ODD = ("", " ", "\0", "\n\r\t", "\ufeff", "\u200d" * 9, "a\ud83d", "[SEP]<s></s>", "ﷺ" * 40, "é́́́")
ANY_TEXT = st.one_of(
    st.sampled_from(ODD),
    st.text(st.characters(), max_size=60),
    st.text(st.sampled_from("aé熊قК🐼\u0301\u200d\0\n "), max_size=200),
    st.builds(lambda text, times: text * times, st.text(max_size=5), st.integers(1, 500)),
)
TEXTS = st.lists(ANY_TEXT, max_size=12)
EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    # The model of a session serves all examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def valid(text: str) -> bool:
    return text == text.encode("utf-8", "replace").decode()


@pytest.fixture(scope="module")
def embedder(en_folder: Path):
    with Embedder(en_folder, on_truncation="ignore") as embedder:
        yield embedder


@pytest.fixture(scope="module")
def reranker(reranker_folder: Path):
    with Reranker(reranker_folder, on_truncation="ignore") as reranker:
        yield reranker


@pytest.fixture(scope="module")
def m3(m3_folder: Path):
    with M3Embedder(m3_folder) as embedder:
        yield embedder


def check_unit(vectors: np.ndarray, count: int) -> None:
    assert vectors.shape == (count, 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@EXAMPLES
@given(texts=TEXTS)
@pytest.mark.parametrize("method", ["embed_documents", "embed_queries"])
def test_an_embedder_takes_any_strings(embedder: Embedder, method: str, texts: list[str]):
    embed = getattr(embedder, method)
    if not all(map(valid, texts)):
        with pytest.raises(BGEError, match=r"texts\[\d+\] has a lone surrogate"):
            embed(texts)
        return
    vectors = embed(texts)
    check_unit(vectors, len(texts))
    for place in {0, len(texts) - 1} & set(range(len(texts))):
        np.testing.assert_allclose(embed([texts[place]])[0], vectors[place], atol=1e-5)


@EXAMPLES
@given(query=ANY_TEXT, texts=TEXTS)
def test_a_reranker_takes_any_strings(reranker: Reranker, query: str, texts: list[str]):
    if not all(map(valid, [query, *texts])):
        with pytest.raises(BGEError, match="has a lone surrogate"):
            reranker.rank(query, texts)
        return
    ranked = reranker.rank(query, texts)
    assert sorted(found.index for found in ranked) == list(range(len(texts)))
    scores = [found.score for found in ranked]
    assert all(0 <= score <= 1 for score in scores)
    assert scores == sorted(scores, reverse=True)


@EXAMPLES
@given(texts=TEXTS)
def test_m3_takes_any_strings(m3: M3Embedder, texts: list[str]):
    if not all(map(valid, texts)):
        with pytest.raises(BGEError, match=r"texts\[\d+\] has a lone surrogate"):
            m3.encode(texts)
        return
    outputs = m3.encode(texts, multi_vector=True, return_tokens=True)
    check_unit(outputs.dense, len(texts))
    weights = [weight for text in outputs.sparse for weight in text.values()]
    assert all(np.isfinite(weight) and weight > 0 for weight in weights)
    for vectors in outputs.multi_vector:
        check_unit(vectors, len(vectors))
    assert np.isfinite(m3.score([(text, "a panda") for text in texts])).all()


@pytest.mark.parametrize("text", ["a" * 1_000_000, "panda " * 170_000, "熊" * 1_000_000])
def test_a_million_characters_are_one_text(embedder, reranker, m3, text):
    check_unit(embedder.embed_documents([text, "short"]), 2)
    check_unit(embedder.embed_queries([text]), 1)
    assert np.isfinite(reranker.score(text[:999_999], [text, "short"])).all()
    encoded = M3Embedder(m3.model, max_length=512, on_truncation="ignore").encode([text, "short"])
    check_unit(encoded.dense, 2)


def test_50000_texts_are_one_list(embedder, reranker):
    texts = [f"{n} {ODD[n % 6]}" for n in range(50_000)]
    vectors = embedder.embed_documents(texts)
    check_unit(vectors, 50_000)
    for place in (0, 511, 512, 31_337, 49_999):
        np.testing.assert_allclose(
            vectors[place], embedder.embed_documents([texts[place]])[0], atol=1e-5
        )
    scores = reranker.score("which?", texts[:10_000])
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(
        scores[9_999], reranker.score("which?", [texts[9_999]])[0], atol=1e-5
    )


# What is no list of str.

NO_LISTS = [
    "a str",
    b"bytes",
    bytearray(b"b"),
    None,
    7,
    1.5,
    True,
    {"a": 1},
    {"a"},
    object(),
    print,
]
NO_TEXTS = [
    None,
    7,
    b"bytes",
    ["a"],
    ("a", "b"),
    float("nan"),
    np.array(["a"]),
    np.int64(3),
    Path("a"),
]


@pytest.mark.parametrize("wrong", NO_LISTS, ids=lambda value: type(value).__name__)
async def test_what_is_no_list_is_named_before_any_model_work(
    call, en_folder, reranker_folder, m3_folder, wrong
):
    with (
        Embedder(en_folder) as one,
        Reranker(reranker_folder) as two,
        M3Embedder(m3_folder) as three,
    ):
        for model, method, arguments, named in (
            (one, "embed_documents", (wrong,), "texts"),
            (one, "embed_queries", (wrong,), "texts"),
            (two, "score", ("q", wrong), "passages"),
            (two, "rank", ("q", wrong), "passages"),
            (two, "score_pairs", (wrong,), "pairs"),
            (three, "encode", (wrong,), "texts"),
            (three, "score", (wrong,), "pairs"),
        ):
            with pytest.raises(InputTypeError, match=named):
                await call(model, method, *arguments)
            assert not model._model.ready, "nothing was loaded for it"


@pytest.mark.parametrize("wrong", NO_TEXTS, ids=lambda value: type(value).__name__)
async def test_an_item_that_is_no_str_is_named_with_its_place(
    call, en_folder, reranker_folder, m3_folder, wrong
):
    with (
        Embedder(en_folder) as one,
        Reranker(reranker_folder) as two,
        M3Embedder(m3_folder) as three,
    ):
        for model, method, arguments, named in (
            (one, "embed_documents", (["a", wrong],), r"texts\[1\]"),
            (one, "embed_queries", (["a", wrong],), r"texts\[1\]"),
            (two, "score", ("q", ["a", wrong]), r"passages\[1\]"),
            (two, "rank", (wrong, ["a"]), "query"),
            (two, "score_pairs", ([("q", "a"), ("q", wrong)],), r"pairs\[1\]\[1\]"),
            (three, "encode", (["a", wrong],), r"texts\[1\]"),
            (three, "score", ([("q", "a"), (wrong, "a")],), r"pairs\[1\]\[0\]"),
        ):
            with pytest.raises(InputTypeError, match=named):
                await call(model, method, *arguments)
            assert not model._model.ready, "nothing was loaded for it"


def as_objects(texts: list[str]) -> Any:
    return np.array(texts, dtype=object)


def as_numpy_strings(texts: list[str]) -> Any:
    return [np.str_(text) for text in texts]


def as_values(texts: list[str]) -> Any:
    return dict(enumerate(texts)).values()


@pytest.mark.parametrize(
    "given",
    [tuple, iter, np.array, as_objects, as_numpy_strings, as_values, lambda t: (x for x in t)],
)
async def test_what_can_be_served_is(call, embedder, reranker, m3, given):
    texts = ["a panda", "", "a cat"]
    np.testing.assert_array_equal(
        await call(embedder, "embed_documents", given(texts)), embedder.embed_documents(texts)
    )
    np.testing.assert_array_equal(
        await call(reranker, "score", np.str_("q"), given(texts)), reranker.score("q", texts)
    )
    encoded = await call(m3, "encode", given(texts))
    np.testing.assert_array_equal(encoded.dense, m3.encode(texts).dense)


async def test_pairs_of_any_sequence_will_do(call, reranker):
    pairs = [("q", "a"), ("q", "b")]
    expected = reranker.score_pairs(pairs)
    for given_pairs in ([list(pair) for pair in pairs], iter(pairs), tuple(pairs)):
        np.testing.assert_array_equal(await call(reranker, "score_pairs", given_pairs), expected)


def test_a_column_of_pandas_is_served_where_pandas_is(embedder):
    pandas = pytest.importorskip("pandas")
    column = pandas.Series(["a", "b"], index=[7, 3])
    np.testing.assert_array_equal(
        embedder.embed_documents(column), embedder.embed_documents(["a", "b"])
    )
    with pytest.raises(InputTypeError, match=r"texts\[1\]"):
        embedder.embed_documents(pandas.Series(["a", None]))


def test_pandas_is_not_needed(en_folder: Path):
    code = f"""
import sys
sys.modules["pandas"] = None
from bge_core import Embedder
print(Embedder({str(en_folder)!r}).embed_documents(["a"]).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "(1, 32)\n"
