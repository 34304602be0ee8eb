"""A server in the model's place. It computes with plain transformers: see tests/servers.py."""

import asyncio
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest

from bge_core import (
    ArgumentError,
    BGEError,
    CheckpointError,
    ClosedError,
    ComputationError,
    EndpointError,
    InputTypeError,
    Ranked,
    RemoteEmbedder,
    RemoteReranker,
    make_embedder,
    make_reranker,
    make_scorer,
)
from tests.servers import answer, drip, drop, free_port, infinity_refusal, tei_refusal

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

INSTRUCTION = "Represent this sentence for searching relevant passages: "
TEXTS = ["Paris is in France.", "", "大熊猫是中国特有的。", "Paris is in France.", " a\nb ", "cat"]
QUERY = "what is the capital of France?"
PASSAGES = ["cat", "Paris is the capital of France.", "", "大熊猫", "cat", "x" * 40]
SECRET = "s3cret-t0ken"


@pytest.fixture
def embedder(server, en_folder, reference_embed):
    server.embed = lambda texts: reference_embed(en_folder, texts)
    with RemoteEmbedder(en_folder, endpoint=server.address) as embedder:
        yield embedder


@pytest.fixture
def reranker(server, reranker_folder, reference_score):
    server.logits = lambda pairs: reference_score(reranker_folder, pairs)
    with RemoteReranker(reranker_folder, endpoint=server.address) as reranker:
        yield reranker


def plain(server, **options):
    """An embedder whose vectors are (1, length of the text), before they are scaled."""
    options = {"query_instruction": "", **options}
    return RemoteEmbedder("acme/encoder", endpoint=server.address, **options)


# The same numbers.


async def test_documents_go_as_they_are_and_queries_with_the_instruction(
    call, server, embedder, en_folder, reference_embed
):
    documents = await call(embedder, "embed_documents", TEXTS)
    queries = await call(embedder, "embed_queries", TEXTS)
    assert (documents.dtype, documents.shape) == (np.float32, (6, 32))
    np.testing.assert_allclose(documents, reference_embed(en_folder, TEXTS), atol=1e-6)
    wanted = reference_embed(en_folder, [INSTRUCTION + text for text in TEXTS])
    np.testing.assert_allclose(queries, wanted, atol=1e-6)
    assert abs(documents - queries).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(documents, axis=1), 1, atol=1e-6)
    assert [len(body["input"]) for _, body in server.asked] == [5, 5]  # equal ones once


@pytest.mark.parametrize(
    ("model", "options", "query", "document"),
    [
        ("BAAI/bge-small-en-v1.5", {}, f"{INSTRUCTION}x", "x"),
        ("BAAI/bge-small-zh-v1.5", {}, "为这个句子生成表示以用于检索相关文章：x", "x"),
        ("BAAI/bge-m3", {}, "x", "x"),
        ("BAAI/bge-small-en-v1.5", {"query_instruction": ""}, "x", "x"),
        ("BAAI/bge-m3", {"query_instruction": "find: "}, "find: x", "x"),
        (
            "BAAI/llm-embedder",
            {"task": "tool"},
            "Transform this user request for fetching helpful tool descriptions: x",
            "Transform this tool description for retrieval: x",
        ),
        (
            "BAAI/bge-en-icl",
            {
                "task_description": "Find it.",
                "examples": [{"query": "q", "response": "r"}],
            },
            "<instruct>Find it.\n<query>q\n<response>r\n\n<instruct>Find it.\n<query>x\n<response>",
            "x",
        ),
        ("acme/encoder", {}, "x", "x"),
    ],
)
def test_instructions_are_those_of_the_published_model(server, model, options, query, document):
    embedder = RemoteEmbedder(model, endpoint=server.address, **options)
    server.embed = lambda texts: np.ones((len(texts), embedder._model.width or 7))
    embedder.embed_queries(["x"])
    embedder.embed_documents(["x"])
    assert [body["input"] for _, body in server.asked] == [[query], [document]]
    assert {body["model"] for _, body in server.asked} == {model}
    assert embedder.dimension == (super(type(embedder._model), embedder._model).dimension or 7)


def test_a_folder_s_own_prompts_are_used(server, prompt_folder):
    embedder = RemoteEmbedder(prompt_folder, endpoint=server.address)
    server.embed = lambda texts: np.ones((len(texts), 32))
    embedder.embed_queries(["x"])
    embedder.embed_documents(["x"])
    assert [body["input"] for _, body in server.asked] == [["query: x"], ["passage: x"]]


def test_normalize_false_gives_the_server_s_own_vectors(server):
    assert plain(server, normalize=False).embed_documents(["abc"]).tolist() == [[1.0, 3.0]]
    np.testing.assert_allclose(
        plain(server).embed_documents(["abc"]), [[0.1**0.5, 0.9**0.5]], atol=1e-7
    )


@pytest.mark.parametrize("dialect", ["tei", "infinity"])
@pytest.mark.parametrize("normalize", [True, False])
async def test_scores_are_those_of_plain_transformers(
    call, server, reranker_folder, reranker, reference_score, dialect, normalize
):
    server.dialect = dialect
    reranker = RemoteReranker(reranker_folder, endpoint=server.address, normalize=normalize)
    scores = await call(reranker, "score", QUERY, PASSAGES)
    pairs = [(QUERY, passage) for passage in PASSAGES]
    expected = reference_score(reranker_folder, pairs, normalize=normalize)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    ranked = await call(reranker, "rank", QUERY, PASSAGES)
    assert [found.index for found in ranked] == np.argsort(-expected, kind="stable").tolist()
    assert {type(found.score) for found in ranked} == {float}
    best = await call(reranker, "rank", QUERY, PASSAGES, top_n=2, score_threshold=ranked[1].score)
    assert best == ranked[:2]
    # One request in both words, one on the other scale, and from then on one word.
    other = {"tei": "documents", "infinity": "texts"}[dialect]
    assert [other in body for _, body in server.asked] == [True, True, False, False, False]


async def test_pairs_are_asked_a_query_at_a_time(call, server, reranker):
    pairs = [("b", "1"), ("a", "1"), ("b", "22"), ("a", "1"), ("b", "333")]
    server.logits = lambda asked: [len(query + passage) + ord(query[0]) for query, passage in asked]
    reranker._normalize = False
    scores = await call(reranker, "score_pairs", pairs)
    assert scores.tolist() == [100.0, 99.0, 101.0, 99.0, 102.0]
    assert [len(body["texts"]) for _, body in server.asked[2:]] == [3, 1]


def test_where_the_sigmoid_is_1_the_logit_still_ranks(server, reranker):
    server.logits = lambda pairs: [float(len(passage)) for _, passage in pairs]
    ranked = reranker.rank("q", ["x" * 40, "x" * 60, "x" * 50])
    assert ranked == [Ranked(1, 1.0), Ranked(2, 1.0), Ranked(0, 1.0)]


async def test_0_1_and_n_items_take_the_same_path(call, server, embedder, reranker):
    assert (await call(embedder, "embed_documents", [])).shape == (0, 32)
    assert (await call(reranker, "rank", "q", [])) == []
    assert server.asked == []
    for count in (1, 32, 33, 100):
        server.reset()
        texts = [f"{number:05}" for number in range(count)]
        server.embed = lambda asked: [[1.0, float(text)] for text in asked]
        vectors = await call(plain(server, normalize=False), "embed_documents", texts)
        assert vectors[:, 1].tolist() == [float(number) for number in range(count)]
        sizes = [len(body["input"]) for _, body in server.asked]
        assert (sum(sizes), max(sizes)) == (count, min(count, 32))
        server.logits = lambda pairs: [float(f"0{passage.strip('b')}") for _, passage in pairs]
        ranked = await call(reranker, "rank", "q", texts)
        assert [found.index for found in ranked] == list(range(count))[::-1]


def test_a_batch_of_long_texts_stays_below_the_size_that_a_server_takes(server):
    plain(server).embed_documents([f"{number}" + "文" * 100_000 for number in range(5)])
    assert sorted(len(body["input"]) for _, body in server.asked) == [1, 2, 2]


# Many at once.


def test_a_few_requests_are_on_their_way_at_a_time(server):
    server.delay = 0.05
    plain(server).embed_documents([str(number) for number in range(32 * 9)])
    assert server.most_at_once == 4


async def test_threads_and_event_loops_share_one_object(server):
    with plain(server, normalize=False) as embedder:

        def of_its_own(number):
            return asyncio.run(embedder.aembed_queries(["x" * number]))[0, 1]

        with ThreadPoolExecutor(8) as pool:
            loops = list(pool.map(of_its_own, range(1, 25)))
            threads = list(
                pool.map(lambda n: embedder.embed_queries(["x" * n])[0, 1], range(1, 25))
            )
        tasks = await asyncio.gather(*(embedder.aembed_queries(["x" * n]) for n in range(1, 25)))
    assert loops == threads == [vectors[0, 1] for vectors in tasks] == list(range(1, 25))


async def test_the_event_loop_goes_on_meanwhile(server):
    server.delay = 0.2
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.005)

    counting = asyncio.create_task(count())
    await plain(server).aembed_documents(["a"])
    counting.cancel()
    assert turns > 10


async def test_cancelling_a_task_gives_up_its_request(server):
    server.delay = 30
    embedder = plain(server)
    task = asyncio.create_task(embedder.aembed_documents(["a"]))
    await asyncio.to_thread(server.wait_for_a_request)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    server.delay = 0
    assert (await embedder.aembed_documents(["a"])).shape == (1, 2)


async def test_close_wakes_those_who_wait(server, call):
    server.delay = 30
    embedder = plain(server)

    def close():
        server.wait_for_a_request()
        embedder.close()

    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(ClosedError, match="was closed before"):
        await call(embedder, "embed_documents", ["a"])
    closing.join()
    with pytest.raises(ClosedError, match="is closed"):
        await call(embedder, "embed_documents", ["a"])
    embedder.close()


def test_a_pickle_has_the_configuration(server, embedder, reranker):
    before = embedder.embed_queries(["cat"])
    reranker.rank("q", ["p"])
    for made in (embedder, reranker):
        copy = pickle.loads(pickle.dumps(made))
        assert (copy.fingerprint, copy.endpoint) == (made.fingerprint, server.address)
    assert len(pickle.dumps(embedder)) < 1500
    assert (pickle.loads(pickle.dumps(embedder)).embed_queries(["cat"]) == before).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_asks_on_connections_of_its_own(server):
    embedder = plain(server, normalize=False)
    embedder.embed_documents(["a"])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(embedder.embed_documents(["abcd"]).tolist()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "[[1.0, 4.0]]"
    assert embedder.embed_documents(["ab"]).tolist() == [[1.0, 2.0]]


def test_a_process_that_closes_nothing_ends_in_silence(server):
    code = (
        "from bge_core import RemoteEmbedder\n"
        f"kept = RemoteEmbedder('acme/encoder', endpoint={server.address!r})\n"
        "print(kept.embed_documents(['abc']).shape)\n"
        "lost = RemoteEmbedder('acme/encoder', endpoint=kept.endpoint)\n"
        "lost.embed_documents(['abc'])\n"
        "del lost\n"
        "import sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    # -X dev makes asyncio tell what took a while.
    said = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert (done.stdout, said) == ("(1, 2)\n[]\n", [])


# When the server fails.


@pytest.mark.parametrize(
    "fault",
    [
        drop,
        answer(429, {"error": "overloaded"}),
        answer(503, b"down"),
        answer(502, b""),
        answer(504, b""),
    ],
)
async def test_what_may_pass_is_tried_again(call, server, fault):
    server.faults = [fault] * 3
    assert (await call(plain(server), "embed_documents", ["a"])).shape == (1, 2)
    assert len(server.asked) == 4
    server.faults = [fault] * 9
    with pytest.raises(EndpointError, match="4 times"):
        await call(plain(server), "embed_documents", ["a"])
    assert len(server.asked) == 8


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 424, 500, 301])
def test_what_will_not_pass_is_not_tried_again(server, status):
    server.faults = [answer(status, {"error": "why\n it failed", "error_type": "x"})]
    with pytest.raises(EndpointError) as caught:
        plain(server).embed_documents(["a"])
    said = str(caught.value)
    assert said.startswith(f"{server.address}/embeddings answered {status} ")
    assert "'why it failed'" in said
    assert said.endswith((".", ")."))
    assert len(server.asked) == 1


@pytest.mark.parametrize("seconds", ["1", "date"])
def test_the_server_s_own_time_is_waited_for(server, seconds):
    if seconds == "date":
        seconds = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    server.faults = [answer(429, {}, retry_after=seconds)]
    started = time.monotonic()
    plain(server).embed_documents(["a"])
    assert 0.7 < time.monotonic() - started < 5


def test_a_wait_without_end_is_refused_at_once(server):
    server.faults = [answer(503, {}, retry_after="3600")]
    with pytest.raises(EndpointError, match=r"503.* and asks for 3600 seconds"):
        plain(server).embed_documents(["a"])
    assert len(server.asked) == 1


def test_an_odd_time_to_wait_is_none(server):
    server.faults = [answer(503, {}, retry_after="soon")]
    plain(server).embed_documents(["a"])


async def test_nobody_listens(call, monkeypatch):
    embedder = RemoteEmbedder("BAAI/bge-m3", endpoint=f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("bge_core.servers.http._BACKOFF", (0.01,))
    with pytest.raises(EndpointError, match="Start the server") as caught:
        await call(embedder, "embed_documents", ["a"])
    assert isinstance(caught.value, ConnectionError)
    assert "can't be reached (ConnectError" in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://a..b", "http://" + "a" * 300])
def test_a_name_that_no_host_can_have(endpoint, monkeypatch):
    monkeypatch.setattr("bge_core.servers.http._BACKOFF", ())
    with pytest.raises(EndpointError, match="can't be"):
        RemoteEmbedder("BAAI/bge-m3", endpoint=endpoint).embed_queries(["a"])


@pytest.mark.parametrize("drips", [False, True])
async def test_a_slow_answer_has_an_end(call, server, drips):
    server.delay = 30
    server.faults = [drip] if drips else []
    with pytest.raises(EndpointError, match=r"no answer within 0.2 seconds.*timeout="):
        await call(plain(server, timeout=0.2), "embed_documents", ["a"])
    assert len(server.asked) == 1


def test_one_failure_stops_the_rest_of_a_call(server):
    server.faults = [answer(500, {"error": "out of memory"})]
    server.delay = 0.05
    with pytest.raises(EndpointError, match="out of memory"):
        plain(server).embed_documents([str(number) for number in range(32 * 50)])
    time.sleep(0.2)
    assert len(server.asked) < 10


def test_a_batch_limit_below_ours_is_a_sentence(server):
    message = {"error": "batch size 32 > maximum allowed batch size 8", "error_type": "Validation"}
    server.faults = [answer(413, message)]
    with pytest.raises(EndpointError, match=r"allowed batch size 8'.*--max-client-batch-size"):
        plain(server).embed_documents(["a"])


# When it talks nonsense.


def entries(*numbers, **more):
    return {"data": [{"index": index, "embedding": [1.0, 2.0]} | more for index in numbers]}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            b"<html><body><h1>Welcome to\nnginx!</h1></body></html>",
            "no JSON but text/html, 'Welcome to nginx!'",
        ),
        (b"", "no JSON"),
        (b"\xff\xfe{", "no JSON"),
        ([], "no list of results"),
        ({}, "no list of results"),
        ({"data": None}, "no list of results"),
        ({"data": {}}, "no list of results"),
        (entries(0), "1 result for 2 texts"),
        (entries(0, 1, 2), "index is 2 of 2 texts"),
        (entries(0, -1), "index is -1 of 2"),
        (entries(0, 0), "index 0 is there twice"),
        (entries(0, None), "index is None"),
        (entries(0, True), "index is True"),
        (entries(0, "1"), "index is '1'"),
        ({"data": [1, 2]}, "index is None"),
        (entries(0, 1, embedding=None), "no list of numbers but None"),
        (entries(0, 1, embedding="AACAPwAAAEA="), "no list of numbers but 'AACA"),
        (entries(0, 1, embedding=[1.0, None]), r"no list of numbers but \[1.0, None"),
        (entries(0, 1, embedding=[[1.0], [2.0]]), "no list of numbers but"),
        (entries(0, 1, embedding=[1.0, True]), "no list of numbers but"),
        (entries(0, 1, embedding=[10**400]), "no list of numbers but"),
        (entries(0, 1, embedding=[]), "a vector of 0 numbers"),
        ({"data": [*entries(0)["data"], {"index": 1, "embedding": [1.0]}]}, "vector of 1 numbers"),
    ],
)
def test_an_answer_that_can_t_be_used_is_a_sentence(server, body, said):
    server.faults = [answer(200, body)]
    with pytest.raises(EndpointError, match=said):
        plain(server).embed_documents(["a", "b"])
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "number", [float("nan"), float("inf"), 1e300], ids=["NaN", "infinity", "overflow"]
)
def test_what_is_no_finite_number_is_refused(server, number):
    server.embed = lambda texts: [[1.0, number if text == "b" else 0.0] for text in texts]
    with pytest.raises(ComputationError, match=r"infinity for texts\[1\].*float32"):
        plain(server).embed_documents(["a", "b"])
    server.logits = lambda pairs: [number if passage == "p1" else 0.0 for _, passage in pairs]
    reranker = RemoteReranker("BAAI/bge-reranker-base", endpoint=server.address)
    with pytest.raises(ComputationError, match="infinity for passage 1"):
        reranker.rank("q", ["p0", "p1"])


def test_a_dimension_that_changes_is_refused(server):
    embedder = plain(server)
    assert (embedder.embed_documents(["a"]).shape, embedder.dimension) == ((1, 2), 2)
    server.embed = lambda texts: np.ones((len(texts), 3))
    with pytest.raises(EndpointError, match="vector of 3 numbers"):
        embedder.embed_documents(["a"])


def test_another_model_than_the_named_one_is_refused(server):
    embedder = RemoteEmbedder("BAAI/bge-base-en-v1.5", endpoint=server.address)
    with pytest.raises(EndpointError, match="vector of 2 numbers, and those of 'BAAI/bge-base-en"):
        embedder.embed_queries(["a"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"results": [{"index": 0, "relevance_score": "0.5"}]}, "passage 0 is no number but '0.5'"),
        ([{"index": 0, "score": None}], "passage 0 is no number but None"),
        ([{"index": 1, "score": 0.5}], "index is 1 of 1 texts"),
        ([], "0 results for 1 text"),
        ("scores", "no list of results"),
        ({"rank": []}, "no list of results"),
    ],
)
def test_ranks_that_can_t_be_used_are_a_sentence(server, reranker, body, said):
    server.faults = [answer(200, body)]
    with pytest.raises(EndpointError, match=said):
        reranker.rank("q", ["p"])


@pytest.mark.parametrize("dialect", ["tei", "infinity"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_server_without_raw_scores_has_no_known_scale(server, dialect, normalize):
    server.dialect, server.honours_raw_scores = dialect, False
    options = {"endpoint": server.address, "normalize": normalize}
    reranker = RemoteReranker("BAAI/bge-reranker-base", **options)
    with pytest.raises(EndpointError, match="no logit and its sigmoid"):
        reranker.rank("q", ["p"])


# Secrets.


def test_the_token_goes_to_the_server_and_nowhere_else(server, caplog):
    caplog.set_level(logging.DEBUG)
    server.api_key = SECRET
    embedder = plain(server, api_key=SECRET)
    embedder.embed_documents(["a"])
    server.faults = [answer(403, {"error": f"token {SECRET} may not"})]
    with pytest.raises(EndpointError, match=r"token \*\*\* may not"):
        embedder.embed_documents(["b"])
    with pytest.raises(EndpointError, match=r"401 Unauthorized.*api_key="):
        plain(server, api_key="another").embed_documents(["a"])
    with pytest.raises(EndpointError, match=r"401 Unauthorized.*api_key="):
        plain(server).embed_documents(["a"])
    assert SECRET not in caplog.text + repr(embedder) + repr(vars(embedder))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"endpoint": "localhost:8080"}, ArgumentError, "no address"),
        ({"endpoint": "ftp://host"}, ArgumentError, "no address"),
        ({"endpoint": "http://"}, ArgumentError, "no address"),
        ({"endpoint": "http://host:99999"}, ArgumentError, "no address"),
        ({"endpoint": "http://ho st"}, ArgumentError, "no address"),
        ({"endpoint": f"http://user:{SECRET}@host"}, ArgumentError, "a password"),
        ({"endpoint": "http://host/v1/embeddings/"}, ArgumentError, "ends with /embeddings"),
        ({"endpoint": f"http://{SECRET}@host"}, ArgumentError, "a password"),
        ({"endpoint": f"http://host?key={SECRET}"}, ArgumentError, "a query"),
        ({"endpoint": f"http://host/#{SECRET}"}, ArgumentError, "a fragment"),
        ({"endpoint": 8080}, InputTypeError, "a str, got int"),
        ({"api_key": ""}, ArgumentError, "api_key is empty"),
        ({"api_key": f"{SECRET}\nX: y"}, ArgumentError, "api_key is empty, or"),
        ({"api_key": f"{SECRET}é"}, ArgumentError, "api_key is empty, or"),
        ({"api_key": 7}, InputTypeError, "api_key must be a str"),
        ({"timeout": 0}, ArgumentError, "above 0"),
        ({"timeout": float("nan")}, ArgumentError, "above 0"),
        ({"timeout": "60"}, InputTypeError, "number of seconds"),
        ({"model": "BAAI/bge-reranker-base"}, CheckpointError, "is a reranker"),
        ({"model": "./bge-m3"}, CheckpointError, "no folder on this machine"),
        ({"model": "~/bge-m3"}, CheckpointError, "no folder on this machine"),
        ({"model": "C:\\\\bge-m3"}, CheckpointError, "no folder on this machine"),
        ({"model": ""}, CheckpointError, "no folder on this machine"),
        ({"model": "models\\bge-m3"}, CheckpointError, "no folder on this machine"),
        ({"model": "bge\nm3"}, CheckpointError, "no folder on this machine"),
        ({"model": "x" * 5000}, CheckpointError, "has 5000 characters"),
        ({"model": 7}, InputTypeError, "got int"),
        ({"model": "bge-reranker-v2-m3"}, CheckpointError, "is a reranker"),
        ({"served_model_name": " "}, ArgumentError, "served_model_name is empty"),
        ({"served_model_name": 7}, InputTypeError, "served_model_name must be a str"),
        ({"endpoint_batch_size": 0}, ArgumentError, "endpoint_batch_size must be 1 or more"),
        ({"endpoint_batch_size": 8.0}, InputTypeError, "a whole number of texts or None"),
        ({"endpoint_batch_size": True}, InputTypeError, "a whole number of texts or None"),
        ({"task": "qa"}, ArgumentError, "is for BAAI/llm-embedder only"),
        ({"query_instruction": 1}, InputTypeError, "query_instruction must be a str"),
    ],
)
def test_a_wrong_argument_is_a_sentence_at_once(options, error, said):
    options = {"model": "BAAI/bge-m3", "endpoint": "http://host", **options}
    with pytest.raises(error, match=said) as caught:
        RemoteEmbedder(**options)
    assert isinstance(caught.value, BGEError)
    assert SECRET not in str(caught.value)


def test_a_folder_of_the_other_kind_is_refused(en_folder, reranker_folder):
    with pytest.raises(CheckpointError, match="is an embedding model"):
        RemoteReranker(en_folder, endpoint="http://host")
    with pytest.raises(CheckpointError, match="is a reranker"):
        RemoteEmbedder(reranker_folder, endpoint="http://host")
    with pytest.raises(CheckpointError, match="a language model that is asked a question"):
        RemoteReranker("BAAI/bge-reranker-v2-gemma", endpoint="http://host")


async def test_wrong_input_is_refused_as_ever(call, embedder, reranker):
    with pytest.raises(InputTypeError, match="put it in a list"):
        await call(embedder, "embed_documents", "text")
    with pytest.raises(ArgumentError, match="top_n must be 1 or more"):
        await call(reranker, "rank", "q", ["p"], top_n=0)
    with pytest.raises(ArgumentError, match="can't be reached: scores go from 0 to 1"):
        await call(reranker, "rank", "q", ["p"], score_threshold=2)


# The choice.


@pytest.mark.parametrize("make", [make_embedder, make_reranker, make_scorer])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "cpu"),
        ("dtype", "float16"),
        ("use_fp16", False),
        ("max_length", 512),
        ("batch_tokens", 100),
        ("on_truncation", "error"),
        ("backend", "auto"),
        ("cache_folder", "cache"),
        ("revision", "main"),
        ("local_files_only", True),
        ("trust_remote_code", True),
        ("token", SECRET),
    ],
)
def test_what_is_the_server_s_business_is_refused(make, name, value):
    model = "BAAI/bge-m3" if make is make_embedder else "BAAI/bge-reranker-base"
    with pytest.raises(ArgumentError, match=f"^{name} can't be set with endpoint=") as caught:
        make(model, endpoint="http://host", **{name: value})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("make", [make_embedder, make_reranker, make_scorer])
@pytest.mark.parametrize("options", [{"api_key": SECRET}, {"timeout": 3}])
def test_a_server_s_arguments_need_a_server(make, options):
    model = "BAAI/bge-m3" if make is make_embedder else "BAAI/bge-reranker-base"
    with pytest.raises(ArgumentError, match=f"^{next(iter(options))} is for a server") as caught:
        make(model, **options)
    assert SECRET not in str(caught.value)
    with pytest.raises(ArgumentError, match="is for a server"):
        make_scorer("BAAI/bge-m3", **options)


def test_pooling_and_m3_weights_are_refused_with_a_server():
    with pytest.raises(ArgumentError, match=r"^pooling can't be set"):
        make_embedder("BAAI/bge-m3", endpoint="http://host", pooling="cls")
    with pytest.raises(ArgumentError, match="three scores that no server"):
        make_scorer("BAAI/bge-m3", endpoint="http://host")
    with pytest.raises(ArgumentError, match="m3_weights is for"):
        make_scorer("BAAI/bge-reranker-base", endpoint="http://host", m3_weights={"dense": 1.0})


def test_a_fingerprint_says_what_is_known(en_folder, copy_of):
    def of(model="BAAI/bge-m3", endpoint="http://a", **options):
        return RemoteEmbedder(model, endpoint=endpoint, **options).fingerprint

    assert of() == of(endpoint="http://b", timeout=3, api_key="k")
    assert (
        len({of(), of(query_instruction="q: "), of(normalize=False), of("BAAI/bge-small-en")}) == 4
    )
    assert of(en_folder) == of(copy_of(en_folder)) != make_embedder(en_folder).fingerprint


# The server's names and limits.


@pytest.mark.parametrize(
    ("model", "query"),
    [
        ("bge-m3", "x"),
        ("bge-m3:latest", "x"),
        ("BGE-M3:567m", "x"),
        ("bge-large-zh-v1.5", "为这个句子生成表示以用于检索相关文章：x"),
        ("bge-small-en-v1.5:f16", f"{INSTRUCTION}x"),
        ("mirror/acme/bge-small-en-v1.5", f"{INSTRUCTION}x"),
        ("my encoder (v2)", "x"),
    ],
)
async def test_a_server_s_own_name_is_sent_as_it_is(call, server, model, query):
    server.names = {model}
    embedder = RemoteEmbedder(model, endpoint=server.address)
    server.embed = lambda texts: np.ones((len(texts), embedder._model.width or 7))
    await call(embedder, "embed_queries", ["x"])
    assert server.asked[0][1]["input"] == [query]
    made = make_embedder(model, endpoint=server.address)
    assert (made.fingerprint, made.model) == (embedder.fingerprint, model)
    pickle.loads(pickle.dumps(made)).embed_queries(["x"])


@pytest.mark.parametrize("model", ["bge-reranker-v2-m3", "bge-reranker-base:latest", "ranker"])
async def test_a_reranker_s_own_name_is_sent_as_it_is(call, server, model):
    server.names = {model}
    for make in (RemoteReranker, make_reranker, make_scorer):
        ranked = await call(make(model, endpoint=server.address), "rank", "q", ["p", "pp"])
        assert [found.index for found in ranked] == [1, 0]


@pytest.mark.parametrize("model", ["BAAI/bge-m3", "bge-m3"])
def test_a_served_model_name_goes_before_the_id(server, model):
    server.names = {"m3-fp8 @ eu"}
    options = {"endpoint": server.address, "served_model_name": "m3-fp8 @ eu"}
    embedder = make_embedder(model, **options)
    server.embed = lambda texts: np.ones((len(texts), 1024))
    assert embedder.embed_queries(["x"]).shape == (1, 1024)
    assert embedder.fingerprint != make_embedder(model, endpoint=server.address).fingerprint
    reranker = make_reranker("BAAI/bge-reranker-base", **options)
    assert pickle.loads(pickle.dumps(reranker)).rank("q", ["p"]) == reranker.rank("q", ["p"])
    with pytest.raises(EndpointError, match=r"404 Not Found.*does not exist.*served_model_name="):
        RemoteEmbedder(model, endpoint=server.address).embed_queries(["x"])


def test_without_a_server_a_bare_name_is_no_id(server):
    for make, name in ((make_embedder, "bge-m3"), (make_scorer, "bge-reranker-v2-m3")):
        with pytest.raises(CheckpointError, match=f"did you mean 'BAAI/{name}'"):
            make(name)
        for argument in ({"served_model_name": "x"}, {"endpoint_batch_size": 4}):
            with pytest.raises(ArgumentError, match=f"^{next(iter(argument))} is for a server"):
                make(f"BAAI/{name}", **argument)
    for name in ("bge-m3", "bge-m3:latest"):
        with pytest.raises(ArgumentError, match="three scores that no server"):
            make_scorer(name, endpoint=server.address)


def named(status, text):
    return lambda given, limit: (status, text.format(given=given, limit=limit).encode())


@pytest.mark.parametrize(
    ("refusal", "info", "sizes"),
    [
        (tei_refusal, None, [32, 8]),
        (lambda given, limit: (422, tei_refusal(given, limit)[1]), None, [32, 8]),
        (
            lambda given, limit: (422, {"message": tei_refusal(given, limit)[1]["error"]}),
            None,
            [32, 8],
        ),
        (infinity_refusal, None, [32, 8]),
        (named(413, "Payload too large"), {"max_client_batch_size": 8}, [32, 8]),
        (named(422, "no"), {"max_client_batch_size": 8}, [32, 8]),
        (named(413, "<h1>413 Request Entity Too Large</h1>"), None, [32, 16, 8]),
        (named(422, "batch is too large"), {"max_client_batch_size": "8"}, [32, 16, 8]),
        (named(413, ""), {"max_client_batch_size": 10**6}, [32, 16, 8]),
        (named(400, "batch size {given} exceeds the limit {limit}"), None, [32, 16, 8]),
        (named(400, "input has too many items: {limit} are allowed"), None, [32, 16, 8]),
    ],
)
async def test_a_smaller_batch_limit_is_learnt_once(call, server, refusal, info, sizes):
    server.batch_limit, server.refusal, server.info = 8, refusal, info
    texts = [f"{number:02}" for number in range(32)]
    server.embed = lambda asked: [[1.0, float(text)] for text in asked]
    embedder = plain(server, normalize=False)
    for _ in range(2):
        vectors = await call(embedder, "embed_documents", texts)
        assert vectors[:, 1].tolist() == list(map(float, range(32)))
    refused = [len(body["input"]) for _, body in server.asked if len(body["input"]) > 8]
    assert refused == sizes[:-1] or set(refused) == set(sizes[:-1])
    assert sum(len(body["input"]) == 8 for _, body in server.asked) == 8
    assert refused.count(32) == 1
    server.asked.clear()
    reranker = RemoteReranker("BAAI/bge-reranker-base", endpoint=server.address, normalize=False)
    server.logits = lambda pairs: [float(f"0{passage.strip('b')}") for _, passage in pairs]
    scores = await call(reranker, "score", "q", texts)
    assert scores.tolist() == list(map(float, range(32)))


def test_a_limit_is_learnt_by_all_requests_on_their_way(server):
    server.batch_limit = 5
    server.embed = lambda asked: [[1.0, float(text)] for text in asked]
    texts = [str(number) for number in range(200)]
    vectors = plain(server, normalize=False).embed_documents(texts)
    assert vectors[:, 1].tolist() == list(map(float, range(200)))
    assert sum(len(body["input"]) > 5 for _, body in server.asked) <= 4


@pytest.mark.parametrize("limit", [0, 32, 64])
def test_a_limit_that_is_none_is_no_reason_to_go_on(server, limit):
    message = {"error": f"batch size 32 > maximum allowed batch size {limit}"}
    server.batch_limit, server.refusal = 8, lambda given, most: (422, message)
    with pytest.raises(EndpointError, match=r"422 .*endpoint_batch_size="):
        plain(server).embed_documents([str(number) for number in range(32)])
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("said", ["inputs must have less than 512 tokens", "at most 512 tokens"])
def test_what_is_wrong_with_a_text_is_not_met_with_less_of_it(server, status, said):
    server.faults = [answer(status, {"error": f"{said}. Given: 900"})]
    with pytest.raises(EndpointError, match=said):
        plain(server).embed_documents([str(number) for number in range(32)])
    assert len(server.asked) == 1


def test_endpoint_batch_size_is_kept_to(server):
    server.batch_limit = 3
    texts = [str(number) for number in range(10)]
    plain(server, endpoint_batch_size=3).embed_documents(texts)
    assert sorted(len(body["input"]) for _, body in server.asked) == [1, 3, 3, 3]
    server.asked.clear()
    reranker = make_scorer("BAAI/bge-reranker-base", endpoint=server.address, endpoint_batch_size=3)
    pickle.loads(pickle.dumps(reranker)).rank("q", texts)
    # Requests run side by side: their order at the server is chance.
    assert sorted(len(body["texts"]) for _, body in server.asked[2:]) == [1, 3, 3, 3]
    server.reset()
    server.batch_limit = 100
    plain(server, endpoint_batch_size=64).embed_documents([str(number) for number in range(100)])
    assert sorted(len(body["input"]) for _, body in server.asked) == [36, 64]


def test_an_empty_vector_is_refused_and_forgotten(server):
    embedder = plain(server)
    server.embed = lambda texts: np.empty((len(texts), 0))
    with pytest.raises(EndpointError, match="a vector of 0 numbers"):
        embedder.embed_documents(["x"])
    server.embed = lambda texts: np.ones((len(texts), 3))
    assert embedder.embed_documents(["x"]).shape == (1, 3)


def test_a_server_is_told_a_folder_s_name_and_not_where_it_is(server, unknown_folder, en_folder):
    for folder, name in ((unknown_folder, unknown_folder.name), (en_folder, EN_ID)):
        server.asked.clear()
        with RemoteEmbedder(folder, endpoint=server.address, query_instruction="") as embedder:
            server.embed = lambda texts: np.ones((len(texts), embedder.dimension))
            embedder.embed_queries(["x"])
        assert [body["model"] for _, body in server.asked] == [name]


EN_ID = "BAAI/bge-small-en-v1.5"
