"""One retriever a framework, written as its users would: split, store in Qdrant, search, rerank."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self

from corpora import Corpus, near_duplicates
from qdrant_client import QdrantClient

BATCH = 256


@dataclass(frozen=True)
class Passages:
    """How documents are cut into passages, and how long ones are read.

    Attributes:
        characters: A passage's length at most, where characters are counted. About 600 are a
            passage that a table can show and that most encoders read whole.
        tokens: The same where tokens are counted.
        window: Tokens of a question and a piece of a passage that the reranker reads at a time;
            None for as much as it can, and the beginning of a passage alone.
    """

    characters: int = 600
    tokens: int = 150
    window: int | None = None

    @property
    def long_passages(self) -> Literal["truncate", "window"]:
        """What happens with a passage that doesn't fit."""
        return "truncate" if self.window is None else "window"


@dataclass(frozen=True)
class Hit:
    """One passage that was found.

    Attributes:
        place: Its rank by the embedder, from 1.
        similarity: The embedder's cosine; after a hybrid search the fused score.
        name: The document that it is from.
        text: The passage.
        also: Further documents in which it stands, nearly word for word.
        relevance: The reranker's score, from 0 to 1; None before reranking.
        span: The characters [start, end) of the text that the reranker's score is of; None for
            all that it read.
    """

    place: int
    similarity: float
    name: str
    text: str
    also: tuple[str, ...] = ()
    relevance: float | None = None
    span: tuple[int, int] | None = None

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
        total: How many passages the corpus has.
    """

    name: str
    fingerprint: str
    total: int

    def index(self, batch: int = BATCH) -> Iterator[int]:
        """Store the passages that aren't yet, and say first and after each batch how many are."""
        ...

    def instructed(self, instruction: str | None) -> Host:
        """Give the same index, with another instruction in front of questions."""
        ...

    def embed(self, question: str) -> list[float]:
        """Give a question's vector."""
        ...

    def search(
        self,
        question: str,
        first: int,
        *,
        vector: list[float] | None = None,
        hybrid: bool = False,
    ) -> list[Hit]:
        """Find passages, best first, by the embedder.

        Args:
            question: What is asked.
            first: How many passages.
            vector: The question's, where it has been computed.
            hybrid: Whether to search by bge-m3's token weights, too.
        """
        ...

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        """Put passages in the reranker's order, all of them."""
        ...


class _QdrantHost(ABC):
    """What is the same in both frameworks: split, store in Qdrant what isn't yet, rerank.

    Args:
        corpus: What to search.
        client: Where passages are stored.
        embedder: A hub id or folder.
        reranker: A hub id or folder.
        instruction: Put in front of questions; None for the checkpoint's own.
        sparse: Whether to store bge-m3's token weights, for a hybrid search.
        passages: How documents are cut and read.
    """

    name: str

    def __init__(
        self,
        corpus: Corpus,
        client: QdrantClient,
        *,
        embedder: str,
        reranker: str,
        instruction: str | None,
        sparse: bool = False,
        passages: Passages | None = None,
    ) -> None:
        self._client, self._embedder, self._sparse = client, embedder, sparse
        self._passages = passages or Passages()
        self._reranker = self._make_reranker(
            model=reranker,
            top_n=None,
            max_length=self._passages.window,
            long_passages=self._passages.long_passages,
        )
        self._embeddings = self._embeddings_with(instruction)
        self.fingerprint = f"{self._embeddings.fingerprint}-{self._reranker.fingerprint}"
        size, self._parts = self._split(corpus)
        self.total = len(self._parts)
        # An instruction changes no passage's vector, and so has no part in the name.
        plain = self._embeddings_with("").fingerprint
        parts = (self.name.lower(), corpus.key(), plain, size)
        self._collection = "-".join([*map(str, parts), *(["sparse"] if sparse else [])])

    def index(self, batch: int = BATCH) -> Iterator[int]:
        """Store the passages that aren't yet, and say first and after each batch how many are."""
        stored = _stored(self._client, self._collection, self.total)
        add = self._adder()
        yield stored
        for start in range(stored, self.total, batch):
            part = self._parts[start : start + batch]
            add(part)
            yield start + len(part)

    def instructed(self, instruction: str | None) -> Self:
        """Give the same index, with another instruction in front of questions."""
        twin = copy.copy(self)
        twin._embeddings = self._embeddings_with(instruction)
        return twin

    @abstractmethod
    def _split(self, corpus: Corpus) -> tuple[int, Sequence[Any]]:
        """Give a passage's size at most and the passages, as the framework has them."""

    @abstractmethod
    def _adder(self) -> Callable[[Sequence[Any]], object]:
        """Make the collection if need be, and give the function that embeds and stores passages."""

    @abstractmethod
    def _make_reranker(self, **options: Any) -> Any:
        """Make the framework's reranker."""

    @abstractmethod
    def _embeddings_with(self, instruction: str | None) -> Any:
        """Make the framework's embedding model."""


class LangChainHost(_QdrantHost):
    """LangChain: BGEEmbeddings in a QdrantVectorStore, then BGEReranker."""

    name = "LangChain"

    def embed(self, question: str) -> list[float]:
        """Give a question's vector."""
        vector: list[float] = self._embeddings.embed_query(question)
        return vector

    def search(
        self,
        question: str,
        first: int,
        *,
        vector: list[float] | None = None,
        hybrid: bool = False,
    ) -> list[Hit]:
        """Find passages, best first, by the embedder; the arguments are those of `Host`."""
        store = self._store(hybrid=hybrid)
        if vector is None or hybrid:
            found = store.similarity_search_with_score(question, k=first)
        else:
            found = store.similarity_search_with_score_by_vector(vector, k=first)
        return [
            Hit(place, score, document.metadata["name"], document.page_content)
            for place, (document, score) in enumerate(found, start=1)
        ]

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        """Put passages in the reranker's order, all of them."""
        from langchain_core.documents import Document

        documents = [Document(hit.text, metadata={"place": hit.place}) for hit in hits]
        return [
            _scored(
                hits[document.metadata["place"] - 1],
                document.metadata["relevance_score"],
                document.metadata,
            )
            for document in self._reranker.compress_documents(documents, question)
        ]

    def _split(self, corpus: Corpus) -> tuple[int, Sequence[Any]]:
        from langchain_core.documents import Document
        from langchain_text_splitters import RecursiveCharacterTextSplitter

        size = self._passages.characters
        splitter = RecursiveCharacterTextSplitter(chunk_size=size, chunk_overlap=size // 10)
        return size, splitter.split_documents(
            [Document(text.text, metadata={"name": text.name}) for text in corpus.texts]
        )

    def _adder(self) -> Callable[[Sequence[Any]], object]:
        from qdrant_client.models import Distance, SparseVectorParams, VectorParams

        if not self._client.collection_exists(self._collection):
            size = VectorParams(size=self._embeddings.dimension, distance=Distance.COSINE)
            weights = {"langchain-sparse": SparseVectorParams()} if self._sparse else None
            self._client.create_collection(
                self._collection, vectors_config=size, sparse_vectors_config=weights
            )
        store = self._store(hybrid=self._sparse)
        return lambda part: store.add_documents(part, batch_size=len(part))

    def _make_reranker(self, **options: Any) -> Any:
        from langchain_bge import BGEReranker

        return BGEReranker(**options)

    def _embeddings_with(self, instruction: str | None) -> Any:
        from langchain_bge import BGEEmbeddings

        return BGEEmbeddings(
            model=self._embedder,
            query_instruction=instruction,
            long_passages=self._passages.long_passages,
        )

    def _store(self, *, hybrid: bool) -> Any:
        from langchain_qdrant import QdrantVectorStore, RetrievalMode

        # `index` made the collection to fit; checking it would embed a text at each question.
        made: dict[str, Any] = {"validate_collection_config": False}
        if not hybrid:
            return QdrantVectorStore(self._client, self._collection, self._embeddings, **made)
        from langchain_bge import BGESparseEmbeddings

        return QdrantVectorStore(
            self._client,
            self._collection,
            self._embeddings,
            sparse_embedding=BGESparseEmbeddings(model=self._embedder),
            retrieval_mode=RetrievalMode.HYBRID,
            **made,
        )


class LlamaIndexHost(_QdrantHost):
    """LlamaIndex: BGEEmbedding in a VectorStoreIndex over Qdrant, then BGEReranker."""

    name = "LlamaIndex"

    def embed(self, question: str) -> list[float]:
        """Give a question's vector."""
        vector: list[float] = self._embeddings.get_query_embedding(question)
        return vector

    def search(
        self,
        question: str,
        first: int,
        *,
        vector: list[float] | None = None,
        hybrid: bool = False,
    ) -> list[Hit]:
        """Find passages, best first, by the embedder; the arguments are those of `Host`."""
        from llama_index.core.schema import QueryBundle

        retriever = self._index().as_retriever(
            vector_store_query_mode="hybrid" if hybrid else "default",
            similarity_top_k=first,
            sparse_top_k=first,
        )
        found = retriever.retrieve(QueryBundle(question, embedding=vector))
        return [
            Hit(place, float(node.score or 0.0), node.metadata["name"], node.text)
            for place, node in enumerate(found, start=1)
        ]

    def rerank(self, question: str, hits: Sequence[Hit]) -> list[Hit]:
        """Put passages in the reranker's order, all of them."""
        from llama_index.core.schema import NodeWithScore, TextNode

        nodes = [NodeWithScore(node=TextNode(text=hit.text, id_=str(hit.place))) for hit in hits]
        return [
            _scored(hits[int(node.node_id) - 1], node.score, node.metadata)
            for node in self._reranker.postprocess_nodes(nodes, query_str=question)
        ]

    def _split(self, corpus: Corpus) -> tuple[int, Sequence[Any]]:
        from llama_index.core import Document
        from llama_index.core.node_parser import SentenceSplitter

        size = self._passages.tokens
        splitter = SentenceSplitter(chunk_size=size, chunk_overlap=size // 10)
        return size, splitter.get_nodes_from_documents(
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

    def _adder(self) -> Callable[[Sequence[Any]], object]:
        add: Callable[[Sequence[Any]], object] = self._index().insert_nodes
        return add

    def _make_reranker(self, **options: Any) -> Any:
        from llamaindex_bge import BGEReranker

        return BGEReranker(**options)

    def _embeddings_with(self, instruction: str | None) -> Any:
        from llamaindex_bge import BGEEmbedding

        return BGEEmbedding(
            model_name=self._embedder,
            query_instruction=instruction,
            long_passages=self._passages.long_passages,
        )

    def _index(self) -> Any:
        from llama_index.core import VectorStoreIndex
        from llama_index.vector_stores.qdrant import QdrantVectorStore

        hooks: dict[str, Any] = {}
        if self._sparse:
            from llamaindex_bge import BGESparseEmbedding

            sparse = BGESparseEmbedding(model_name=self._embedder)
            hooks = {
                "enable_hybrid": True,
                "sparse_doc_fn": sparse.sparse_doc_fn,
                "sparse_query_fn": sparse.sparse_query_fn,
            }
        store = QdrantVectorStore(self._collection, client=self._client, **hooks)
        return VectorStoreIndex.from_vector_store(store, embed_model=self._embeddings)


HOSTS: dict[str, type[LangChainHost | LlamaIndexHost]] = {
    "langchain": LangChainHost,
    "llamaindex": LlamaIndexHost,
}


def _stored(client: QdrantClient, collection: str, total: int) -> int:
    """Count the passages that an earlier run stored, which it did in order."""
    if not client.collection_exists(collection):
        return 0
    stored = client.count(collection).count
    if stored <= total:
        return stored
    client.delete_collection(collection)
    return 0


def _scored(hit: Hit, relevance: float | None, metadata: Mapping[str, Any]) -> Hit:
    span = None
    if "relevance_start" in metadata:
        span = metadata["relevance_start"], metadata["relevance_end"]
    return replace(hit, relevance=relevance, span=span)
