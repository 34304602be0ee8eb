"""A real Infinity server on loopback gives what the same folders give on this machine.

`make test-server` makes the environment that it runs in; without one, these tests are skipped.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

import langchain_bge
import llamaindex_bge
from bge_core import Embedder, EndpointError, RemoteEmbedder, RemoteReranker, Reranker
from tests.servers import free_port

PROGRAM = Path(__file__).parents[1] / ".venv-infinity" / "bin" / "infinity_emb"
KEY = "s3cret"
QUERY = "what is the capital of France?"

pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.skipif(not PROGRAM.exists(), reason="no .venv-infinity: see make test-server"),
]


@pytest.fixture(scope="module")
def address(
    stand_in_folder: Path,
    en_folder: Path,
    reranker_folder: Path,
    bert_reranker_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    port = free_port()
    command = [PROGRAM, "v2", "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY]
    # The names that are asked for: published ids, and no path of this machine.
    served = {
        stand_in_folder.name: stand_in_folder,
        f"BAAI/{en_folder.name}": en_folder,
        f"BAAI/{reranker_folder.name}": reranker_folder,
        bert_reranker_folder.name: bert_reranker_folder,
    }
    for name, folder in served.items():
        command += ["--model-id", folder, "--served-model-name", name]
        command += ["--device", "cpu", "--engine", "torch"]
        command += ["--no-bettertransformer", "--no-model-warmup"]
    log = tmp_path_factory.mktemp("infinity") / "log"
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "NO_PROXY": "127.0.0.1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **quiet}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(240):
        try:
            with opener.open(health, timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize("fixture", ["stand_in_folder", "en_folder"])
async def test_vectors_are_those_of_this_machine(
    request: pytest.FixtureRequest, call: Any, address: str, corpus: tuple[str, ...], fixture: str
) -> None:
    folder = request.getfixturevalue(fixture)
    texts = [*corpus, "cat", "cat", "", *(f"{number} {corpus[5]}" for number in range(20))]
    instruction = "query: " if fixture == "stand_in_folder" else None
    remote = RemoteEmbedder(folder, endpoint=address, api_key=KEY, query_instruction=instruction)
    with remote, Embedder(folder, query_instruction=instruction) as local:
        for verb in ("embed_documents", "embed_queries"):
            expected = getattr(local, verb)(texts)
            served = await call(remote, verb, texts)
            assert served.dtype == np.float32
            np.testing.assert_allclose(served, expected, atol=1e-5)
        assert remote.dimension == local.dimension


@pytest.mark.parametrize("fixture", ["reranker_folder", "bert_reranker_folder"])
@pytest.mark.parametrize("normalize", [True, False])
async def test_scores_and_order_are_those_of_this_machine(
    request: pytest.FixtureRequest,
    call: Any,
    address: str,
    corpus: tuple[str, ...],
    fixture: str,
    normalize: bool,
) -> None:
    folder = request.getfixturevalue(fixture)
    passages = [*corpus, "cat", "cat", *(f"{number} {corpus[5]}" for number in range(20))]
    remote = RemoteReranker(folder, endpoint=address, api_key=KEY, normalize=normalize)
    with remote, Reranker(folder, normalize=normalize) as local:
        expected = local.score(QUERY, passages)
        served = await call(remote, "score", QUERY, passages)
        np.testing.assert_allclose(served, expected, atol=1e-4)
        ranked = await call(remote, "rank", QUERY, passages)
        assert [found.index for found in ranked] == [
            found.index for found in local.rank(QUERY, passages)
        ]
        pairs = [(query, passage) for passage in passages[:9] for query in (QUERY, "cat")]
        served = await call(remote, "score_pairs", pairs)
        np.testing.assert_allclose(served, local.score_pairs(pairs), atol=1e-4)


async def test_the_adapters_give_what_they_give_on_this_machine(
    call: Any, address: str, en_folder: Path, reranker_folder: Path, corpus: tuple[str, ...]
) -> None:
    texts, server = list(corpus[:8]), {"endpoint": address, "api_key": KEY}

    def pair(made: Any, **options: Any) -> tuple[Any, Any]:
        return made(**options, **server), made(**options)

    served, local = pair(langchain_bge.BGEEmbeddings, model=en_folder)
    for verb, given in (("embed_documents", texts), ("embed_query", QUERY)):
        np.testing.assert_allclose(
            await call(served, verb, given), getattr(local, verb)(given), atol=1e-5
        )
    served, local = pair(llamaindex_bge.BGEEmbedding, model_name=en_folder)
    for verb, given in (("get_text_embedding_batch", texts), ("get_query_embedding", QUERY)):
        np.testing.assert_allclose(
            await call(served, verb, given), getattr(local, verb)(given), atol=1e-5
        )

    documents = [Document(page_content=text, id=str(at)) for at, text in enumerate(texts)]
    served, local = pair(langchain_bge.BGEReranker, model=reranker_folder)
    found = await call(served, "compress_documents", documents, QUERY)
    expected = local.compress_documents(documents, QUERY)
    assert [document.id for document in found] == [document.id for document in expected]
    served, local = pair(langchain_bge.BGECrossEncoder, model=reranker_folder)
    pairs = [(QUERY, text) for text in texts]
    np.testing.assert_allclose(served.score(pairs), local.score(pairs), atol=1e-4)

    nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    served, local = pair(llamaindex_bge.BGEReranker, model=reranker_folder)
    found = await call(served, "postprocess_nodes", nodes, query_str=QUERY)
    expected = local.postprocess_nodes(nodes, query_str=QUERY)
    assert [node.node_id for node in found] == [node.node_id for node in expected]
    np.testing.assert_allclose(
        [node.score for node in found], [node.score for node in expected], atol=1e-4
    )


async def test_many_event_loops_and_tasks(address: str, en_folder: Path) -> None:
    with RemoteEmbedder(en_folder, endpoint=address, api_key=KEY) as embedder:
        expected = embedder.embed_queries([QUERY])
        found = await asyncio.gather(*(embedder.aembed_queries([QUERY]) for _ in range(20)))
        found += [
            await asyncio.to_thread(lambda: asyncio.run(embedder.aembed_queries([QUERY])))
            for _ in range(3)
        ]
    for vectors in found:
        np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_what_the_server_refuses_is_a_sentence(address: str, en_folder: Path) -> None:
    with pytest.raises(EndpointError, match=r"401 Unauthorized.*api_key="):
        RemoteEmbedder(en_folder, endpoint=address).embed_queries(["a"])
    with pytest.raises(EndpointError, match=r"answered 400.*model="):
        RemoteReranker("BAAI/bge-reranker-large", endpoint=address, api_key=KEY).rank("q", ["p"])
    with pytest.raises(EndpointError, match=r"answered 404.*/v1"):
        RemoteEmbedder(en_folder, endpoint=f"{address}/v1", api_key=KEY).embed_queries(["a"])
