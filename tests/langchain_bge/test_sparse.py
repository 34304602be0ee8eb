"""BGESparseEmbeddings, hybrid search in Qdrant, and bge-m3 as a reranker."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_qdrant import QdrantVectorStore, RetrievalMode, SparseEmbeddings, SparseVector

from bge_core import ArgumentError, CheckpointError, ClosedError, InputTypeError, M3Embedder
from langchain_bge import BGEEmbeddings, BGEReranker, BGESparseEmbeddings
from tests.m3_texts import QUERY, TEXTS, tokens_of


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def as_dict(vector):
    return dict(zip(vector.indices, vector.values, strict=True))


class TestVectors:
    async def test_are_the_core_s(self, call, m3_folder):
        sparse = BGESparseEmbeddings(model=m3_folder)
        assert isinstance(sparse, SparseEmbeddings)
        expected = M3Embedder(m3_folder).encode(TEXTS, dense=False).sparse
        vectors = await call(sparse, "embed_documents", TEXTS)
        for vector, weights in zip(vectors, expected, strict=True):
            assert isinstance(vector, SparseVector)
            assert as_dict(vector) == pytest.approx(weights, abs=1e-5)
            assert vector.indices == sorted(set(vector.indices))
            assert {type(value) for value in (*vector.indices, *vector.values)} <= {int, float}
        query = await call(sparse, "embed_query", TEXTS[0])
        assert as_dict(query) == pytest.approx(expected[0], abs=1e-5)

    async def test_of_nothing(self, call, m3_folder):
        sparse = BGESparseEmbeddings(model=m3_folder)
        assert await call(sparse, "embed_documents", []) == []
        assert len(await call(sparse, "embed_documents", ["", " "])) == 2


async def hybrid(call, m3_folder, **arguments):
    dense = BGEEmbeddings(model=m3_folder)
    sparse = BGESparseEmbeddings(model=m3_folder, **arguments)
    dense.embed_query("warm")
    store = QdrantVectorStore.construct_instance(
        embedding=dense,
        sparse_embedding=sparse,
        retrieval_mode=RetrievalMode.HYBRID,
        client_options={"location": ":memory:"},
        collection_name="texts",
    )
    return store, dense, sparse


class TestHybrid:
    async def test_indexing_takes_one_pass_a_document(self, call, m3_folder, passes):
        store, _, _ = await hybrid(call, m3_folder)
        passes.clear()
        texts = [f"{text} {number}" for number in range(30) for text in TEXTS]
        await call(store, "add_texts", texts)
        assert sum(passes) == tokens_of(m3_folder, texts)

    async def test_a_query_takes_one_pass(self, call, m3_folder, passes):
        store, _, _ = await hybrid(call, m3_folder)
        await call(store, "add_texts", TEXTS)
        passes.clear()
        found = await call(store, "similarity_search", QUERY, k=3)
        assert sum(passes) == tokens_of(m3_folder, [QUERY])
        assert len(found) == 3

    async def test_stored_vectors_are_those_of_each_class_alone(self, call, m3_folder):
        store, _, _ = await hybrid(call, m3_folder)
        await call(store, "add_texts", TEXTS)
        alone = M3Embedder(m3_folder).encode(TEXTS)
        points = store.client.scroll("texts", with_vectors=True, limit=100)[0]
        assert len(points) == len(TEXTS)
        for point in points:
            place = TEXTS.index(point.payload["page_content"])
            np.testing.assert_allclose(point.vector[""], alone.dense[place], atol=1e-5)
            assert as_dict(point.vector["langchain-sparse"]) == pytest.approx(
                alone.sparse[place], abs=1e-5
            )

    async def test_a_document_finds_itself(self, call, m3_folder):
        store, _, _ = await hybrid(call, m3_folder)
        await call(store, "add_texts", TEXTS)
        for text in TEXTS:
            (found,) = await call(store, "similarity_search", text, k=1)
            assert found.page_content == text

    async def test_one_model_is_loaded(self, call, m3_folder):
        store, dense, sparse = await hybrid(call, m3_folder)
        await call(store, "add_texts", TEXTS)
        reranker = BGEReranker(model=m3_folder)
        await call(reranker, "rerank", TEXTS, QUERY)
        engines = {id(model._core._model._engine) for model in (dense, sparse)}
        core: Any = reranker._core
        assert engines == {id(core._embedder._model._engine)}

    async def test_another_dtype_is_another_model(self, call, m3_folder, passes):
        store, _, _ = await hybrid(call, m3_folder, dtype="bfloat16")
        passes.clear()
        # No other test's model has left halves of these.
        texts = [f"{text} by dtype" for text in TEXTS]
        await call(store, "add_texts", texts)
        assert sum(passes) == 2 * tokens_of(m3_folder, texts)


class TestConfiguration:
    def test_copies_and_pickles_carry_the_configuration(self, m3_folder):
        sparse = BGESparseEmbeddings(model=m3_folder, max_length=20)
        expected = sparse.embed_query(TEXTS[0])
        for other in (pickle.loads(pickle.dumps(sparse)), copy.deepcopy(sparse)):
            assert other.max_length == 20
            assert other.embed_query(TEXTS[0]) == expected
        assert sparse.fingerprint != BGESparseEmbeddings(model=m3_folder).fingerprint

    def test_close(self, m3_folder):
        with BGESparseEmbeddings(model=m3_folder) as sparse:
            sparse.embed_query("a")
        with pytest.raises(ClosedError):
            sparse.embed_query("a")

    def test_refusals(self, m3_folder, en_folder, copy_of):
        folder = copy_of(m3_folder)
        (folder / "sparse_linear.pt").unlink()
        with pytest.raises(CheckpointError, match=r"sparse_linear\.pt"):
            BGESparseEmbeddings(model=folder)
        with pytest.raises(CheckpointError, match="bge-m3's make"):
            BGESparseEmbeddings(model=en_folder)
        with pytest.raises(CheckpointError, match="gives no sparse outputs"):
            BGESparseEmbeddings(model="BAAI/bge-base-en-v1.5")
        with pytest.raises(ArgumentError, match="backend='torch'"):
            BGESparseEmbeddings(model=m3_folder, backend="openvino")
        with pytest.raises(ArgumentError, match="query_instruction"):
            BGESparseEmbeddings(model=m3_folder, query_instruction="find: ")


class TestReranker:
    @pytest.mark.parametrize(
        "weights", [None, {"dense": 1, "sparse": 0}, {"sparse": 2.5, "multi_vector": 0}]
    )
    async def test_scores_by_all_outputs(self, call, m3_folder, weights):
        reranker = BGEReranker(model=m3_folder, m3_weights=weights, top_n=None)
        expected = M3Embedder(m3_folder).score([(QUERY, text) for text in TEXTS], weights=weights)
        order = np.argsort(-expected, kind="stable")
        documents = [Document(text, metadata={"at": at}) for at, text in enumerate(TEXTS)]
        kept = await call(reranker, "compress_documents", documents, QUERY)
        assert [document.metadata["at"] for document in kept] == order.tolist()
        scores = [document.metadata["relevance_score"] for document in kept]
        np.testing.assert_allclose(scores, expected[order], atol=1e-6)
        assert {type(score) for score in scores} == {float}
        assert "relevance_score" not in documents[0].metadata

    async def test_limits(self, call, m3_folder):
        everything = BGEReranker(model=m3_folder, top_n=None)
        ranked = await call(everything, "rerank", TEXTS, QUERY)
        least = ranked[2]["relevance_score"]
        limited = BGEReranker(model=m3_folder, top_n=2, score_threshold=least)
        assert await call(limited, "rerank", TEXTS, QUERY) == ranked[:2]
        assert await call(limited, "rerank", TEXTS, QUERY, top_n=None) == ranked[:3]
        assert await call(limited, "rerank", [], QUERY) == []

    def test_weights_change_the_fingerprint_and_survive_a_copy(self, m3_folder):
        one = BGEReranker(model=m3_folder)
        other = BGEReranker(model=m3_folder, m3_weights={"sparse": 0.5})
        assert one.fingerprint != other.fingerprint
        for made in (copy.copy(other), pickle.loads(pickle.dumps(other))):
            assert made.m3_weights == other.m3_weights
            assert made.fingerprint == other.fingerprint

    def test_refusals(self, m3_folder, en_folder, reranker_folder, copy_of):
        with pytest.raises(ArgumentError, match="'colbert' is no weight"):
            BGEReranker(model=m3_folder, m3_weights={"colbert": 1})
        with pytest.raises(InputTypeError, match="name each"):
            BGEReranker(model=m3_folder, m3_weights=[1, 1, 1])
        with pytest.raises(ArgumentError, match="m3_weights is for"):
            BGEReranker(model=reranker_folder, m3_weights={"dense": 1})
        with pytest.raises(CheckpointError, match="embedding model"):
            BGEReranker(model=en_folder)
        with pytest.raises(CheckpointError, match="embedding model"):
            BGEReranker(model="BAAI/bge-m3-unsupervised")
        folder = copy_of(m3_folder)
        (folder / "colbert_linear.pt").unlink()
        with pytest.raises(CheckpointError, match=r"colbert_linear\.pt"):
            BGEReranker(model=folder)
        BGEReranker(model=folder, m3_weights={"multi_vector": 0})
        BGEReranker(model="BAAI/bge-m3")

    def test_a_folder_of_another_name_is_known_by_its_files(self, m3_folder, copy_of):
        reranker = BGEReranker(model=copy_of(m3_folder, "fine-tuned"))
        assert len(reranker.rerank(TEXTS, QUERY)) == 3
