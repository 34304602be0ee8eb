"""A server's address, and how it is asked: one event loop, time limits, retries, sentences."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import ssl
import threading
import weakref
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from bge_core import arguments
from bge_core.engine.process import on_fork
from bge_core.errors import ArgumentError, EndpointError, InputTypeError
from bge_core.servers.answers import (
    ERROR_BYTES,
    Answer,
    mask,
    plain_line,
    retry_after,
    short_repr,
)
from bge_core.servers.protocols import UnreadableAnswerError, error_message, hint_for

if TYPE_CHECKING:
    from concurrent.futures import Future

    import httpx

__all__ = ["Endpoint", "StatusError"]

T = TypeVar("T")

_CONNECT_SECONDS = 5.0
# Seconds before the second, third and fourth try, where the server names no time itself.
_BACKOFF = (0.5, 1.0, 2.0)
_LONGEST_WAIT = 30.0
# Overloaded, or a proxy whose server is away. Of the rest a repetition changes nothing.
_RETRYABLE = (429, 502, 503, 504)
# Requests that a server has at a time; the others wait for their turn, outside of their time
# limit. text-embeddings-inference takes 512.
_AT_ONCE = 256
# Of the connections of a burst, so many are kept open for the next requests.
_KEPT_ALIVE = 20
# What a chunk counts at least: each takes its time, however small it is.
_LEAST_BYTES = 64
# An answer of so many bytes is read on the event loop: handing it over would take longer.
_FEW_BYTES = 1 << 15
_PROCESS_ATTRIBUTES = frozenset({"_connections", "_finalizer"})


class StatusError(EndpointError):
    """The server answered with a status that says no, and a repetition changes nothing.

    Attributes:
        status: The HTTP status.
        text: The server's words, without the token.
    """

    status = 0
    text = ""


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
        self._init_process_state()

    def _init_process_state(self) -> None:
        self._connections: _Connections | None = None
        self._finalizer: Callable[[], object] | None = None
        # The parent's connections are not this process's.
        on_fork(self, Endpoint._init_process_state)

    def __getstate__(self) -> dict[str, Any]:
        """Return the configuration, without connections."""
        state = self.__dict__
        return {name: value for name, value in state.items() if name not in _PROCESS_ATTRIBUTES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a configuration."""
        self.__dict__.update(state)
        self._init_process_state()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start work that posts, on the endpoints' own event loop.

        Raises:
            EndpointError: This process can make no thread or event loop for it.
        """
        try:
            return asyncio.run_coroutine_threadsafe(work, _loop_thread.loop())
        except (OSError, RuntimeError) as exc:
            work.close()
            said = f"can't be asked ({self._named(exc)})"
            hint = "This process has no room for another thread and its files."
            raise self.failed(said, hint) from exc

    def close(self) -> None:
        """Close the connections; a later request would make new ones."""
        if self._finalizer is not None:
            self._finalizer()
        self._connections = self._finalizer = None

    async def post(
        self, path: str, body: Mapping[str, Any], *, read: Callable[[Any], T], largest: int
    ) -> T:
        """Post JSON and read the answer; a failure that may pass is met with three more tries.

        Args:
            path: What follows the address.
            body: What is asked.
            read: Makes the result of the answer's JSON, or raises `UnreadableAnswerError`.
            largest: Bytes that an answer can have, unpacked.

        Raises:
            EndpointError: The server can't be reached, fails, or gives no such answer.
        """
        content = json.dumps(body, ensure_ascii=False).encode()
        for wait in (*_BACKOFF, None):
            asked = 0.0
            cause: BaseException | None = None
            try:
                answer = await self._send("POST", path, content, largest)
            except _UnreachableError as exc:
                said, hint = exc.said, "Start the server, or correct endpoint='...'."
                cause = self._shareable(exc.cause)
            else:
                if answer.is_success:
                    return await self._read(path, answer, read, largest)
                asked = retry_after(answer.headers)
                too_long = asked > _LONGEST_WAIT
                said, hint, text = self._describe_error(answer)
                if too_long:
                    said += f", and asks for {asked:.0f} seconds"
                if answer.status not in _RETRYABLE or too_long:
                    error = StatusError(self._sentence(path, said, hint))
                    error.status, error.text = answer.status, text
                    raise error
            if wait is None:
                said += f", {len(_BACKOFF) + 1} times"
                raise self.failed(said, hint, path) from cause
            await asyncio.sleep(max(wait, asked))
        raise AssertionError  # the last turn returns or raises

    async def get(self, path: str) -> Any:
        """Get JSON of 16 KB at most, in one try.

        Raises:
            EndpointError: There is none.
        """
        try:
            answer = await self._send("GET", path, b"", ERROR_BYTES)
        except _UnreachableError as exc:
            raise self.failed(exc.said, "", path) from self._shareable(exc.cause)
        if not answer.is_success:
            said, hint, _ = self._describe_error(answer)
            raise self.failed(said, hint, path)
        return await self._read(path, answer, lambda found: found, ERROR_BYTES)

    def failed(self, said: str, hint: str, path: str = "") -> EndpointError:
        """Make the error of a failure.

        Args:
            said: What the server did.
            hint: What to do.
            path: What followed the address.
        """
        return EndpointError(self._sentence(path, said, hint))

    def malformed(self, path: str, found: str) -> EndpointError:
        """Return an error that says what is wrong with an answer of status 200."""
        hint = "Is it a text-embeddings-inference or Infinity server, with no proxy that answers?"
        return self.failed(f"gave an answer that can't be used: {found}", hint, path)

    async def _send(self, method: str, path: str, content: bytes, largest: int) -> Answer:
        """Ask once.

        Raises:
            _UnreachableError: What may pass.
            EndpointError: What will not pass.
        """
        import httpx

        try:
            async with (
                self._connected().one() as connection,  # waiting for it is not the server's time
                asyncio.timeout(self._timeout),
            ):
                request = httpx.Request(
                    method,
                    f"{self.url}{path}",
                    headers=self._headers(),
                    content=content,
                    # The whole has its time above: a server may send a byte now and then.
                    extensions={"timeout": {"connect": _CONNECT_SECONDS}},
                )
                response = await connection.handle_async_request(request)
                try:
                    return await self._collect(path, response, largest)
                finally:
                    await response.aclose()
        except EndpointError:
            raise
        except TimeoutError as exc:
            said = f"gave no answer within {self._timeout:g} seconds"
            hint = "Pass timeout=... to wait longer, or send less at a time."
            raise self.failed(said, hint, path) from exc
        except (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError) as exc:
            said = f"can't be reached ({self._named(exc)})"
            raise _UnreachableError(said, exc) from None
        # httpx hands on what sockets, ssl, idna and proxies raise, each in its own way.
        except Exception as exc:  # noqa: BLE001
            said = f"can't be used ({self._named(exc)})"
            hint = "Check the server and any proxy."
            raise self.failed(said, hint, path) from self._shareable(exc)

    def _headers(self) -> dict[str, str]:
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "gzip, deflate",
            "Content-Type": "application/json",
            "User-Agent": "bge-adapters",
        }
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        return headers

    def _connected(self) -> _Connections:
        if self._connections is None:
            self._connections = _Connections(self._transports())
            loop = asyncio.get_running_loop()
            self._finalizer = weakref.finalize(
                self, _disconnect, self._connections, loop, os.getpid()
            )
        return self._connections

    def _transports(self) -> Callable[[], httpx.AsyncHTTPTransport]:
        """Return what makes connections, each a pool of its own.

        httpx's pool looks at all of its requests and connections whenever one of them ends.

        Raises:
            EndpointError: The environment's proxy or certificates can't be used.
        """
        import httpx

        name = _proxy_of(self.url)
        try:
            # What an http server never needs isn't read.
            secure = urlsplit(self.url).scheme == "https"
            context = httpx.create_ssl_context() if secure else _no_certificates()
            proxy = None if name is None else httpx.Proxy(name)
            limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)

            def make() -> httpx.AsyncHTTPTransport:
                return httpx.AsyncHTTPTransport(verify=context, proxy=proxy, limits=limits)

            make()
        # A package that is missing, an address that is none, a file that is none.
        except Exception as exc:  # noqa: BLE001
            # An address with "@" may have a password.
            words = type(exc).__name__ if name and "@" in name else self._named(exc)
            said = f"can't be asked, as the environment says ({words})"
            hint = (
                "Correct HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE or SSL_CERT_DIR; "
                "NO_PROXY names the hosts that are asked without a proxy."
            )
            raise self.failed(said, hint) from None
        return make

    async def _collect(self, path: str, response: httpx.Response, largest: int) -> Answer:
        """Read an answer as it was sent, and no more of it than it can have.

        Raises:
            EndpointError: There is more.
        """
        body = bytearray()
        limit = largest if response.is_success else ERROR_BYTES
        left = limit
        raw = cast("AsyncGenerator[bytes, None]", response.aiter_raw())
        async with contextlib.aclosing(raw) as parts:
            async for part in parts:
                left -= max(len(part), _LEAST_BYTES)
                if left < 0 and response.is_success:
                    raise self._too_large(path, largest)
                body += part[:limit]
                if left < 0:
                    break
                # Much that came at once is no reason to keep the others waiting.
                await asyncio.sleep(0)
        return Answer(
            status=response.status_code,
            reason=response.reason_phrase,
            headers=response.headers,
            body=bytes(body),
        )

    def _too_large(self, path: str, largest: int) -> EndpointError:
        return self.malformed(path, f"it is longer than {largest:,} bytes")

    async def _read(self, path: str, answer: Answer, read: Callable[[Any], T], largest: int) -> T:
        """Unpack and read an answer, off the event loop unless it is short.

        Raises:
            EndpointError: It is no JSON, or not what was asked for.
        """

        def work() -> T:
            return read(json.loads(answer.unpacked(largest)))

        try:
            if len(answer.body) <= _FEW_BYTES and not answer.encoding:
                return work()
            return await asyncio.get_running_loop().run_in_executor(_loop_thread.readers, work)
        except OverflowError:
            raise self._too_large(path, largest) from None
        except UnreadableAnswerError as exc:
            found = exc.found.replace("{}", self._shown(short_repr(exc.value), 60))
            raise self.malformed(path, found) from None
        # What json says of nonsense, at its worst: ([[[[..., 10**5000, bytes of no encoding.
        except (ValueError, RecursionError, MemoryError, zlib.error):
            kind = self._shown(answer.headers.get("content-type", "no content type"))
            found = f"no JSON but {kind}, {self._shown(answer.text())!r}"
            raise self.malformed(path, found) from None

    def _describe_error(self, answer: Answer) -> tuple[str, str, str]:
        """Return what a failure is, what to do, and all of the server's words."""
        text = answer.text()
        message: Any = text
        with contextlib.suppress(ValueError, RecursionError):
            message = error_message(json.loads(text))
        words = message if isinstance(message, str) else short_repr(message) if message else ""
        reason = self._shown(answer.reason, 60)
        said = f"answered {answer.status} {reason}".rstrip()
        if words.strip():
            said += f", {self._shown(words)!r}"
        redirects = answer.status in (301, 302, 303, 307, 308)
        hint = (
            "Write the address that it redirects to as endpoint='...'."
            if redirects
            else hint_for(answer.status)
        )
        return said, hint, self._masked(text)

    def _sentence(self, path: str, said: str, hint: str) -> str:
        said = self._masked(f"{self.url}{path} {said}")
        return self._masked(f"{said[:1000]}. {hint}".rstrip())

    def _shown(self, found: object, limit: int = 200) -> str:
        """Make what came from outside short and plain, without tags and without the token."""
        text = self._masked(plain_line(found))
        return text if len(text) <= limit else f"{text[:limit]}..."

    def _named(self, exc: BaseException) -> str:
        while isinstance(exc, BaseExceptionGroup):  # which says no more than that there are some
            exc = exc.exceptions[0]
        words = self._shown(exc)
        return f"{type(exc).__name__}: {words}" if words else type(exc).__name__

    def _masked(self, text: str) -> str:
        return text if self._api_key is None else mask(text, self._api_key)

    def _shareable(self, exc: BaseException) -> BaseException | None:
        """Return a cause that a traceback may show: one without the token."""
        text = str(exc)
        return exc if self._masked(text) == text else None


class _UnreachableError(Exception):
    """A failure that may pass."""

    def __init__(self, said: str, cause: BaseException) -> None:
        super().__init__(said)
        self.said = said
        self.cause = cause


class _Connections:
    """The connections to one server: a request has one for itself, and waits for its turn."""

    def __init__(self, make: Callable[[], httpx.AsyncHTTPTransport]) -> None:
        self._make = make
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._idle: list[httpx.AsyncHTTPTransport] = []
        self._closed = False

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[httpx.AsyncHTTPTransport]:
        async with self._turns:
            # The last one that was used is the least likely to be closed on the other side.
            connection = self._idle.pop() if self._idle else self._make()
            # Only one that answered is kept: of a request that was cancelled at the moment when
            # its connection opened, httpcore holds the connection busy for ever.
            kept = False
            try:
                yield connection
                kept = len(self._idle) < _KEPT_ALIVE or self._turns.locked()
            finally:
                if kept and not self._closed:
                    self._idle.append(connection)
                else:
                    await connection.aclose()

    async def aclose(self) -> None:
        self._closed = True
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.aclose()


class _LoopThread:
    """The event loop of this process's requests, and the threads that read long answers."""

    def __init__(self) -> None:
        self.after_fork()

    def after_fork(self) -> None:
        """Drop the parent's loop and threads, which are not in this process."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        # Of its own: the loop's other threads may all wait for names to be resolved.
        self.readers = ThreadPoolExecutor(2, thread_name_prefix="bge-endpoint-reader")

    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                try:
                    name = "bge-endpoint"
                    threading.Thread(target=loop.run_forever, name=name, daemon=True).start()
                except BaseException:
                    loop.close()
                    raise
                self._loop = loop
            return self._loop


_loop_thread = _LoopThread()
on_fork(_loop_thread, _LoopThread.after_fork)


def _disconnect(connections: _Connections, loop: asyncio.AbstractEventLoop, process: int) -> None:
    if process == os.getpid() and not loop.is_closed():
        asyncio.run_coroutine_threadsafe(connections.aclose(), loop)


def _no_certificates() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _proxy_of(url: str) -> str | None:
    """Find the proxy that the environment names for an address."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc) or proxy_bypass(parts.hostname or ""):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


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
        msg = f"timeout must be a number of seconds above 0, got {arguments.shown(timeout)}."
        raise ArgumentError(msg)
    return seconds
