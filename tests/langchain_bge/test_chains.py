"""The adapters where people put them: retrievers, pipelines, chains and caches."""

from __future__ import annotations

import json

import numpy as np
import pytest
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.documents import BaseDocumentTransformer, Document
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.stores import InMemoryByteStore
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_text_splitters import CharacterTextSplitter

from langchain_bge import BGEEmbeddings, BGEReranker

TEXTS = [
    "Paris is the capital and the largest city of France, on the river Seine.",
    "Berlin is the capital of Germany; Rome is the capital of Italy.",
    "The giant panda is a bear species endemic to China.",
    "A cat sat on the mat, and the dog slept in the garden.",
    "Water boils at 100 degrees Celsius at sea level.",
    "A generator function yields values one at a time.",
]
QUERY = "what is the capital of France?"


class OnlyShort(BaseDocumentTransformer):
    """Drop long documents, as a user's own pipeline step would."""

    def transform_documents(self, documents, **kwargs):
        return [document for document in documents if len(document.page_content) < 70]


@pytest.fixture
def embeddings(en_folder):
    return BGEEmbeddings(model=en_folder)


@pytest.fixture
def reranker(reranker_folder):
    return BGEReranker(model=reranker_folder, top_n=2)


@pytest.fixture
def store(embeddings):
    store = InMemoryVectorStore(embeddings)
    documents = [
        Document(id=str(index), page_content=text, metadata={"source": f"{index}.md"})
        for index, text in enumerate(TEXTS)
    ]
    store.add_documents(documents)
    return store


@pytest.fixture
def expected(reference_embed, reference_score, en_folder, reranker_folder):
    """Find the ids and scores by transformers alone: four retrieved, two kept."""
    instruction = "Represent this sentence for searching relevant passages: "
    documents = reference_embed(en_folder, TEXTS)
    similarity = documents @ reference_embed(en_folder, [instruction + QUERY])[0]
    found = np.argsort(-similarity)[:4]
    pairs = [(QUERY, TEXTS[index]) for index in found]
    scores = reference_score(reranker_folder, pairs, normalize=True)
    best = np.argsort(-scores)[:2]
    return [(str(found[index]), pytest.approx(float(scores[index]), abs=1e-5)) for index in best]


def found_in(documents):
    return [(document.id, document.metadata["relevance_score"]) for document in documents]


async def test_contextual_compression_retriever(call, store, reranker, expected):
    retriever = ContextualCompressionRetriever(
        base_compressor=reranker, base_retriever=store.as_retriever(search_kwargs={"k": 4})
    )
    documents = await call(retriever, "invoke", QUERY)
    assert found_in(documents) == expected
    # What the store holds has no score: copies were scored.
    assert all("relevance_score" not in entry["metadata"] for entry in store.store.values())
    assert json.dumps([document.metadata for document in documents])


async def test_document_compressor_pipeline(call, reranker):
    splitter = CharacterTextSplitter(chunk_size=60, chunk_overlap=0, separator=" ")
    pipeline = DocumentCompressorPipeline(transformers=[splitter, OnlyShort(), reranker])
    documents = [Document(page_content=text, metadata={"n": n}) for n, text in enumerate(TEXTS)]
    kept = await call(pipeline, "compress_documents", documents, QUERY)
    chunks = [
        document
        for document in splitter.transform_documents(documents)
        if len(document.page_content) < 70
    ]
    assert len(chunks) > len(TEXTS)
    assert kept == reranker.compress_documents(chunks, QUERY)
    assert all("relevance_score" not in document.metadata for document in documents)


async def test_chain_of_langchain_core_alone(call, store, reranker, expected):
    def rerank(found):
        return reranker.compress_documents(found["documents"], found["query"])

    async def arerank(found):
        return await reranker.acompress_documents(found["documents"], found["query"])

    retriever = store.as_retriever(search_kwargs={"k": 4})
    chain = {"documents": retriever, "query": RunnablePassthrough()} | RunnableLambda(
        rerank, afunc=arerank
    )
    assert found_in(await call(chain, "invoke", QUERY)) == expected
    batch = await call(chain, "batch", [QUERY, QUERY])
    assert [found_in(documents) for documents in batch] == [expected, expected]


async def test_similarity_search_with_score(call, store):
    ((document, score),) = await call(store, "similarity_search_with_score", QUERY, k=1)
    # Unit vectors: the score is the cosine.
    assert -1 <= score <= 1
    assert document.id in store.store


class TestCacheBackedEmbeddings:
    """A cache that keys on the text alone can't tell a query from an equal document."""

    async def test_separate_stores_are_safe(self, call, embeddings):
        cached = CacheBackedEmbeddings.from_bytes_store(
            embeddings,
            InMemoryByteStore(),
            namespace=embeddings.fingerprint,
            query_embedding_cache=InMemoryByteStore(),
            key_encoder="blake2b",
        )
        for _ in range(2):
            (document,) = await call(cached, "embed_documents", [QUERY])
            query = await call(cached, "embed_query", QUERY)
            assert document == embeddings.embed_documents([QUERY])[0]
            assert query == embeddings.embed_query(QUERY)
            assert query != document

    async def test_one_store_for_both_is_not(self, call, embeddings):
        cached = CacheBackedEmbeddings.from_bytes_store(
            embeddings,
            InMemoryByteStore(),
            namespace=embeddings.fingerprint,
            query_embedding_cache=True,
            key_encoder="blake2b",
        )
        (document,) = await call(cached, "embed_documents", [QUERY])
        # If this ever fails, docs/caching.md's warning can go.
        assert await call(cached, "embed_query", QUERY) == document

    async def test_the_fingerprint_keeps_models_apart(self, call, en_folder, zh_folder):
        store = InMemoryByteStore()
        for settings in (
            {"model": en_folder},
            {"model": en_folder, "normalize_embeddings": False},
            {"model": zh_folder},
        ):
            embeddings = BGEEmbeddings(**settings)
            cached = CacheBackedEmbeddings.from_bytes_store(
                embeddings, store, namespace=embeddings.fingerprint, key_encoder="blake2b"
            )
            vectors = await call(cached, "embed_documents", TEXTS)
            assert vectors == embeddings.embed_documents(TEXTS)
        assert len(list(store.yield_keys())) == 3 * len(TEXTS)
