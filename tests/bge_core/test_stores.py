"""bge-m3's outputs in the words of stores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from bge_core import ArgumentError, InputTypeError, M3Embedder, M3Outputs, M3Weights
from bge_core.stores import qdrant_vectors, rank_features, rank_features_query, sparsevec
from tests.m3_texts import QUERY, TEXTS


class TestRankFeatures:
    def test_keys_are_ids_and_values_are_what_lucene_holds(self, m3_folder: Path):
        for weights in M3Embedder(m3_folder).encode(TEXTS, dense=False).sparse:
            features = rank_features(weights)
            assert {int(key): value for key, value in features.items()} == weights
            assert not any("." in key for key in features)
        single: Any = np.float32(0.5)
        assert rank_features({3: 0.0, 2: 1e-40, 1: single}) == {"1": 0.5}
        assert rank_features({}) == {}

    def test_the_query_s_score_is_the_lexical_one(self, m3_folder):
        embedder = M3Embedder(m3_folder)
        weights = embedder.encode([QUERY, *TEXTS], dense=False).sparse
        asked, documents = weights[0], weights[1:]
        clauses = rank_features_query("tokens", asked)["bool"]["should"]
        assert all(clause["rank_feature"]["linear"] == {} for clause in clauses)
        boosts = {
            clause["rank_feature"]["field"]: clause["rank_feature"]["boost"] for clause in clauses
        }
        only = M3Weights(dense=0, sparse=1, multi_vector=0)
        expected = embedder.score([(QUERY, text) for text in TEXTS], weights=only)
        for own, score in zip(documents, expected, strict=True):
            # Lucene's linear function of a feature is the feature; a boost multiplies it.
            features = rank_features(own).items()
            found = sum(boosts.get(f"tokens.{key}", 0.0) * value for key, value in features)
            assert found == pytest.approx(score, rel=1e-6, abs=1e-5)


class TestSparsevec:
    def test_the_literal(self):
        assert sparsevec({9: 0.5, 0: 0.25, 4: 0.0}, dimensions=10) == "{1:0.25,10:0.5}/10"
        assert sparsevec({}) == "{}/250002"
        single: Any = np.float32(2)
        assert sparsevec({5: 1e-5, 7: single}) == "{6:1e-05,8:2.0}/250002"
        many = {token: 1.0 + token for token in range(16_001)}
        assert sparsevec(many, heaviest=2) == "{16000:16000.0,16001:16001.0}/250002"
        assert sparsevec(dict.fromkeys(range(4), 1.0), heaviest=2) == "{1:1.0,2:1.0}/250002"

    def test_refusals(self):
        for wrong in ({"heaviest": True}, {"dimensions": True}):
            with pytest.raises(InputTypeError, match="must be a whole number"):
                sparsevec({0: 1.0}, **wrong)
        with pytest.raises(ArgumentError, match="Token 10 is none of 10: pass the vocabulary"):
            sparsevec({10: 0.5}, dimensions=10)
        with pytest.raises(ArgumentError, match="holds 16,000 weights, got 16,001"):
            sparsevec(dict.fromkeys(range(16_001), 1.0))


@pytest.mark.parametrize("write", [rank_features, sparsevec])
def test_what_is_no_sparse_output_is_refused(write):
    wrong: Any
    for wrong in ([(1, 0.5)], {"panda": 0.5}, {"6": 0.5}, {1.5: 0.5}, {1: None}, {None: 0.5}):
        with pytest.raises(InputTypeError, match="mapping of token ids to weights, got"):
            write(wrong)
    for wrong in ({-1: 0.5}, {1: -0.5}, {1: math.nan}, {1: math.inf}):
        with pytest.raises(ArgumentError, match="0 or more and finite, got"):
            write(wrong)


class TestQdrant:
    def test_each_output_alone(self, m3_folder):
        embedder = M3Embedder(m3_folder)
        assert qdrant_vectors(embedder.encode([], multi_vector=True)) == []
        assert qdrant_vectors(M3Outputs()) == []
        (given,) = qdrant_vectors(embedder.encode(TEXTS[:1], sparse=False))
        assert given.keys() == {"dense"}
        (given,) = qdrant_vectors(embedder.encode(TEXTS[:1], dense=False))
        assert given.keys() == {"sparse"}

    def test_the_store_reranks_by_max_sim_after_one_pass(self, m3_folder, passes):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(m3_folder)
        embedder = M3Embedder(m3_folder)
        embedder.encode(["warm"])
        passes.clear()
        client = QdrantClient(":memory:")
        multi = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        cosine = models.Distance.COSINE
        client.create_collection(
            "texts",
            vectors_config={
                "dense": models.VectorParams(size=embedder.dimension, distance=cosine),
                "multi_vector": models.VectorParams(
                    size=32, distance=cosine, multivector_config=multi
                ),
            },
            sparse_vectors_config={"sparse": models.SparseVectorParams()},
        )
        vectors = qdrant_vectors(embedder.encode(TEXTS, multi_vector=True))
        points = [models.PointStruct(id=at, vector=vector) for at, vector in enumerate(vectors)]
        client.upsert("texts", points)
        assert sum(passes) == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
        passes.clear()
        (query,) = qdrant_vectors(embedder.encode([QUERY], multi_vector=True))
        assert sum(passes) == len(tokenizer(QUERY)["input_ids"])
        found = client.query_points(
            "texts",
            prefetch=[
                models.Prefetch(query=query["dense"], using="dense", limit=len(TEXTS)),
                models.Prefetch(
                    query=models.SparseVector(**query["sparse"]), using="sparse", limit=len(TEXTS)
                ),
            ],
            query=query["multi_vector"],
            using="multi_vector",
            limit=len(TEXTS),
        ).points
        only = M3Weights(dense=0, sparse=0, multi_vector=1)
        expected = embedder.score([(QUERY, text) for text in TEXTS], weights=only)
        assert [point.id for point in found] == np.argsort(-expected, kind="stable").tolist()
        scores = np.array([point.score for point in found]) / len(query["multi_vector"])
        np.testing.assert_allclose(scores, np.sort(expected)[::-1], atol=1e-5)
