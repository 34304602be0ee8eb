"""A model on a server: batches, requests side by side, and the embedder and reranker over it."""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Unpack

import numpy as np

from bge_core.backends.loading import load_tokenizer
from bge_core.checkpoints.catalog import find_profile
from bge_core.checkpoints.metadata import check_cached, check_kind, check_profile, read
from bge_core.checkpoints.source import Source, locate
from bge_core.embedder import Embedder
from bge_core.engine.call import Call
from bge_core.engine.process import hold_interpreter_exit, on_fork
from bge_core.engine.stats import Counters
from bge_core.errors import (
    ArgumentError,
    CheckpointError,
    ComputationError,
    EndpointError,
    closed_while_waiting_error,
)
from bge_core.lifecycle import Closeable
from bge_core.options import RemoteArguments, ServerOptions, with_options_of
from bge_core.reranker import Reranker
from bge_core.servers.http import Endpoint, StatusError
from bge_core.servers.protocols import (
    PROTOCOLS,
    batch_limit_of,
    batch_limit_of_info,
    detect_protocol,
    is_about_batches,
    rerank_probe,
)
from bge_core.tokenizer import report_truncation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.arguments import Priority
    from bge_core.checkpoints.catalog import PairPrompt, Profile
    from bge_core.checkpoints.metadata import Checkpoint, Kind
    from bge_core.engine.call import Progress, Steps
    from bge_core.engine.stats import ModelStats
    from bge_core.prompts import QueryExample
    from bge_core.servers.protocols import ServerProtocol
    from bge_core.tokenizer import Tokenizer

__all__ = [
    "RemoteEmbedder",
    "RemoteReranker",
    "ServedModel",
    "find_served_profile",
    "served_source",
]

Item = TypeVar("Item", str, tuple[str, str])
Part = TypeVar("Part")

# What text-embeddings-inference takes at a time unless told otherwise, and half of the two
# megabytes that it takes at most, in characters of four bytes.
_BATCH = 32
_BATCH_CHARACTERS = 250_000
# Ollama's and a registry's way to write a version.
_TAG = re.compile(r":[^:/]*$")
_PATH = re.compile(r"[~./]|[A-Za-z]:/|.*\\")
_LONGEST_NAME = 255
# Requests of one call that the server has at a time.
_IN_FLIGHT = 4
# What an answer can have: a vector of many numbers written out in full, with spaces; a score
# beside what else a server says of it; an echo of the request; and never more than the last.
_VECTOR_BYTES = 8192 * 48
_SCORE_BYTES = 1024
_OTHER_BYTES = 1 << 18
_MOST_BYTES = 1 << 26


class ServedModel(Closeable, Generic[Item]):
    """A model that a server runs: what `Embedder` and `Reranker` have on this machine.

    The model's name says what it is: instructions and dimension come from it, and with a folder
    of this machine from its JSON files. Nothing is downloaded, save for `long_passages="window"`
    a tokenizer, and pickles carry the configuration only.

    Args:
        options: The model's name, the server, and how it is asked.
        kind: `"embedder"` or `"reranker"`.

    Raises:
        ArgumentError: A value that is not supported.
        CheckpointError: A model that is none, or of another kind.
        InputTypeError: A value of the wrong type.
    """

    _unpickled_attributes = Closeable._unpickled_attributes | {
        "_batch_size",
        "_checkpoint",
        "_tokenizer",
        "counters",
    }

    def __init__(self, options: ServerOptions, *, kind: Kind) -> None:
        self._kind = kind
        self._source = served_source(options.model)
        self._served_name = options.served_model_name
        self._most_items = options.endpoint_batch_size or _BATCH
        self.endpoint = Endpoint(options.endpoint, api_key=options.api_key, timeout=options.timeout)
        self._max_length = options.max_length
        self._init_process_state()
        if self._source.is_local:
            self.checkpoint()  # reading it is the check
        else:
            profile = find_served_profile(self.model)
            check_profile(profile, kind, self.model)
            if profile is None or profile.kind != kind:
                check_cached(self._source, kind, pooling=None, loadable=False)

    def _init_process_state(self) -> None:
        super()._init_process_state()
        on_fork(self, ServedModel.after_fork)
        # What a server was found to take, it takes of everybody who asks through this object.
        self._batch_size = self._most_items
        self._checkpoint: Checkpoint | None = None
        self._tokenizer: Tokenizer | None = None
        self.counters = Counters(self._flight_lock)

    def after_fork(self) -> None:
        """Start over in a forked child."""
        super().after_fork()
        self.counters = Counters(self._flight_lock)

    @property
    def model(self) -> str:
        """The hub id, the server's name of it, or the folder."""
        return self._source.model

    @property
    def profile(self) -> Profile | None:
        """The model's row in the table of published checkpoints."""
        if profile := find_served_profile(self.model, self._kind):
            return profile
        checkpoint = self.checkpoint()
        return checkpoint.profile if checkpoint else None

    @property
    def served_name(self) -> str:
        """The name that the server knows; a path on this machine is none of its business."""
        if self._served_name is not None:
            return self._served_name
        if not self._source.is_local:
            return self.model
        # By its own name alone: what it was trained from is another model.
        profile = find_profile(self.model, self._kind)
        return profile.id if profile else Path(self.model).name

    @property
    def is_local(self) -> bool:
        """False: it runs on a server."""
        return False

    @property
    def ready(self) -> bool:
        """True: nothing has to be loaded."""
        return True

    @property
    def prompts(self) -> Mapping[str, str]:
        """The prompts that the folder on this machine carries; none of a hub id."""
        checkpoint = self.checkpoint()
        return checkpoint.prompts if checkpoint else {}

    @property
    def pair_prompt(self) -> PairPrompt | None:
        """How it is asked to score a pair, where it is a language model."""
        known = self.checkpoint() or self.profile
        return known.pair_prompt if known else None

    @property
    def truncate_dim(self) -> int | None:
        """How many of a vector's numbers are kept, where a folder on this machine says it."""
        checkpoint = self.checkpoint()
        return checkpoint.truncate_dim if checkpoint else None

    @property
    def dimension(self) -> int | None:
        """Length of its vectors; None where neither its name nor its folder says it."""
        if checkpoint := self.checkpoint():
            return checkpoint.hidden_size if checkpoint.only_standard_modules else None
        return self.profile.dimension if self.profile else None

    @property
    def known_dimension(self) -> int | None:
        """As `dimension`: no server is asked for it."""
        return self.dimension

    @property
    def max_length(self) -> int:
        """Tokens that the server reads of a text, as far as can be known here.

        Raises:
            ArgumentError: Neither the model's name nor its folder says it.
        """
        if self._max_length is not None:
            return self._max_length
        if checkpoint := self.checkpoint():
            return checkpoint.default_max_length
        if self.profile is not None:
            return self.profile.max_length
        msg = (
            f"How many tokens the server reads of {self.model!r} is not known here: pass "
            "max_length=..., or long_passages='truncate'."
        )
        raise ArgumentError(msg)

    @property
    def capacity(self) -> int:
        """As `max_length`: what else the server could read is not known."""
        return self.max_length

    @property
    def dtype(self) -> str:
        """`"unknown"`: the server has its own number format, and doesn't say."""
        return "unknown"

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """What stands for the weights: what the server has can't be known."""
        checkpoint = self.checkpoint()
        content = checkpoint.digest() if checkpoint else self.model
        return "served", content, self._served_name, self._max_length

    def tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer, of its folder or from the hub.

        Raises:
            CheckpointError: It can't be found.
            ClosedError: The model was closed.
        """
        self.check_open()
        if self._tokenizer is None:
            profile = self.profile
            local = self._source.is_local or profile is None
            source = self._source if local or profile is None else Source.of(profile.id)
            found = read(source, locate(source, weights=False))
            with hold_interpreter_exit():
                self._tokenizer = load_tokenizer(found, trust_remote_code=False)
        return self._tokenizer

    def checkpoint(self) -> Checkpoint | None:
        """Read the folder on this machine, where the model is one."""
        if self._checkpoint is None and self._source.is_local:
            folder = locate(self._source)
            if not any((folder / name).is_file() for name in ("config.json", "modules.json")):
                raise _says_nothing_error(self.model)
            found = read(self._source, folder)
            check_kind(found, self._kind, pooling=None)
            self._checkpoint = found
        return self._checkpoint

    def stats(self) -> ModelStats:
        """Return what it has asked the server for so far."""
        return self.counters.stats()

    def close(self) -> None:
        """Release the server. Callers that still wait get a `ClosedError`."""
        super().close()
        self.endpoint.close()

    @abstractmethod
    async def _rows(self, items: Sequence[Item], progress: Progress) -> list[NDArray[np.float32]]:
        """Ask the server for a row of each item."""

    def steps(
        self,
        call: Call[Any],
        *,
        priority: Priority,  # noqa: ARG002 -- the server has its own queue
        progress: Progress = None,
    ) -> Steps[None]:
        """Ask the server for a call's items and add their rows to it.

        Args:
            call: Texts or pairs.
            priority: Of no effect: the server has its own queue.
            progress: Called with the number of items done.

        Yields:
            The future of all rows.

        Raises:
            ClosedError: The model was closed.
            EndpointError: The server can't be reached, fails, or gives no such answer.
        """
        self.check_open()
        if not call.items:
            return
        items, (before, after) = call.items, call.around
        if before or after:
            # On this machine these are tokens that are never truncated; a server takes text.
            items = [f"{before}{item}{after}" for item in items]
        future = self.endpoint.start(self._rows(items, progress))
        self._track(future)
        self.counters.add_sequences(len(items), 0)
        try:
            call.add_rows((yield future))
        except CancelledError as exc:
            raise closed_while_waiting_error(self.model) from exc

    def report_truncation(
        self,
        what: str,
        lengths: Sequence[int],
        *,
        pairs: Sequence[int] | None = None,
        windows: bool = False,
    ) -> None:
        """Log which texts were truncated here, before the server could."""
        report_truncation(
            what=what,
            lengths=lengths,
            pairs=pairs,
            max_length=self.max_length,
            capacity=self.capacity,
            windows=windows,
            policy="warn",
            model=self.model,
        )

    async def _ask_in_batches(
        self,
        groups: Sequence[Sequence[int]],
        texts: Sequence[str],
        ask: Callable[[Sequence[int]], Awaitable[None]],
        progress: Progress,
    ) -> None:
        """Ask for all items, in requests of the size that the server turns out to take.

        Args:
            groups: The items' positions; a request has items of one group.
            texts: What each of all items adds to a request, for its size.
            ask: Sends one request and keeps what came of it.
            progress: Is told how many items are done.

        Raises:
            EndpointError: The server fails, or takes not even one item.
        """
        batches = [
            batch for group in groups for batch in _batches(group, texts, limit=self._batch_size)
        ]

        async def request(batch: Sequence[int]) -> None:
            if len(batch) <= self._batch_size:
                started = time.perf_counter()
                try:
                    await ask(batch)
                except StatusError as exc:
                    if not await self._can_ask_for_less(exc, len(batch)):
                        raise
                else:
                    self.counters.add_pack(time.perf_counter() - started, 0.0)
                    if progress is not None:
                        progress(len(batch))
                    return
            size = self._batch_size  # it may shrink on the way
            for start in range(0, len(batch), size):
                await request(batch[start : start + size])

        await _gather_limited(batches, request)

    async def _can_ask_for_less(self, exc: StatusError, size: int) -> bool:
        """Learn from a refusal how much the server takes at a time; False if that isn't it."""
        if size == 1:
            return False
        if self._batch_size < size:
            return True  # learnt already
        limit = batch_limit_of(exc.text)
        about_batches = is_about_batches(exc.text)
        if limit is None and (exc.status in (413, 422) or (exc.status == 400 and about_batches)):
            limit = await self._limit_of_info()
            too_much = exc.status == 413 or about_batches
            if too_much and not (limit and limit < size):
                limit = size // 2
        if limit is None or not 0 < limit < size:
            return False
        self._batch_size = min(self._batch_size, limit)
        return True

    async def _limit_of_info(self) -> int | None:
        try:
            return batch_limit_of_info(await self.endpoint.get("/info"))
        except EndpointError:
            return None  # another server, or an older one

    def non_finite_error(self, which: str) -> ComputationError:
        """Return the error that says that NaN or infinity came out."""
        msg = (
            f"{self.endpoint.url} gave NaN or infinity for {which}: half precision overflows on "
            "some texts. Start the server with float32 or bfloat16 (--dtype)."
        )
        return ComputationError(msg)


class _ServedEmbedder(ServedModel[str]):
    """An embedding model on a server: texts -> vectors."""

    def __init__(self, options: ServerOptions) -> None:
        super().__init__(options, kind="embedder")
        self.width = super().dimension

    @property
    def dimension(self) -> int | None:
        """Length of its vectors; the first answer tells where nothing else does."""
        return self.width

    async def _rows(self, items: Sequence[str], progress: Progress) -> list[NDArray[np.float32]]:
        # All kinds of servers embed alike.
        protocol = next(iter(PROTOCOLS.values()))
        rows: dict[int, NDArray[np.float32]] = {}

        async def ask(batch: Sequence[int]) -> None:
            texts = [items[position] for position in batch]
            vectors = await self.endpoint.post(
                protocol.embeddings_path,
                protocol.embeddings_request(self.served_name, texts),
                read=lambda answer: protocol.read_embeddings(answer, len(texts)),
                largest=_largest(texts, _VECTOR_BYTES),
            )
            self._check_width(protocol.embeddings_path, vectors.shape[1])
            rows.update(zip(batch, vectors, strict=True))

        await self._ask_in_batches([range(len(items))], items, ask, progress)
        return [rows[position] for position in range(len(items))]

    def _check_width(self, path: str, width: int) -> None:
        if self.width is None and width:
            self.width = width
        if not width or width != self.width:
            said = (
                f"gave a vector of {width} numbers, and those of {self.model!r} have "
                f"{self.width or 'some'}"
            )
            hint = "Write the model that the server runs as model='...'."
            raise self.endpoint.failed(said, hint, path)


class _ServedReranker(ServedModel[tuple[str, str]]):
    """A cross-encoder on a server: pairs -> logits."""

    def __init__(self, options: ServerOptions) -> None:
        self._protocol: ServerProtocol | None = None
        super().__init__(options, kind="reranker")

    async def _rows(
        self, items: Sequence[tuple[str, str]], progress: Progress
    ) -> list[NDArray[np.float32]]:
        protocol = self._protocol = self._protocol or await self._detect_protocol()
        by_query: dict[str, list[int]] = {}
        for position, (query, _) in enumerate(items):
            by_query.setdefault(query, []).append(position)
        rows = np.empty((len(items), 1), dtype=np.float32)

        async def ask(batch: Sequence[int]) -> None:
            query = items[batch[0]][0]
            passages = [items[position][1] for position in batch]
            logits = await self.endpoint.post(
                protocol.rerank_path,
                protocol.rerank_request(self.served_name, query, passages, raw=True),
                read=lambda answer: protocol.read_scores(answer, len(passages)),
                largest=_largest([query, *passages], _SCORE_BYTES),
            )
            rows[batch, 0] = logits

        await self._ask_in_batches(
            list(by_query.values()), [passage for _, passage in items], ask, progress
        )
        return list(rows)

    async def _detect_protocol(self) -> ServerProtocol:
        """Ask for one pair in the words of every kind of server, on both scales.

        Raises:
            EndpointError: It is no known kind, or the two scales are not a logit and its sigmoid.
        """
        path = "/rerank"

        def read(answer: object) -> tuple[ServerProtocol, float]:
            protocol = detect_protocol(answer)
            return protocol, float(protocol.read_scores(answer, 1)[0])

        async def request(*, raw: bool) -> tuple[ServerProtocol, float]:
            probe = rerank_probe(self.served_name, raw=raw)
            largest = _largest(["a", "b"], _SCORE_BYTES)
            return await self.endpoint.post(path, probe, read=read, largest=largest)

        _, score = await request(raw=False)
        protocol, logit = await request(raw=True)
        if math.isfinite(logit):
            sigmoid = math.exp(min(logit, 0.0)) / (1.0 + math.exp(-abs(logit)))
            # As far as two passes in bfloat16 may be apart.
            if not math.isclose(sigmoid, score, abs_tol=0.02):
                said = (
                    f"gave {logit:.4g} with raw_scores and {score:.4g} without, which are no logit "
                    "and its sigmoid, so its scores can't be brought to a known scale"
                )
                hint = "Use text-embeddings-inference, or a newer Infinity."
                raise self.endpoint.failed(said, hint, path)
        return protocol


class RemoteEmbedder(Embedder):
    """An embedding model that a server runs: text-embeddings-inference, Infinity, or alike.

    Instructions, order, and the length of vectors are those of `Embedder`. How long a text may
    be, whether it is cut, and the pooling are the server's: nothing is said of what it cuts.

    Args:
        model: The published id of the model that is served, the server's own name of it, or a
            folder on this machine with the same model.
        query_instruction: Put in front of queries, never of documents. None for the one that
            the model card gives, `""` for none.
        document_instruction: Put in front of documents, as `Embedder` takes it.
        task_description: A decoder's word for the queries', as `Embedder` takes it.
        examples: What bge-en-icl sees in front of each query, as `Embedder` takes it.
        task: llm-embedder's task; None for every other model.
        normalize: Scale vectors to unit length. False gives them as the server does, which
            with text-embeddings-inference are of unit length in any case.
        truncate_dim: How many of a vector's numbers are kept, as `Embedder` takes it. They are
            cut here, whatever the server knows of it.
        long_passages: What happens with a document that the server would truncate; `"window"`
            sends overlapping windows of it instead, as `Embedder` does. It needs the model's
            tokenizer, of the folder or from the hub.
        max_length: Tokens that the server reads of a text, for the windows; None for the model's
            limit.
        **options: `endpoint`, `api_key`, `timeout`, `served_model_name` and
            `endpoint_batch_size`, as `bge_core.options.ServerOptions` describes them.

    Raises:
        ArgumentError: A value that is not supported.
        CheckpointError: A model that is none, or a reranker.
        InputTypeError: A value of the wrong type.

    Example:
        >>> embedder = RemoteEmbedder("BAAI/bge-small-en-v1.5", endpoint="http://localhost:8080")
        >>> embedder.query_instruction, embedder.dimension
        ('Represent this sentence for searching relevant passages: ', 384)
        >>> embedder.embed_documents(["Paris is in France."]).shape  # doctest: +SKIP
        (1, 384)
    """

    _model: _ServedEmbedder

    @with_options_of(ServerOptions)
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        task_description: str | None = None,
        examples: Iterable[QueryExample | Mapping[str, str]] | None = None,
        task: str | None = None,
        normalize: bool = True,
        truncate_dim: int | None = None,
        long_passages: str = "truncate",
        max_length: int | None = None,
        **options: Unpack[RemoteArguments],
    ) -> None:
        served = _ServedEmbedder(ServerOptions(model=model, max_length=max_length, **options))
        self._set_up(
            served,
            query_instruction=query_instruction,
            document_instruction=document_instruction,
            task_description=task_description,
            examples=examples,
            task=task,
            normalize=normalize,
            truncate_dim=truncate_dim,
            long_passages=long_passages,
        )
        _ = self._template  # making it is the check

    @property
    def endpoint(self) -> str:
        """The server's address."""
        return self._model.endpoint.url


class RemoteReranker(Reranker):
    """A cross-encoder that a server runs: text-embeddings-inference, Infinity, or alike.

    The server is asked for raw logits, and scale, order, ties and limits are those of `Reranker`.
    A first request for one short pair on both of the server's scales makes sure that it knows
    the difference. How a long pair is cut is the server's: the longer of the two first, where
    `Reranker` leaves a quarter to the passage.

    Args:
        model: The published id of the model that is served, the server's own name of it, or a
            folder on this machine with the same model.
        normalize: Return the sigmoid of the logit, from 0 to 1; False gives the raw logit.
        long_passages: What happens with a passage that the server would truncate; `"window"`
            sends overlapping windows of it instead, as `Reranker` does. It needs the model's
            tokenizer, of the folder or from the hub.
        max_length: Tokens that the server reads of a pair, for the windows; None for the model's
            limit.
        **options: `endpoint`, `api_key`, `timeout`, `served_model_name` and
            `endpoint_batch_size`, as `bge_core.options.ServerOptions` describes them.

    Raises:
        ArgumentError: A value that is not supported.
        CheckpointError: A model that is none, or no reranker of one label.
        InputTypeError: A value of the wrong type.

    Example:
        >>> reranker = RemoteReranker("BAAI/bge-reranker-base", endpoint="http://localhost:8080")
        >>> reranker.rank("what is a panda?", [])
        []
        >>> reranker.rank("what is a panda?", ["A panda is a bear."])  # doctest: +SKIP
        [Ranked(index=0, score=0.9979, span=None)]
    """

    _model: _ServedReranker

    @with_options_of(ServerOptions)
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        normalize: bool = True,
        long_passages: str = "truncate",
        max_length: int | None = None,
        **options: Unpack[RemoteArguments],
    ) -> None:
        served = _ServedReranker(ServerOptions(model=model, max_length=max_length, **options))
        self._set_up(served, normalize=normalize, long_passages=long_passages)
        if served.pair_prompt is not None:
            msg = (
                f"{self.model!r} is a language model that is asked a question, and a server's "
                "/rerank runs cross-encoders: leave endpoint=... out, or use "
                "'BAAI/bge-reranker-v2-m3'."
            )
            raise CheckpointError(msg)

    @property
    def endpoint(self) -> str:
        """The server's address."""
        return self._model.endpoint.url


def find_served_profile(name: str, kind: Kind | None = None) -> Profile | None:
    """Find what is published under a server's name of a model; a version behind it is ignored."""
    return find_profile(name, kind) or find_profile(_TAG.sub("", name), kind)


def served_source(model: str | os.PathLike[str]) -> Source:
    """Return the source of a folder, a published id, or any other name that a server may know.

    Raises:
        CheckpointError: It looks like a folder and is none, or is no name.
        InputTypeError: It is neither a str nor a path.
    """
    if isinstance(model, (str, os.PathLike)) and _is_gguf(Path(model)):
        raise _says_nothing_error(os.fspath(model))
    named = isinstance(model, str) and model.isprintable() and model.strip() == model != ""
    if not isinstance(model, str) or not named or _PATH.match(model):
        return Source.of(model)
    if len(model) > _LONGEST_NAME:
        msg = f"model={model[:40]!r}... has {len(model)} characters: no model has such a name."
        raise CheckpointError(msg)
    return Source.of(model) if Path(model).is_dir() else Source(model=model)


def _says_nothing_error(name: str) -> CheckpointError:
    msg = (
        f"model={name!r} has no config.json, which would say here what the server runs: pass the "
        "model's id, such as model='BAAI/bge-m3', and where the server knows it by another name, "
        "that as served_model_name='...'."
    )
    return CheckpointError(msg)


def _is_gguf(path: Path) -> bool:
    try:
        return path.suffix.lower() == ".gguf" and path.is_file()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False


def _batches(
    positions: Sequence[int], texts: Sequence[str], *, limit: int
) -> Iterator[Sequence[int]]:
    """Cut positions of texts into what one request carries."""
    start = characters = 0
    for end, position in enumerate(positions):
        characters += len(texts[position])
        if end > start and (end - start == limit or characters > _BATCH_CHARACTERS):
            yield positions[start:end]
            start, characters = end, len(texts[position])
    yield positions[start:]


async def _gather_limited(parts: Sequence[Part], work: Callable[[Part], Awaitable[None]]) -> None:
    """Work on all parts, a few at a time; the first failure stops the rest."""
    waiting = iter(parts)

    async def turn() -> None:
        for part in waiting:
            await work(part)

    turns = [asyncio.ensure_future(turn()) for _ in range(min(_IN_FLIGHT, len(parts)))]
    try:
        await asyncio.gather(*turns)
    finally:
        for task in turns:
            task.cancel()


def _largest(texts: Sequence[str], each: int) -> int:
    """Return how many bytes an answer about these texts can have."""
    echo = 8 * sum(map(len, texts))
    return min(_OTHER_BYTES + echo + each * len(texts), _MOST_BYTES)
