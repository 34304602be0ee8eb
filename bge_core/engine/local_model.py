"""What an embedder and a reranker share: configuration, loading, computing, closing."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Generic

import numpy as np

from bge_core import arguments
from bge_core.backends.runner_options import RunnerOptions
from bge_core.backends.table import BACKENDS, check_backend, choose_backends, load_runners
from bge_core.checkpoints.catalog import find_profile
from bge_core.checkpoints.metadata import check_kind, check_profile, read
from bge_core.checkpoints.source import locate
from bge_core.engine.call import Call, Item, non_finite_error, progress_bar, run_off_loop
from bge_core.engine.process import hold_interpreter_exit, on_fork
from bge_core.errors import ArgumentError
from bge_core.lifecycle import Closeable
from bge_core.tokenizer import can_tokenize_inline, report_truncation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.checkpoints.metadata import Checkpoint, Kind
    from bge_core.checkpoints.source import Source
    from bge_core.devices import Placement
    from bge_core.engine.call import Encode
    from bge_core.engine.scheduler import Engine, Priority, Rows
    from bge_core.errors import ComputationError
    from bge_core.tokenizer import Tokenizer, TokenSequence

__all__ = ["LocalModel"]

logger = logging.getLogger(__name__)

_SLICES_AHEAD = 2


class LocalModel(Closeable, Generic[Item]):
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

    _unpickled_attributes = frozenset(
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
        self._on_truncation = arguments.one_of(
            "on_truncation", on_truncation, arguments.ON_TRUNCATION
        )
        self._backend = check_backend(backend, devices=placement.devices, dtype=placement.dtype)
        self._start()
        if source.is_local:
            _ = self.checkpoint  # reading it is the check
        elif profile := find_profile(source.model):
            check_profile(profile, kind, source.model)
            if profile.kind == kind:
                self._check_length(profile.max_length)

    def _start(self) -> None:
        self._closed = False
        self._lock = threading.RLock()
        self._checkpoint: Checkpoint | None = None
        self._digest: str | None = None
        self._engine: Engine | None = None
        self._in_flight: weakref.WeakSet[Future[Rows]] = weakref.WeakSet()
        self._flight_lock = threading.Lock()
        on_fork(self, LocalModel._after_fork)

    def _after_fork(self) -> None:
        """Replace what another thread may have held."""
        self._lock = threading.RLock()
        self._flight_lock = threading.Lock()
        self._in_flight = weakref.WeakSet()

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
        only = BACKENDS[self._backend].device if self._backend in BACKENDS else None
        return (only,) if only and not asked else asked

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
        backend = BACKENDS.get(self._backend)
        if backend is not None and backend.dtype is not None:
            return self.devices, backend.dtype
        profile = find_profile(self.model, self._kind)
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
        from bge_core.engine.registry import shared_engine, shared_output_cache

        devices, dtype = self._placed()
        content = self._content()
        options = RunnerOptions(
            kind=self._kind,
            pooling=self._pooling or found.pooling,
            dtype=dtype,
            trust_remote_code=self._source.trust_remote_code,
            cache_folder=self._source.cache_folder,
            output_cache=shared_output_cache((content, dtype), self._source.name),
        )
        chosen = choose_backends(self._backend, found, options, devices)
        key = (
            self._kind,
            found.folder.resolve(),
            # A folder that was trained further is another model.
            content,
            options.pooling,
            devices,
            dtype,
            *chosen.values(),
            options.trust_remote_code,
        )
        return shared_engine(key, lambda: self._new_engine(found, options, devices, chosen))

    def _new_engine(
        self,
        found: Checkpoint,
        options: RunnerOptions,
        devices: Sequence[str],
        chosen: Mapping[Priority, str],
    ) -> Engine:
        from bge_core.backends.loading import load_tokenizer
        from bge_core.engine.scheduler import Engine

        logger.info("Loading %r on %s in %s.", found.name, ", ".join(devices), options.dtype)
        tokenizer = load_tokenizer(found, trust_remote_code=options.trust_remote_code)
        self._check_room(tokenizer)  # before the weights
        if found.pair_prompt is not None:
            options = replace(options, answer=tokenizer.first_id(found.pair_prompt.answer))
        return Engine(
            load_runners(chosen, found, options, devices),
            tokenizer,
            name=found.name,
            output_cache=options.output_cache,
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
    ) -> tuple[list[TokenSequence], list[bool]]:
        """Tokenise items; says of each whether it was cut."""

    def _call(self, items: Sequence[Item], encode: Encode[Item] | None = None) -> Call[Item]:
        """Make the call of items, which are tokenised by `encode`; None for `_encode`."""
        return Call(items, encode=encode)

    def _compute(
        self,
        items: Sequence[Item],
        *,
        priority: Priority,
        encode: Encode[Item] | None = None,
        show_progress: bool = False,
    ) -> NDArray[np.float32] | None:
        """Tokenise and compute, a few slices ahead of the workers.

        Args:
            items: Texts or pairs; equal ones are computed once.
            priority: The engine's priority.
            encode: Tokenises items; None for `_encode`.
            show_progress: Show a progress bar.

        Returns:
            A row an item, [n, width]; None for no items, which need no model.
        """
        self._check_open()
        if not items:
            return None
        call = self._call(items, encode)
        self._fill(call, priority=priority, show_progress=show_progress)
        return call.stacked()

    def _fill(self, call: Call[Item], *, priority: Priority, show_progress: bool = False) -> None:
        """Compute a call's items and hand it their rows; `_compute` is this for plain rows."""
        engine = self._loaded()
        ahead: deque[Future[Rows]] = deque()
        with progress_bar(call.total, show=show_progress, unit=call.unit) as progress:
            try:
                for sequences in self._slices(engine.tokenizer, call):
                    ahead.append(self._submit(engine, call, sequences, priority, progress))
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
        priority: Priority,
        encode: Encode[Item] | None = None,
        show_progress: bool = False,
    ) -> NDArray[np.float32] | None:
        """Do the same on an event loop, without ever blocking it."""
        self._check_open()
        if not items:
            return None
        small = can_tokenize_inline(items)
        call = await run_off_loop(self._call, items, encode, inline=small)
        await self._afill(call, priority=priority, show_progress=show_progress)
        return await run_off_loop(call.stacked, inline=small)

    async def _afill(
        self, call: Call[Item], *, priority: Priority, show_progress: bool = False
    ) -> None:
        """Do as `_fill` does, without ever blocking the event loop."""
        # A short query is tokenised in less time than a thread takes to be woken.
        small = can_tokenize_inline(call.items)
        engine = self._engine
        if engine is None:
            engine = await asyncio.to_thread(self._loaded)
        slices = self._slices(engine.tokenizer, call)
        ahead: deque[Future[Rows]] = deque()
        with progress_bar(call.total, show=show_progress, unit=call.unit) as progress:
            try:
                while sequences := await run_off_loop(next, slices, None, inline=small):
                    ahead.append(self._submit(engine, call, sequences, priority, progress))
                    if len(ahead) > _SLICES_AHEAD:
                        await self._hand_over(call, ahead.popleft(), inline=small)
                while ahead:
                    await self._hand_over(call, ahead.popleft(), inline=small)
            finally:
                for future in ahead:
                    future.cancel()
        await run_off_loop(self._report, call, inline=small)

    async def _hand_over(self, call: Call[Item], future: Future[Rows], *, inline: bool) -> None:
        rows = await self._await(future)
        await run_off_loop(call.take, rows, inline=inline)

    def _slices(self, tokenizer: Tokenizer, call: Call[Item]) -> Iterator[list[TokenSequence]]:
        """Tokenise slice by slice; all at once where a text that is too long is an error."""
        strict = self._on_truncation == "error"
        encode = call.encode or self._encode
        whole: list[TokenSequence] = []
        # Windows of all texts would be too many to hold, and of them only a query can be cut.
        at_once = strict and not call.windowed
        if at_once:
            with hold_interpreter_exit():
                whole, call.cut = encode(tokenizer, call.items)
            self._report(call)
        for part in call.slices():
            if at_once:
                sequences = whole[part]
            else:
                with hold_interpreter_exit():
                    sequences, cut = encode(tokenizer, call.items[part])
                call.cut += cut
                if strict:
                    self._report(call)
            if call.requested_outputs is not None:
                sequences = [
                    replace(
                        sequence,
                        requested_outputs=call.requested_outputs,
                        shares_outputs=call.shares_outputs,
                    )
                    for sequence in sequences
                ]
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
        sequences: Sequence[TokenSequence],
        priority: Priority,
        progress: Callable[[int], None] | None,
    ) -> Future[Rows]:
        future = engine.submit(
            sequences, priority=priority, caller=call, budget=self._batch_tokens, progress=progress
        )
        with self._flight_lock:
            self._in_flight.add(future)
        if self._closed:
            future.cancel()
        return future

    def _non_finite_error(self, which: str) -> ComputationError:
        return non_finite_error(self.model, which)


def _positive(name: str, value: object) -> int | None:
    if value is None:
        return None
    return arguments.whole_number(name, value, unit=" of tokens", instead=" or None")
