"""A server's address, and how it is asked: one event loop, timeouts, a few retries, sentences."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from bge_core import arguments
from bge_core.engine.process import on_fork
from bge_core.errors import ArgumentError, EndpointError, InputTypeError

if TYPE_CHECKING:
    from concurrent.futures import Future

    import httpx

__all__ = ["Endpoint"]

T = TypeVar("T")

_CONNECT_SECONDS = 5.0
# Seconds before the second, third and fourth try, where the server names no time itself.
_WAITS = (0.5, 1.0, 2.0)
_LONGEST_WAIT = 30.0
# Overloaded, or a proxy whose server is away. Of the rest a repetition changes nothing.
_PASSING = (429, 502, 503, 504)
_OF_A_PROCESS = frozenset({"_client", "_let_go"})

_HINTS = {
    400: "If it serves several models, one of them must go by the name that model= gives.",
    401: "Pass the server's token as api_key='...'.",
    403: "Pass a token that may ask for this as api_key='...'.",
    404: (
        "The path is endpoint=... and what follows it here: leave /v1 out where the server has "
        "none, and make sure that it serves a model of this kind."
    ),
    413: (
        "At most 32 texts are sent at a time: raise the server's limit "
        "(--max-client-batch-size, --payload-limit), or let it cut long texts (--auto-truncate)."
    ),
    422: (
        "At most 32 texts are sent at a time: raise the server's limit "
        "(--max-client-batch-size), or let it cut long texts (--auto-truncate)."
    ),
    424: "Its model failed, or is of another kind: look at the server's log.",
    429: "It is overloaded: send less at a time, or give it more capacity.",
}


class Endpoint:
    """A text-embeddings-inference or Infinity server, or what answers like one.

    Requests of all endpoints run on one event loop in a thread of its own, so that sync callers
    and any number of event loops share connections. Connections are made at first use, and anew
    after a fork and in a copy.

    Args:
        url: Its address, such as `"http://localhost:8080"`, without a password or a query.
        api_key: A bearer token; None for a server without one. In no message and no repr.
        timeout: Seconds to wait for one answer; None for 60.

    Raises:
        ArgumentError: An address, a token or a time that can't be meant.
        InputTypeError: One of them of the wrong type.
    """

    def __init__(self, url: str, *, api_key: str | None, timeout: float | None) -> None:
        self.url = _checked_url(url)
        self._api_key = None if api_key is None else arguments.secret("api_key", api_key)
        self._timeout = _checked_timeout(timeout)
        self._start()

    def _start(self) -> None:
        self._client: httpx.AsyncClient | None = None
        self._let_go: Callable[[], object] | None = None
        on_fork(self, Endpoint._start)  # the parent's connections are not this process's

    def __getstate__(self) -> dict[str, Any]:
        """Give the configuration, without connections."""
        return {name: value for name, value in self.__dict__.items() if name not in _OF_A_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a configuration."""
        self.__dict__.update(state)
        self._start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start work that posts, on the endpoints' own event loop."""
        return asyncio.run_coroutine_threadsafe(work, _home.loop())

    def close(self) -> None:
        """Give up the connections; a later request would make new ones."""
        if self._let_go is not None:
            self._let_go()
        self._client = self._let_go = None

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Post JSON and give the answer; a failure that may pass is met with three more tries.

        Args:
            path: What follows the address.
            body: What is asked.

        Raises:
            EndpointError: The server can't be reached, fails, or gives no JSON.
        """
        import httpx

        content = json.dumps(body, ensure_ascii=False).encode()
        for wait in (*_WAITS, None):
            asked, cause = 0.0, None
            try:
                async with asyncio.timeout(self._timeout):
                    response = await self._connected().post(f"{self.url}{path}", content=content)
            except TimeoutError as exc:
                said = f"gave no answer within {self._timeout:g} seconds"
                hint = "Pass timeout=... to wait longer, or send less at a time."
                raise self.failed(path, said, hint) from exc
            except (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError) as exc:
                said = f"can't be reached ({type(exc).__name__}: {self._short(str(exc))})"
                hint, cause = "Start the server, or correct endpoint='...'.", exc
            except (httpx.RequestError, httpx.InvalidURL) as exc:
                said = f"can't be used ({type(exc).__name__}: {self._short(str(exc))})"
                raise self.failed(path, said, "Check the server and any proxy.") from exc
            else:
                if response.is_success:
                    return self._read(path, response)
                said, hint = self._said(response)
                asked = _retry_after(response)
                if asked > _LONGEST_WAIT:
                    said += f", and asks for {asked:.0f} seconds"
                if response.status_code not in _PASSING or asked > _LONGEST_WAIT:
                    raise self.failed(path, said, hint)
            if wait is None:
                raise self.failed(path, f"{said}, {len(_WAITS) + 1} times", hint) from cause
            await asyncio.sleep(max(wait, asked))
        raise AssertionError  # the last turn returns or raises

    def failed(self, path: str, said: str, hint: str) -> EndpointError:
        """Make the sentence of a failure.

        Args:
            path: What followed the address.
            said: What the server did.
            hint: What to do.
        """
        return EndpointError(f"{self.url}{path} {said}. {hint}".rstrip())

    def malformed(self, path: str, found: str) -> EndpointError:
        """Say what is wrong with an answer that came without an error."""
        hint = "Is it a text-embeddings-inference or Infinity server, with no proxy that answers?"
        return self.failed(path, f"gave an answer that can't be used: {found}", hint)

    def _connected(self) -> httpx.AsyncClient:
        if self._client is None:
            import httpx

            headers = {"Content-Type": "application/json"}
            if self._api_key is not None:
                headers["Authorization"] = f"Bearer {self._api_key}"
            # The whole request has its time in `post`: a server may send a byte now and then.
            timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
            self._client = httpx.AsyncClient(headers=headers, timeout=timeout)
            loop = asyncio.get_running_loop()
            self._let_go = weakref.finalize(self, _disconnect, self._client, loop, os.getpid())
        return self._client

    def _read(self, path: str, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as exc:
            kind = response.headers.get("content-type", "no content type")
            found = f"no JSON but {self._short(kind)}, {self._short(response.text)!r}"
            raise self.malformed(path, found) from exc

    def _said(self, response: httpx.Response) -> tuple[str, str]:
        status = response.status_code
        message: Any = response.text
        try:
            message = response.json()
            # TEI: error, or message with an OpenAI route; Infinity: error.message, or detail.
            while isinstance(message, dict):
                named = (message.get(name) for name in ("error", "message", "detail"))
                message = next((value for value in named if value), "")
        except ValueError:
            pass
        said = f"answered {status} {response.reason_phrase}".rstrip()
        if message:
            said += f", {self._short(str(message))!r}"
        if response.is_redirect:
            return said, "Write the address that it redirects to as endpoint='...'."
        return said, _HINTS.get(status, "Look at the server's log.")

    def _short(self, text: str) -> str:
        if self._api_key is not None:
            text = text.replace(self._api_key, "***")
        text = " ".join(re.sub(r"<[^>]*>", " ", text[:4000]).split())
        return text if len(text) <= 200 else f"{text[:200]}..."


class _Home:
    """The event loop of this process's requests."""

    def __init__(self) -> None:
        self.after_fork()

    def after_fork(self) -> None:
        """Let go of the parent's loop, whose thread is not in this process."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                threading.Thread(target=loop.run_forever, name="bge-endpoint", daemon=True).start()
                self._loop = loop
            return self._loop


_home = _Home()
on_fork(_home, _Home.after_fork)


def _disconnect(client: httpx.AsyncClient, loop: asyncio.AbstractEventLoop, process: int) -> None:
    if process == os.getpid() and not loop.is_closed():
        asyncio.run_coroutine_threadsafe(client.aclose(), loop)


def _checked_url(url: object) -> str:
    if not isinstance(url, str):
        msg = f"endpoint must be a server's address, a str, got {type(url).__name__}."
        raise InputTypeError(msg)
    example = "pass one such as 'http://localhost:8080'"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    # No value in these messages: it may hold a password.
    if not usable or any(character.isspace() for character in url):
        msg = f"endpoint is no address of an http or https server: {example}."
        raise ArgumentError(msg)
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        msg = (
            "endpoint has a user name, a password, a query or a fragment, which would show up in "
            f"logs: {example}, and the token as api_key='...'."
        )
        raise ArgumentError(msg)
    if (path := parts.path.rstrip("/").rpartition("/")[2]) in ("embeddings", "rerank"):
        msg = f"endpoint ends with /{path}, which is put behind it here: leave that out."
        raise ArgumentError(msg)
    return url.rstrip("/")


def _checked_timeout(timeout: object) -> float:
    if timeout is None:
        return 60.0
    seconds = arguments.number("timeout", timeout, unit=" of seconds", instead=" or None")
    if not 0 < seconds < math.inf:
        msg = f"timeout must be a number of seconds above 0, got {timeout!r}."
        raise ArgumentError(msg)
    return seconds


def _retry_after(response: httpx.Response) -> float:
    """Read how many seconds the server asks to be left alone; 0 where it says nothing."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
