"""A small server on loopback that speaks as text-embeddings-inference or Infinity do.

It computes with plain transformers, and fails, drags or talks nonsense when told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import socketserver
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

Send = Callable[[dict[str, Any]], Awaitable[None]]
Fault = Callable[[Send], Awaitable[None]]


class Server:
    """What the server does, and what it was asked.

    Attributes:
        embed: Texts -> vectors.
        logits: (query, passage) pairs -> logits.
        dialect: "tei" or "infinity".
        api_key: The token that it wants; None for none.
        prefix: What its paths begin with.
        honours_raw_scores: Whether it knows the flag; without, it gives sigmoids.
        faults: What it does with the next requests in place of answering.
        edit: Changes an answer before it goes out.
        delay: Seconds before each answer.
        batch_limit: Texts or passages that a request may have.
        refusal: What it says to more of them: (given, limit) -> a status and a body.
        info: What `/info` says; None for a server without it.
        info_asked: How often `/info` was asked for.
        names: Names of models that it knows; None for any.
        asked: (path, body) of each request, in order.
        headers: The headers of the last request.
        most_at_once: Requests that it had at a time, at most.
    """

    def __init__(self) -> None:
        self.address = ""
        self.reset()

    def reset(self) -> None:
        self.embed: Callable[[Sequence[str]], Any] = lambda texts: [
            [1.0, float(len(t))] for t in texts
        ]
        self.logits: Callable[[Sequence[tuple[str, str]]], Any] = lambda pairs: [
            float(len(passage) - 10) for _, passage in pairs
        ]
        self.dialect = "tei"
        self.api_key: str | None = None
        self.prefix = ""
        self.honours_raw_scores = True
        self.faults: list[Fault] = []
        self.edit: Callable[[Any], Any] = lambda answer: answer
        self.delay = 0.0
        self.batch_limit = 32
        self.refusal: Callable[[int, int], tuple[int, Any]] = tei_refusal
        self.info: dict[str, Any] | None = None
        self.info_asked = 0
        self.names: set[str] | None = None
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: dict[str, str] = {}
        self.at_once = self.most_at_once = 0

    def wait_for_a_request(self) -> None:
        """Return when a request is being answered."""
        for _ in range(1000):
            if self.at_once:
                return
            time.sleep(0.01)
        raise TimeoutError

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["method"] == "GET":
            self.info_asked += 1
            status = 404 if scope["path"] != "/info" or self.info is None else 200
            await answer(status, self.info or {})(send)
            return
        self.asked.append((scope["path"], json.loads(body)))
        if self.faults:
            await self.faults.pop(0)(send)
            return
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.delay)
            status, found = self._answer(scope["path"], json.loads(body))
        finally:
            self.at_once -= 1
        await answer(status, found if status != 200 else self.edit(found))(send)

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.api_key and self.headers.get("authorization") != f"Bearer {self.api_key}":
            return 401, {"detail": "Unauthorized"}
        if self.names is not None and body["model"] not in self.names:
            return 404, {"error": {"message": f"The model {body['model']!r} does not exist."}}
        items = body.get("input") or body.get("texts") or body.get("documents") or []
        if len(items) > self.batch_limit:
            return self.refusal(len(items), self.batch_limit)
        if path == f"{self.prefix}/embeddings":
            return self._embeddings(body["input"])
        if path == f"{self.prefix}/rerank":
            return self._rerank(body)
        return 404, {"detail": "Not Found"}

    def _embeddings(self, texts: list[str]) -> tuple[int, Any]:
        vectors = [[float(number) for number in vector] for vector in self.embed(texts)]
        data = [{"index": at, "embedding": vector} for at, vector in enumerate(vectors)]
        # Nobody promises an order.
        return 200, {"object": "list", "data": data[::-1], "model": "served"}

    def _rerank(self, body: dict[str, Any]) -> tuple[int, Any]:
        tei = self.dialect == "tei"
        word, name = ("texts", "score") if tei else ("documents", "relevance_score")
        if word not in body:
            return 422, {"detail": [{"type": "missing", "loc": ["body", word]}]}
        import numpy as np

        logits = np.array(self.logits([(body["query"], passage) for passage in body[word]]))
        raw = body["raw_scores"] and self.honours_raw_scores
        scores = logits if raw else 1 / (1 + np.exp(-logits))
        ranks = [{"index": int(at), name: float(scores[at])} for at in np.argsort(-scores)]
        return 200, ranks if tei else {"results": ranks}


def tei_refusal(given: int, limit: int) -> tuple[int, Any]:
    """Refuse a batch as text-embeddings-inference does."""
    return 413, {
        "error": f"batch size {given} > maximum allowed batch size {limit}",
        "error_type": "Validation",
    }


def infinity_refusal(given: int, limit: int) -> tuple[int, Any]:
    """Refuse a batch as Infinity's pydantic models do."""
    said = f"List should have at most {limit} items after validation, not {given}"
    entry = {"type": "too_long", "loc": ["body", "input"], "msg": said, "input": ["x"] * given}
    return 422, {"detail": [entry]}


def answer(status: int, body: Any, **headers: str) -> Fault:
    """Answer this: bytes as they are, anything else as JSON."""
    raw = isinstance(body, bytes)
    content = body if raw else json.dumps(body).encode()
    kind = "text/html" if raw else "application/json"
    given = {"content-type": kind, **{name.replace("_", "-"): v for name, v in headers.items()}}

    async def respond(send: Send) -> None:
        pairs = [(name.encode(), value.encode()) for name, value in given.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": content})

    return respond


async def drop(send: Send) -> None:
    """Close the connection in the middle of an answer."""
    length = [(b"content-length", b"1000")]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": b"{", "more_body": True})


async def drip(send: Send) -> None:
    """Send a byte now and then, for ever."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    with contextlib.suppress(OSError):
        for _ in range(200):
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.05)
    await send({"type": "http.response.body", "body": b""})


def free_port() -> int:
    """Give a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(app: Server) -> Iterator[Server]:
    """Serve on loopback in a thread of its own."""
    import uvicorn

    port = free_port()
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="critical",
    )
    served = uvicorn.Server(config)
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    for _ in range(500):
        if served.started:
            break
        thread.join(0.01)
    assert served.started
    app.address = f"http://127.0.0.1:{port}"
    try:
        yield app
    finally:
        served.should_exit = served.force_exit = True
        thread.join(10)
        assert not thread.is_alive()


class RawServer:
    """A server on loopback that reads requests and answers with bytes as they are.

    Attributes:
        reply: The request's body -> the parts of the answer, as long as the client takes them; a
            number is a pause in seconds.
        keeps: Whether the connection stays open for a next request.
        resets: Whether it ends with a reset.
        asked: How many requests there were.
    """

    def __init__(self) -> None:
        self.reply: Callable[[bytes], Iterable[bytes | float]] = lambda body: []
        self.keeps = self.resets = False
        self.asked = 0
        self.address = ""

    def serve(self, connection: socket.socket) -> None:
        """Answer the requests of one connection."""
        with contextlib.suppress(OSError), connection.makefile("rb") as incoming:
            while incoming.readline():
                length = 0
                while (line := incoming.readline()) not in (b"\r\n", b""):
                    name, _, value = line.partition(b":")
                    if name.lower() == b"content-length":
                        length = int(value)
                body = incoming.read(length)
                self.asked += 1
                for part in self.reply(body):
                    if isinstance(part, bytes):
                        connection.sendall(part)
                    else:
                        time.sleep(part)
                if self.resets:
                    linger = (1).to_bytes(4, "little") + bytes(4)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                if not self.keeps or self.resets:
                    return


@contextlib.contextmanager
def running_raw() -> Iterator[RawServer]:
    """Serve bytes on loopback, each connection in a thread of its own."""
    raw = RawServer()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            raw.serve(self.request)

    class Listener(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 128

        def shutdown_request(self, request: Any) -> None:
            request.close()  # a reset is to be one

    with Listener(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        raw.address = f"http://127.0.0.1:{listener.server_address[1]}"
        try:
            yield raw
        finally:
            listener.shutdown()
            thread.join(10)


def respond(
    body: bytes, *, status: bytes = b"200 OK", headers: Sequence[bytes] = (), length: bool = True
) -> bytes:
    """Write an answer out, with headers as they are given."""
    lines = [b"HTTP/1.1 " + status, b"Content-Type: application/json", *headers]
    if length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])
