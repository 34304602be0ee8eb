"""The stores of both hosts behind one small interface, each with its data in a folder.

A store holds texts under ids that are UUIDs, with flat metadata. `open` is called once more after
`close`, and finds what was there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

DIMENSIONS = 32


class Found(NamedTuple):
    text: str
    score: float
    metadata: dict[str, Any]


class LangChainStore:
    """A LangChain store of the class in `store`, which `open` makes."""

    needs: Sequence[str] = ()
    store: Any

    def __init__(self, folder: Path, embedding: Any) -> None:
        self.folder, self.embedding = folder, embedding
        self.open()

    def open(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def where(self, lang: str) -> dict[str, Any]:
        return {"filter": {"lang": lang}}

    def add(self, texts: list[str], metadata: list[dict[str, Any]], ids: list[str]) -> None:
        self.store.add_texts(texts, metadatas=metadata, ids=ids)

    def documents(self, query: str, k: int, lang: str | None = None) -> list[Any]:
        filters = {} if lang is None else self.where(lang)
        found: list[Any] = self.store.similarity_search_with_score(query, k=k, **filters)
        return found

    def find(self, query: str, k: int, lang: str | None = None) -> list[Found]:
        return [
            Found(document.page_content, score, document.metadata)
            for document, score in self.documents(query, k, lang)
        ]

    def rerank(self, reranker: Any, query: str, k: int) -> list[Found]:
        found = [document for document, _ in self.documents(query, k)]
        return [
            Found(document.page_content, document.metadata["relevance_score"], document.metadata)
            for document in reranker.compress_documents(found, query)
        ]

    def delete(self, ids: list[str]) -> None:
        self.store.delete(ids=ids)


class LangChainInMemory(LangChainStore):
    def open(self) -> None:
        from langchain_core.vectorstores import InMemoryVectorStore

        file = self.folder / "texts.json"
        self.store = InMemoryVectorStore(self.embedding)
        if file.exists():
            self.store = InMemoryVectorStore.load(str(file), self.embedding)

    def close(self) -> None:
        self.store.dump(str(self.folder / "texts.json"))

    def where(self, lang: str) -> dict[str, Any]:
        return {"filter": lambda document: document.metadata["lang"] == lang}


class LangChainQdrant(LangChainStore):
    def open(self) -> None:
        from langchain_qdrant import QdrantVectorStore

        self.store = QdrantVectorStore.construct_instance(
            embedding=self.embedding,
            client_options={"path": str(self.folder)},
            collection_name="texts",
        )

    def close(self) -> None:
        self.store.client.close()

    def where(self, lang: str) -> dict[str, Any]:
        from qdrant_client import models

        match = models.FieldCondition(key="metadata.lang", match=models.MatchValue(value=lang))
        return {"filter": models.Filter(must=[match])}


class LangChainChroma(LangChainStore):
    needs = ("langchain_chroma",)

    def open(self) -> None:
        from chromadb.config import Settings
        from langchain_chroma import Chroma

        self.store = Chroma(
            "texts",
            embedding_function=self.embedding,
            persist_directory=str(self.folder),
            client_settings=Settings(anonymized_telemetry=False, is_persistent=True),
            collection_configuration={"hnsw": {"space": "cosine"}},
        )

    def close(self) -> None:
        from chromadb.api.client import SharedSystemClient

        SharedSystemClient.clear_system_cache()


class LangChainFAISS(LangChainStore):
    needs = ("faiss", "langchain_community")

    def open(self) -> None:
        import faiss
        from langchain_community.docstore.in_memory import InMemoryDocstore
        from langchain_community.vectorstores import FAISS
        from langchain_community.vectorstores.utils import DistanceStrategy

        product = DistanceStrategy.MAX_INNER_PRODUCT
        if (self.folder / "index.faiss").exists():
            self.store = FAISS.load_local(
                str(self.folder),
                self.embedding,
                distance_strategy=product,
                allow_dangerous_deserialization=True,
            )
        else:
            index = faiss.IndexFlatIP(DIMENSIONS)
            self.store = FAISS(
                self.embedding, index, InMemoryDocstore(), {}, distance_strategy=product
            )

    def close(self) -> None:
        self.store.save_local(str(self.folder))


class LangChainLanceDB(LangChainStore):
    needs = ("lancedb", "langchain_community")

    def open(self) -> None:
        from langchain_community.vectorstores import LanceDB

        self.store = LanceDB(
            uri=str(self.folder),
            embedding=self.embedding,
            table_name="texts",
            mode="append",
            distance="cosine",
        )

    def where(self, lang: str) -> dict[str, Any]:
        return {"filter": f"metadata.lang = '{lang}'", "prefilter": True}


class LangChainMilvus(LangChainStore):
    needs = ("milvus_lite", "langchain_milvus")

    def open(self) -> None:
        from langchain_milvus import Milvus

        self.store = Milvus(
            self.embedding,
            collection_name="texts",
            connection_args={"uri": str(self.folder / "texts.db")},
            index_params={"metric_type": "IP", "index_type": "AUTOINDEX"},
            consistency_level="Strong",
        )

    def close(self) -> None:
        self.store.client.close()

    def where(self, lang: str) -> dict[str, Any]:
        return {"expr": f'lang == "{lang}"'}


class LlamaIndexStore:
    """A LlamaIndex store in an index; `store` makes it."""

    needs: Sequence[str] = ()
    index: Any

    def __init__(self, folder: Path, embedding: Any) -> None:
        self.folder, self.embedding = folder, embedding
        self.open()

    def store(self) -> Any:
        raise NotImplementedError

    def open(self) -> None:
        from llama_index.core import VectorStoreIndex

        self.own = self.store()
        self.index = VectorStoreIndex.from_vector_store(self.own, embed_model=self.embedding)

    def close(self) -> None:
        pass

    def add(self, texts: list[str], metadata: list[dict[str, Any]], ids: list[str]) -> None:
        from llama_index.core.schema import TextNode

        nodes = [
            TextNode(text=text, id_=own, metadata=said, excluded_embed_metadata_keys=list(said))
            for text, said, own in zip(texts, metadata, ids, strict=True)
        ]
        self.index.insert_nodes(nodes)

    def nodes(self, query: str, k: int, lang: str | None = None) -> list[Any]:
        from llama_index.core.vector_stores import MetadataFilter, MetadataFilters

        filters = None
        if lang is not None:
            filters = MetadataFilters(filters=[MetadataFilter(key="lang", value=lang)])
        retriever = self.index.as_retriever(similarity_top_k=k, filters=filters)
        found: list[Any] = retriever.retrieve(query)
        return found

    def find(self, query: str, k: int, lang: str | None = None) -> list[Found]:
        nodes = self.nodes(query, k, lang)
        return [Found(node.text, node.score, node.metadata) for node in nodes]

    def rerank(self, reranker: Any, query: str, k: int) -> list[Found]:
        nodes = reranker.postprocess_nodes(self.nodes(query, k), query_str=query)
        return [Found(node.text, node.score, node.metadata) for node in nodes]

    def delete(self, ids: list[str]) -> None:
        self.index.delete_nodes(ids)


class LlamaIndexInMemory(LlamaIndexStore):
    def stored(self) -> dict[str, Any]:
        return {}

    def empty(self) -> dict[str, Any]:
        return {}

    def open(self) -> None:
        from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage

        if (self.folder / "docstore.json").exists():
            context = StorageContext.from_defaults(persist_dir=str(self.folder), **self.stored())
            self.index = load_index_from_storage(context, embed_model=self.embedding)
        else:
            context = StorageContext.from_defaults(**self.empty())
            self.index = VectorStoreIndex([], storage_context=context, embed_model=self.embedding)

    def close(self) -> None:
        self.index.storage_context.persist(str(self.folder))


class LlamaIndexFaiss(LlamaIndexInMemory):
    needs = ("faiss", "llama_index.vector_stores.faiss")

    def stored(self) -> dict[str, Any]:
        from llama_index.vector_stores.faiss import FaissMapVectorStore

        return {"vector_store": FaissMapVectorStore.from_persist_dir(str(self.folder))}

    def empty(self) -> dict[str, Any]:
        import faiss
        from llama_index.vector_stores.faiss import FaissMapVectorStore

        index = faiss.IndexIDMap2(faiss.IndexFlatIP(DIMENSIONS))
        return {"vector_store": FaissMapVectorStore(index)}


class LlamaIndexQdrant(LlamaIndexStore):
    def store(self) -> Any:
        from llama_index.vector_stores.qdrant import QdrantVectorStore
        from qdrant_client import QdrantClient

        return QdrantVectorStore("texts", client=QdrantClient(path=str(self.folder)))

    def close(self) -> None:
        self.own.client.close()


class LlamaIndexChroma(LlamaIndexStore):
    needs = ("chromadb", "llama_index.vector_stores.chroma")

    def store(self) -> Any:
        import chromadb
        from chromadb.config import Settings
        from llama_index.vector_stores.chroma import ChromaVectorStore

        client = chromadb.PersistentClient(
            str(self.folder), settings=Settings(anonymized_telemetry=False)
        )
        collection = client.get_or_create_collection(
            "texts", configuration={"hnsw": {"space": "cosine"}}
        )
        return ChromaVectorStore(chroma_collection=collection)

    def close(self) -> None:
        from chromadb.api.client import SharedSystemClient

        SharedSystemClient.clear_system_cache()


class LlamaIndexLanceDB(LlamaIndexStore):
    needs = ("lancedb", "llama_index.vector_stores.lancedb")

    def store(self) -> Any:
        from llama_index.vector_stores.lancedb import LanceDBVectorStore

        return LanceDBVectorStore(
            uri=str(self.folder), table_name="texts", mode="create", query_type="vector"
        )

    def delete(self, ids: list[str]) -> None:
        # The class's own puts the ids into double quotes, which are names of columns to lancedb.
        with pytest.raises(ValueError, match="No field named"):
            super().delete(ids)
        quoted = ", ".join(f"'{own}'" for own in ids)
        self.own.table.delete(f"id IN ({quoted})")


class LlamaIndexMilvus(LlamaIndexStore):
    needs = ("milvus_lite", "llama_index.vector_stores.milvus")

    def store(self) -> Any:
        from llama_index.vector_stores.milvus import MilvusVectorStore

        return MilvusVectorStore(
            uri=str(self.folder / "texts.db"),
            collection_name="texts",
            dim=DIMENSIONS,
            similarity_metric="IP",
        )

    def close(self) -> None:
        self.own.client.close()


STORES: dict[str, Any] = {
    "LangChain in memory": LangChainInMemory,
    "LangChain Qdrant": LangChainQdrant,
    "LangChain Chroma": LangChainChroma,
    "LangChain FAISS": LangChainFAISS,
    "LangChain LanceDB": LangChainLanceDB,
    "LangChain Milvus": LangChainMilvus,
    "LlamaIndex in memory": LlamaIndexInMemory,
    "LlamaIndex Qdrant": LlamaIndexQdrant,
    "LlamaIndex Chroma": LlamaIndexChroma,
    "LlamaIndex FAISS": LlamaIndexFaiss,
    "LlamaIndex LanceDB": LlamaIndexLanceDB,
    "LlamaIndex Milvus": LlamaIndexMilvus,
}
