"""NaN and infinity: refused with the text's place and the remedy, never given, sorted or stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import NodeWithScore, TextNode
from safetensors.torch import load_file, save_file

import langchain_bge
import llamaindex_bge
from bge_core import ComputationError, Embedder, M3Embedder, Reranker
from bge_core.backends.bert import load_bert
from bge_core.factory import make_scorer

FINE, BROKEN = ["a cat", "a dog"], "a panda"
TEXTS = [*FINE, BROKEN]


def break_panda(folder: Path, to: Path, value: float) -> Path:
    """Copy a checkpoint in which one word's embedding is what overflowing weights give."""
    shutil.copytree(folder, to)
    vocabulary = json.loads((to / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    if isinstance(vocabulary, dict):
        word = vocabulary["panda"]
    else:
        word = next(place for place, (piece, _) in enumerate(vocabulary) if "panda" in piece)
    tensors = load_file(to / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("word_embeddings.weight"))
    tensors[name][word] = value
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.fixture(scope="module", params=[float("nan"), float("inf")], ids=["nan", "inf"])
def broken(request: Any, tmp_path_factory: Any) -> Callable[[str], Path]:
    """Give a broken copy of a fixture's folder."""
    place = tmp_path_factory.mktemp("broken")

    def give(name: str) -> Path:
        folder = request.getfixturevalue(name)
        to = place / folder.name
        return to if to.exists() else break_panda(folder, to, request.param)

    return give


@pytest.fixture(scope="module")
def converted(tmp_path_factory: Any) -> Path:
    """Where OpenVINO's models are kept from one test to the next: converting takes seconds."""
    folder: Path = tmp_path_factory.mktemp("converted")
    return folder


REMEDY = r"NaN or infinity for {}.*dtype='float32'"


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("method", ["embed_documents", "embed_queries"])
async def test_an_embedder_names_the_text(broken, call, method, backend, converted):
    with Embedder(
        broken("en_folder"), query_instruction="", backend=backend, cache_folder=converted
    ) as embedder:
        assert np.isfinite(await call(embedder, method, FINE)).all()
        with pytest.raises(ComputationError, match=REMEDY.format(r"texts\[2\]")):
            await call(embedder, method, TEXTS)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
async def test_a_reranker_names_the_passage_and_ranks_nothing(broken, call, backend, converted):
    folder = broken("bert_reranker_folder")
    with Reranker(folder, backend=backend, cache_folder=converted) as reranker:
        assert np.isfinite(await call(reranker, "score", "what?", FINE)).all()
        for method in ("score", "rank"):
            with pytest.raises(ComputationError, match=REMEDY.format("passage 2")):
                await call(reranker, method, "what?", TEXTS)


@pytest.mark.parametrize("output", ["dense", "sparse", "multi_vector"])
async def test_m3_names_the_text(broken, call, output):
    asked = {name: name == output for name in ("dense", "sparse", "multi_vector")}
    with M3Embedder(broken("m3_folder")) as embedder:
        await call(embedder, "encode", FINE, **asked)
        with pytest.raises(ComputationError, match=REMEDY.format(r"texts\[2\]")):
            await call(embedder, "encode", TEXTS, **asked)
        weights = {name: float(wanted) for name, wanted in asked.items()}
        with pytest.raises(ComputationError, match=REMEDY.format("the text 'a panda'")):
            await call(embedder, "score", [("what?", text) for text in TEXTS], weights=weights)
    scorer = make_scorer(broken("m3_folder"), m3_weights=weights)
    with pytest.raises(ComputationError, match="a panda"):
        await call(scorer, "rank", "what?", TEXTS)
    scorer.close()


async def test_half_precision_that_overflows_is_refused(m3_folder, tmp_path, call):
    """Weights that float32 carries and float16 does not, as those of some checkpoints."""
    folder = shutil.copytree(m3_folder, tmp_path / "bge-m3")
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("1.intermediate.dense.weight"))
    tensors[name] *= 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with Embedder(folder, dtype="float32") as whole:
        assert np.isfinite(await call(whole, "embed_documents", TEXTS)).all()
        # A CPU computes float16 as float32 here, so this is what a GPU would have.
        runner: Any
        (runner,) = whole.local.loaded().runners["background"]
        runner._encoder = load_bert(
            whole.checkpoint, kind="embedder", dtype=torch.float16, device=torch.device("cpu")
        )
        with pytest.raises(ComputationError, match=REMEDY.format(r"texts\[0\]")):
            await call(whole, "embed_documents", TEXTS)


# The hosts: an error before anything is in a store, or in another order.


async def test_langchain_stores_nothing(broken, call):
    with langchain_bge.BGEEmbeddings(model=broken("en_folder"), query_instruction="") as model:
        store = InMemoryVectorStore(model)
        with pytest.raises(ComputationError, match=r"texts\[2\]"):
            await call(store, "add_texts", TEXTS)
        assert store.store == {}
        with pytest.raises(ComputationError, match=r"texts\[0\]"):
            await call(store, "similarity_search", BROKEN)
        manager = InMemoryRecordManager("tests")
        manager.create_schema()
        with pytest.raises(ComputationError):
            index([Document(text) for text in TEXTS], manager, store, key_encoder="sha256")
        assert (store.store, manager.list_keys()) == ({}, [])


@pytest.mark.parametrize("kind", ["bert_reranker_folder", "m3_folder"])
async def test_langchain_ranks_nothing(broken, call, kind):
    with langchain_bge.BGEReranker(model=broken(kind)) as reranker:
        for method, documents in (
            ("rerank", TEXTS),
            ("compress_documents", [Document(text) for text in TEXTS]),
        ):
            with pytest.raises(ComputationError, match="NaN or infinity"):
                await call(reranker, method, documents, "what?")


def test_langchain_s_cross_encoder_scores_nothing(broken):
    with (
        langchain_bge.BGECrossEncoder(model=broken("bert_reranker_folder")) as model,
        pytest.raises(ComputationError, match="NaN or infinity"),
    ):
        model.score([("what?", text) for text in TEXTS])


async def test_sparse_adapters_give_nothing(broken, call):
    with (
        langchain_bge.BGESparseEmbeddings(model=broken("m3_folder")) as one,
        llamaindex_bge.BGESparseEmbedding(model_name=broken("m3_folder")) as two,
    ):
        for model, method, given in (
            (one, "embed_documents", TEXTS),
            (one, "embed_query", BROKEN),
            (two, "get_text_embedding_batch", TEXTS),
            (two, "get_query_embedding", BROKEN),
        ):
            with pytest.raises(ComputationError, match="NaN or infinity"):
                await call(model, method, given)


async def test_llamaindex_stores_nothing(broken, call):
    with llamaindex_bge.BGEEmbedding(model_name=broken("en_folder")) as model:
        storage = StorageContext.from_defaults()
        nodes = [TextNode(text=text) for text in TEXTS]
        with pytest.raises(ComputationError, match=r"texts\[2\]"):
            VectorStoreIndex(nodes, embed_model=model, storage_context=storage)
        assert storage.vector_store.to_dict()["embedding_dict"] == {}
        with pytest.raises(ComputationError, match=r"texts\[2\]"):
            await call(model, "get_text_embedding_batch", TEXTS)
        with pytest.raises(ComputationError, match=r"texts\[0\]"):
            await call(model, "get_query_embedding", BROKEN)
        assert all(node.embedding is None for node in nodes)


@pytest.mark.parametrize("kind", ["bert_reranker_folder", "m3_folder"])
async def test_llamaindex_ranks_nothing(broken, call, kind):
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in TEXTS]
    with (
        llamaindex_bge.BGEReranker(model=broken(kind)) as reranker,
        pytest.raises(ComputationError, match="NaN or infinity"),
    ):
        await call(reranker, "postprocess_nodes", nodes, query_str="what?")
    assert [node.score for node in nodes] == [0.5] * 3
