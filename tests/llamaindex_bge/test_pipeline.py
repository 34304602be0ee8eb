"""The two classes inside LlamaIndex: indexes, query engines, ingestion, settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_index.core
import numpy as np
import pytest
from llama_index.core import Settings, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.instrumentation import (  # type: ignore[attr-defined]
    get_dispatcher,
)
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import Document, QueryBundle, TextNode
from llama_index.core.vector_stores import SimpleVectorStore

from llamaindex_bge import BGEEmbedding, BGEReranker

DOCUMENTS = [
    "Paris is the capital and the largest city of France, on the river Seine.",
    "The giant panda, sometimes called a panda bear, is a bear species of China.",
    "A cat sat on the mat, and the dog slept in the garden all day long.",
    "Water boils at 100 degrees Celsius at sea level, and freezes at 0 degrees.",
]
QUERY = "What is the capital of France?"


class Counter(BaseEventHandler):
    """Counts the texts that were embedded."""

    count: int = 0

    @classmethod
    def class_name(cls) -> str:
        return "Counter"

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, EmbeddingEndEvent):
            self.count += len(event.chunks)


@pytest.fixture
def counter() -> Iterator[Counter]:
    counter = Counter()
    get_dispatcher().add_event_handler(counter)
    yield counter
    get_dispatcher().event_handlers.remove(counter)


@pytest.fixture(autouse=True)
def fresh_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep one test's settings from the others."""
    for name in ("_embed_model", "_llm", "_node_parser", "_callback_manager", "_transformations"):
        monkeypatch.setattr(Settings, name, None)
    Settings.llm = MockLLM(max_tokens=8)
    # LlamaIndex carries tiktoken's file, but forgets it in the processes that it starts.
    cache = Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))


@pytest.fixture
def embed_model(stand_in_folder: Path) -> BGEEmbedding:
    return BGEEmbedding(model_name=stand_in_folder, query_instruction="")


def documents() -> list[Document]:
    return [
        Document(text=text, id_=f"document-{index}", metadata={"page": index})
        for index, text in enumerate(DOCUMENTS)
    ]


async def test_index_and_query_engine(embed_model: BGEEmbedding, reranker_folder: Path):
    index = VectorStoreIndex.from_documents(documents(), embed_model=embed_model)
    retrieved = index.as_retriever(similarity_top_k=4).retrieve(QUERY)
    assert retrieved[0].text == DOCUMENTS[0]
    assert retrieved[0].score is not None
    vectors = [embed_model.get_query_embedding(QUERY)]
    vectors.append(embed_model.get_text_embedding(f"page: 0\n\n{DOCUMENTS[0]}"))
    assert retrieved[0].score == pytest.approx(float(np.dot(vectors[0], vectors[1])), abs=1e-5)

    reranker = BGEReranker(model=reranker_folder, top_n=2, keep_retrieval_score=True)
    engine = index.as_query_engine(similarity_top_k=4, node_postprocessors=[reranker])
    response = engine.query(QUERY)
    expected = reranker.postprocess_nodes(retrieved, query_bundle=QueryBundle(QUERY))
    assert [node.node_id for node in response.source_nodes] == [node.node_id for node in expected]
    assert [node.score for node in response.source_nodes] == [node.score for node in expected]
    assert all("retrieval_score" in node.metadata for node in response.source_nodes)
    assert str(response)
    again = await engine.aquery(QUERY)
    assert [node.node_id for node in again.source_nodes] == [node.node_id for node in expected]


async def test_async_index(embed_model: BGEEmbedding):
    index = VectorStoreIndex([], embed_model=embed_model)
    await index.ainsert_nodes([TextNode(text=text) for text in DOCUMENTS])
    retriever = index.as_retriever(similarity_top_k=1)
    (found,) = await retriever.aretrieve(QUERY)
    assert found.text == DOCUMENTS[0]
    bundle = QueryBundle("unused", custom_embedding_strs=[QUERY, "Where is Paris?"])
    (found,) = await retriever.aretrieve(bundle)
    assert found.text == DOCUMENTS[0]


def test_settings(embed_model: BGEEmbedding, reranker_folder: Path):
    Settings.embed_model = embed_model
    assert Settings.embed_model is embed_model
    index = VectorStoreIndex.from_documents(documents())
    engine = RetrieverQueryEngine.from_args(
        index.as_retriever(similarity_top_k=3),
        node_postprocessors=[BGEReranker(model=reranker_folder, top_n=1)],
    )
    assert len(engine.query(QUERY).source_nodes) == 1


def test_stored_index_is_read_again(embed_model: BGEEmbedding, tmp_path: Path):
    index = VectorStoreIndex.from_documents(documents(), embed_model=embed_model)
    index.storage_context.persist(str(tmp_path))
    from llama_index.core import load_index_from_storage

    storage = StorageContext.from_defaults(persist_dir=str(tmp_path))
    again = load_index_from_storage(storage, embed_model=embed_model)
    assert again.as_retriever(similarity_top_k=1).retrieve(QUERY)[0].text == DOCUMENTS[0]


async def test_ingestion_cache(embed_model: BGEEmbedding, call: Any, counter: Counter):
    store = SimpleVectorStore()
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(), embed_model], vector_store=store
    )
    for _ in range(2):
        nodes = await call_run(call, pipeline)
        assert [node.embedding is not None for node in nodes] == [True] * 4
    assert counter.count == 4, "the second run must come from the cache"
    moved = embed_model.model_copy(update={"device": "cpu", "embed_batch_size": 1})
    pipeline.transformations[1] = moved
    await call_run(call, pipeline)
    assert counter.count == 4, "neither device nor batch size changes a vector"
    pipeline.transformations[1] = embed_model.model_copy(update={"max_length": 4})
    await call_run(call, pipeline)
    assert counter.count == 8


async def call_run(call: Any, pipeline: IngestionPipeline) -> Any:
    return await call(pipeline, "run", documents=documents())


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="the host starts one worker a CPU at most")
def test_ingestion_with_workers(en_folder: Path):
    """Two spawned processes load the model by themselves, and what they cached comes back."""
    embed_model = BGEEmbedding(model_name=en_folder)
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(), embed_model], cache=IngestionCache()
    )
    nodes = pipeline.run(documents=documents(), num_workers=2)
    assert [node.ref_doc_id for node in nodes] == [f"document-{index}" for index in range(4)]
    expected = embed_model.get_text_embedding_batch(
        [f"page: {index}\n\n{text}" for index, text in enumerate(DOCUMENTS)]
    )
    vectors = [node.embedding for node in nodes]
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
async def test_async_ingestion_with_workers(en_folder: Path):
    pipeline = IngestionPipeline(transformations=[BGEEmbedding(model_name=en_folder)])
    nodes = await pipeline.arun(documents=documents(), num_workers=2)
    assert [len(node.embedding or []) for node in nodes] == [32] * 4
