"""What an embedder and a reranker share: configuration, loading, computing, closing."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from numbers import Integral
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from bge_core.checkpoint import Checkpoint, Kind, Source, check_kind, check_profile, locate, read
from bge_core.closing import Closing
from bge_core.errors import (
    ArgumentError,
    CheckpointError,
    ComputationError,
    InputTypeError,
)
from bge_core.placement import Placement
from bge_core.profiles import find_profile
from bge_core.tokens import (
    OnTruncation,
    Tokens,
    check_on_truncation,
    is_small,
    report_truncation,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.engine import Engine, Lane, Rows
    from bge_core.passes import Ask
    from bge_core.runner import Runner
    from bge_core.tokens import Tokenizer

__all__ = ["Call", "Item", "LocalModel", "not_finite", "off_loop", "progress_bar", "slices_of"]

logger = logging.getLogger(__name__)

Done = TypeVar("Done")
Item = TypeVar("Item", bound=str | tuple[str, str])
"""What is tokenised to one sequence: a text, or a (query, passage) pair."""

Encode = Callable[["Tokenizer", Sequence[Item]], tuple[list[Tokens], list[bool]]]
"""Items -> a sequence an item, and of each item whether it was cut."""

# Tokenised ahead of the workers: enough to sort by length, little enough for a flat memory.
_SLICE = 512
_SLICES_AHEAD = 2


class LocalModel(Closing, Generic[Item]):
    """A checkpoint that runs on this machine.

    Its arguments are checked at once, and a local folder's JSON files are read; the weights load
    at first use and are shared by everything that names the same model, revision, device and
    dtype. Pickles and copies carry the configuration only.

    Args:
        kind: `"embedder"` or `"reranker"`.
        source: Where the checkpoint comes from.
        placement: The devices and the dtype.
        pooling: Which rows make the vector; None for the checkpoint's own.
        max_length: Tokens that are read of a text; None for the checkpoint's own.
        batch_tokens: Tokens computed in one pass; None for the device's default.
        on_truncation: What happens when a text is longer.
        backend: What executes the model: `"torch"`, `"openvino"` or `"auto"`.

    Raises:
        ArgumentError: A value that can't be served.
        CheckpointError: A folder that is none, damaged, or of another kind.
        InputTypeError: A value of the wrong type.
    """

    _of_a_process = frozenset(
        {"_checkpoint", "_closed", "_digest", "_engine", "_flight_lock", "_in_flight", "_lock"}
    )

    def __init__(
        self,
        *,
        kind: Kind,
        source: Source,
        placement: Placement,
        pooling: str | None,
        max_length: int | None,
        batch_tokens: int | None,
        on_truncation: str,
        backend: str,
    ) -> None:
        self._kind = kind
        self._source = source
        self._placement = placement
        self._pooling = pooling
        self._max_length = _positive("max_length", max_length)
        self._batch_tokens = _positive("batch_tokens", batch_tokens)
        self._on_truncation: OnTruncation = check_on_truncation(on_truncation)
        self._backend = _checked_backend(backend, placement)
        self._start()
        if source.is_local:
            _ = self.checkpoint  # reading it is the check
        elif profile := find_profile(source.model):
            check_profile(profile, kind, source.model)
            self._check_length(profile.max_length)

    def _start(self) -> None:
        self._closed = False
        self._lock = threading.RLock()
        self._checkpoint: Checkpoint | None = None
        self._digest: str | None = None
        self._engine: Engine | None = None
        self._flight_lock = threading.Lock()
        self._in_flight: weakref.WeakSet[Future[Rows]] = weakref.WeakSet()
        _models.add(self)

    @property
    def model(self) -> str:
        """The hub id or folder."""
        return self._source.model

    @property
    def checkpoint(self) -> Checkpoint:
        """What the checkpoint says of itself; a hub id is downloaded for it if need be.

        Raises:
            CheckpointError: It can't be found, or it is damaged or of another kind.
        """
        # Without the lock where that is possible: another thread may hold it while weights load.
        if (known := self._checkpoint) is not None:
            return known
        with self._lock:
            if self._checkpoint is None:
                found = read(self._source, locate(self._source))
                check_kind(found, self._kind, pooling=self._pooling)
                self._check_length(found.max_length)
                self._checkpoint = found
            return self._checkpoint

    @property
    def max_length(self) -> int:
        """Tokens that are read of a text, special ones included."""
        return self._max_length or self.checkpoint.default_length

    @property
    def dtype(self) -> str:
        """The number format that computes on this machine: float32, float16 or bfloat16."""
        return self._placed()[1]

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that were asked for; empty for the best one of whichever machine loads it."""
        asked = self._placement.devices
        return ("cpu",) if self._backend == "openvino" and not asked else asked

    def close(self) -> None:
        """Let go of the model; the weights are freed when nobody else holds them.

        Callers that still wait get a `ClosedError`. Closing twice is harmless.
        """
        self._closed = True
        self._engine = None
        with self._flight_lock:
            waiting = list(self._in_flight)
        for future in waiting:
            future.cancel()

    def _check_length(self, most: int) -> None:
        if self._max_length is not None and self._max_length > most:
            msg = (
                f"max_length={self._max_length} is more than the {most} tokens that "
                f"{self.model!r} can take: pass {most} or less, or None."
            )
            raise ArgumentError(msg)

    def _placed(self) -> tuple[Sequence[str], str]:
        if self._backend == "openvino":
            return self.devices, "float32"
        profile = find_profile(self.model)
        if profile is None:
            # What another hub id says of itself is looked at when it loads.
            found = self.checkpoint if self._source.is_local else self._checkpoint
            profile = found.profile if found else None
        return self._placement.resolve(profile.half if profile else "float16")

    def _content(self) -> str:
        """Hash the checkpoint's files, once: what is loaded is what was hashed."""
        with self._lock:
            if self._digest is None:
                self._digest = self.checkpoint.digest()
            return self._digest

    def _loaded(self) -> Engine:
        with self._lock:
            self._check_open()
            if self._engine is None:
                engine = self._load()
                self._check_room(engine.tokenizer)
                self._engine = engine
                if self._closed:  # meanwhile, by somebody who found nothing to let go of
                    self._engine = None
                    self._check_open()
                return engine
            return self._engine

    def _load(self) -> Engine:
        found = self.checkpoint  # before the heavy imports: it may not be there at all
        from bge_core.engine import shared_engine

        devices, dtype = self._placed()
        key = (
            self._kind,
            found.folder.resolve(),
            # A folder that was trained further is another model.
            self._content(),
            self._pooling or found.pooling,
            devices,
            dtype,
            self._backend,
            self._source.trust_remote_code,
        )
        return shared_engine(key, lambda: self._new_engine(found, devices, dtype))

    def _new_engine(self, found: Checkpoint, devices: Sequence[str], dtype: str) -> Engine:
        from bge_core.checkpoint import load_tokenizer
        from bge_core.engine import Engine
        from bge_core.runner import load_runner

        logger.info("Loading %r on %s in %s.", found.name, ", ".join(devices), dtype)
        pooling = self._pooling or found.pooling
        trust = self._source.trust_remote_code
        tokenizer = load_tokenizer(found, trust_remote_code=trust)
        self._check_room(tokenizer)  # before the weights
        backend = self._backend
        fast: Runner | None = None
        if backend == "openvino" or (backend == "auto" and self._auto_openvino(devices, dtype)):
            from bge_core.openvino_runner import load_openvino_runner

            try:
                fast = load_openvino_runner(
                    found,
                    kind=self._kind,
                    pooling=pooling,
                    trust_remote_code=trust,
                    cache_folder=self._source.cache_folder,
                )
            except CheckpointError as exc:
                if backend == "openvino":
                    raise
                logger.debug("Torch serves queries, too: %s", exc)
        if backend == "openvino" and fast is not None:
            both = [fast] * len(devices)
            return Engine({"query": both, "bulk": both}, tokenizer, name=found.name)
        prompt = found.pair_prompt
        answer = None if prompt is None else tokenizer.first_id(prompt.answer)
        loaded = [
            load_runner(
                found,
                kind=self._kind,
                pooling=pooling,
                device=device,
                dtype=dtype,
                trust_remote_code=trust,
                answer=answer,
            )
            for device in devices
        ]
        # Bulk is level between the two, and packs need next to no padding.
        query = loaded if fast is None else [fast] * len(devices)
        return Engine({"query": query, "bulk": loaded}, tokenizer, name=found.name)

    def _auto_openvino(self, devices: Sequence[str], dtype: str) -> bool:
        # A reranker's work is bulk even when somebody waits for it.
        return (
            self._kind == "embedder"
            and dtype == "float32"
            and _on_cpu(devices)
            and find_spec("openvino") is not None
        )

    def _check_room(self, tokenizer: Tokenizer) -> None:
        extra = tokenizer.single_extra if self._kind == "embedder" else tokenizer.pair_extra
        if self.max_length <= extra:
            msg = (
                f"max_length={self.max_length} leaves no room for text: {extra} of them are "
                f"special tokens. Pass {extra + 1} or more."
            )
            raise ArgumentError(msg)

    @abstractmethod
    def _encode(
        self, tokenizer: Tokenizer, items: Sequence[Item]
    ) -> tuple[list[Tokens], list[bool]]:
        """Tokenise items; says of each whether it was cut."""

    def _ask(self) -> Ask | None:
        """Say what is asked for beside a plain row; nothing of most models."""
        return None

    def _call(self, items: Sequence[Item], encode: Encode[Item] | None = None) -> Call[Item]:
        """Make the call of items, which are tokenised by `encode`; None for `_encode`."""
        return Call(items, ask=self._ask(), encode=encode)

    def _compute(
        self,
        items: Sequence[Item],
        *,
        lane: Lane,
        encode: Encode[Item] | None = None,
        show_progress: bool = False,
    ) -> NDArray[np.float32] | None:
        """Tokenise and compute, a few slices ahead of the workers.

        Args:
            items: Texts or pairs; equal ones are computed once.
            lane: The engine's lane.
            encode: Tokenises items; None for `_encode`.
            show_progress: Show a progress bar.

        Returns:
            A row an item, [n, width]; None for no items, which need no model.
        """
        self._check_open()
        if not items:
            return None
        call = self._call(items, encode)
        self._fill(call, lane=lane, show_progress=show_progress)
        return call.stacked()

    def _fill(self, call: Call[Item], *, lane: Lane, show_progress: bool = False) -> None:
        """Compute a call's items and hand it their rows; `_compute` is this for plain rows."""
        engine = self._loaded()
        ahead: deque[Future[Rows]] = deque()
        with progress_bar(call.total, show=show_progress, unit=call.unit) as progress:
            try:
                for sequences in self._slices(engine.tokenizer, call):
                    ahead.append(self._submit(engine, call, sequences, lane, progress))
                    if len(ahead) > _SLICES_AHEAD:
                        call.take(self._wait(ahead.popleft()))
                while ahead:
                    call.take(self._wait(ahead.popleft()))
            finally:
                for future in ahead:
                    future.cancel()
        self._report(call)

    async def _acompute(
        self,
        items: Sequence[Item],
        *,
        lane: Lane,
        encode: Encode[Item] | None = None,
        show_progress: bool = False,
    ) -> NDArray[np.float32] | None:
        """Do the same on an event loop, without ever blocking it."""
        self._check_open()
        if not items:
            return None
        small = is_small(items)
        call = await off_loop(self._call, items, encode, inline=small)
        await self._afill(call, lane=lane, show_progress=show_progress)
        return await off_loop(call.stacked, inline=small)

    async def _afill(self, call: Call[Item], *, lane: Lane, show_progress: bool = False) -> None:
        """Do as `_fill` does, without ever blocking the event loop."""
        # A short query is tokenised in less time than a thread takes to be woken.
        small = is_small(call.items)
        engine = self._engine
        if engine is None:
            engine = await asyncio.to_thread(self._loaded)
        slices = self._slices(engine.tokenizer, call)
        ahead: deque[Future[Rows]] = deque()
        with progress_bar(call.total, show=show_progress, unit=call.unit) as progress:
            try:
                while sequences := await off_loop(next, slices, None, inline=small):
                    ahead.append(self._submit(engine, call, sequences, lane, progress))
                    if len(ahead) > _SLICES_AHEAD:
                        await self._hand_over(call, ahead.popleft(), inline=small)
                while ahead:
                    await self._hand_over(call, ahead.popleft(), inline=small)
            finally:
                for future in ahead:
                    future.cancel()
        await off_loop(self._report, call, inline=small)

    async def _hand_over(self, call: Call[Item], future: Future[Rows], *, inline: bool) -> None:
        rows = await self._await(future)
        await off_loop(call.take, rows, inline=inline)

    def _slices(self, tokenizer: Tokenizer, call: Call[Item]) -> Iterator[list[Tokens]]:
        """Tokenise slice by slice; all at once where a text that is too long is an error."""
        from bge_core.engine import staying

        strict = self._on_truncation == "error"
        encode = call.encode or self._encode
        whole: list[Tokens] = []
        # Windows of all texts would be too many to hold, and of them only a query can be cut.
        at_once = strict and not call.windowed
        if at_once:
            with staying():
                whole, call.cut = encode(tokenizer, call.items)
            self._report(call)
        for part in call.slices():
            if at_once:
                sequences = whole[part]
            else:
                with staying():
                    sequences, cut = encode(tokenizer, call.items[part])
                call.cut += cut
                if strict:
                    self._report(call)
            if call.ask is not None:
                sequences = [replace(sequence, ask=call.ask) for sequence in sequences]
            yield sequences

    def _report(self, call: Call[Item]) -> None:
        known = len(call.cut)  # fewer than all, while slices follow
        what = "texts" if self._kind == "embedder" else "pairs"
        report_truncation(
            what="queries, with room left for a passage," if call.windowed else what,
            cut=sum(call.cut[place] for place in call.places if place < known),
            total=len(call.places),
            max_length=self.max_length,
            policy=self._on_truncation,
            model=self.model,
        )

    def _submit(
        self,
        engine: Engine,
        call: Call[Item],
        sequences: Sequence[Tokens],
        lane: Lane,
        progress: Callable[[int], None] | None,
    ) -> Future[Rows]:
        future = engine.submit(
            sequences, lane=lane, caller=call, budget=self._batch_tokens, progress=progress
        )
        with self._flight_lock:
            self._in_flight.add(future)
        if self._closed:
            future.cancel()
        return future

    def _not_finite(self, which: str) -> ComputationError:
        return not_finite(self.model, which)


class Call(Generic[Item]):
    """One call's items, each distinct one once, and what has come of them.

    Args:
        items: All items, in order.
        ask: What is asked for each of them beside a plain row.
        encode: Tokenises them; None for the model's own way.
    """

    windowed = False
    unit = "text"

    def __init__(
        self,
        items: Sequence[Item],
        *,
        ask: Ask | None = None,
        encode: Encode[Item] | None = None,
    ) -> None:
        index: dict[Item, int] = {}
        self.places = [index.setdefault(item, len(index)) for item in items]
        self.items: list[Item] = list(index)
        self.ask = ask
        self.encode: Encode[Item] | None = encode
        self.cut: list[bool] = []
        self.rows: Rows = []

    @property
    def total(self) -> int | None:
        """How many sequences there will be; None where only tokenising tells."""
        return len(self.items)

    def slices(self) -> Iterator[slice]:
        """Say which items are tokenised and submitted together, in order."""
        for start in range(0, len(self.items), _SLICE):
            yield slice(start, start + _SLICE)

    def take(self, rows: Rows) -> None:
        """Take the rows of the next slice."""
        self.rows += rows

    def name_of(self, place: int) -> str:
        """Name a distinct item for a message, by where it came first."""
        return f"texts[{self.places.index(place)}]"

    def stacked(self) -> NDArray[np.float32]:
        """Give a row for each of all items, in order, [n, width]."""
        rows = np.empty((len(self.rows), len(self.rows[0])), dtype=np.float32)
        # Slice by slice, so that other threads get their turn between two of them.
        for start in range(0, len(rows), _SLICE):
            end = start + _SLICE
            np.stack(self.rows[start:end], out=rows[start:end])
        self.rows.clear()
        return rows if len(self.items) == len(self.places) else rows[self.places]


def _positive(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        msg = f"{name} must be a whole number of tokens or None, got {value!r}."
        raise InputTypeError(msg)
    if value < 1:
        msg = f"{name} must be 1 or more, got {value}."
        raise ArgumentError(msg)
    return int(value)


async def off_loop(work: Callable[..., Done], *arguments: object, inline: bool) -> Done:
    """Work in a thread, or at once where it is too little to stop an event loop."""
    return work(*arguments) if inline else await asyncio.to_thread(work, *arguments)


def slices_of(items: Sequence[Any], *, characters: int) -> Iterator[slice]:
    """Cut items into slices of so many characters, and no more items than any slice has.

    A longer item is a slice of its own.
    """
    start = total = 0
    for end, item in enumerate(items):
        length = _characters(item)
        if end > start and (total + length > characters or end - start == _SLICE):
            yield slice(start, end)
            start = end
            total = 0
        total += length
    yield slice(start, len(items))


def _characters(item: str | tuple[str, str]) -> int:
    return len(item) if isinstance(item, str) else sum(map(len, item))


def not_finite(model: str, which: str) -> ComputationError:
    """Say that a model gave NaN or infinity for one text."""
    msg = (
        f"{model!r} gave NaN or infinity for {which}: half precision overflows on some texts. "
        "Pass dtype='float32' or dtype='bfloat16'; if that is what runs, the weights are damaged."
    )
    return ComputationError(msg)


@contextmanager
def progress_bar(
    total: int | None, *, show: bool, unit: str = "text"
) -> Iterator[Callable[[int], None] | None]:
    """Give the function that moves a progress bar on, or None where none is shown."""
    if not show:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit=unit) as bar:

        def move(count: int) -> None:
            bar.update(count)

        yield move


def _checked_backend(backend: str, placement: Placement) -> str:
    if backend not in ("torch", "openvino", "auto"):
        msg = f"backend={backend!r} is not served: use 'torch', 'openvino' or 'auto'."
        raise ArgumentError(msg)
    if backend == "openvino" and not _on_cpu(placement.devices):
        msg = (
            f"backend='openvino' runs on the CPU, not on device={list(placement.devices)}: "
            "pass device='cpu', or backend='torch'."
        )
        raise ArgumentError(msg)
    if backend == "openvino" and placement.dtype not in ("auto", "float32"):
        msg = (
            f"backend='openvino' computes in float32, not in dtype={placement.dtype!r}: leave "
            "dtype out, or pass backend='torch'."
        )
        raise ArgumentError(msg)
    return backend


def _on_cpu(devices: Sequence[str]) -> bool:
    return all(device.partition(":")[0] == "cpu" for device in devices)


_models: weakref.WeakSet[LocalModel[Any]] = weakref.WeakSet()


def _in_child() -> None:
    """Replace what another thread may have held when the process forked."""
    for model in list(_models):
        model._lock = threading.RLock()
        model._flight_lock = threading.Lock()
        model._in_flight = weakref.WeakSet()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
