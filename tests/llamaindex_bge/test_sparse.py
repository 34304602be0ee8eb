"""BGESparseEmbedding, hybrid search in Qdrant, and bge-m3 as a reranker."""

from __future__ import annotations

import copy
import logging
import pickle
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base_sparse import BaseSparseEmbedding
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient

from bge_core import (
    ArgumentError,
    CheckpointError,
    ClosedError,
    InputTypeError,
    M3Embedder,
    M3Weights,
)
from llamaindex_bge import BGEEmbedding, BGEReranker, BGESparseEmbedding
from tests.m3_texts import QUERY, TEXTS, tokens_of

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


async def test_vectors_are_the_core_s(call: Any, m3_folder: Path):
    sparse = BGESparseEmbedding(model_name=m3_folder)
    assert isinstance(sparse, BaseSparseEmbedding)
    expected = M3Embedder(m3_folder).encode(TEXTS, dense=False).sparse
    batch = await call(sparse, "get_text_embedding_batch", TEXTS)
    single = [await call(sparse, "get_text_embedding", text) for text in TEXTS]
    queries = [await call(sparse, "get_query_embedding", text) for text in TEXTS]
    for given in (batch, single, queries):
        for weights, wanted in zip(given, expected, strict=True):
            assert weights == pytest.approx(wanted, abs=1e-5)
    aggregated = await call(sparse, "get_agg_embedding_from_queries", TEXTS[:2])
    assert aggregated.keys() == expected[0].keys() | expected[1].keys()
    for hook in (sparse.sparse_doc_fn, sparse.sparse_query_fn):
        indices, values = hook(TEXTS)
        given = [dict(zip(*pair, strict=True)) for pair in zip(indices, values, strict=True)]
        for weights, wanted in zip(given, expected, strict=True):
            assert weights == pytest.approx(wanted, abs=1e-5)
    assert sparse.sparse_doc_fn([]) == ([], [])


async def test_similarity_is_the_model_s_own(call: Any, m3_folder: Path):
    sparse = BGESparseEmbedding(model_name=m3_folder)
    query = await call(sparse, "get_query_embedding", QUERY)
    text = await call(sparse, "get_text_embedding", TEXTS[0])
    only = M3Weights(dense=0, sparse=1, multi_vector=0)
    (expected,) = M3Embedder(m3_folder).score([(QUERY, TEXTS[0])], weights=only)
    assert sparse.similarity(query, text) == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert sparse.similarity(query, {}) == 0.0


def hybrid(m3_folder: Path) -> tuple[QdrantVectorStore, BGEEmbedding, BGESparseEmbedding]:
    dense = BGEEmbedding(model_name=m3_folder)
    sparse = BGESparseEmbedding(model_name=m3_folder)
    dense.get_query_embedding("warm")
    store = QdrantVectorStore(
        "texts",
        client=QdrantClient(":memory:"),
        enable_hybrid=True,
        sparse_doc_fn=sparse.sparse_doc_fn,
        sparse_query_fn=sparse.sparse_query_fn,
    )
    return store, dense, sparse


def index_of(nodes: list[TextNode], store: QdrantVectorStore, dense: BGEEmbedding) -> Any:
    context = StorageContext.from_defaults(vector_store=store)
    return VectorStoreIndex(nodes, storage_context=context, embed_model=dense)


def test_hybrid_indexing_takes_one_pass_a_document(m3_folder: Path, passes: list[int]):
    store, dense, _ = hybrid(m3_folder)
    passes.clear()
    nodes = [
        TextNode(text=f"{text} {number}", metadata={"page": number})
        for number in range(30)
        for text in TEXTS
    ]
    index_of(nodes, store, dense)
    texts = [node.get_content(MetadataMode.EMBED) for node in nodes]
    assert sum(passes) == tokens_of(m3_folder, texts)


def test_a_hybrid_query_takes_one_pass_and_finds(m3_folder: Path, passes: list[int]):
    store, dense, _ = hybrid(m3_folder)
    index = index_of([TextNode(text=text) for text in TEXTS], store, dense)
    retriever = index.as_retriever(
        vector_store_query_mode="hybrid", similarity_top_k=3, sparse_top_k=3
    )
    for text in TEXTS:
        passes.clear()
        assert retriever.retrieve(text)[0].text == text
        assert sum(passes) == tokens_of(m3_folder, [text])


def test_stored_vectors_are_those_of_each_class_alone(m3_folder: Path):
    store, dense, _ = hybrid(m3_folder)
    ids = [str(uuid.UUID(int=at)) for at in range(len(TEXTS))]
    nodes = [TextNode(text=text, id_=own) for text, own in zip(TEXTS, ids, strict=True)]
    index_of(nodes, store, dense)
    alone = M3Embedder(m3_folder).encode(TEXTS)
    points, _ = store.client.scroll("texts", with_vectors=True, limit=100)
    assert len(points) == len(TEXTS)
    for point in points:
        at = ids.index(point.id)
        np.testing.assert_allclose(point.vector["text-dense"], alone.dense[at], atol=1e-5)
        sparse = point.vector["text-sparse-new"]
        given = dict(zip(sparse.indices, sparse.values, strict=True))
        assert given == pytest.approx(alone.sparse[at], abs=1e-5)


def test_one_model_is_loaded(m3_folder: Path):
    dense, sparse = BGEEmbedding(model_name=m3_folder), BGESparseEmbedding(model_name=m3_folder)
    reranker = BGEReranker(model=m3_folder)
    dense.get_query_embedding("a")
    sparse.get_query_embedding("a")
    reranker.postprocess_nodes([NodeWithScore(node=TextNode(text="a"))], query_str="b")
    cores: list[Any] = [dense._core, sparse._core, reranker._core]
    assert cores[0]._model._engine is cores[1]._model._engine is cores[2]._embedder._model._engine


def test_configuration_travels(m3_folder: Path):
    sparse = BGESparseEmbedding(model_name=m3_folder, max_length=20, token="hf_secret")
    expected = sparse.get_query_embedding(TEXTS[0])
    data = sparse.to_dict()
    assert data["class_name"] == "BGESparseEmbedding"
    assert "hf_secret" not in f"{data} {sparse!r} {sparse.to_payload()} {sparse.to_json()}"
    for other in (
        BGESparseEmbedding.from_dict(data),
        pickle.loads(pickle.dumps(sparse)),
        copy.deepcopy(sparse),
    ):
        assert other.max_length == 20
        assert other.get_query_embedding(TEXTS[0]) == expected
    assert sparse.fingerprint != BGESparseEmbedding(model_name=m3_folder).fingerprint
    with pytest.raises(ArgumentError, match="can't be changed"):
        sparse.max_length = 7


def test_closed(m3_folder: Path):
    with BGESparseEmbedding(model_name=m3_folder) as sparse:
        sparse.get_text_embedding("a")
    with pytest.raises(ClosedError):
        sparse.get_text_embedding("a")


def test_refusals(m3_folder: Path, en_folder: Path, copy_of: Any):
    folder = copy_of(m3_folder)
    (folder / "sparse_linear.pt").unlink()
    with pytest.raises(CheckpointError, match=r"sparse_linear\.pt"):
        BGESparseEmbedding(model_name=folder)
    with pytest.raises(CheckpointError, match="bge-m3's make"):
        BGESparseEmbedding(model_name=en_folder)
    with pytest.raises(CheckpointError, match="gives no sparse outputs"):
        BGESparseEmbedding(model_name="BAAI/bge-small-en-v1.5")
    with pytest.raises(ArgumentError, match="no argument 'normalize'"):
        BGESparseEmbedding(model_name=m3_folder, normalize=False)


@pytest.mark.parametrize("weights", [None, {"dense": 1, "sparse": 0}, M3Weights(sparse=2.5)])
async def test_the_reranker_scores_by_all_outputs(call: Any, m3_folder: Path, weights: Any):
    reranker = BGEReranker(model=m3_folder, m3_weights=weights, top_n=None)
    nodes = [
        NodeWithScore(node=TextNode(text=text, id_=str(at)), score=0.5)
        for at, text in enumerate(TEXTS)
    ]
    result = await call(reranker, "postprocess_nodes", nodes, query_str=QUERY)
    expected = M3Embedder(m3_folder).score([(QUERY, text) for text in TEXTS], weights=weights)
    order = np.argsort(-expected, kind="stable")
    assert [int(node.node_id) for node in result] == order.tolist()
    np.testing.assert_allclose([node.score for node in result], expected[order], atol=1e-6)
    assert {type(node.score) for node in result} == {float}
    assert {node.score for node in nodes} == {0.5}


def test_the_reranker_s_weights_travel(m3_folder: Path):
    reranker = BGEReranker(model=m3_folder, m3_weights={"sparse": 0.5})
    assert reranker.m3_weights == M3Weights(sparse=0.5)
    assert reranker.fingerprint != BGEReranker(model=m3_folder).fingerprint
    for other in (
        BGEReranker.from_dict(reranker.to_dict()),
        BGEReranker.from_json(reranker.to_json()),
        pickle.loads(pickle.dumps(reranker)),
        copy.copy(reranker),
    ):
        assert other.m3_weights == reranker.m3_weights
        assert other.fingerprint == reranker.fingerprint


def test_the_reranker_refuses_in_sentences(
    m3_folder: Path, reranker_folder: Path, en_folder: Path, copy_of: Any
):
    with pytest.raises(ArgumentError, match="'colbert' is no weight"):
        BGEReranker(model=m3_folder, m3_weights={"colbert": 1})
    with pytest.raises(InputTypeError, match="Weights must be M3Weights or a mapping"):
        BGEReranker(model=m3_folder, m3_weights=[1, 1, 1])
    with pytest.raises(ArgumentError, match="m3_weights is for"):
        BGEReranker(model=reranker_folder, m3_weights={"dense": 1})
    with pytest.raises(CheckpointError, match="embedding model"):
        BGEReranker(model=en_folder)
    folder = copy_of(m3_folder)
    (folder / "colbert_linear.pt").unlink()
    with pytest.raises(CheckpointError, match=r"colbert_linear\.pt"):
        BGEReranker(model=folder)
    BGEReranker(model="BAAI/bge-m3")


async def test_one_text_in_place_of_a_list_is_refused(call: Any, m3_folder: Path):
    model = BGESparseEmbedding(model_name=m3_folder)
    with pytest.raises(InputTypeError, match="texts must be a list of str, got one str"):
        await call(model, "get_text_embedding_batch", "a text")
    assert len(await call(model, "get_text_embedding_batch", iter(["a text", "a cat"]))) == 2
