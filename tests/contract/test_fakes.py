"""The fakes for users' own tests: the hosts' suites, and no weights, no torch."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import NodeWithScore, TextNode

import bge_core
from bge_core import ArgumentError, CheckpointError, ClosedError, InputTypeError
from bge_core.testing import fake_embedder, fake_reranker
from langchain_bge import BGEEmbeddings
from langchain_bge.testing import FakeBGECrossEncoder, FakeBGEEmbeddings, FakeBGEReranker
from llamaindex_bge import testing
from tests.contract.llamaindex_suite import EmbeddingContract, RerankerContract, recorded

__all__ = ["recorded"]

TEXTS = ["Cats purr when they are happy.", "Paris is the capital of France.", "Water boils."]
QUERY = "what is the capital of France?"


class OfFake:
    @property
    def embeddings_class(self) -> type[FakeBGEEmbeddings]:
        return FakeBGEEmbeddings


class TestUnit(OfFake, EmbeddingsUnitTests):
    """`langchain_tests.unit_tests`."""


class TestIntegration(OfFake, EmbeddingsIntegrationTests):
    """`langchain_tests.integration_tests`."""


class TestFakeEmbedding(EmbeddingContract):
    """The contract that `BGEEmbedding` is held to."""

    other_arguments = {  # noqa: RUF012
        "query_instruction": "another instruction: ",
        "normalize": False,
        "max_length": 16,
    }
    idle_arguments = {"batch_tokens": 64, "device": "cpu"}  # noqa: RUF012
    secret_arguments = {"token": "hf_do_not_show"}  # noqa: RUF012

    @pytest.fixture
    def embedding(self) -> tuple[Any, dict[str, Any]]:
        return testing.FakeBGEEmbedding, {}


class TestFakeReranker(RerankerContract):
    """The contract that `BGEReranker` is held to."""

    idle_arguments = {"batch_tokens": 64, "normalize": False}  # noqa: RUF012
    secret_arguments = {"token": "hf_do_not_show"}  # noqa: RUF012

    @pytest.fixture
    def reranker(self) -> tuple[Any, dict[str, Any]]:
        return testing.FakeBGEReranker, {}


def test_numbers_are_the_same_on_every_machine():
    vector = FakeBGEEmbeddings().embed_query(QUERY)
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert vector == fake_embedder("BAAI/bge-small-en-v1.5").embed_queries([QUERY])[0].tolist()
    assert vector == testing.FakeBGEEmbedding().get_query_embedding(QUERY)
    np.testing.assert_allclose(vector[:3], [-0.011004, -0.015488, -0.025343], atol=1e-5)
    (best, *_) = FakeBGEReranker().rerank(TEXTS, QUERY)
    assert best == {"index": 1, "relevance_score": pytest.approx(0.970688, abs=1e-5)}


def test_what_shares_words_is_found():
    store = InMemoryVectorStore(FakeBGEEmbeddings())
    store.add_texts(TEXTS)
    assert store.similarity_search(QUERY, k=1)[0].page_content == TEXTS[1]
    index = VectorStoreIndex(
        nodes=[TextNode(text=text) for text in TEXTS], embed_model=testing.FakeBGEEmbedding()
    )
    assert index.as_retriever(similarity_top_k=1).retrieve(QUERY)[0].text == TEXTS[1]
    kept = FakeBGEReranker(top_n=1).compress_documents(
        [Document(page_content=text) for text in TEXTS], QUERY
    )
    assert kept[0].page_content == TEXTS[1]
    assert 0.5 < kept[0].metadata["relevance_score"] < 1
    scores = FakeBGECrossEncoder().score([(QUERY, text) for text in TEXTS])
    assert int(np.argmax(scores)) == 1


def test_texts_of_all_scripts_and_of_none():
    texts = ["", " ", "巴黎是法国的首都。", "大熊猫是熊。", "🐼", "القطة نائمة", "a b", "b a"]
    vectors = fake_embedder("BAAI/bge-m3").embed_documents(texts)
    assert vectors.shape == (8, 1024)
    assert np.isfinite(vectors).all()
    assert len({row.tobytes() for row in vectors}) == len(texts)
    (best, *_) = fake_reranker("BAAI/bge-m3").rank("法国的首都", texts)
    assert best.index == 2


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"normalise_embeddings": True}, ArgumentError, "did you mean 'normalize_embeddings'"),
        ({"max_length": 513}, ArgumentError, "more than the 512 tokens"),
        ({"dtype": "int4"}, ArgumentError, "dtype"),
        ({"embed_instruction": "x"}, ArgumentError, "in front of queries only"),
        ({"model": "BAAI/bge-reranker-base"}, CheckpointError, "BGEReranker"),
        ({"model": "/no/such/folder"}, CheckpointError, "no folder"),
        ({"api_key": "x"}, ArgumentError, "api_key is for a server"),
    ],
)
def test_a_fake_refuses_what_the_real_one_refuses(
    arguments: dict[str, Any], error: type[Exception], said: str
):
    with pytest.raises(error, match=said) as fake:
        FakeBGEEmbeddings(**arguments)
    with pytest.raises(error) as real:
        BGEEmbeddings(**{"model": "BAAI/bge-small-en-v1.5", **arguments})
    assert str(fake.value) == str(real.value).replace("BGEEmbeddings", "FakeBGEEmbeddings")


def test_wrong_texts_and_life():
    with FakeBGEEmbeddings() as embeddings:
        with pytest.raises(InputTypeError, match="texts must be a list of str"):
            embeddings.embed_documents("abc")
        again = pickle.loads(pickle.dumps(embeddings))
        assert again == embeddings
    with pytest.raises(ClosedError):
        embeddings.embed_query("a")
    assert again.embed_query("a")
    assert isinstance(embeddings, BGEEmbeddings)


def test_a_server_is_never_asked():
    embeddings = FakeBGEEmbeddings(endpoint="http://localhost:1", api_key="x")
    assert len(embeddings.embed_query("a")) == embeddings.dimension == 384


def test_windows_are_the_whole_text():
    embeddings = FakeBGEEmbeddings(long_passages="window")
    assert embeddings.embed_documents(TEXTS) == FakeBGEEmbeddings().embed_documents(TEXTS)
    (node,) = testing.FakeBGEReranker(long_passages="window").postprocess_nodes(
        [NodeWithScore(node=TextNode(text=TEXTS[1]))], query_str=QUERY
    )
    assert (node.metadata["relevance_start"], node.metadata["relevance_end"]) == (0, len(TEXTS[1]))


def test_windows_that_fit_have_the_same_vector_with_a_document_prompt():
    given = {"model": "BAAI/llm-embedder", "task": "tool"}
    windows = fake_embedder(**given, long_passages="window").embed_documents(TEXTS)
    assert (windows == fake_embedder(**given).embed_documents(TEXTS)).all()


def test_what_a_fake_has_not_is_a_sentence():
    for made in (fake_embedder("BAAI/bge-m3"), fake_reranker("BAAI/bge-m3")):
        with pytest.raises(ArgumentError, match=r"^The fake of 'BAAI/bge-m3' has no checkpoint"):
            _ = made.checkpoint


@pytest.mark.parametrize("wrong", [3, ["a"], b"a"])
@pytest.mark.parametrize("name", ["name", "query_key", "documents_key"])
def test_a_step_s_names_are_texts(name: str, wrong: Any):
    with pytest.raises(InputTypeError, match=rf"^{name} must be a str, got "):
        FakeBGEReranker().as_runnable(**{name: wrong})


@pytest.mark.parametrize("wrong", [3, None, "ab", {"a"}, np.array("a"), iter([])])
def test_nodes_are_a_list(wrong: Any):
    with pytest.raises(InputTypeError, match=r"^nodes must be a list of NodeWithScore, got "):
        testing.FakeBGEReranker().postprocess_nodes(wrong, query_str=QUERY)


def test_examples_of_a_generator_are_read_once():
    example = {"query": "who wrote Emma?", "response": "Jane Austen."}
    one, other = (
        fake_embedder("BAAI/bge-en-icl", examples=given).embed_queries([QUERY])
        for given in ([example], (item for item in [example]))
    )
    assert (one == other).all()


def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys\n"
        "from langchain_bge.testing import FakeBGEEmbeddings, FakeBGEReranker\n"
        "from llamaindex_bge import testing\n"
        "FakeBGEEmbeddings().embed_query('a')\n"
        "FakeBGEReranker().rerank(['a'], 'b')\n"
        "testing.FakeBGEEmbedding().get_text_embedding_batch(['a'])\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(bge_core.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
