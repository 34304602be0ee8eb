"""The adapters with `endpoint=`: what they ask a server, and what they never show."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document

from bge_core import ArgumentError, CheckpointError, EndpointError
from langchain_bge import BGECrossEncoder, BGEEmbeddings, BGEReranker, BGESparseEmbeddings
from tests.servers import answer

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

SECRET = "s3cret-t0ken"
QUERY = "what is a panda?"
TEXTS = ["cat", "The giant panda is a bear.", "cat"]
INSTRUCTION = "Represent this sentence for searching relevant passages: "


async def test_embeddings_are_those_of_transformers(
    call: Any, server: Any, en_folder: Path, reference_embed: Any
):
    server.embed, server.api_key = lambda texts: reference_embed(en_folder, texts), SECRET
    made = BGEEmbeddings(model=en_folder, endpoint=server.address, api_key=SECRET, timeout=9)
    documents = await call(made, "embed_documents", TEXTS)
    query = await call(made, "embed_query", QUERY)
    np.testing.assert_allclose(documents, reference_embed(en_folder, TEXTS), atol=1e-6)
    wanted = reference_embed(en_folder, [INSTRUCTION + QUERY])[0]
    np.testing.assert_allclose(query, wanted, atol=1e-6)
    assert {type(number) for number in query} == {float}
    assert (made.dimension, await call(made, "embed_documents", [])) == (32, [])


@pytest.mark.parametrize("normalize", [True, False])
async def test_the_reranker_gives_copies_with_scores(
    call: Any, server: Any, reranker_folder: Path, reference_score: Any, normalize: bool
):
    server.logits = lambda pairs: reference_score(reranker_folder, pairs)
    documents = [Document(page_content=text, id=str(at)) for at, text in enumerate(TEXTS)]
    before = copy.deepcopy(documents)
    made = BGEReranker(model=reranker_folder, endpoint=server.address, normalize=normalize)
    found = await call(made, "compress_documents", documents, QUERY)
    pairs = [(QUERY, text) for text in TEXTS]
    expected = reference_score(reranker_folder, pairs, normalize=normalize)
    order = np.argsort(-expected, kind="stable")
    assert [document.id for document in found] == [str(at) for at in order]
    scores = [document.metadata["relevance_score"] for document in found]
    np.testing.assert_allclose(scores, expected[order], atol=1e-6)
    assert documents == before
    plain = BGECrossEncoder(model=reranker_folder, endpoint=server.address, normalize=normalize)
    np.testing.assert_allclose(plain.score(pairs), expected, atol=1e-6)


@pytest.mark.parametrize("adapter", [BGEEmbeddings, BGEReranker, BGECrossEncoder])
def test_the_token_is_never_shown_and_goes_with_copies(server: Any, adapter: Any):
    name = "BAAI/bge-m3" if adapter is BGEEmbeddings else "BAAI/bge-reranker-base"
    made = adapter(model=name, endpoint=server.address, api_key=SECRET)
    shown = f"{made!r} {made} {made.model_dump()} {made.model_dump_json()}"
    assert SECRET not in shown
    assert server.address in shown
    for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), made.model_copy()):
        assert twin.api_key.get_secret_value() == SECRET
        assert (twin.endpoint, twin.fingerprint) == (server.address, made.fingerprint)
    with pytest.raises(ArgumentError, match="endpoint:") as caught:
        adapter(model=name, endpoint=[SECRET], api_key=[SECRET])
    assert SECRET not in str(caught.value)
    with pytest.raises(ArgumentError, match="can't be changed"):
        made.endpoint = "http://elsewhere"


@pytest.mark.parametrize("adapter", [BGEEmbeddings, BGEReranker, BGECrossEncoder])
def test_what_is_the_server_s_business_is_refused(adapter: Any):
    name = "BAAI/bge-m3" if adapter is BGEEmbeddings else "BAAI/bge-reranker-base"
    with pytest.raises(ArgumentError, match=r"^device, dtype can't be set with endpoint="):
        adapter(model=name, endpoint="http://host", device="cpu", dtype="float16")
    with pytest.raises(ArgumentError, match=r"^api_key is for a server"):
        adapter(model=name, api_key=SECRET)
    with pytest.raises(ArgumentError, match="a password"):
        adapter(model=name, endpoint=f"http://user:{SECRET}@host")


def test_a_server_s_own_name_and_batch_limit(server: Any):
    server.names, server.batch_limit = {"bge-small-en-v1.5", "ranker:2"}, 3
    server.embed = lambda texts: np.ones((len(texts), 384))
    texts = [str(number) for number in range(10)]
    made = BGEEmbeddings(model="bge-small-en-v1.5", endpoint=server.address, endpoint_batch_size=3)
    twin = pickle.loads(pickle.dumps(made.model_copy()))
    for embeddings in (made, twin):
        server.asked.clear()
        assert len(embeddings.embed_documents(texts)) == 10
        assert sorted(len(body["input"]) for _, body in server.asked) == [1, 3, 3, 3]
        embeddings.embed_query("x")
        assert server.asked[-1][1]["input"] == [f"{INSTRUCTION}x"]
    learnt = BGEEmbeddings(model="bge-small-en-v1.5", endpoint=server.address)
    assert len(learnt.embed_documents(texts)) == 10
    ranker = BGEReranker(
        model="BAAI/bge-reranker-base", endpoint=server.address, served_model_name="ranker:2"
    )
    plain = BGEReranker(model="BAAI/bge-reranker-base", endpoint=server.address)
    assert ranker.fingerprint != plain.fingerprint
    assert len(ranker.compress_documents([Document(page_content=t) for t in texts], "q")) == 3
    assert {body["model"] for _, body in server.asked} == {"bge-small-en-v1.5", "ranker:2"}
    with pytest.raises(CheckpointError, match="did you mean 'BAAI/bge-m3'"):
        BGEEmbeddings(model="bge-m3")
    with pytest.raises(ArgumentError, match=r"^endpoint_batch_size is for a server"):
        BGEEmbeddings(model="BAAI/bge-m3", endpoint_batch_size=3)


def test_a_server_s_failure_is_a_connection_error(server: Any):
    server.faults = [answer(500, {"error": "out of memory"})]
    made = BGEEmbeddings(model="BAAI/bge-m3", endpoint=server.address)
    with pytest.raises(ConnectionError, match="out of memory") as caught:
        made.embed_query("a")
    assert isinstance(caught.value, EndpointError)


def test_sparse_vectors_come_from_no_server():
    with pytest.raises(ArgumentError, match="has no argument 'endpoint'"):
        BGESparseEmbeddings(model="BAAI/bge-m3", endpoint="http://host")
