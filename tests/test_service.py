"""The example service: answers, refusals, metrics and limits in process; its end by a signal."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from transformers import AutoTokenizer

fastapi = pytest.importorskip("fastapi")
parser = pytest.importorskip("prometheus_client.parser")

SERVICE = Path(__file__).parent.parent / "examples" / "service"
INSTRUCTION = "Represent this sentence for searching relevant passages: "
PASSAGES = ["Cats purr.", "Paris is the capital of France.", "Water boils."]

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


@pytest.fixture
def made(monkeypatch, en_folder, reranker_folder):
    """Make the service with some settings: `async with made(most_texts=3) as http`."""
    monkeypatch.syspath_prepend(str(SERVICE))
    from app import Settings, make_app

    @contextlib.asynccontextmanager
    async def make(**settings):
        settings = {"model": str(en_folder), "reranker": str(reranker_folder)} | settings
        app = make_app(Settings(**settings))
        transport = httpx.ASGITransport(app)
        client = httpx.AsyncClient(transport=transport, base_url="http://service")
        async with app.router.lifespan_context(app), client as http:
            yield http

    return make


async def counted(http):
    """Read the metrics as Prometheus does: (name, labels) -> value."""
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name.removeprefix("bge_"), frozenset(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def test_what_it_answers(made, en_folder, reranker_folder, reference_embed, reference_score):
    async with made() as http:
        documents = await http.post("/embed", json={"texts": PASSAGES})
        query = await http.post("/embed", json={"texts": ["a cat"], "kind": "query"})
        ranked = await http.post("/rerank", json={"query": "a cat", "passages": PASSAGES})
        best = {"query": "a cat", "passages": PASSAGES, "top_n": 1}
        (first,) = (await http.post("/rerank", json=best)).json()["results"]
        alive = [await http.get(path) for path in ("/health", "/ready")]
    np.testing.assert_allclose(
        documents.json()["vectors"], reference_embed(en_folder, PASSAGES), atol=1e-5
    )
    np.testing.assert_allclose(
        query.json()["vectors"], reference_embed(en_folder, [INSTRUCTION + "a cat"]), atol=1e-5
    )
    assert documents.json()["model"] == str(en_folder)
    pairs = [("a cat", passage) for passage in PASSAGES]
    scores = reference_score(reranker_folder, pairs, normalize=True)
    results = ranked.json()["results"]
    assert [found["index"] for found in results] == np.argsort(-scores).tolist()
    np.testing.assert_allclose(
        [found["score"] for found in results], np.sort(scores)[::-1], atol=1e-5
    )
    assert first == results[0]
    assert [answer.status_code for answer in alive] == [200, 200]


async def test_it_speaks_as_openai_does(made, en_folder, reference_embed):
    expected = reference_embed(en_folder, PASSAGES)
    async with made(reranker="") as http:
        plain = await http.post("/v1/embeddings", json={"input": PASSAGES, "model": "any"})
        packed = {"input": PASSAGES, "encoding_format": "base64", "dimensions": 32}
        packed = await http.post("/v1/embeddings", json=packed)
        one = {"input": "a cat", "input_type": "query"}
        one = await http.post("/v1/embeddings", json=one)
        shorter = await http.post("/v1/embeddings", json={"input": "a cat", "dimensions": 8})
        missing = await http.post("/rerank", json={"query": "a cat", "passages": PASSAGES})
    data = plain.json()["data"]
    assert [(row["object"], row["index"]) for row in data] == [("embedding", i) for i in range(3)]
    np.testing.assert_allclose([row["embedding"] for row in data], expected, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(en_folder)
    tokens = sum(map(len, tokenizer(PASSAGES, add_special_tokens=False).input_ids))
    assert plain.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    found = [base64.b64decode(row["embedding"]) for row in packed.json()["data"]]
    np.testing.assert_allclose([np.frombuffer(row, "<f4") for row in found], expected, atol=1e-5)
    np.testing.assert_allclose(
        one.json()["data"][0]["embedding"],
        reference_embed(en_folder, [INSTRUCTION + "a cat"])[0],
        atol=1e-5,
    )
    assert (shorter.status_code, missing.status_code) == (400, 404)
    assert "has 32" in shorter.json()["detail"]
    assert "BGE_RERANKER" in missing.json()["detail"]


BAD = {
    "a str for texts": ("/embed", {"texts": "bare"}, 400, "texts must be a list"),
    "a number among texts": ("/embed", {"texts": ["a", 1]}, 400, "texts[1]"),
    "null": ("/embed", {"texts": None}, 400, "texts must be a list"),
    "a mapping": ("/embed", {"texts": {"a": "b"}}, 400, "texts must be a list"),
    "half a character": ("/embed", b'{"texts": ["\\ud800"]}', 400, "Unicode"),
    "half a character as a name": (
        "/embed",
        b'{"\\ud800": 1, "texts": []}',
        422,
        "the body: Input should be",
    ),
    "half a character as a kind": ("/embed", b'{"texts": [], "kind": "\\ud800"}', 422, "kind"),
    "no texts": ("/embed", {}, 422, "texts: Field required"),
    "another kind": ("/embed", {"texts": ["a"], "kind": "sparse"}, 422, "kind"),
    "no JSON": ("/embed", b"{", 422, "JSON"),
    "no UTF-8": ("/embed", b'{"texts": ["\xff"]}', 400, ""),
    "a deep hole": ("/embed", b"[" * 100_000, 400, ""),
    "another field": ("/embed", {"texts": ["a"], "normalize": False}, 422, "normalize"),
    "a query that is none": ("/rerank", {"query": 1, "passages": ["a"]}, 400, "query must be"),
    "half a query": ("/rerank", b'{"query": "\\udfff", "passages": ["a"]}', 400, "Unicode"),
    "top_n of 0": ("/rerank", {"query": "a", "passages": ["a"], "top_n": 0}, 400, "top_n"),
    "a bool for top_n": (
        "/rerank",
        {"query": "a", "passages": ["a"], "top_n": True},
        400,
        "top_n must be a whole number",
    ),
    "a bool for a threshold": (
        "/rerank",
        {"query": "a", "passages": ["a"], "score_threshold": False},
        400,
        "score_threshold must be a number",
    ),
    "a bool for a dimension": ("/v1/embeddings", {"input": "a", "dimensions": True}, 422, "dim"),
    "no number": (
        "/rerank",
        b'{"query": "a", "passages": ["a"], "score_threshold": NaN}',
        400,
        "NaN",
    ),
    "an unreachable threshold": (
        "/rerank",
        {"query": "a", "passages": ["a"], "score_threshold": 2},
        400,
        "can't be reached",
    ),
    "token ids": ("/v1/embeddings", {"input": [1, 2]}, 400, "[0] must be"),
    "too many texts": ("/embed", {"texts": ["a"] * 9}, 413, "9 texts are more than the 8"),
    "too many passages": ("/rerank", {"query": "a", "passages": ["a"] * 9}, 413, "than the 8"),
    "too long a text": ("/embed", {"texts": ["a" * 20_001]}, 413, "than the 20000"),
    "too long a query": ("/rerank", {"query": "a" * 20_001, "passages": []}, 413, "20000"),
    "too many bytes": ("/embed", b" " * 120_001, 413, "bytes are more than the 120000"),
}


async def test_what_it_refuses_in_a_sentence(made):
    async with made(most_texts=8, most_characters=20_000) as http:
        for name, (path, body, status, said) in BAD.items():
            given = {"content": body} if isinstance(body, bytes) else {"json": body}
            headers = {"content-type": "application/json"}
            answer = await http.post(path, headers=headers, **given)
            assert answer.status_code == status, (name, answer.text)
            assert said in answer.json()["detail"], (name, answer.text)

        async def chunks():
            yield b'{"texts": ["a"]}'

        assert (await http.post("/embed", content=chunks())).status_code == 411
        assert (await http.post("/elsewhere", json={})).status_code == 404
        assert (await http.get("/embed")).status_code == 405
        # None of it has harmed anybody.
        assert (await http.post("/embed", json={"texts": []})).json()["vectors"] == []
        assert (await http.post("/embed", json={"texts": ["a"]})).status_code == 200
        assert not any(("status", "500") in labels for _, labels in await counted(http))


async def test_concurrent_requests_share_passes_and_are_counted(made, en_folder, reranker_folder):
    async with made() as http:
        before = await counted(http)
        bodies = [{"texts": [f"query {i}"], "kind": "query"} for i in range(40)]
        answers = await asyncio.gather(*(http.post("/embed", json=body) for body in bodies))
        assert {answer.status_code for answer in answers} == {200}
        await http.post("/rerank", json={"query": "a cat", "passages": PASSAGES})
        await http.post("/embed", json={"texts": "bare"})
        after = await counted(http)
    embedder = {"role": "embedder", "model": str(en_folder)}
    reranker = {"role": "reranker", "model": str(reranker_folder)}

    def added(name, **labels):
        key = name, frozenset(labels.items())
        return after[key] - before.get(key, 0)

    assert added("requests_total", **embedder) == added("sequences_total", **embedder) == 40
    assert 1 <= added("packs_total", **embedder) < 40
    tokenizer = AutoTokenizer.from_pretrained(en_folder)
    read = tokenizer([INSTRUCTION + body["texts"][0] for body in bodies]).input_ids
    assert added("tokens_total", **embedder) == sum(map(len, read))
    assert added("texts_total", **reranker) == 3
    assert added("stage_seconds_total", **embedder, stage="compute") > 0
    assert added("http_responses_total", path="/embed", status="200") == 40
    assert added("http_responses_total", path="/embed", status="400") == 1
    assert added("http_seconds_count", path="/embed") == 41
    assert added("http_in_progress") == 0
    for priority in ("interactive", "background"):
        assert added("waiting_sequences", **embedder, priority=priority) == 0


async def test_more_requests_than_it_takes_are_sent_away(made):
    async with made(most_requests=4) as http:
        body = {"texts": [f"document {i}" for i in range(200)]}
        asked = [http.post("/embed", json=body) for _ in range(12)]
        asked += [http.get(path) for path in ("/ready", "/health", "/metrics")]
        *answers, ready, health, metrics = await asyncio.gather(*asked)
        assert [each.status_code for each in (ready, health, metrics)] == [503, 200, 200]
        found = sorted(answer.status_code for answer in answers)
        assert found == [200] * 4 + [503] * 8
        sent_away = next(answer for answer in answers if answer.status_code == 503)
        assert sent_away.headers["retry-after"] == "1"
        assert "come again" in sent_away.json()["detail"]
        assert (await http.get("/ready")).status_code == 200


async def test_a_model_that_was_closed_is_no_fault_of_the_client(made):
    async with made() as http:
        service = http._transport.app.user_middleware[0].kwargs["service"]
        service.close()
        answer = await http.post("/embed", json={"texts": ["a"]})
        assert answer.status_code == 503
        assert "is closed" in answer.json()["detail"]


def test_settings_of_the_environment(monkeypatch):
    monkeypatch.syspath_prepend(str(SERVICE))
    from app import Settings

    assert Settings.of({"PATH": "x"}) == Settings()
    given = {"BGE_MODEL": "a", "BGE_RERANKER": "", "BGE_MOST_TEXTS": "3"}
    assert Settings.of(given) == Settings(model="a", reranker="", most_texts=3)
    for wrong in ("", "many", "0", "-1"):
        with pytest.raises(SystemExit, match="BGE_MOST_TEXTS must be a whole number"):
            Settings.of({"BGE_MOST_TEXTS": wrong})


def test_a_signal_lets_running_requests_finish(en_folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--factory", "app:make_app"]
    command += ["--app-dir", str(SERVICE), "--port", str(port)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(SERVICE.parent.parent),
        "BGE_MODEL": str(en_folder),
        "BGE_RERANKER": "",
    }
    body = b'{"texts": ["Cats purr."]}'
    head = (
        "POST /embed HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            log = []
            for line in process.stderr:  # until it takes requests
                log.append(line)
                if "running on" in line:
                    break
            with socket.create_connection(("127.0.0.1", port), timeout=30) as running:
                running.sendall(head.encode() + body[:5])
                _wait_for_a_request(port)
                process.send_signal(signal.SIGTERM)
                for line in process.stderr:
                    log.append(line)
                    if "Waiting for connections to close" in line or "Shutting down" in line:
                        break
                running.sendall(body[5:])
                answer = b""
                while part := running.recv(65536):
                    answer += part
            log += process.stderr
        finally:
            process.terminate()
            process.wait(60)
    said = "".join(log)
    assert answer.startswith(b"HTTP/1.1 200"), said
    assert b'"vectors":[[' in answer
    assert said.index("Shutting down") < said.index("The models are closed."), said
    assert process.returncode in (0, -signal.SIGTERM), said
    assert "Traceback" not in said


def _wait_for_a_request(port):
    for _ in range(1000):
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        if "bge_http_in_progress 1.0" in metrics:
            return
        time.sleep(0.02)
    raise TimeoutError
