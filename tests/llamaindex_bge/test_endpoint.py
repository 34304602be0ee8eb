"""The components with `endpoint=`: what they ask a server, and what they never show."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import NodeWithScore, TextNode

from bge_core import ArgumentError, CheckpointError, EndpointError
from llamaindex_bge import BGEEmbedding, BGEReranker, BGESparseEmbedding
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
    made = BGEEmbedding(model_name=en_folder, endpoint=server.address, api_key=SECRET, timeout=9)
    texts = await call(made, "get_text_embedding_batch", TEXTS)
    query = await call(made, "get_query_embedding", QUERY)
    np.testing.assert_allclose(texts, reference_embed(en_folder, TEXTS), atol=1e-6)
    wanted = reference_embed(en_folder, [INSTRUCTION + QUERY])[0]
    np.testing.assert_allclose(query, wanted, atol=1e-6)
    assert {type(number) for number in query} == {float}
    assert made.dimension == 32


@pytest.mark.parametrize("normalize", [True, False])
async def test_the_reranker_gives_copies_with_scores(
    call: Any, server: Any, reranker_folder: Path, reference_score: Any, normalize: bool
):
    server.logits = lambda pairs: reference_score(reranker_folder, pairs)
    nodes = [
        NodeWithScore(node=TextNode(text=text, id_=str(at)), score=0.5)
        for at, text in enumerate(TEXTS)
    ]
    before = copy.deepcopy(nodes)
    made = BGEReranker(
        model=reranker_folder, endpoint=server.address, normalize=normalize, top_n=None
    )
    found = await call(made, "postprocess_nodes", nodes, query_str=QUERY)
    pairs = [(QUERY, text) for text in TEXTS]
    expected = reference_score(reranker_folder, pairs, normalize=normalize)
    order = np.argsort(-expected, kind="stable")
    assert [node.node_id for node in found] == [str(at) for at in order]
    np.testing.assert_allclose([node.score for node in found], expected[order], atol=1e-6)
    assert nodes == before


def test_the_token_is_never_shown_and_goes_with_copies(server: Any):
    embedding = BGEEmbedding(model_name="BAAI/bge-m3", endpoint=server.address, api_key=SECRET)
    reranker = BGEReranker(model="BAAI/bge-reranker-base", endpoint=server.address, api_key=SECRET)
    for made in (embedding, reranker):
        shown = f"{made!r} {made} {made.to_dict()} {made.to_json()} {made.model_dump()}"
        assert SECRET not in shown
        assert "api_key" not in made.to_dict()
        assert made.to_dict()["endpoint"] == server.address
        for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), made.model_copy()):
            assert twin.api_key.get_secret_value() == SECRET
            assert (twin.endpoint, twin.fingerprint) == (server.address, made.fingerprint)
        with pytest.raises(ArgumentError, match="can't be changed"):
            made.endpoint = "http://elsewhere"
    assert SECRET not in json.dumps(embedding.to_payload(), default=str)
    again = BGEEmbedding.from_dict(embedding.to_dict())
    assert (again.endpoint, again.api_key) == (server.address, None)


def test_the_ingestion_cache_s_key_has_no_address():
    def key(**options: Any) -> str:
        return str(BGEEmbedding(model_name="BAAI/bge-m3", **options).to_dict())

    served = key(endpoint="http://one")
    assert served == key(endpoint="http://two", timeout=3, api_key=SECRET)
    assert served != key(device="cpu")  # the server's number format is its own
    assert served != key(endpoint="http://one", query_instruction="q: ")


def test_what_is_the_server_s_business_is_refused():
    with pytest.raises(ArgumentError, match=r"^device, pooling can't be set with endpoint="):
        BGEEmbedding(model_name="BAAI/bge-m3", endpoint="http://h", device="cpu", pooling="cls")
    with pytest.raises(ArgumentError, match=r"^api_key is for a server"):
        BGEReranker(model="BAAI/bge-reranker-base", api_key=SECRET)
    with pytest.raises(ArgumentError, match="three scores that no server"):
        BGEReranker(model="BAAI/bge-m3", endpoint="http://h")
    with pytest.raises(ArgumentError, match="has no argument 'endpoint'"):
        BGESparseEmbedding(model_name="BAAI/bge-m3", endpoint="http://h")


def test_a_server_s_own_name_and_batch_limit(server: Any):
    server.names, server.batch_limit = {"bge-small-en-v1.5", "ranker:2"}, 3
    server.embed = lambda texts: np.ones((len(texts), 384))
    texts = [str(number) for number in range(10)]
    made = BGEEmbedding(model="bge-small-en-v1.5", endpoint=server.address, endpoint_batch_size=3)
    twin = pickle.loads(pickle.dumps(made.model_copy()))
    for embeddings in (made, twin):
        server.asked.clear()
        assert len(embeddings.get_text_embedding_batch(texts)) == 10
        assert sorted(len(body["input"]) for _, body in server.asked) == [1, 3, 3, 3]
        embeddings.get_query_embedding("x")
        assert server.asked[-1][1]["input"] == [f"{INSTRUCTION}x"]
    learnt = BGEEmbedding(model="bge-small-en-v1.5", endpoint=server.address)
    assert len(learnt.get_text_embedding_batch(texts)) == 10
    ranker = BGEReranker(
        model="BAAI/bge-reranker-base", endpoint=server.address, served_model_name="ranker:2"
    )
    plain = BGEReranker(model="BAAI/bge-reranker-base", endpoint=server.address)
    assert ranker.fingerprint != plain.fingerprint
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    assert len(ranker.postprocess_nodes(nodes, query_str="q")) == ranker.top_n
    assert {body["model"] for _, body in server.asked} == {"bge-small-en-v1.5", "ranker:2"}
    with pytest.raises(CheckpointError, match="did you mean 'BAAI/bge-m3'"):
        BGEEmbedding(model="bge-m3")
    with pytest.raises(ArgumentError, match=r"^endpoint_batch_size is for a server"):
        BGEEmbedding(model="BAAI/bge-m3", endpoint_batch_size=3)


def test_a_server_s_failure_is_a_connection_error(server: Any):
    server.faults = [answer(500, {"error": "out of memory"})]
    made = BGEEmbedding(model_name="BAAI/bge-m3", endpoint=server.address)
    with pytest.raises(ConnectionError, match="out of memory") as caught:
        made.get_query_embedding("a")
    assert isinstance(caught.value, EndpointError)
