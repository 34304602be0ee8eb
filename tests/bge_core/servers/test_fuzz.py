"""Whatever a server answers: a right result or a `BGEError`, in bounded time and memory.

`BGE_FUZZ_EXAMPLES=10000` makes a long run of it.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bge_core import BGEError, RemoteEmbedder, RemoteReranker
from tests.servers import RawServer, running_raw

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

EXAMPLES = int(os.environ.get("BGE_FUZZ_EXAMPLES", "150"))
KEY = "s3cret-t0ken_9f"
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=timedelta(seconds=5),
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Values.

numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(),
    st.integers(-10, 10),
    st.sampled_from([10**30, -(10**400), 2**63, -(2**63), 1 << 64]),
)
odd: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, "", "1", "NaN", KEY, "x" * 5000, [], {}, [[]], [1], "0x1"]
)
anything = st.recursive(
    st.one_of(numbers, odd, st.text(max_size=20)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw the usual, and now and then anything."""
    return st.integers(0, 9).flatmap(lambda draw: anything if draw == 0 else usual)


floats = st.floats(-10, 10, width=32)
indices = mostly(st.integers(0, 1))
vectors = st.lists(mostly(floats), min_size=0, max_size=3) | st.lists(
    floats, min_size=2, max_size=2
)


def ranks(score: str) -> st.SearchStrategy[Any]:
    return _entries(st.fixed_dictionaries({"index": indices, score: mostly(floats)}))


def _entries(entry: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def in_order(found: list[Any]) -> list[Any]:
        for index, one in enumerate(found):
            if isinstance(one, dict):
                one["index"] = len(found) - 1 - index
        return found

    drawn = st.lists(mostly(entry), max_size=4)
    whole = st.lists(entry, min_size=2, max_size=2).map(in_order)
    return st.one_of(whole, drawn, drawn.map(in_order))


embeddings = mostly(
    st.fixed_dictionaries(
        {
            "data": mostly(
                _entries(st.fixed_dictionaries({"index": indices, "embedding": mostly(vectors)}))
            )
        }
    )
)
rankings = mostly(
    ranks("score") | st.fixed_dictionaries({"results": mostly(ranks("relevance_score"))})
)
right_vectors = st.lists(st.lists(floats, min_size=2, max_size=2), min_size=2, max_size=2)
right_embeddings = st.builds(
    lambda found, order: {"data": [{"index": index, "embedding": found[index]} for index in order]},
    right_vectors,
    st.permutations([0, 1]),
)
right_rankings = st.builds(
    lambda found, order, named: (
        {"results": _ranks(found, order, "relevance_score")}
        if named
        else _ranks(found, order, "score")
    ),
    st.lists(floats, min_size=2, max_size=2),
    st.permutations([0, 1]),
    st.booleans(),
)


def _ranks(scores: list[float], order: list[int], name: str) -> list[dict[str, Any]]:
    return [{"index": index, name: scores[index]} for index in order]


failures = st.one_of(
    anything,
    st.fixed_dictionaries(
        {}, optional={"error": anything, "message": anything, "detail": anything}
    ),
    st.sampled_from(
        [
            {"error": "batch size 2 > maximum allowed batch size 1"},
            {"error": f"no token {KEY}"},
            {"detail": [{"msg": "List should have at most 1 item after validation, not 2"}]},
            {"error": "maximum allowed batch size 999999999999999999999999"},
        ]
    ),
)
nests = st.sampled_from([b"[" * 20_000, b'{"data":' * 9000, b"[" * 900 + b"]" * 900])


def spelled(value: Any, style: int) -> bytes:
    """Write JSON in one of several ways, of which the last two are no UTF-8."""
    text = json.dumps(
        value, ensure_ascii=style % 2 == 0, indent=[None, None, 2, 9, None, None][style]
    )
    if style == 4:
        return text.encode("utf-16")
    return text.encode("latin-1", "replace") if style == 5 else text.encode(errors="replace")


def written(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    json_bytes = st.builds(spelled, values, st.integers(0, 5))
    return st.one_of(json_bytes, json_bytes, json_bytes, nests, st.binary(max_size=200))


# Answers.

packings: dict[bytes, Callable[[bytes], bytes]] = {
    b"gzip": gzip.compress,
    b"deflate": zlib.compress,
    b"identity": bytes,
    b"br": bytes,
    b"gzip, gzip": lambda body: gzip.compress(gzip.compress(body)),
}
versions = st.sampled_from([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/2", b"ICY", b""])
reasons = st.sampled_from([b"", b"OK", b"\xff\xfe", b"x" * 9000, KEY.encode()])
codes = st.sampled_from(
    [
        200,
        201,
        204,
        206,
        299,
        100,
        101,
        301,
        304,
        400,
        401,
        403,
        404,
        413,
        422,
        424,
        429,
        500,
        502,
        503,
        504,
        599,
        999,
        0,
        -1,
        99999,
    ]
)
statuses = st.builds(
    lambda version, code, reason: b"%s %d %s" % (version, code, reason), versions, codes, reasons
)
header_values = st.sampled_from(
    [
        b"",
        b"0",
        b"-1",
        b"9" * 400,
        b"close",
        b"keep-alive",
        b"\xff\xfe",
        b"x" * 9000,
        KEY.encode(),
        b"Wed, 21 Oct 99999999999999999999 07:28:00 GMT",
        b"text/html; charset=nonsense",
        b"chunked",
        b"http://[::1",
        b"gzip",
    ]
) | st.binary(max_size=12)
header_names = st.sampled_from(
    [
        b"Retry-After",
        b"Content-Type",
        b"Connection",
        b"Location",
        b"Set-Cookie",
        b"Transfer-Encoding",
        b"Content-Length",
        b"Content-Encoding",
        b"Date",
        b"Upgrade",
        b"Trailer",
        b"X y",
        b"",
    ]
)


@st.composite
def answers(
    draw: st.DrawFn, right: st.SearchStrategy[Any], bodies: st.SearchStrategy[bytes]
) -> tuple[bytes, bytes | None]:
    """Draw an answer as it is sent, with one thing wrong, or all, or nothing.

    Returns:
        The bytes, and the body where that is what a reader can come to.
    """
    wrong = draw(
        st.sampled_from(["body", "body", "status", "headers", "packing", "framing", "cut"])
    )
    wrong = draw(st.sampled_from([wrong, wrong, wrong, wrong, "nothing", "all"]))

    def is_wrong(what: str) -> bool:
        return wrong in (what, "all")

    body = draw(bodies) if is_wrong("body") else spelled(draw(right), draw(st.integers(0, 3)))
    status = draw(statuses) if is_wrong("status") else b"HTTP/1.1 200 OK"
    packing = draw(st.sampled_from([b"", *packings])) if is_wrong("packing") else b""
    sent = packings[packing](body) if packing else body
    lines = [status]
    if packing:
        lines.append(b"Content-Encoding: " + packing)
    if is_wrong("headers"):
        drawn = st.lists(st.tuples(header_names, header_values), min_size=1, max_size=3)
        lines += [name + b": " + value for name, value in draw(drawn)]
    framing = draw(st.sampled_from(["length", "length", "chunked", "close"]))
    if framing == "chunked":
        size = draw(st.integers(1, 64))
        lines.append(b"Transfer-Encoding: chunked")
        pieces = [sent[start : start + size] for start in range(0, len(sent), size)]
        sent = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    elif framing == "length":
        off = draw(st.sampled_from([-5, -1, 1, 5, 10**12])) if is_wrong("framing") else 0
        lines.append(b"Content-Length: %d" % (len(sent) + off))
    elif is_wrong("framing"):
        lines.append(b"Transfer-Encoding: chunked")  # and it is not
    answer = b"\r\n".join([*lines, b"", sent])
    if is_wrong("cut"):
        answer = answer[: int(len(answer) * draw(st.floats(0, 1)))]
    return answer, body if wrong in ("body", "status", "packing", "nothing") else None


def reference(body: bytes, name: str, texts: int) -> Any:
    """Read an answer in the plainest way: numpy's array, or any error."""
    answer = json.loads(body)
    entries = answer
    if isinstance(answer, dict):
        entries = answer["data"] if name == "embedding" else answer["results"]
        name = name if name == "embedding" else "relevance_score"
    by_index = {entry["index"]: entry[name] for entry in entries}
    assert len(entries) == texts
    with np.errstate(over="ignore"):
        return np.array([by_index[index] for index in range(texts)], np.float64).astype(np.float32)


@pytest.fixture(scope="module")
def raw() -> Iterator[RawServer]:
    with running_raw() as server, pytest.MonkeyPatch.context() as patched:
        patched.setattr("bge_core.servers.http._BACKOFF", (0.0, 0.0, 0.0))
        patched.setattr("bge_core.servers.http._LONGEST_WAIT", 0.0)
        patched.setenv("NO_PROXY", "127.0.0.1")
        yield server


def check(
    work: Callable[[], NDArray[np.float32]], body: bytes | None, name: str
) -> NDArray[np.float32] | None:
    """Ask, and hold what comes against the plainest reading of the answer."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failure = ""
    found = None
    try:
        found = work()
    except BGEError as exc:
        failure = "".join(traceback.format_exception(exc))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < (200 << 10 if sys.platform == "linux" else 200 << 20)
    assert KEY not in failure
    if found is not None:
        assert np.isfinite(found).all()
        if body is not None:
            np.testing.assert_array_equal(found, reference(body, name, 2))
    return found


@fuzzed
@given(
    answer=answers(right_embeddings, written(st.one_of(embeddings, embeddings, failures))),
    keeps=st.booleans(),
    resets=st.booleans(),
)
def test_any_answer_to_texts(
    raw: RawServer, answer: tuple[bytes, bytes | None], keeps: bool, resets: bool
):
    raw.reply, raw.keeps, raw.resets = (lambda body: [answer[0]]), keeps, resets
    options: dict[str, Any] = {"normalize": False, "query_instruction": "", "timeout": 0.3}
    with RemoteEmbedder("acme/encoder", endpoint=raw.address, api_key=KEY, **options) as embedder:
        check(lambda: embedder.embed_documents(["a", "b"]), answer[1], "embedding")


@fuzzed
@given(
    answer=answers(right_rankings, written(st.one_of(rankings, rankings, failures))),
    keeps=st.booleans(),
    knows=st.booleans(),
)
def test_any_answer_to_pairs(
    raw: RawServer, answer: tuple[bytes, bytes | None], keeps: bool, knows: bool
):
    def reply(body: bytes) -> list[bytes]:
        asked = json.loads(body)
        if knows and len(asked.get("texts", [])) == len(asked.get("documents", [])) == 1:
            score = 0.0 if asked["raw_scores"] else 0.5
            probe = json.dumps({"results": [{"index": 0, "relevance_score": score}]}).encode()
            if b'"score"' in answer[0]:
                probe = b'[{"index": 0, "score": %f}]' % score
            return [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(probe), probe)]
        return [answer[0]]

    raw.reply, raw.keeps, raw.resets = reply, keeps, False
    options: dict[str, Any] = {"normalize": False, "timeout": 0.3}
    with RemoteReranker("acme/ranker", endpoint=raw.address, api_key=KEY, **options) as reranker:
        check(lambda: reranker.score("q", ["a", "b"]), answer[1], "score")


@settings(max_examples=30, database=None, deadline=None)
@given(found=right_embeddings, style=st.integers(0, 3))
def test_a_right_answer_is_no_error(raw: RawServer, found: Any, style: int):
    body = spelled(found, style)
    raw.reply = lambda asked: [
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    ]
    raw.keeps = raw.resets = False
    options: dict[str, Any] = {"normalize": False, "query_instruction": ""}
    with RemoteEmbedder("acme/encoder", endpoint=raw.address, **options) as embedder:
        read = check(lambda: embedder.embed_documents(["a", "b"]), body, "embedding")
    assert read is not None
