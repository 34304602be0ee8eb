"""The scorer that a checkpoint is for, and bge-m3 in a reranker's place."""

import logging
from typing import Any

import numpy as np
import pytest

from bge_core import (
    ArgumentError,
    CheckpointError,
    ClosedError,
    InputTypeError,
    M3Embedder,
    M3Reranker,
    M3Weights,
    Reranker,
    make_scorer,
)

QUERY = "Where is the capital of France?"
PASSAGES = [
    "A cat sat on the mat.",
    "Paris is the capital of France.",
    "",
    "大熊猫是中国特有的。",
    "A cat sat on the mat.",
]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


async def test_a_cross_encoder_gets_a_reranker(call, reranker_folder, bert_reranker_folder):
    for folder in (reranker_folder, bert_reranker_folder):
        scorer = make_scorer(folder, normalize=False, max_length=30)
        own = Reranker(folder, normalize=False, max_length=30)
        assert isinstance(scorer, Reranker)
        assert await call(scorer, "rank", QUERY, PASSAGES) == own.rank(QUERY, PASSAGES)
        assert scorer.model == str(folder)
        assert scorer.fingerprint == own.fingerprint


@pytest.mark.parametrize("weights", [None, M3Weights(sparse=2.0, multi_vector=0)])
async def test_m3_gets_its_three_scores(call, m3_folder, weights):
    scorer = make_scorer(m3_folder, m3_weights=weights)
    assert isinstance(scorer, M3Reranker)
    expected = M3Embedder(m3_folder).score([(QUERY, text) for text in PASSAGES], weights=weights)
    np.testing.assert_allclose(
        await call(scorer, "score", QUERY, PASSAGES), expected, atol=1e-6, rtol=0
    )
    pairs = [(QUERY, text) for text in PASSAGES]
    np.testing.assert_allclose(
        await call(scorer, "score_pairs", pairs), expected, atol=1e-6, rtol=0
    )
    assert scorer.model == str(m3_folder)
    ranked = await call(scorer, "rank", QUERY, PASSAGES)
    assert [found.index for found in ranked] == np.argsort(-expected, kind="stable").tolist()
    assert {(type(found.index), type(found.score)) for found in ranked} == {(int, float)}
    least = ranked[2].score
    assert await call(scorer, "rank", QUERY, PASSAGES, top_n=2) == ranked[:2]
    assert await call(scorer, "rank", QUERY, PASSAGES, score_threshold=least) == ranked[:3]
    assert await call(scorer, "rank", QUERY, []) == []


def test_m3_is_known_by_its_name_and_by_its_files(m3_folder, copy_of):
    for model in ("BAAI/bge-m3", m3_folder, copy_of(m3_folder, "acme")):
        assert isinstance(make_scorer(model), M3Reranker)
    # A snapshot of the classifier that was trained from bge-m3 is no bge-m3.
    assert isinstance(make_scorer("BAAI/bge-reranker-v2-m3"), Reranker)


def test_what_scores_no_pairs_is_refused(en_folder, unknown_folder, m3_folder, copy_of):
    for model in (en_folder, unknown_folder, "BAAI/bge-m3-unsupervised", "BAAI/bge-base-zh"):
        with pytest.raises(CheckpointError, match="embedding model"):
            make_scorer(model)
    folder = copy_of(m3_folder)
    (folder / "sparse_linear.pt").unlink()
    with pytest.raises(CheckpointError, match=r"sparse_linear\.pt"):
        make_scorer(folder)
    assert make_scorer(folder, m3_weights={"sparse": 0}).rank(QUERY, PASSAGES)


def test_weights_are_for_m3(reranker_folder):
    with pytest.raises(ArgumentError, match="m3_weights is for"):
        make_scorer(reranker_folder, m3_weights=M3Weights())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"query": None}, InputTypeError),
        ({"passages": "text"}, InputTypeError),
        ({"top_n": 0}, ArgumentError),
        ({"score_threshold": float("nan")}, ArgumentError),
    ],
)
async def test_wrong_arguments_are_refused(call, m3_folder, arguments, error):
    given = {"query": QUERY, "passages": PASSAGES, **arguments}
    with pytest.raises(error):
        await call(make_scorer(m3_folder), "rank", **given)


async def test_closing_closes_the_model(call, m3_folder):
    embedder = M3Embedder(m3_folder)
    M3Reranker(embedder).close()
    with pytest.raises(ClosedError):
        embedder.encode(["a"])


def test_the_query_is_encoded_once_and_a_passage_too(m3_folder, computed):
    scorer: Any = make_scorer(m3_folder)
    scorer.score(QUERY, PASSAGES)
    own = M3Embedder(m3_folder).encode(
        [QUERY, *PASSAGES[:4]], dense=False, sparse=False, multi_vector=True
    )
    assert own.multi_vector is not None
    tokens = sum(len(vectors) + 1 for vectors in own.multi_vector)
    assert computed.passes == [tokens, tokens]


def test_fingerprint(m3_folder):
    one = make_scorer(m3_folder).fingerprint
    assert make_scorer(m3_folder, batch_tokens=64).fingerprint == one
    assert make_scorer(m3_folder, m3_weights={"sparse": 0.5}).fingerprint != one
    assert make_scorer(m3_folder, max_length=50).fingerprint != one
