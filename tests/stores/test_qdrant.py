"""A Qdrant collection with bge-m3's three vectors, opened by both hosts."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.utils import node_to_metadata_dict
from llama_index.vector_stores.qdrant import QdrantVectorStore as LlamaIndexQdrant
from qdrant_client import QdrantClient, models

from bge_core import M3Embedder
from bge_core.stores import qdrant_vectors
from langchain_bge import BGEEmbeddings, BGESparseEmbeddings
from llamaindex_bge import BGEEmbedding, BGESparseEmbedding

TEXTS = [
    "Paris is the capital and the largest city of France.",
    "大熊猫是中国特有的一种熊科动物。",
    "The cat sat on the mat.",
]

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


@pytest.fixture
def client(m3_folder: Path) -> QdrantClient:
    embedder = M3Embedder(m3_folder)
    multi = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    cosine = models.Distance.COSINE
    client = QdrantClient(":memory:")
    client.create_collection(
        "texts",
        vectors_config={
            "dense": models.VectorParams(size=32, distance=cosine),
            "multi_vector": models.VectorParams(size=32, distance=cosine, multivector_config=multi),
        },
        sparse_vectors_config={"sparse": models.SparseVectorParams()},
    )
    points = []
    vectors = qdrant_vectors(embedder.encode(TEXTS, multi_vector=True))
    for at, (text, vector) in enumerate(zip(TEXTS, vectors, strict=True), start=1):
        node = TextNode(text=text, id_=str(uuid.UUID(int=at)), metadata={"page": at})
        payload = {
            **node_to_metadata_dict(node),
            "page_content": text,
            "metadata": {"page": at},
        }
        points.append(models.PointStruct(id=node.id_, vector=vector, payload=payload))
    client.upsert("texts", points)
    return client


def test_langchain_searches_it(client: QdrantClient, m3_folder: Path):
    from langchain_qdrant import QdrantVectorStore, RetrievalMode

    store = QdrantVectorStore(
        client,
        "texts",
        embedding=BGEEmbeddings(model=m3_folder),
        sparse_embedding=BGESparseEmbeddings(model=m3_folder),
        retrieval_mode=RetrievalMode.HYBRID,
        vector_name="dense",
        sparse_vector_name="sparse",
    )
    for at, text in enumerate(TEXTS, start=1):
        (found,) = store.similarity_search(text, k=1)
        assert (found.page_content, found.metadata["page"]) == (text, at)


def test_llamaindex_searches_it(client: QdrantClient, m3_folder: Path):
    sparse = BGESparseEmbedding(model_name=m3_folder)
    store = LlamaIndexQdrant(
        "texts",
        client=client,
        enable_hybrid=True,
        dense_vector_name="dense",
        sparse_vector_name="sparse",
        sparse_doc_fn=sparse.sparse_doc_fn,
        sparse_query_fn=sparse.sparse_query_fn,
    )
    index = VectorStoreIndex.from_vector_store(
        store, embed_model=BGEEmbedding(model_name=m3_folder)
    )
    retriever = index.as_retriever(
        vector_store_query_mode="hybrid", similarity_top_k=1, sparse_top_k=3
    )
    for at, text in enumerate(TEXTS, start=1):
        (found,) = retriever.retrieve(text)
        assert (found.text, found.metadata["page"]) == (text, at)
