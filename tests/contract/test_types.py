"""What users write type-checks: mypy reads this file with its checks of arguments switched on."""

# mypy: enable-error-code="arg-type, call-arg, union-attr, index"

from __future__ import annotations

from pathlib import Path

import torch
from langchain_core.documents import Document
from langchain_core.runnables import Runnable

from bge_core import M3Embedder, M3Outputs, M3Weights, QueryExample
from langchain_bge import BGECrossEncoder, BGEEmbeddings, BGEReranker, BGESparseEmbeddings
from langchain_bge.testing import FakeBGEEmbeddings, FakeBGEReranker
from llamaindex_bge import BGEEmbedding, BGESparseEmbedding, testing
from llamaindex_bge import BGEReranker as NodeReranker

EN = "BAAI/bge-small-en-v1.5"
RERANKER = "BAAI/bge-reranker-base"


def test_either_name_of_the_model():
    assert BGEEmbeddings(model=EN) == BGEEmbeddings(model_name=EN)
    assert BGEReranker(model=RERANKER) == BGEReranker(model_name=RERANKER)
    assert BGECrossEncoder(model=RERANKER) == BGECrossEncoder(model_name=RERANKER)
    assert BGESparseEmbeddings(model="BAAI/bge-m3").model_name == "BAAI/bge-m3"
    assert BGESparseEmbeddings(model_name="BAAI/bge-m3").model == "BAAI/bge-m3"
    assert BGEEmbedding(model=EN) == BGEEmbedding(model_name=EN)
    assert NodeReranker(model=RERANKER) == NodeReranker(model_name=RERANKER)
    assert BGESparseEmbedding(model="BAAI/bge-m3").model_name.upper() == "BAAI/BGE-M3"
    assert FakeBGEEmbeddings(model_name=EN) == FakeBGEEmbeddings()
    assert testing.FakeBGEReranker(model=RERANKER) == testing.FakeBGEReranker()


def test_a_model_stands_first_where_that_of_the_class_before_did():
    assert BGEEmbedding(EN, max_length=9) == BGEEmbedding(model_name=EN, max_length=9)
    assert NodeReranker(RERANKER) == NodeReranker(model=RERANKER)
    assert BGESparseEmbedding("BAAI/bge-m3") == BGESparseEmbedding(model="BAAI/bge-m3")
    assert BGESparseEmbeddings("BAAI/bge-m3") == BGESparseEmbeddings(model="BAAI/bge-m3")


def test_what_is_accepted_is_typed_as_accepted(en_folder: Path):
    served = BGEEmbeddings(model=EN, endpoint="http://localhost:1", api_key="secret", timeout=3)
    assert served.api_key is not None
    assert BGEEmbedding(model=EN, endpoint="http://localhost:1", api_key="secret") != served
    icl = "BAAI/bge-en-icl"
    example = {"query": "who wrote Emma?", "response": "Jane Austen wrote Emma in 1815."}
    for kind in (BGEEmbeddings, BGEEmbedding):
        kind(model=icl, examples=[example], token="hf_x")
        kind(model=icl, examples=[QueryExample(query="q", response="r")], task_description="t")
        kind(model=en_folder, dtype=torch.float16, cache_folder=en_folder, device=["cpu", "cpu"])
    weights = {"dense": 1.0, "sparse": 0.3, "multi_vector": 1.0}
    assert BGEReranker(model="BAAI/bge-m3", m3_weights=weights).m3_weights == M3Weights()
    assert NodeReranker(model="BAAI/bge-m3", m3_weights=M3Weights()).m3_weights == M3Weights()


def test_what_comes_out_is_typed():
    embeddings = FakeBGEEmbeddings()
    vector: list[float] = embeddings.embed_query("a")
    resolved = embeddings.resolved
    instruction: str | None = resolved.query_instruction
    with FakeBGEReranker(top_n=1) as reranker:
        documents: list[Document] = reranker.compress_documents([Document(page_content="a")], "a")
        index: int = reranker.rerank(["a"], "a")[0]["index"]
        step: Runnable[dict[str, object], list[Document]] = reranker.as_runnable()
    copied: FakeBGEReranker = reranker.model_copy(update={"top_n": None})
    assert len(vector) == embeddings.dimension == resolved.dimension
    assert instruction
    assert (len(documents), index, copied.top_n) == (1, 0, None)
    assert step.get_name() == "FakeBGEReranker"


async def test_what_was_asked_of_encode_is_typed(m3_folder: Path):
    with M3Embedder(m3_folder) as m3:
        both = m3.encode(["a", "b"])
        first: dict[int, float] = both.sparse[0]
        width: int = both.dense[0].shape[0]
        wider: dict[int, float] = m3.encode(["a"], dense=False, multi_vector=False).sparse[0]
        every = m3.encode(["a"], multi_vector=True, return_tokens=True)
        spelt: dict[str, float] = every.tokens[0]
        vectors: int = every.multi_vector[0].shape[1]
        later = await m3.aencode(["a"], sparse=True, return_tokens=True)
        assert later.sparse[0].keys() == wider.keys() == first.keys()
        assert later.tokens[0].keys() == spelt.keys()
        assert width == vectors == m3.dimension
        # What was not asked for, and what is known only later, may be None.
        assert both.tokens is None
        assert both.multi_vector is None
        assert m3.encode(["a"], sparse=False).sparse is None
        for flag in (True, False):
            outputs: M3Outputs = m3.encode(["a"], sparse=flag)
            assert (outputs.sparse is None) is not flag
            found = m3.encode(["a"], sparse=flag).sparse
            assert (found[0] if found is not None else wider).keys() == wider.keys()
