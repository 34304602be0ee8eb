"""BGE embeddings and a reranker over HTTP: one process, one model each, shared by all requests.

    pip install 'bge-adapters[service]'
    BGE_MODEL=BAAI/bge-small-en-v1.5 uvicorn --factory app:make_app --app-dir examples/service

The environment says what runs; see `Settings`. docs/service.md has the rest.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Self

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from metrics import Metrics
from numpy.typing import NDArray
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, StrictInt, WithJsonSchema
from starlette.types import ASGIApp, Receive, Scope, Send

from bge_core import (
    ArgumentError,
    BGEError,
    ClosedError,
    Embedder,
    EndpointError,
    InputTypeError,
    Scorer,
    TruncationError,
    make_embedder,
    make_reranker,
)

logger = logging.getLogger("uvicorn.error")  # which uvicorn shows

# A character has six bytes at most in JSON: \uXXXX.
_BYTES_PER_CHARACTER = 6
_LENGTH_DIGITS = 16
_STATUS = (
    ((ArgumentError, InputTypeError, TruncationError), 400),
    (ClosedError, 503),
    (EndpointError, 502),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What runs, and how much it takes at a time: `BGE_MODEL`, `BGE_RERANKER` and so on.

    Attributes:
        model: The embedder's hub id or folder.
        reranker: The reranker's; `""` for none.
        query_instruction: Put in front of queries; None for the model card's.
        device: Where both run; None for the best device.
        dtype: Their number format.
        backend: What executes them.
        most_texts: Texts, or passages, of one request.
        most_characters: Characters of one request.
        most_requests: Requests that are worked on at a time; more are sent away.
    """

    model: str = "BAAI/bge-small-en-v1.5"
    reranker: str = "BAAI/bge-reranker-base"
    query_instruction: str | None = None
    device: str | None = None
    dtype: str = "auto"
    backend: str = "torch"
    most_texts: int = 256
    most_characters: int = 1_000_000
    most_requests: int = 512

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Read settings from the environment: each field under its name, with `BGE_` in front."""
        given: dict[str, Any] = {}
        for field in fields(cls):
            name = f"BGE_{field.name.upper()}"
            if name not in environment:
                continue
            given[field.name] = value = environment[name]
            if isinstance(field.default, int):
                if not (value.isdecimal() and int(value)):
                    msg = f"{name} must be a whole number of 1 or more, got {value!r}."
                    raise SystemExit(msg)
                given[field.name] = int(value)
        return cls(**given)


# What the core checks itself, in a sentence of its own; the schema is for the page at /docs.
Text = Annotated[Any, WithJsonSchema({"type": "string"})]
Texts = Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "string"}})]
Count = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "null"}]})]
Threshold = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]})]


class Body(BaseModel):
    """A request; a field that it doesn't have is an error, and not ignored."""

    model_config = ConfigDict(extra="forbid")


class EmbedBody(Body):
    """Texts to embed; queries get the model's instruction, documents none."""

    texts: Texts
    kind: Literal["query", "document"] = "document"


class RerankBody(Body):
    """A query and what was found for it."""

    query: Text
    passages: Texts
    top_n: Count = None
    score_threshold: Threshold = None


class OpenAIBody(Body):
    """What OpenAI's client sends; `input_type` says what its interface has no word for."""

    input: Annotated[Any, WithJsonSchema({"type": ["string", "array"]})]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    input_type: Literal["query", "document"] = "document"
    dimensions: StrictInt | None = None
    user: str | None = None


class Service:
    """The models of one process, and how much is asked of them.

    Args:
        settings: What runs.

    Raises:
        BGEError: A model that is none, or a setting that is not supported.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        where: dict[str, Any] = {
            "device": settings.device,
            "dtype": settings.dtype,
            "backend": settings.backend,
        }
        self.embedder: Embedder = make_embedder(
            settings.model, query_instruction=settings.query_instruction, **where
        )
        self._reranker = make_reranker(settings.reranker, **where) if settings.reranker else None
        models = {"embedder": self.embedder, "reranker": self._reranker}
        self.metrics = Metrics({role: model for role, model in models.items() if model})

    @property
    def reranker(self) -> Scorer:
        """The reranker, for a request that wants one."""
        if self._reranker is None:
            raise HTTPException(404, "No reranker runs here: start it with BGE_RERANKER=...")
        return self._reranker

    async def load(self) -> None:
        """Load the weights, and compute once: the first user should not wait for it."""
        await self.embedder.aembed_queries(["warm"])
        if self._reranker is not None:
            await self._reranker.ascore("warm", ["warm"])

    def close(self) -> None:
        """Release the models."""
        self.embedder.close()
        if self._reranker is not None:
            self._reranker.close()

    def check_size(self, texts: Any, query: object = "") -> None:
        """Refuse more than a request may bring; what is no text is the core's to refuse."""
        most = self.settings
        given = texts if isinstance(texts, list) else [texts]
        if len(given) > most.most_texts:
            msg = f"{len(given)} texts are more than the {most.most_texts} of one request."
            raise HTTPException(413, msg)
        characters = sum(len(text) for text in (query, *given) if isinstance(text, str))
        if characters > most.most_characters:
            msg = (
                f"{characters} characters are more than the {most.most_characters} of one request."
            )
            raise HTTPException(413, msg)

    async def embed(self, texts: Any, kind: str) -> NDArray[np.float32]:
        """Embed queries or documents; those who wait at the same time share a pass."""
        self.check_size(texts)
        if kind == "query":
            return await self.embedder.aembed_queries(texts)
        return await self.embedder.aembed_documents(texts)


def make_app(settings: Settings | None = None) -> FastAPI:
    """Make the application.

    Args:
        settings: What runs; None for what the environment says.
    """
    service = Service(settings or Settings.of(os.environ))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.load()
        try:
            yield
        finally:
            # uvicorn comes here when the running requests are answered.
            service.close()
            logger.info("The models are closed.")

    app = FastAPI(title="bge-adapters", lifespan=lifespan)
    app.add_middleware(Limits, service=service)
    app.add_exception_handler(BGEError, _refusal)
    app.add_exception_handler(RequestValidationError, _unreadable)

    @app.post("/embed")
    async def embed(body: EmbedBody) -> Response:
        """Give a vector a text, in order."""
        vectors = await service.embed(body.texts, body.kind)
        return await asyncio.to_thread(
            lambda: JSONResponse({"model": service.embedder.model, "vectors": vectors.tolist()})
        )

    @app.post("/rerank")
    async def rerank(body: RerankBody) -> Response:
        """Give the passages' places and scores, best first."""
        service.check_size(body.passages, body.query)
        ranked = await service.reranker.arank(
            body.query, body.passages, top_n=body.top_n, score_threshold=body.score_threshold
        )
        results = [{"index": found.index, "score": found.score} for found in ranked]
        return JSONResponse({"model": service.reranker.model, "results": results})

    @app.post("/v1/embeddings")
    async def openai_embeddings(body: OpenAIBody) -> Response:
        """Give what OpenAI's interface gives."""
        embedder = service.embedder
        if body.dimensions not in (None, embedder.dimension):
            msg = f"dimensions={body.dimensions}: {embedder.model!r} has {embedder.dimension}."
            raise HTTPException(400, msg)
        texts = [body.input] if isinstance(body.input, str) else body.input
        vectors = await service.embed(texts, body.input_type)
        return await asyncio.to_thread(_openai_answer, embedder, texts, vectors, body)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process lives."""
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Say that it takes requests; `Limits` says that it doesn't."""
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Give the counters in Prometheus's text form."""
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


class Limits:
    """Counts the requests, and sends those away that are too large or too many.

    A queue that only grows answers everybody too late: who is sent away can ask another process.

    Args:
        app: What answers the rest.
        service: The models, their settings and metrics.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._metrics = service.metrics
        self._most = service.settings.most_requests
        self._most_bytes = service.settings.most_characters * _BYTES_PER_CHARACTER

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        busy = self._metrics.in_progress >= self._most
        with self._metrics.request(scope["path"]) as seen:

            async def counted(message: Any) -> None:
                if message["type"] == "http.response.start":
                    seen.status = message["status"]
                await send(message)

            app = self._refused(Request(scope), busy=busy) or self._app
            await app(scope, receive, counted)

    def _refused(self, request: Request, *, busy: bool) -> Response | None:
        if busy and request.url.path not in ("/health", "/metrics"):
            msg = f"{self._most} requests are being worked on: come again."
            return JSONResponse({"detail": msg}, 503, {"Retry-After": "1"})
        if request.method != "POST":
            return None
        length = request.headers.get("content-length", "")
        if not (length.isdecimal() and len(length) < _LENGTH_DIGITS):
            return JSONResponse({"detail": "Say the body's size, as Content-Length."}, 411)
        if int(length) > self._most_bytes:
            msg = f"{length} bytes are more than the {self._most_bytes} of one request."
            return JSONResponse({"detail": msg}, 413)
        return None


def _openai_answer(
    embedder: Embedder, texts: Sequence[str], vectors: NDArray[np.float32], body: OpenAIBody
) -> Response:
    def spelled(vector: NDArray[np.float32]) -> object:
        if body.encoding_format == "float":
            return vector.tolist()
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()

    tokens = sum(embedder.local.tokenizer().count(texts)) if embedder.is_local else 0
    return JSONResponse(
        {
            "object": "list",
            "model": embedder.model,
            "data": [
                {"object": "embedding", "index": index, "embedding": spelled(vector)}
                for index, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


async def _refusal(_: Request, error: Exception) -> Response:
    """Answer with the core's sentence: what the client did wrong, or that this is not its fault."""
    status = next((status for kinds, status in _STATUS if isinstance(error, kinds)), 500)
    return JSONResponse({"detail": _printable(str(error))}, status)


async def _unreadable(_: Request, error: Exception) -> Response:
    """Answer in a sentence; what was sent is not repeated, since it may be no valid text."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 -- it is registered for these
    said = [
        f"{'.'.join(str(part) for part in item['loc'][1:]) or 'the body'}: {item['msg']}"
        for item in error.errors()
    ]
    return JSONResponse({"detail": _printable("; ".join(said))}, 422)


def _printable(sentence: str) -> str:
    return sentence.encode("utf-8", "backslashreplace").decode()
