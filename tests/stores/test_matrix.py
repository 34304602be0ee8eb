"""Each store of each host: index, query, filter, delete, persist, reopen, rerank."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import langchain_bge
import llamaindex_bge
from tests.stores.harness import STORES, LangChainStore, LlamaIndexFaiss, LlamaIndexStore

TEXTS = [
    "Paris is the capital and the largest city of France.",
    "Berlin is the capital of Germany; Rome is the capital of Italy.",
    "大熊猫是中国特有的一种熊科动物，主要吃竹子。",
    "巴黎是法国的首都，也是法国最大的城市。",
    "The cat sat on the mat, and the dog slept in the garden all day long.",
    "Water boils at 100 degrees Celsius at sea level.",
]
METADATA: list[dict[str, Any]] = [
    {"lang": "zh" if text[0] > "z" else "en", "page": at, "weight": at / 4}
    for at, text in enumerate(TEXTS)
]
IDS = [str(uuid.UUID(int=at + 1)) for at in range(len(TEXTS))]
QUERY = "what is the capital of France?"
INSTRUCTION = "Represent this sentence for searching relevant passages: "

# The stores' own packages say much of what they will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


@pytest.fixture(params=STORES)
def kind(request: pytest.FixtureRequest) -> Any:
    found = STORES[request.param]
    for package in found.needs:
        pytest.importorskip(package)
    if request.param == "LangChain Milvus":
        module = pytest.importorskip("langchain_milvus.vectorstores.milvus")
        if not hasattr(module, "_MilvusClientCollection"):
            pytest.skip("langchain-milvus 0.3.3 finds no connection with pymilvus 2.6.10 and later")
    return found


@pytest.fixture
def embedding(kind: Any, en_folder: Path) -> Any:
    if issubclass(kind, LangChainStore):
        return langchain_bge.BGEEmbeddings(model=en_folder)
    return llamaindex_bge.BGEEmbedding(model_name=en_folder)


@pytest.fixture
def reranker(kind: Any, reranker_folder: Path) -> Any:
    options: dict[str, Any] = {"top_n": 3, "long_passages": "window"}
    if issubclass(kind, LlamaIndexStore):
        return llamaindex_bge.BGEReranker(
            model=reranker_folder, keep_retrieval_score=True, **options
        )
    return langchain_bge.BGEReranker(model=reranker_folder, **options)


@pytest.fixture
def order(en_folder: Path, reference_embed: Any) -> list[int]:
    documents = reference_embed(en_folder, TEXTS)
    (query,) = reference_embed(en_folder, [INSTRUCTION + QUERY])
    return [int(at) for at in np.argsort(-(documents @ query), kind="stable")]


def places(found: list[Any]) -> list[int]:
    return [TEXTS.index(hit.text) for hit in found]


def test_a_store_from_its_first_text_to_a_reranked_answer(
    kind: Any,
    embedding: Any,
    reranker: Any,
    order: list[int],
    tmp_path: Path,
    reranker_folder: Path,
    reference_score: Any,
):
    store = kind(tmp_path, embedding)
    store.add(TEXTS[:4], METADATA[:4], IDS[:4])
    store.add(TEXTS[4:], METADATA[4:], IDS[4:])

    found = store.find(QUERY, 4)
    assert places(found) == order[:4]
    for hit in found:
        said = METADATA[TEXTS.index(hit.text)]
        assert {name: hit.metadata[name] for name in said} == said

    if kind is LlamaIndexFaiss:
        with pytest.raises(ValueError, match="filters not implemented for Faiss"):
            store.find(QUERY, 2, lang="zh")
    else:
        chinese = [at for at in order if METADATA[at]["lang"] == "zh"]
        assert places(store.find(QUERY, 2, lang="zh")) == chinese

    store.delete([IDS[order[0]]])
    assert places(store.find(QUERY, 3)) == order[1:4]

    store.close()
    store.open()
    assert places(store.find(QUERY, 5)) == order[1:]

    best = store.rerank(reranker, QUERY, 5)
    left = [TEXTS[at] for at in order[1:]]
    scores = reference_score(reranker_folder, [(QUERY, text) for text in left], normalize=True)
    ranking = np.argsort(-scores, kind="stable")[:3]
    assert [hit.text for hit in best] == [left[at] for at in ranking]
    np.testing.assert_allclose([hit.score for hit in best], scores[ranking], atol=1e-5)
    store.close()


def test_what_a_reranker_writes_is_metadata_that_the_store_keeps(
    kind: Any, embedding: Any, reranker: Any, tmp_path: Path
):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    store = kind(first, embedding)
    store.add(TEXTS, METADATA, IDS)
    best = store.rerank(reranker, QUERY, 6)
    store.close()
    # Qdrant and Milvus add names of their own, of the point that was found.
    added = {"_id", "_collection_name", "pk"}
    written = [
        {name: value for name, value in hit.metadata.items() if name not in added} for hit in best
    ]
    for metadata in written:
        assert type(metadata["relevance_start"]) is type(metadata["relevance_end"]) is int
        assert {type(value) for value in metadata.values()} <= {str, int, float}

    other = kind(second, embedding)
    other.add([hit.text for hit in best], written, IDS[:3])
    other.close()
    other.open()
    kept = {hit.text: hit.metadata for hit in other.find(QUERY, 3)}
    assert len(kept) == 3
    for hit, metadata in zip(best, written, strict=True):
        for name, value in metadata.items():
            expected = value if isinstance(value, str) else pytest.approx(value, abs=1e-6)
            assert kept[hit.text][name] == expected, name
    other.close()
