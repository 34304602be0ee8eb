"""A model that can't be found: one sentence in every class, and the cause in debug logs."""

import io
import logging
import traceback
from typing import Any

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from bge_core import CheckpointError, Embedder, M3Embedder, Reranker
from langchain_bge import BGECrossEncoder, BGEEmbeddings, BGEReranker, BGESparseEmbeddings
from llamaindex_bge import BGEEmbedding, BGESparseEmbedding
from llamaindex_bge import BGEReranker as NodeReranker

NODES = [NodeWithScore(node=TextNode(text="a"))]
CALLS: dict[str, tuple[Any, str, tuple[Any, ...]]] = {
    "core": (Embedder, "embed_documents", (["a"],)),
    "core reranker": (Reranker, "score", ("q", ["a"])),
    "m3": (M3Embedder, "encode", (["a"],)),
    "langchain documents": (BGEEmbeddings, "embed_documents", (["a"],)),
    "langchain query": (BGEEmbeddings, "embed_query", ("a",)),
    "langchain sparse": (BGESparseEmbeddings, "embed_query", ("a",)),
    "langchain reranker": (BGEReranker, "compress_documents", ([Document("a")], "q")),
    "llamaindex documents": (BGEEmbedding, "get_text_embedding_batch", (["a"],)),
    "llamaindex query": (BGEEmbedding, "get_query_embedding", ("a",)),
    "llamaindex sparse": (BGESparseEmbedding, "get_text_embedding_batch", (["a"],)),
}


def check(caught: pytest.ExceptionInfo[CheckpointError], caplog: pytest.LogCaptureFixture) -> None:
    shown = traceback.format_exception(caught.value)
    assert shown[-1].startswith("bge_core.errors.CheckpointError: model='acme/none' can't be found")
    assert not any("exception" in line and "following" in line for line in shown), shown
    (record,) = [one for one in caplog.records if one.name == "bge_core.checkpoints.source"]
    assert record.levelno == logging.DEBUG
    assert record.exc_info


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path))
    caplog.set_level(logging.DEBUG, logger="bge_core.checkpoints.source")


@pytest.mark.parametrize("name", CALLS)
async def test_it_is_the_sentence_alone(call, caplog, name):
    make, method, given = CALLS[name]
    model = make(model="acme/none", local_files_only=True)
    with pytest.raises(CheckpointError) as caught:
        await call(model, method, *given)
    check(caught, caplog)


def test_of_the_classes_that_only_wait(caplog):
    cross = BGECrossEncoder(model="acme/none", local_files_only=True)
    with pytest.raises(CheckpointError) as caught:
        cross.score([("q", "a")])
    check(caught, caplog)
    caplog.clear()
    reranker = NodeReranker(model="acme/none", local_files_only=True)
    with pytest.raises(CheckpointError) as caught:
        reranker.postprocess_nodes(NODES, query_str="q")
    check(caught, caplog)
    caplog.clear()


async def test_what_the_hub_s_client_tells_of_its_tries_is_in_the_debug_log(
    monkeypatch, call, caplog
):
    import huggingface_hub

    def broken(*_: object, local_files_only: bool, **__: object) -> None:
        if not local_files_only:
            logging.getLogger("huggingface_hub.utils._http").warning("Retrying in %ss", 1)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    printed = io.StringIO()
    client, handler = logging.getLogger("huggingface_hub"), logging.StreamHandler(printed)
    client.addHandler(handler)
    try:
        with pytest.raises(CheckpointError, match="Network is unreachable"):
            await call(Embedder("acme/none"), "embed_documents", ["a"])
        assert not printed.getvalue()
        assert "huggingface_hub.utils._http: Retrying in 1s" in caplog.text
        client.warning("outside of it")  # others may say what they like
        assert printed.getvalue() == "outside of it\n"
    finally:
        client.removeHandler(handler)


async def test_of_the_node_reranker_s_loop(caplog):
    reranker = NodeReranker(model="acme/none", local_files_only=True)
    with pytest.raises(CheckpointError) as caught:
        await reranker.apostprocess_nodes(NODES, query_str="q")
    check(caught, caplog)
