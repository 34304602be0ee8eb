"""bge-m3 in Milvus: one pass for dense and sparse, in both hosts, in Milvus Lite's file.

The hosts' packages want different versions of pymilvus, so `make test-stores` runs each half with
its own.
"""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bge_core import ArgumentError, CheckpointError, ClosedError, M3Embedder
from langchain_bge import BGEEmbeddings
from llamaindex_bge import BGEEmbedding
from tests.m3_texts import QUERY, TEXTS, tokens_of

pytest.importorskip("milvus_lite")


# What langchain-milvus says of its own default.
pytestmark = pytest.mark.filterwarnings("ignore:The 'ranker_type' and:DeprecationWarning")


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


def fused(folder: Path, query: str, texts: list[str], *, first: int) -> dict[str, float]:
    """Score texts by the reciprocal ranks of the first of each: by dense and by sparse score."""
    alone = M3Embedder(folder)
    asked, given = alone.encode([query]), alone.encode(texts)
    dense = given.dense @ asked.dense[0]
    sparse: list[float] = [
        sum((text.get(token, 0.0) * weight for token, weight in asked.sparse[0].items()), 0.0)
        for text in given.sparse
    ]
    scores = dict.fromkeys(texts, 0.0)
    for found in (dense, np.array(sparse)):
        for rank, at in enumerate(np.argsort(-found, kind="stable")[:first], start=1):
            scores[texts[at]] += 1 / (60 + rank)
    return scores


def check(found: list[tuple[str, float]], scores: dict[str, float]) -> None:
    best = sorted(scores.values(), reverse=True)[: len(found)]
    assert [score for _, score in found] == pytest.approx(best, abs=1e-6)
    assert [score for _, score in found] == pytest.approx(
        [scores[text] for text, _ in found], abs=1e-6
    )


class TestLangChain:
    @pytest.fixture(autouse=True)
    def _version(self) -> None:
        module = pytest.importorskip("langchain_milvus.vectorstores.milvus")
        if not hasattr(module, "_MilvusClientCollection"):
            pytest.skip("langchain-milvus 0.3.3 finds no connection with pymilvus 2.6.10 and later")

    def store(self, m3_folder: Path, path: Path) -> Any:
        from langchain_milvus import Milvus

        from langchain_bge.milvus import BGEMilvusSparseEmbeddings

        return Milvus(
            [BGEEmbeddings(model=m3_folder), BGEMilvusSparseEmbeddings(model=m3_folder)],
            vector_field=["dense", "sparse"],
            index_params=[
                {"metric_type": "IP", "index_type": "AUTOINDEX"},
                {"metric_type": "IP", "index_type": "SPARSE_INVERTED_INDEX"},
            ],
            # The store's own default drops a fifth of the weights, which Milvus Lite refuses.
            search_params=[{"metric_type": "IP"}] * 2,
            connection_args={"uri": str(path / "texts.db")},
            consistency_level="Strong",
            auto_id=True,
        )

    async def test_vectors_are_the_core_s(self, call, m3_folder):
        from langchain_milvus.utils.sparse import BaseSparseEmbedding

        from langchain_bge.milvus import BGEMilvusSparseEmbeddings

        sparse = BGEMilvusSparseEmbeddings(model=m3_folder)
        assert isinstance(sparse, BaseSparseEmbedding)
        expected = M3Embedder(m3_folder).encode(TEXTS, dense=False).sparse
        vectors = await call(sparse, "embed_documents", TEXTS)
        for weights, wanted in zip(vectors, expected, strict=True):
            assert weights == pytest.approx(wanted, abs=1e-5)
            assert {type(part) for item in weights.items() for part in item} <= {int, float}
        assert await call(sparse, "embed_query", QUERY) == pytest.approx(
            M3Embedder(m3_folder).encode([QUERY], dense=False).sparse[0], abs=1e-5
        )
        assert await call(sparse, "embed_documents", []) == []

    async def test_one_pass_each_and_the_order_of_both_scores(
        self, call, m3_folder, passes, tmp_path
    ):
        store = self.store(m3_folder, tmp_path)
        store.embedding_func[0].embed_query("warm")
        passes.clear()
        await call(store, "add_texts", TEXTS)
        assert sum(passes) == tokens_of(m3_folder, TEXTS)
        for query in (QUERY, *TEXTS[:2]):
            passes.clear()
            found = await call(
                store, "similarity_search_with_score", query, k=3, fetch_k=3, ranker_type="rrf"
            )
            assert sum(passes) == tokens_of(m3_folder, [query])
            assert len(found) == 3
            scored = [(document.page_content, score) for document, score in found]
            check(scored, fused(m3_folder, query, TEXTS, first=3))

    def test_stored_vectors_are_those_of_each_class_alone(self, m3_folder, tmp_path):
        store = self.store(m3_folder, tmp_path)
        store.add_texts(TEXTS)
        alone = M3Embedder(m3_folder).encode(TEXTS)
        rows = store.client.query(store.collection_name, output_fields=["*"], limit=10)
        assert len(rows) == len(TEXTS)
        for row in rows:
            at = TEXTS.index(row["text"])
            np.testing.assert_allclose(row["dense"], alone.dense[at], atol=1e-5)
            assert row["sparse"] == pytest.approx(alone.sparse[at], abs=1e-5)

    def test_configuration(self, m3_folder, en_folder):
        from langchain_bge.milvus import BGEMilvusSparseEmbeddings

        sparse = BGEMilvusSparseEmbeddings(model=m3_folder, max_length=20)
        expected = sparse.embed_query(TEXTS[0])
        for other in (pickle.loads(pickle.dumps(sparse)), copy.deepcopy(sparse)):
            assert other.max_length == 20
            assert other.embed_query(TEXTS[0]) == expected
        with pytest.raises(CheckpointError, match="bge-m3's make"):
            BGEMilvusSparseEmbeddings(model=en_folder)
        with pytest.raises(ArgumentError, match="query_instruction"):
            BGEMilvusSparseEmbeddings(model=m3_folder, query_instruction="find: ")
        sparse.close()
        with pytest.raises(ClosedError):
            sparse.embed_query("a")


class TestLlamaIndex:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("llama_index.vector_stores.milvus")

    def index(self, m3_folder: Path, path: Path, nodes: list[Any]) -> Any:
        from llama_index.core import StorageContext, VectorStoreIndex
        from llama_index.vector_stores.milvus import MilvusVectorStore

        from llamaindex_bge.milvus import BGEMilvusSparseEmbedding

        store = MilvusVectorStore(
            uri=str(path / "texts.db"),
            collection_name="texts",
            dim=32,
            similarity_metric="IP",
            enable_sparse=True,
            sparse_embedding_function=BGEMilvusSparseEmbedding(model_name=m3_folder),
        )
        return VectorStoreIndex(
            nodes,
            storage_context=StorageContext.from_defaults(vector_store=store),
            embed_model=BGEEmbedding(model_name=m3_folder),
        )

    async def test_vectors_are_the_core_s(self, m3_folder):
        from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction

        from llamaindex_bge.milvus import BGEMilvusSparseEmbedding

        sparse = BGEMilvusSparseEmbedding(model_name=m3_folder)
        assert isinstance(sparse, BaseSparseEmbeddingFunction)
        expected = M3Embedder(m3_folder).encode(TEXTS, dense=False).sparse
        given = (
            sparse.encode_documents(TEXTS),
            await sparse.async_encode_documents(TEXTS),
            sparse.encode_queries(TEXTS),
            await sparse.async_encode_queries(TEXTS),
            sparse.get_text_embedding_batch(TEXTS),
        )
        for vectors in given:
            for weights, wanted in zip(vectors, expected, strict=True):
                assert weights == pytest.approx(wanted, abs=1e-5)
        assert sparse.encode_documents([]) == sparse.encode_queries([]) == []

    @pytest.mark.parametrize("excluded", [True, False])
    def test_one_pass_each_and_the_order_of_both_scores(
        self, m3_folder, passes, tmp_path, excluded
    ):
        from llama_index.core.schema import MetadataMode, TextNode

        nodes = [TextNode(text=text, metadata={"page": at}) for at, text in enumerate(TEXTS)]
        for node in nodes:
            node.excluded_embed_metadata_keys = ["page"] if excluded else []
        BGEEmbedding(model_name=m3_folder).get_query_embedding("warm")
        passes.clear()
        index = self.index(m3_folder, tmp_path, nodes)
        embedded = [node.get_content(MetadataMode.EMBED) for node in nodes]
        # The store asks for the sparse vector of the text alone.
        expected = {*embedded, *TEXTS}
        assert sum(passes) == tokens_of(m3_folder, list(expected))
        retriever = index.as_retriever(vector_store_query_mode="hybrid", similarity_top_k=3)
        for query in (QUERY, *TEXTS[:2]):
            passes.clear()
            found = retriever.retrieve(query)
            assert sum(passes) == tokens_of(m3_folder, [query])
            assert len(found) == 3
            if excluded:
                scored = [(node.text, node.score) for node in found]
                check(scored, fused(m3_folder, query, TEXTS, first=3))

    def test_configuration_travels(self, m3_folder):
        from llamaindex_bge.milvus import BGEMilvusSparseEmbedding

        sparse = BGEMilvusSparseEmbedding(model_name=m3_folder, max_length=20)
        expected = sparse.encode_queries(TEXTS)
        data = sparse.to_dict()
        assert data["class_name"] == "BGEMilvusSparseEmbedding"
        for other in (
            BGEMilvusSparseEmbedding.from_dict(data),
            pickle.loads(pickle.dumps(sparse)),
            copy.deepcopy(sparse),
        ):
            assert (type(other), other.max_length) == (BGEMilvusSparseEmbedding, 20)
            assert other.encode_queries(TEXTS) == expected
