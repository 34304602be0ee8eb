"""What comes over the wire: floods, bombs, nonsense, the environment. Each ends in a sentence."""

import asyncio
import functools
import gzip
import json
import pickle
import threading
import traceback
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from bge_core import BGEError, EndpointError, RemoteEmbedder, RemoteReranker
from bge_core.servers import http
from tests.servers import answer, respond, running_raw

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

KEY = "s3cret-t0ken_9f"
GOOD = json.dumps({"data": [{"index": 0, "embedding": [3.0, 4.0]}]}).encode()


@pytest.fixture
def raw(monkeypatch):
    monkeypatch.setattr("bge_core.servers.http._BACKOFF", (0.01, 0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_raw() as server:
        yield server


def plain(server, **options):
    options = {"query_instruction": "", "timeout": 5, **options}
    return RemoteEmbedder("acme/encoder", endpoint=server.address, **options)


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def said(embedder):
    """Give the sentence of a failure, and all of its traceback."""
    with pytest.raises(EndpointError) as caught:
        embedder.embed_documents(["a"])
    shown = "".join(traceback.format_exception(caught.value))
    assert len(str(caught.value)) < 2000
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), EndpointError)
    return str(caught.value), shown


# Many at once.


async def test_waiting_for_a_turn_is_outside_of_the_time_limit(server, monkeypatch):
    monkeypatch.setattr(http, "_AT_ONCE", 2)
    server.delay = 0.1
    embedder = plain(server, timeout=0.9, normalize=False)
    found = await asyncio.gather(*(embedder.aembed_queries(["x" * n]) for n in range(1, 31)))
    assert [vectors[0, 1] for vectors in found] == list(range(1, 31))
    assert server.most_at_once == 2


async def test_of_a_burst_s_connections_a_few_are_kept(server, monkeypatch):
    monkeypatch.setattr(http, "_KEPT_ALIVE", 3)
    server.delay = 0.1
    embedder = plain(server)
    for _ in range(2):
        await asyncio.gather(*(embedder.aembed_queries(["x" * n]) for n in range(1, 31)))
    assert server.most_at_once > 10
    connections = embedder._model.endpoint._connections
    assert len(connections._idle) == 3
    embedder.close()
    await asyncio.sleep(0.1)
    assert connections._idle == []


async def test_cancelled_requests_give_their_turn_back(server, monkeypatch):
    monkeypatch.setattr(http, "_AT_ONCE", 2)
    embedder = plain(server)
    await embedder.aembed_queries(["warm"])
    server.delay = 30
    tasks = [asyncio.create_task(embedder.aembed_queries(["a" * n])) for n in range(1, 9)]
    await asyncio.to_thread(server.wait_for_a_request)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    server.delay = 0
    found = await asyncio.gather(*(embedder.aembed_queries(["a" * n]) for n in range(1, 9)))
    assert len(found) == 8


@pytest.mark.parametrize("opened", [False, True])
async def test_a_request_can_be_cancelled_at_any_step(server, opened):
    async def ask(endpoint):
        body = {"model": "acme/encoder", "input": ["a"]}
        return await endpoint.post("/embeddings", body, read=lambda answer: answer, largest=10_000)

    async def cancel_and_ask_again(steps):
        endpoint = http.Endpoint(server.address, api_key=None, timeout=2)
        if opened:
            await ask(endpoint)
        task = asyncio.ensure_future(ask(endpoint))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await ask(endpoint)
        endpoint.close()

    loop = http._loop_thread.loop()
    before = descriptors()
    for steps in range(60):
        future = asyncio.run_coroutine_threadsafe(cancel_and_ask_again(steps), loop)
        await asyncio.wrap_future(future)
    await asyncio.sleep(0.1)
    assert descriptors() <= before + 5


# Too much.


def chunks(piece):
    yield respond(b"", headers=[b"Transfer-Encoding: chunked"], length=False)
    while True:
        yield b"%x\r\n%s\r\n" % (len(piece), piece)


def endless_numbers(body):
    yield respond(b'{"data": [{"index": 0, "embedding": [', length=False)
    while True:
        yield b"0.25," * 1000


@functools.cache
def packed(pack):
    return pack(b'{"data": [' + b" " * (100 << 20))


def bomb(pack, name):
    return [respond(packed(pack), headers=[b"Content-Encoding: " + name])]


FLOODS = {
    "chunked": lambda body: chunks(b" " * 1000),
    "chunks of a byte": lambda body: chunks(b"["),
    "numbers": endless_numbers,
    "gzip": lambda body: bomb(gzip.compress, b"gzip"),
    "deflate": lambda body: bomb(zlib.compress, b"deflate"),
    "a gigabyte to come": lambda body: [
        respond(b"[" * (1 << 20), headers=[b"Content-Length: 1000000000"], length=False)
    ],
    "headers": lambda body: [b"HTTP/1.1 200 OK\r\n", *(b"X-%d: y\r\n" % n for n in range(30_000))],
    "one header": lambda body: [b"HTTP/1.1 200 OK\r\nX: ", *[b"y" * 1000] * 1000],
    "a failure": lambda body: [
        respond(b"", status=b"500 Oh", length=False),
        *[b"<b>no</b> " * 1000] * 1000,
    ],
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_is_refused_and_others_don_t_notice(raw, server, flood):
    raw.reply = FLOODS[flood]
    raw.reply(b"")  # what it packs is packed before memory is counted
    healthy = plain(server, normalize=False)
    tracemalloc.start()
    try:
        flooded = asyncio.create_task(plain(raw, timeout=30).aembed_documents(["a"]))
        while not flooded.done():
            assert (await healthy.aembed_documents(["abc"])).tolist() == [[1.0, 3.0]]
        with pytest.raises(EndpointError):
            await flooded
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 30 << 20


def test_a_rerank_flood_is_refused(raw):
    raw.reply = lambda body: chunks(b'{"index": 0, "score": 0.25},' * 100)
    with pytest.raises(EndpointError, match="longer than"):
        RemoteReranker("BAAI/bge-reranker-base", endpoint=raw.address).rank("q", ["p"])


def test_what_is_asked_for_is_never_too_much(raw):
    width = 8192
    vector = [-1.2345678901234567e-100] * width

    def reply(body):
        count = len(json.loads(body)["input"])
        data = [{"index": index, "embedding": vector} for index in range(count)]
        yield respond(json.dumps({"data": data}, indent=4).encode())

    raw.reply = reply
    texts = [str(number) for number in range(32)]
    found = plain(raw, normalize=False, timeout=60).embed_documents(texts)
    assert found.shape == (32, width)


@pytest.mark.parametrize(
    ("pack", "name"),
    [
        (gzip.compress, b"gzip"),
        (gzip.compress, b"x-gzip"),
        (zlib.compress, b"deflate"),
        (functools.partial(zlib.compress, wbits=-15), b"deflate"),
        (bytes, b"identity"),
    ],
)
def test_packed_answers_are_unpacked(raw, pack, name):
    raw.reply = lambda body: [respond(pack(GOOD), headers=[b"Content-Encoding: " + name])]
    assert plain(raw, normalize=False).embed_documents(["a"]).tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize(
    ("name", "body", "why"),
    [
        (b"br", GOOD, "its content-encoding is 'br'"),
        (
            b"gzip, gzip",
            gzip.compress(gzip.compress(GOOD, mtime=0), mtime=0),
            "its content-encoding is 'gzip, gzip'",
        ),
        (b"gzip", GOOD, "no JSON"),
        (b"gzip", gzip.compress(GOOD, mtime=0)[:-9], "in the middle of what is packed"),
        (b"deflate", b"", "in the middle of what is packed"),
    ],
)
def test_what_can_t_be_unpacked_is_a_sentence(raw, name, body, why):
    raw.reply = lambda _: [respond(body, headers=[b"Content-Encoding: " + name])]
    assert why in said(plain(raw))[0]


# Secrets.

ECHOES = {
    "reason": lambda key: respond(b"{}", status=b"401 no such token " + key),
    "reason of success": lambda key: respond(b"x", status=b"200 token " + key),
    "split by a tag": lambda key: respond(
        b"<p>" + key[:4] + b"<br/>" + key[4:] + b"</p>", status=b"403 no"
    ),
    "letter by letter": lambda key: respond(
        b"".join(b"<i>%c</i>\n" % letter for letter in key), status=b"403 no"
    ),
    "as entities": lambda key: respond(
        b"".join(b"&#%d;" % letter for letter in key), status=b"403 no"
    ),
    "in capitals": lambda key: respond(b"token " + key.upper(), status=b"403 no"),
    "behind zeroes": lambda key: respond(b"token " + b"\0".join([key[:3], key[3:]])),
    "in JSON": lambda key: respond(b'{"error": {"message": ["%s"]}}' % key, status=b"400 no"),
    "in JSON, escaped": lambda key: respond(
        b'{"detail": "%s"}' % b"".join(b"\\u%04x" % letter for letter in key), status=b"400 no"
    ),
    "as an index": lambda key: respond(b'{"data": [{"index": "%s"}]}' % key),
    "as a long index": lambda key: respond(b'{"data": [{"index": "%s%s"}]}' % (b"x" * 50, key)),
    "as a vector": lambda key: respond(b'{"data": [{"index": 0, "embedding": ["%s"]}]}' % key),
    "as a type": lambda key: respond(b"", headers=[b"Content-Type: text/" + key]),
    "as a packing": lambda key: respond(b"", headers=[b"Content-Encoding: " + key]),
    "as a status line": lambda key: b"HTTP/1.1 " + key + b"\r\n\r\n",
    "as a header": lambda key: b"HTTP/1.1 200 OK\r\n" + key + b"\r\n\r\n",
    "as a protocol": lambda key: key + b" 200 OK\r\n\r\n",
    "as a length": lambda key: respond(b"", headers=[b"Content-Length: " + key], length=False),
    "as a time": lambda key: respond(b"", status=b"503 No", headers=[b"Retry-After: " + key]),
    "at the end of much": lambda key: respond(b"x" * 190 + key, status=b"500 No"),
    "often": lambda key: respond(key * 500, status=b"500 No"),
}


@pytest.mark.parametrize("echo", ECHOES)
def test_a_token_that_the_server_says_is_not_shown(raw, echo, caplog):
    raw.reply = lambda body: [ECHOES[echo](KEY.encode())]
    sentence, shown = said(plain(raw, api_key=KEY))
    squeezed = "".join(letter for letter in shown.casefold() if letter.isalnum())
    for hidden in (KEY, KEY[:9], KEY[-9:]):
        assert hidden not in shown
        assert hidden not in caplog.text
    assert "s3crett0ken9f" not in squeezed
    assert sentence.startswith(raw.address)


def test_a_sentence_has_an_end_and_keeps_its_hint(raw):
    raw.reply = lambda body: [respond(b"y" * 10_000, status=b"500 " + b"x" * 10_000)]
    sentence = said(plain(raw))[0]
    assert len(sentence) < 700
    assert sentence.endswith("... Look at the server's log.") or "Look at the server's" in sentence


# Nonsense.


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b'{"data":' * 100_000,
        b'{"data": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"data": [{"index": 0, "embedding": ' + b"[" * 500 + b"]" * 500 + b"}]}",
        b'{"data": [{"index": 0, "embedding": [1' + b"0" * 5000 + b"]}]}",
        b'{"data": [{"index": 1' + b"0" * 4000 + b', "embedding": [1]}]}',
        b'{"data": [{"index": 0, "embedding": ["1", "2"]}]}',
        b'{"data": [{"index": 0.0, "embedding": [1, 2]}]}',
        b'{"data": [{"index": -0, "embedding": {"0": 1}}]}',
        b'{"data": [[0, [1, 2]]]}',
        b'{"data": "' + b"x" * 100_000 + b'"}',
        b"\xff\xfe\x00",
        b'\xef\xbb\xbf"x"',
        b"\x00" * 1000,
        b"NaN",
        b"1e999999",
        b"null",
        b"",
    ],
    ids=lambda body: repr(body[:24]),
)
@pytest.mark.parametrize("status", [b"200 OK", b"500 No", b"422 No", b"299 Odd"])
def test_nonsense_is_a_sentence(raw, body, status):
    raw.reply = lambda _: [respond(body, status=status)]
    said(plain(raw))
    with pytest.raises(BGEError):
        RemoteReranker("BAAI/bge-reranker-base", endpoint=raw.address).rank("q", ["p"])


@pytest.mark.parametrize(
    "value",
    [
        "Wed, 21 Oct 99999999999999999999 07:28:00 GMT",
        "Wed, 21 Oct 9999 07:28:00 -9999",
        "Wed, 31 Feb 2030 25:61:61 GMT",
        "Fri, 31 Dec 9999 23:59:59 -2359",
        "Mon, 01 Jan 0001 00:00:00 +2359",
        "9" * 400,
        "-5",
        "1e5",
        "inf",
        "nan",
        "²",
        ",",
        "(((",
        "",
        "Wed",
        "0x10",
    ],
)
def test_an_absurd_time_to_wait_is_a_sentence_or_none(server, value):
    server.faults = [answer(503, {}, retry_after=value.encode().decode("latin-1"))] * 4
    with pytest.raises(EndpointError, match="503"):
        plain(server).embed_documents(["a"])


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"\r\n\r\n",
        b"HTTP/1.1",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 000 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n{}",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x16\x03\x01\x02\x00" * 20,
        b"<html></html>",
        respond(GOOD, headers=[b"Content-Length: 7"], length=False),
        respond(GOOD, headers=[b"Content-Length: -7"], length=False),
        respond(GOOD, headers=[b"Content-Length: 7", b"Content-Length: 8"], length=False),
        respond(GOOD[:20], headers=[b"Content-Length: 1000"], length=False),
        respond(b"zz\r\n", headers=[b"Transfer-Encoding: chunked"], length=False),
        respond(b"ffffffffffffffffffff\r\n", headers=[b"Transfer-Encoding: chunked"], length=False),
        respond(b"5\r\n{", headers=[b"Transfer-Encoding: chunked"], length=False),
        respond(GOOD, headers=[b"Transfer-Encoding: nonsense"], length=False),
        respond(GOOD, headers=[b"X\x00: y"]),
        respond(GOOD, status=b"302 Found", headers=[b"Location: \xff\xfe"]),
        respond(GOOD, status=b"301 Moved", headers=[b"Location: http://[::1"]),
        respond(GOOD, status=b"407 Proxy Authentication Required"),
    ],
    ids=lambda reply: repr(reply[:32]),
)
@pytest.mark.parametrize("ending", ["closes", "resets"])
def test_what_is_no_answer_is_a_sentence(raw, reply, ending):
    raw.reply, raw.resets = (lambda body: [reply]), ending == "resets"
    said(plain(raw))


def test_a_server_that_stops_in_the_middle_has_an_end(raw):
    raw.keeps = True
    raw.reply = lambda body: [respond(GOOD[:9], headers=[b"Content-Length: 99"], length=False), 9.0]
    assert "no answer within 0.3 seconds" in said(plain(raw, timeout=0.3))[0]


@pytest.mark.parametrize("more", [b"x", b"garbage\r\n\r\n", b"\xff" * 1000])
def test_what_follows_an_answer_does_not_spoil_the_next(raw, more):
    raw.keeps = True
    raw.reply = lambda body: [respond(GOOD) + more]
    embedder = plain(raw, normalize=False)
    for text in ("a", "b", "c"):
        assert embedder.embed_documents([text]).tolist() == [[3.0, 4.0]]


# The environment.

PROXIES = [
    "socks5://127.0.0.1:9",
    "127.0.0.1:99999",
    "socks5h://user:pass@127.0.0.1:9",
    "garbage://x",
    "http://[::1",
    "http://host:port",
    "http://host:99999",
    "http://\x7f",
    "http://" + "a" * 300,
    "http://a..b:1",
    "://",
    "http://",
    f"http://user:{KEY}@[",
    f"nonsense://user:{KEY}@host",
]


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY", "http_proxy"])
def test_a_proxy_that_is_none_is_a_sentence(raw, monkeypatch, name, proxy):
    for other in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, proxy)
    raw.reply = lambda body: [respond(GOOD)]
    sentence, shown = said(plain(raw))
    assert KEY not in shown
    assert "pass@" not in shown
    assert "TaskGroup" not in sentence
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1,::1,[,http://[::1,*.x,,")
    assert plain(raw, normalize=False).embed_documents(["a"]).tolist() == [[3.0, 4.0]]


def test_a_proxy_is_asked_in_the_server_s_place(raw, monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("HTTP_PROXY", raw.address.removeprefix("http://"))
    raw.reply = lambda body: [respond(GOOD)]
    embedder = RemoteEmbedder("acme/encoder", endpoint="http://far.away", query_instruction="")
    np.testing.assert_allclose(embedder.embed_queries(["a"]), [[0.6, 0.8]], atol=1e-7)
    assert raw.asked == 1


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_certificates_that_are_none_are_a_sentence(raw, monkeypatch, tmp_path, name):
    monkeypatch.setattr(http, "_CONNECT_SECONDS", 0.2)
    (tmp_path / "odd.pem").write_text("-----BEGIN CERTIFICATE-----\nnonsense\n")
    monkeypatch.setenv(name, str(tmp_path / "odd.pem"))
    secure = RemoteEmbedder("acme/encoder", endpoint=raw.address.replace("http", "https"))
    said(secure)
    monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    assert "SSL_CERT_FILE" in said(secure)[0] or name == "SSL_CERT_DIR"
    # An address without TLS needs none.
    raw.reply = lambda body: [respond(GOOD)]
    assert plain(raw).embed_documents(["a"]).shape == (1, 2)


def test_tls_to_a_server_without_it_is_a_sentence(raw, monkeypatch):
    monkeypatch.setattr(http, "_CONNECT_SECONDS", 0.2)
    raw.reply = lambda body: [respond(GOOD)]
    said(RemoteEmbedder("acme/encoder", endpoint=raw.address.replace("http", "https")))


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://" + "x" * 64,
        "http://a_b..",
        "http://-",
        "http://١٢٣.١",
        "http://xn--a",
        "http://[::]:1",
    ],
)
def test_an_odd_host_is_a_sentence(endpoint, monkeypatch):
    monkeypatch.setattr(http, "_BACKOFF", ())
    with pytest.raises(BGEError):
        RemoteEmbedder("acme/encoder", endpoint=endpoint, timeout=3).embed_queries(["a"])


@pytest.mark.parametrize("what", ["loop", "thread"])
def test_a_start_that_fails_leaves_nothing_behind(server, monkeypatch, what):
    monkeypatch.setattr(http, "_loop_thread", http._LoopThread())

    def fail(*arguments, **options):
        raise OSError(24, "Too many open files") if what == "loop" else RuntimeError("can't start")

    before = descriptors(), threading.active_count()
    with monkeypatch.context() as patched:
        if what == "loop":
            patched.setattr(asyncio, "new_event_loop", fail)
        else:
            patched.setattr(threading.Thread, "start", fail)
        embedder = plain(server)
        for _ in range(20):
            with pytest.raises(EndpointError, match="no room for another thread"):
                embedder.embed_documents(["a"])
    assert descriptors() <= before[0]
    assert threading.active_count() <= before[1]
    assert embedder.embed_documents(["a"]).shape == (1, 2)
    embedder.close()


def test_failures_leave_no_connection_open(raw):
    raw.reply = lambda body: [respond(b"nonsense", status=b"500 No")]
    embedder = plain(raw)
    said(embedder)
    before = descriptors()
    for _ in range(30):
        said(embedder)
    assert descriptors() <= before + 2
