"""A server in a model's place, and the choice between it and a model on this machine."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from bge_core.checkpoint import Checkpoint, Kind, Source, check_kind, check_profile, locate, read
from bge_core.closing import Closing
from bge_core.embedder import DenseEmbedder, Embedder
from bge_core.endpoint import Endpoint
from bge_core.errors import ArgumentError, CheckpointError, ComputationError
from bge_core.instructions import QueryExample
from bge_core.local_model import Call, progress_bar
from bge_core.profiles import Profile, find_profile
from bge_core.reranker import PairScorer, Reranker

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from bge_core.engine import Lane

__all__ = ["RemoteEmbedder", "RemoteReranker", "make_embedder", "make_reranker", "not_local"]

Item = TypeVar("Item", str, tuple[str, str])
Progress = Callable[[int], None] | None

# What text-embeddings-inference takes at a time unless told otherwise, and half of the two
# megabytes that it takes at most, in characters of four bytes.
_BATCH = 32
_BATCH_CHARACTERS = 250_000
_EMBEDDINGS, _RERANK = "/embeddings", "/rerank"
# Requests of one call that the server has at a time.
_IN_FLIGHT = 4
_DEFAULTS: Mapping[str, object] = MappingProxyType(
    {
        "backend": "torch",
        "dtype": "auto",
        "local_files_only": False,
        "long_passages": "truncate",
        "on_truncation": "warn",
        "trust_remote_code": False,
    }
)


class RemoteModel(Closing, Generic[Item]):
    """A model that a server runs.

    The model's name says what it is: instructions and dimension come from it, and with a folder
    of this machine from its JSON files. Nothing is downloaded, and pickles carry the
    configuration only.

    Args:
        kind: `"embedder"` or `"reranker"`.
        model: The published id of the model that is served, or a folder with the same.
        endpoint: The server's address.
        api_key: A bearer token.
        timeout: Seconds to wait for one answer; None for 60.

    Raises:
        ArgumentError: A value that can't be served.
        CheckpointError: A model that is none, or of another kind.
        InputTypeError: A value of the wrong type.
    """

    _of_a_process = frozenset({"_checkpoint", "_closed", "_in_flight"})

    def __init__(
        self,
        *,
        kind: Kind,
        model: str | os.PathLike[str],
        endpoint: str,
        api_key: str | None,
        timeout: float | None,
    ) -> None:
        self._kind = kind
        self._source = Source.of(model)
        self._endpoint = Endpoint(endpoint, api_key=api_key, timeout=timeout)
        self._start()
        if self._source.is_local:
            self._folder()  # reading it is the check
        else:
            check_profile(self._profile(), kind, self.model)

    def _start(self) -> None:
        self._closed = False
        self._checkpoint: Checkpoint | None = None
        self._in_flight: set[Future[Any]] = set()

    @property
    def model(self) -> str:
        """The hub id or folder."""
        return self._source.model

    @property
    def endpoint(self) -> str:
        """The server's address."""
        return self._endpoint.url

    @property
    def dtype(self) -> str:
        """`"unknown"`: the server has its own number format, and doesn't say."""
        return "unknown"

    def close(self) -> None:
        """Let go of the server; callers that still wait get a `ClosedError`."""
        self._closed = True
        for future in list(self._in_flight):
            future.cancel()
        self._endpoint.close()

    @abstractmethod
    async def _rows(self, items: Sequence[Item], progress: Progress) -> list[NDArray[np.float32]]:
        """Ask the server for a row of each item."""

    def _folder(self) -> Checkpoint | None:
        """Read the folder on this machine, where the model is one."""
        if self._checkpoint is None and self._source.is_local:
            found = read(self._source, locate(self._source))
            check_kind(found, self._kind, pooling=None)
            self._checkpoint = found
        return self._checkpoint

    def _served_name(self) -> str:
        """Give the name that a server knows; a path on this machine is none of its business."""
        profile = self._profile()
        if not self._source.is_local:
            return self.model
        return profile.id if profile else Path(self.model).name

    def _profile(self) -> Profile | None:
        folder = self._folder()
        return find_profile(self.model) or (folder.profile if folder else None)

    def _content(self) -> str:
        # What the server's weights are can't be known: a name stands for them.
        folder = self._folder()
        return folder.digest() if folder else self.model

    def _compute(
        self,
        items: Sequence[Item],
        *,
        lane: Lane,  # noqa: ARG002 -- the server has its own queue
        show_progress: bool = False,
    ) -> NDArray[np.float32] | None:
        self._check_open()
        if not items:
            return None
        call = Call(items)
        future = self._begin(call, show_progress=show_progress)
        call.take(self._wait(future))
        return call.stacked()

    async def _acompute(
        self,
        items: Sequence[Item],
        *,
        lane: Lane,  # noqa: ARG002 -- the server has its own queue
        show_progress: bool = False,
    ) -> NDArray[np.float32] | None:
        self._check_open()
        if not items:
            return None
        call = await asyncio.to_thread(Call, items)
        future = self._begin(call, show_progress=show_progress)
        call.take(await self._await(future))
        return await asyncio.to_thread(call.stacked)

    def _begin(self, call: Call[Item], *, show_progress: bool) -> Future[list[NDArray[np.float32]]]:
        async def work() -> list[NDArray[np.float32]]:
            with progress_bar(len(call.items), show=show_progress) as progress:
                return await self._rows(call.items, progress)

        future = self._endpoint.start(work())
        self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)
        if self._closed:
            future.cancel()
        return future

    def _not_finite(self, which: str) -> ComputationError:
        msg = (
            f"{self.endpoint} gave NaN or infinity for {which}: half precision overflows on some "
            "texts. Start the server with float32 or bfloat16 (--dtype)."
        )
        return ComputationError(msg)


class RemoteEmbedder(RemoteModel[str], DenseEmbedder):
    """An embedding model that a server runs: text-embeddings-inference, Infinity, or alike.

    Instructions, order, and the length of vectors are those of `Embedder`. How long a text may
    be, whether it is cut, and the pooling are the server's: nothing is said of what it cuts.

    Args:
        model: The published id of the model that is served (`"BAAI/bge-small-en-v1.5"`), or a
            folder on this machine with the same. Infinity knows a model by this name.
        endpoint: The server's address (`"http://localhost:8080"`); it answers `/embeddings`.
        api_key: A bearer token; None for a server without one.
        timeout: Seconds to wait for one answer, 32 texts at most; None for 60.
        query_instruction: Put in front of queries, never of documents. None for the one that
            the model card gives, `""` for none.
        task_description: A decoder's word for the same, as `Embedder` takes it.
        examples: What bge-en-icl sees in front of each query, as `Embedder` takes it.
        task: llm-embedder's task; None for every other model.
        normalize: Scale vectors to unit length. False gives them as the server does, which
            with text-embeddings-inference are of unit length in any case.

    Raises:
        ArgumentError: A value that can't be served.
        CheckpointError: A model that is none, or a reranker.
        InputTypeError: A value of the wrong type.

    Example:
        >>> embedder = RemoteEmbedder("BAAI/bge-small-en-v1.5", endpoint="http://localhost:8080")
        >>> embedder.query_instruction, embedder.dimension
        ('Represent this sentence for searching relevant passages: ', 384)
        >>> embedder.embed_documents(["Paris is in France."]).shape  # doctest: +SKIP
        (1, 384)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        endpoint: str,
        api_key: str | None = None,
        timeout: float | None = None,
        query_instruction: str | None = None,
        task_description: str | None = None,
        examples: Iterable[QueryExample | Mapping[str, str]] | None = None,
        task: str | None = None,
        normalize: bool = True,
    ) -> None:
        DenseEmbedder.__init__(
            self,
            query_instruction=query_instruction,
            task_description=task_description,
            examples=examples,
            task=task,
            normalize=normalize,
        )
        RemoteModel.__init__(
            self,
            kind="embedder",
            model=model,
            endpoint=endpoint,
            api_key=api_key,
            timeout=timeout,
        )
        self._width = self._expected()
        _ = self._frame  # making it is the check

    @property
    def dimension(self) -> int:
        """Length of a vector; the server is asked where the model's name doesn't say it."""
        if self._width is None:
            return int(self.embed_documents(["a"]).shape[1])
        return self._width

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the model's name, instructions and scale.

        What the server runs under that name, its number format and its limits can't be known.
        """
        frame = self._frame
        asked = (frame.examples, frame.before, frame.after, frame.document)
        parts = ("served", self._content(), asked, self._normalize)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _expected(self) -> int | None:
        if folder := self._folder():
            return folder.hidden_size if folder.plain else None
        profile = self._profile()
        return profile.dimension if profile else None

    def _prompts(self) -> Mapping[str, str]:
        folder = self._folder()
        return folder.prompts if folder else {}

    def _queries(self, texts: Iterable[str]) -> list[str]:
        # On this machine these parts are tokens that nothing is cut of; a server takes text.
        frame = self._frame
        return [f"{frame.examples}{text}{frame.after}" for text in super()._queries(texts)]

    async def _rows(self, items: Sequence[str], progress: Progress) -> list[NDArray[np.float32]]:
        async def ask(part: slice) -> NDArray[np.float32]:
            texts = items[part]
            body = {"model": self._served_name(), "input": texts, "encoding_format": "float"}
            answer = await self._endpoint.post(_EMBEDDINGS, body)
            vectors = self._vectors_of(answer, len(texts))
            if progress is not None:
                progress(len(texts))
            return vectors

        parts = await _side_by_side(list(_batches(items)), ask)
        return [row for part in parts for row in part]

    def _vectors_of(self, answer: object, count: int) -> NDArray[np.float32]:
        data = answer.get("data") if isinstance(answer, dict) else None
        found = _by_index(self._endpoint, _EMBEDDINGS, data, "embedding", count)
        for index, vector in enumerate(found):
            if not isinstance(vector, list) or not all(map(_is_number, vector)):
                wrong = f"embedding {index} is no list of numbers but {vector!r:.60}"
                raise self._endpoint.malformed(_EMBEDDINGS, wrong)
            if self._width is None and vector:
                self._width = len(vector)
            if not vector or len(vector) != self._width:
                said = (
                    f"gave a vector of {len(vector)} numbers, and those of {self.model!r} have "
                    f"{self._width or 'some'}"
                )
                hint = "Write the model that the server runs as model='...'."
                raise self._endpoint.failed(_EMBEDDINGS, said, hint)
        return _float32(found)


class RemoteReranker(RemoteModel[tuple[str, str]], PairScorer):
    """A cross-encoder that a server runs: text-embeddings-inference, Infinity, or alike.

    The server is asked for raw logits, and scale, order, ties and limits are those of `Reranker`.
    A first request for one short pair on both of the server's scales makes sure that it knows
    the difference. How a long pair is cut is the server's: the longer of the two first, where
    `Reranker` leaves a quarter to the passage.

    Args:
        model: The published id of the model that is served (`"BAAI/bge-reranker-base"`), or a
            folder on this machine with the same. Infinity knows a model by this name.
        endpoint: The server's address (`"http://localhost:8080"`); it answers `/rerank`.
        api_key: A bearer token; None for a server without one.
        timeout: Seconds to wait for one answer, 32 passages at most; None for 60.
        normalize: Give the sigmoid of the logit, from 0 to 1; False gives the raw logit.

    Raises:
        ArgumentError: A value that can't be served.
        CheckpointError: A model that is none, or no reranker of one label.
        InputTypeError: A value of the wrong type.

    Example:
        >>> reranker = RemoteReranker("BAAI/bge-reranker-base", endpoint="http://localhost:8080")
        >>> reranker.rank("what is a panda?", [])
        []
        >>> reranker.rank("what is a panda?", ["A panda is a bear."])  # doctest: +SKIP
        [(0, 0.9979)]
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        endpoint: str,
        api_key: str | None = None,
        timeout: float | None = None,
        normalize: bool = True,
    ) -> None:
        PairScorer.__init__(self, normalize=normalize)
        # The name of the passages in a request, once it is known.
        self._word: str | None = None
        RemoteModel.__init__(
            self,
            kind="reranker",
            model=model,
            endpoint=endpoint,
            api_key=api_key,
            timeout=timeout,
        )
        known = self._folder() or self._profile()
        if known is not None and known.pair_prompt is not None:
            msg = (
                f"{self.model!r} is a language model that is asked a question, and a server's "
                "/rerank runs cross-encoders: leave endpoint=... out, or use "
                "'BAAI/bge-reranker-v2-m3'."
            )
            raise CheckpointError(msg)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the model's name and the scale."""
        parts = ("served", self._content(), self._normalize)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    async def _rows(
        self, items: Sequence[tuple[str, str]], progress: Progress
    ) -> list[NDArray[np.float32]]:
        word = self._word = self._word or await self._learn()
        by_query: dict[str, list[int]] = {}
        for place, (query, _) in enumerate(items):
            by_query.setdefault(query, []).append(place)
        requests = [
            places[part]
            for places in by_query.values()
            for part in _batches([items[place][1] for place in places])
        ]

        async def ask(places: list[int]) -> NDArray[np.float32]:
            passages = [items[place][1] for place in places]
            query = items[places[0]][0]
            _, logits = await self._ask(query, {word: passages}, len(passages), raw=True)
            if progress is not None:
                progress(len(passages))
            return logits

        rows = np.empty((len(items), 1), dtype=np.float32)
        for places, logits in zip(requests, await _side_by_side(requests, ask), strict=True):
            rows[places, 0] = logits
        return list(rows)

    async def _learn(self) -> str:
        """Ask for one pair in both servers' words on both scales.

        Returns:
            What this server calls passages.

        Raises:
            EndpointError: The two scales are not a logit and its sigmoid.
        """
        both = {"texts": ["b"], "documents": ["b"]}
        word, raw = await self._ask("a", both, 1, raw=True)
        _, shown = await self._ask("a", both, 1, raw=False)
        logit, score = float(raw[0]), float(shown[0])
        if math.isfinite(logit):
            sigmoid = math.exp(min(logit, 0.0)) / (1.0 + math.exp(-abs(logit)))
            # As far as two passes in bfloat16 may be apart.
            if not math.isclose(sigmoid, score, abs_tol=0.02):
                said = (
                    f"gave {logit:.4g} with raw_scores and {score:.4g} without, which are no logit "
                    "and its sigmoid, so its scores can't be brought to a known scale"
                )
                hint = "Use text-embeddings-inference, or a newer Infinity."
                raise self._endpoint.failed(_RERANK, said, hint)
        return word

    async def _ask(
        self, query: str, passages: Mapping[str, list[str]], count: int, *, raw: bool
    ) -> tuple[str, NDArray[np.float32]]:
        body = {
            "model": self._served_name(),
            "query": query,
            **passages,
            "raw_scores": raw,
            # text-embeddings-inference's word; Infinity cuts in any case.
            "truncate": True,
        }
        answer = await self._endpoint.post(_RERANK, body)
        word, name, ranks = "texts", "score", answer
        if isinstance(answer, dict):
            word, name, ranks = "documents", "relevance_score", answer.get("results")
        found = _by_index(self._endpoint, _RERANK, ranks, name, count)
        for index, score in enumerate(found):
            if not _is_number(score):
                wrong = f"the score of passage {index} is no number but {score!r:.60}"
                raise self._endpoint.malformed(_RERANK, wrong)
        return word, _float32(found)


def make_embedder(
    model: str | os.PathLike[str],
    *,
    endpoint: str | None = None,
    api_key: str | None = None,
    timeout: float | None = None,
    query_instruction: str | None = None,
    task_description: str | None = None,
    examples: Iterable[QueryExample | Mapping[str, str]] | None = None,
    task: str | None = None,
    pooling: str | None = None,
    normalize: bool = True,
    device: str | Sequence[str] | None = None,
    dtype: str | torch.dtype = "auto",
    use_fp16: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    on_truncation: str = "warn",
    long_passages: str = "truncate",
    backend: str = "torch",
    cache_folder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    token: str | None = None,
) -> DenseEmbedder:
    """Make an embedder on this machine, or one that asks a server.

    Args:
        model: A hub id or a folder.
        endpoint: A server's address; None for this machine.
        api_key: The server's token, as `RemoteEmbedder` takes it.
        timeout: Seconds to wait for one answer of the server.
        query_instruction: As `Embedder` takes it, and so all that follow.
        task_description: A decoder's word for the same.
        examples: What bge-en-icl sees in front of each query.
        task: llm-embedder's task.
        pooling: Which rows make the vector.
        normalize: Scale vectors to unit length.
        device: Where it runs.
        dtype: A number format.
        use_fp16: FlagEmbedding's word for it.
        max_length: Tokens that are read of a text.
        batch_tokens: Tokens computed in one pass.
        on_truncation: What happens when a text is longer.
        long_passages: What happens with a document that doesn't fit.
        backend: What executes the model.
        cache_folder: The hub's cache.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never go to the network.
        trust_remote_code: Run Python code that the checkpoint carries.
        token: A hub token for private models.

    Returns:
        A `RemoteEmbedder` where there is an endpoint, else an `Embedder`.

    Raises:
        ArgumentError: A value that can't be served, or one for a local model with an endpoint.
        CheckpointError: A model that can't be found, is damaged, or is no embedding model.
        InputTypeError: A value of the wrong type.

    Example:
        >>> type(make_embedder("BAAI/bge-small-en-v1.5")).__name__
        'Embedder'
        >>> served = make_embedder("BAAI/bge-small-en-v1.5", endpoint="http://localhost:8080")
        >>> type(served).__name__
        'RemoteEmbedder'
    """
    local: dict[str, Any] = {
        "pooling": pooling,
        "device": device,
        "dtype": dtype,
        "use_fp16": use_fp16,
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "on_truncation": on_truncation,
        "long_passages": long_passages,
        "backend": backend,
        "cache_folder": cache_folder,
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
        "token": token,
    }
    common: dict[str, Any] = {
        "query_instruction": query_instruction,
        "task_description": task_description,
        "examples": examples,
        "task": task,
        "normalize": normalize,
    }
    not_local(endpoint, api_key=api_key, timeout=timeout, local=local)
    if endpoint is None:
        return Embedder(model, **common, **local)
    return RemoteEmbedder(model, endpoint=endpoint, api_key=api_key, timeout=timeout, **common)


def make_reranker(
    model: str | os.PathLike[str],
    *,
    endpoint: str | None = None,
    api_key: str | None = None,
    timeout: float | None = None,
    normalize: bool = True,
    device: str | Sequence[str] | None = None,
    dtype: str | torch.dtype = "auto",
    use_fp16: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    on_truncation: str = "warn",
    long_passages: str = "truncate",
    backend: str = "torch",
    cache_folder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    token: str | None = None,
) -> PairScorer:
    """Make a cross-encoder on this machine, or one that asks a server.

    Args:
        model: A hub id or a folder.
        endpoint: A server's address; None for this machine.
        api_key: The server's token, as `RemoteReranker` takes it.
        timeout: Seconds to wait for one answer of the server.
        normalize: As `Reranker` takes it, and so all that follow.
        device: Where it runs.
        dtype: A number format.
        use_fp16: FlagEmbedding's word for it.
        max_length: Tokens that are read of a pair.
        batch_tokens: Tokens computed in one pass.
        on_truncation: What happens when a pair is longer.
        long_passages: What happens with a passage that doesn't fit.
        backend: What executes the model.
        cache_folder: The hub's cache.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never go to the network.
        trust_remote_code: Run Python code that the checkpoint carries.
        token: A hub token for private models.

    Returns:
        A `RemoteReranker` where there is an endpoint, else a `Reranker`.

    Raises:
        ArgumentError: A value that can't be served, or one for a local model with an endpoint.
        CheckpointError: A model that can't be found, is damaged, or is no reranker of one label.
        InputTypeError: A value of the wrong type.
    """
    local: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "use_fp16": use_fp16,
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "on_truncation": on_truncation,
        "long_passages": long_passages,
        "backend": backend,
        "cache_folder": cache_folder,
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
        "token": token,
    }
    not_local(endpoint, api_key=api_key, timeout=timeout, local=local)
    if endpoint is None:
        return Reranker(model, normalize=normalize, **local)
    return RemoteReranker(
        model, endpoint=endpoint, api_key=api_key, timeout=timeout, normalize=normalize
    )


def not_local(
    endpoint: str | None,
    *,
    api_key: str | None,
    timeout: float | None,
    local: Mapping[str, object],
) -> None:
    """Refuse arguments of a local model beside an endpoint, and a server's without one.

    Raises:
        ArgumentError: Names what to leave out.
    """
    if endpoint is None:
        served = {"api_key": api_key, "timeout": timeout}
        given = [name for name, value in served.items() if value is not None]
        if given:
            msg = (
                f"{' and '.join(given)} is for a server: pass endpoint='http://...', too, or leave "
                "it out. A token for private models on the hub is token='...'."
            )
            raise ArgumentError(msg)
        return
    given = sorted(name for name, value in local.items() if value != _DEFAULTS.get(name))
    if given:
        msg = (
            f"{', '.join(given)} can't be set with endpoint=..., since the server loads and runs "
            "the model: leave it out here and say it to the server. (api_key='...' is the "
            "server's token; instructions and normalize apply as ever.)"
        )
        raise ArgumentError(msg)


def _batches(texts: Sequence[str]) -> Iterator[slice]:
    start = characters = 0
    for place, text in enumerate(texts):
        characters += len(text)
        if place > start and (place - start == _BATCH or characters > _BATCH_CHARACTERS):
            yield slice(start, place)
            start, characters = place, len(text)
    yield slice(start, len(texts))


Part = TypeVar("Part")
Result = TypeVar("Result")


async def _side_by_side(
    parts: Sequence[Part], ask: Callable[[Part], Awaitable[Result]]
) -> list[Result]:
    """Ask for all parts, a few at a time; the first failure stops the rest."""
    results: dict[int, Result] = {}
    waiting = iter(enumerate(parts))

    async def turn() -> None:
        for place, part in waiting:
            results[place] = await ask(part)

    turns = [asyncio.ensure_future(turn()) for _ in range(min(_IN_FLIGHT, len(parts)))]
    try:
        await asyncio.gather(*turns)
    finally:
        for task in turns:
            task.cancel()
    return [results[place] for place in range(len(parts))]


def _by_index(endpoint: Endpoint, path: str, entries: object, name: str, count: int) -> list[Any]:
    """Give what entries say under a name, each in its own place.

    Raises:
        EndpointError: There is not exactly one entry for each of 0 to `count` - 1.
    """
    if not isinstance(entries, list):
        raise endpoint.malformed(path, "it has no list of results")
    found: dict[int, Any] = {}
    for entry in entries:
        index = entry.get("index") if isinstance(entry, dict) else None
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            raise endpoint.malformed(path, f"an entry's index is {index!r:.60} of {count} texts")
        if index in found:
            raise endpoint.malformed(path, f"index {index} is there twice")
        found[index] = entry.get(name)
    if len(found) != count:
        raise endpoint.malformed(path, f"{len(found)} results for {count} texts")
    return [found[index] for index in range(count)]


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return True
    # JSON's whole numbers have no limit, and numpy's have.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _float32(values: list[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what is too big becomes infinity, and is refused as such
        return np.asarray(values, dtype=np.float64).astype(np.float32)
