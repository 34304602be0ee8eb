"""One retriever a framework, written as its users would: split, store in Qdrant, search, rerank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from corpora import Corpus, near_duplicates
from qdrant_client import QdrantClient
from tqdm import tqdm

# About 600 characters: a passage that a table can show and that most encoders read whole.
CHUNK_CHARACTERS = 600
CHUNK_TOKENS = 150
BATCH = 256


@dataclass(frozen=True)
class Hit:
    """One passage that was found.

    Attributes:
        place: Its rank by the embedder, from 1.
        similarity: The embedder's cosine.
        name: The document that it is from.
        text: The passage.
        also: Further documents in which it stands, nearly word for word.
        relevance: The reranker's score, from 0 to 1; None before reranking.
    """

    place: int
    similarity: float
    name: str
    text: str
    also: tuple[str, ...] = ()
    relevance: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All documents in which it stands."""
        return (self.name, *self.also)


def distinct(hits: Sequence[Hit]) -> list[Hit]:
    """Leave out what an earlier hit says nearly word for word, and note where that stands, too.

    Args:
        hits: Passages, best first.

    Returns:
        The first of each, their places counted anew.
    """
    kept: dict[int, Hit] = {}
    for hit, first in zip(hits, near_duplicates([hit.text for hit in hits]), strict=True):
        if first not in kept:
            kept[first] = replace(hit, place=len(kept) + 1)
        elif hit.name not in kept[first].names:
            kept[first] = replace(kept[first], also=(*kept[first].also, hit.name))
    return list(kept.values())


class Host(Protocol):
    """A framework with an index of the corpus.

    Attributes:
        name: The framework's.
        fingerprint: Changes with the embedder's and the reranker's numbers.
    """

    name: str
    fingerprint: str

    def search(self, question: str, first: int) -> list[Hit]:
        """Find passages, best first, by the embedder."""
        ...

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        """Put passages in the reranker's order, all of them."""
        ...


class LangChainHost:
    """LangChain: BGEEmbeddings in a QdrantVectorStore, then BGEReranker."""

    name = "LangChain"

    def __init__(
        self,
        corpus: Corpus,
        client: QdrantClient,
        *,
        embedder: str,
        reranker: str,
        instruction: str | None,
    ) -> None:
        from langchain_core.documents import Document
        from langchain_qdrant import QdrantVectorStore
        from langchain_text_splitters import RecursiveCharacterTextSplitter
        from qdrant_client.models import Distance, VectorParams

        from langchain_bge import BGEEmbeddings, BGEReranker

        embeddings = BGEEmbeddings(model=embedder, query_instruction=instruction)
        self._reranker = BGEReranker(model=reranker, top_n=None)
        self.fingerprint = f"{embeddings.fingerprint}-{self._reranker.fingerprint}"
        splitter = RecursiveCharacterTextSplitter(chunk_size=CHUNK_CHARACTERS, chunk_overlap=60)
        chunks = splitter.split_documents(
            [Document(text.text, metadata={"name": text.name}) for text in corpus.texts]
        )
        collection = f"langchain-{corpus.key()}-{embeddings.fingerprint}"
        stored = _stored(client, collection)
        if stored != len(chunks):
            client.delete_collection(collection)
            size = VectorParams(size=embeddings.dimension, distance=Distance.COSINE)
            client.create_collection(collection, vectors_config=size)
        self._store = QdrantVectorStore(client, collection, embeddings)
        if stored != len(chunks):
            with tqdm(total=len(chunks), desc="LangChain: indexing", unit="passage") as bar:
                for start in range(0, len(chunks), BATCH):
                    part = chunks[start : start + BATCH]
                    self._store.add_documents(part, batch_size=BATCH)
                    bar.update(len(part))

    def search(self, question: str, first: int) -> list[Hit]:
        """Find passages, best first, by the embedder."""
        found = self._store.similarity_search_with_score(question, k=first)
        return [
            Hit(place, score, document.metadata["name"], document.page_content)
            for place, (document, score) in enumerate(found, start=1)
        ]

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        """Put passages in the reranker's order, all of them."""
        from langchain_core.documents import Document

        documents = [Document(hit.text, metadata={"place": hit.place}) for hit in hits]
        return [
            _scored(hits, document.metadata["place"], document.metadata["relevance_score"])
            for document in self._reranker.compress_documents(documents, question)
        ]


class LlamaIndexHost:
    """LlamaIndex: BGEEmbedding in a VectorStoreIndex over Qdrant, then BGEReranker."""

    name = "LlamaIndex"

    def __init__(
        self,
        corpus: Corpus,
        client: QdrantClient,
        *,
        embedder: str,
        reranker: str,
        instruction: str | None,
    ) -> None:
        from llama_index.core import Document, StorageContext, VectorStoreIndex
        from llama_index.core.node_parser import SentenceSplitter
        from llama_index.vector_stores.qdrant import QdrantVectorStore

        from llamaindex_bge import BGEEmbedding, BGEReranker

        embed_model = BGEEmbedding(model_name=embedder, query_instruction=instruction)
        self._reranker = BGEReranker(model=reranker, top_n=None)
        self.fingerprint = f"{embed_model.fingerprint}-{self._reranker.fingerprint}"
        splitter = SentenceSplitter(chunk_size=CHUNK_TOKENS, chunk_overlap=15)
        nodes = splitter.get_nodes_from_documents(
            [
                # The reference's topics have short names; the vector is of the passage alone.
                Document(
                    text=text.text,
                    metadata={"name": text.name},
                    excluded_embed_metadata_keys=["name"],
                )
                for text in corpus.texts
            ]
        )
        collection = f"llamaindex-{corpus.key()}-{embed_model.fingerprint}"
        stored = _stored(client, collection)
        if stored not in (0, len(nodes)):
            client.delete_collection(collection)
        store = QdrantVectorStore(collection, client=client)
        if stored == len(nodes):
            index = VectorStoreIndex.from_vector_store(store, embed_model=embed_model)
        else:
            index = VectorStoreIndex(
                nodes,
                storage_context=StorageContext.from_defaults(vector_store=store),
                embed_model=embed_model,
                insert_batch_size=BATCH,
                show_progress=True,
            )
        self._index = index

    def search(self, question: str, first: int) -> list[Hit]:
        """Find passages, best first, by the embedder."""
        found = self._index.as_retriever(similarity_top_k=first).retrieve(question)
        return [
            Hit(place, float(node.score or 0.0), node.metadata["name"], node.text)
            for place, node in enumerate(found, start=1)
        ]

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        """Put passages in the reranker's order, all of them."""
        from llama_index.core.schema import NodeWithScore, TextNode

        nodes = [NodeWithScore(node=TextNode(text=hit.text, id_=str(hit.place))) for hit in hits]
        return [
            _scored(hits, int(node.node_id), node.score)
            for node in self._reranker.postprocess_nodes(nodes, query_str=question)
        ]


HOSTS: dict[str, type[LangChainHost | LlamaIndexHost]] = {
    "langchain": LangChainHost,
    "llamaindex": LlamaIndexHost,
}


def _stored(client: QdrantClient, collection: str) -> int:
    if not client.collection_exists(collection):
        return 0
    return client.count(collection).count


def _scored(hits: Sequence[Hit], place: int, relevance: float | None) -> Hit:
    return replace(hits[place - 1], relevance=relevance)
