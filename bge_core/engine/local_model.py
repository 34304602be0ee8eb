"""A checkpoint that runs on this machine: configuration, loading, computing, closing."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bge_core.arguments import shown
from bge_core.backends.runner_options import RunnerOptions
from bge_core.backends.table import BACKENDS, check_backend, choose_backends, load_runners
from bge_core.checkpoints.catalog import find_profile
from bge_core.checkpoints.metadata import (
    check_cached,
    check_kind,
    check_loadable,
    check_profile,
    read,
)
from bge_core.checkpoints.source import locate
from bge_core.engine.call import non_finite_error
from bge_core.engine.process import hold_interpreter_exit, on_fork
from bge_core.engine.stats import Counters
from bge_core.errors import ArgumentError, closed_while_waiting_error
from bge_core.layers import LayerOptions
from bge_core.lifecycle import Closeable
from bge_core.tokenizer import report_truncation, room_remedy

if TYPE_CHECKING:
    from bge_core.arguments import Priority
    from bge_core.checkpoints.catalog import PairPrompt, Profile
    from bge_core.checkpoints.metadata import Checkpoint, Kind
    from bge_core.engine.call import Call, Progress, Steps
    from bge_core.engine.scheduler import Engine, Rows
    from bge_core.engine.stats import ModelStats
    from bge_core.errors import ComputationError
    from bge_core.layers import Depth
    from bge_core.options import ModelOptions
    from bge_core.tokenizer import Tokenizer, TokenSequence

__all__ = ["LocalModel"]

logger = logging.getLogger(__name__)

# Slices that wait, at the least: more where the devices take more than that.
_SLICES_AHEAD = 2
_POOLINGS = ("cls", "mean", "last")


class LocalModel(Closeable):
    """A checkpoint that runs on this machine.

    Its options are checked, and a local folder's JSON files are read at once; the weights load
    at first use and are shared by everything that names the same model, revision, device and
    dtype. Pickles and copies carry the configuration only.

    Args:
        options: Where it comes from, where it runs, and how much it reads.
        kind: `"embedder"` or `"reranker"`.
        pooling: Which rows make the vector; None for the checkpoint's own.

    Raises:
        ArgumentError: A value that is not supported.
        CheckpointError: A folder that is none, damaged, or of another kind.
    """

    _unpickled_attributes = Closeable._unpickled_attributes | {
        "_cached",
        "_checkpoint",
        "_digest",
        "counters",
        "_engine",
        "_fitting_prompts",
        "_lock",
    }

    def __init__(
        self,
        options: ModelOptions,
        *,
        kind: Kind,
        pooling: str | None = None,
        layers: LayerOptions | None = None,
    ) -> None:
        self.options = options
        self._layers = LayerOptions() if layers is None else layers
        self._kind = kind
        self._source = options.source
        self._placement = options.placement
        self._pooling = pooling
        self._backend = check_backend(
            options.backend, devices=options.placement.devices, dtype=options.placement.dtype
        )
        self._init_process_state()
        if self.is_local_folder:
            _ = self.checkpoint  # reading it is the check
            return
        if profile := find_profile(self.model):
            check_profile(profile, kind, self.model)
            if profile.kind == kind:
                self._check_length(profile.max_length)
                self._layers.resolve(self.model, profile.layer_heads)
                return
        # Of another id what it says of itself counts, if that is here already.
        self._cached: Checkpoint | None = check_cached(self._source, kind, pooling=pooling)

    def _init_process_state(self) -> None:
        super()._init_process_state()
        self._lock = threading.RLock()
        self._checkpoint: Checkpoint | None = None
        self._cached = None
        self._digest: str | None = None
        self._engine: Engine | None = None
        self._fitting_prompts: set[str] = set()
        self.counters = Counters(self._flight_lock)
        on_fork(self, LocalModel.after_fork)

    def after_fork(self) -> None:
        """Replace what another thread may have held."""
        super().after_fork()
        self._lock = threading.RLock()
        self.counters = Counters(self._flight_lock)

    @property
    def model(self) -> str:
        """The hub id or folder."""
        return self._source.model

    @property
    def is_local(self) -> bool:
        """True: it runs on this machine."""
        return True

    @property
    def is_local_folder(self) -> bool:
        """Whether it is a folder, and no hub id."""
        return self._source.is_local

    @property
    def ready(self) -> bool:
        """Whether it is loaded."""
        return self._engine is not None

    @property
    def engine(self) -> Engine | None:
        """What computes, if it is loaded."""
        return self._engine

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
                check_loadable(found)
                self._check_length(found.max_length)
                self._layers.resolve(self.model, found.layer_heads)
                self._checkpoint = found
            return self._checkpoint

    @property
    def known_checkpoint(self) -> Checkpoint | None:
        """`checkpoint`, unless a hub id would have to be fetched for it."""
        return self.checkpoint if self.is_local_folder else self._checkpoint or self._cached

    @property
    def profile(self) -> Profile | None:
        """Its row in the table of published checkpoints; a published id needs no files."""
        return find_profile(self.model, self._kind) or self.checkpoint.profile

    @property
    def prompts(self) -> Mapping[str, str]:
        """The prompts that the checkpoint carries, by name."""
        return self.checkpoint.prompts

    @property
    def pair_prompt(self) -> PairPrompt | None:
        """How it is asked to score a pair, where it is a language model."""
        return self.checkpoint.pair_prompt

    @property
    def backend(self) -> str:
        """What executes it: `"torch"`, `"openvino"`, or `"auto"` for whichever is installed."""
        return self._backend

    @property
    def pooling(self) -> str | None:
        """Which rows make the vector."""
        return self._pooling or self.checkpoint.pooling

    @property
    def truncate_dim(self) -> int | None:
        """How many of a vector's numbers are kept, where the checkpoint says it; None for all."""
        return self.checkpoint.truncate_dim

    @property
    def dimension(self) -> int | None:
        """Length of its vectors; None where modules of its own decide."""
        return self._dimension_of(self.checkpoint)

    @property
    def known_dimension(self) -> int | None:
        """As `dimension`; of a hub id what the table of published checkpoints says."""
        if (found := self.known_checkpoint) is not None:
            return self._dimension_of(found)
        profile = find_profile(self.model, self._kind)
        return profile.dimension if profile else None

    def _dimension_of(self, found: Checkpoint) -> int | None:
        pooling = self._pooling or found.pooling
        standard = found.only_standard_modules and pooling in _POOLINGS
        return found.hidden_size if standard else None

    @property
    def max_length(self) -> int:
        """Tokens that are read of a text, special ones included."""
        return self.options.max_length or self.checkpoint.default_max_length

    @property
    def capacity(self) -> int:
        """Tokens that it can take at all."""
        return self.checkpoint.max_length

    @property
    def depth(self) -> Depth | None:
        """How much is computed of a reranker with a score after each layer; None for the rest."""
        return self._layers.resolve(self.model, self.checkpoint.layer_heads)

    @property
    def dtype(self) -> str:
        """The number format that computes on this machine: float32, float16, bfloat16 or int8."""
        return self.placed()[1]

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that were asked for; empty for the best one of whichever machine loads it."""
        asked = self._placement.devices
        only = BACKENDS[self._backend].device if self._backend in BACKENDS else None
        return (only,) if only and not asked else asked

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """What of it changes the numbers: weights, pooling, length, number format."""
        depth = self.depth
        known = (self.content(), self.pooling, self.max_length, self.dtype)
        return known if depth is None else (*known, depth)

    def close(self) -> None:
        """Release the model; the weights are freed when nobody else holds them.

        Callers that still wait get a `ClosedError`. Closing twice is harmless.
        """
        self._closed = True
        self.stats()  # which keeps what goes with the engine
        self._engine = None
        super().close()

    def stats(self) -> ModelStats:
        """Return what it has done so far, and what waits for it."""
        if (engine := self._engine) is None:
            return self.counters.stats()
        self.counters.note_cache_hits(engine.cache_hits)
        return self.counters.stats(engine.waiting())

    def placed(self) -> tuple[Sequence[str], str]:
        """Return the devices that compute on this machine, and their number format."""
        backend = BACKENDS.get(self._backend)
        if backend is not None and backend.dtype is not None:
            return self.devices, backend.dtype
        profile = find_profile(self.model, self._kind)
        if profile is None:
            # What another hub id says of itself is looked at when it loads.
            found = self.known_checkpoint
            profile = found.profile if found else None
        return self._placement.resolve(profile.half if profile else "float16")

    def content(self) -> str:
        """Hash the checkpoint's files, once: what is loaded is what was hashed."""
        with self._lock:
            if self._digest is None:
                self._digest = self.checkpoint.digest()
            return self._digest

    def tokenizer(self) -> Tokenizer:
        """Return its tokenizer, loading the model if need be."""
        return self.loaded().tokenizer

    def loaded(self) -> Engine:
        """Return what computes, loading it if need be.

        Raises:
            ClosedError: The model was closed.
        """
        # Without the lock where that is possible, as in `checkpoint`.
        if (engine := self._engine) is not None and not self._closed:
            return engine
        with self._lock:
            self.check_open()
            if self._engine is None:
                engine = self._load()
                self._check_room(engine.tokenizer)
                self._engine = engine
                if self._closed:  # meanwhile, by somebody who found nothing to release
                    self._engine = None
                    self.check_open()
                return engine
            return self._engine

    def _check_length(self, limit: int) -> None:
        asked = self.options.max_length
        if asked is not None and asked > limit:
            msg = (
                f"max_length={shown(asked)} is more than the {limit} tokens that {self.model!r} "
                f"can take: pass {limit} or less, or None."
            )
            raise ArgumentError(msg)

    def _load(self) -> Engine:
        found = self.checkpoint  # before the heavy imports: it may not be there at all
        from bge_core.engine.registry import shared_engine, shared_output_cache

        devices, dtype = self.placed()
        content = self.content()
        options = RunnerOptions(
            kind=self._kind,
            pooling=self._pooling or found.pooling,
            dtype=dtype,
            trust_remote_code=self._source.trust_remote_code,
            cache_folder=self._source.cache_folder,
            depth=self.depth,
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
            options.depth,
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
        if (prompt := found.pair_prompt) is not None:
            answer = None if prompt.answer is None else tokenizer.first_id(prompt.answer)
            options = replace(options, answer=answer, tail=len(tokenizer.prompt_tail(prompt)))
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
                f"max_length={self.max_length} leaves no room for text: the special tokens "
                f"alone take {extra}. "
                + room_remedy(
                    extra + 1,
                    capacity=self.capacity,
                    otherwise="a checkpoint whose files allow more",
                )
            )
            raise ArgumentError(msg)

    def _check_prompt(self, tokenizer: Tokenizer, prompt: str) -> None:
        """Refuse a prompt that fills `max_length`: whatever stood behind it had one vector.

        Each prompt is tokenised for it once, and not in front of every query.
        """
        if prompt in self._fitting_prompts:
            return
        taken = tokenizer.count([prompt])[0]
        if self.checkpoint.truncation_side == "right" and (
            taken + tokenizer.single_extra >= self.max_length
        ):
            msg = (
                f"max_length={self.max_length} leaves no room for text: what is put in front of it "
                f"takes {taken} tokens, and {tokenizer.single_extra} are special. "
                + room_remedy(
                    taken + tokenizer.single_extra + 1,
                    capacity=self.capacity,
                    otherwise="a shorter instruction",
                )
            )
            raise ArgumentError(msg)
        self._fitting_prompts.add(prompt)

    def steps(
        self, call: Call[Any], *, priority: Priority, progress: Progress = None
    ) -> Steps[None]:
        """Tokenise and compute a call's items, a few slices ahead of the workers.

        Args:
            call: Texts or pairs; their rows are added to it.
            priority: `"interactive"` for what somebody waits for, else `"background"`.
            progress: Called in a worker with the number of sequences done.

        Yields:
            Futures of rows.

        Raises:
            ClosedError: The model was closed.
            TruncationError: An item is too long and `on_truncation="error"`.
        """
        self.check_open()
        if not call.items:  # nothing needs no model
            return
        engine = self.loaded()
        if call.prompt:
            self._check_prompt(engine.tokenizer, call.prompt)
        budget = self.options.batch_tokens
        enough = engine.tokens_ahead(priority, budget) if call.rows_are_small else 0
        ahead: deque[Future[Rows]] = deque()
        waiting: deque[int] = deque()  # of each slice its tokens
        try:
            for sequences in self._slices(engine.tokenizer, call):
                future = engine.submit(
                    sequences,
                    priority=priority,
                    caller=call,
                    budget=budget,
                    progress=progress,
                    counters=self.counters,
                )
                self._track(future)
                ahead.append(future)
                waiting.append(sum(map(len, sequences)))
                while len(ahead) > _SLICES_AHEAD and sum(waiting) > enough:
                    waiting.popleft()
                    call.add_rows((yield ahead.popleft()))
            while ahead:
                call.add_rows((yield ahead.popleft()))
        except CancelledError as exc:
            raise closed_while_waiting_error(self.model) from exc
        finally:
            for future in ahead:
                future.cancel()
        if any(call.truncated):
            self._report(call)

    def _slices(self, tokenizer: Tokenizer, call: Call[Any]) -> Iterator[list[TokenSequence]]:
        """Tokenise slice by slice; all at once where a text that is too long is an error."""
        whole: list[TokenSequence] = []
        strict = call.reports and self.options.on_truncation == "error"
        if strict:
            with hold_interpreter_exit():
                whole, call.truncated = self._encode(tokenizer, call, call.items)
            self._report(call)
        for part in call.slices():
            if strict:
                sequences = whole[part]
            else:
                with hold_interpreter_exit():
                    sequences, truncated = self._encode(tokenizer, call, call.items[part])
                call.truncated += truncated
            if call.prompt and not self.checkpoint.pools_prompts:
                length = tokenizer.prompt_length(call.prompt)
                sequences = [replace(sequence, prompt_length=length) for sequence in sequences]
            if call.requested_outputs is not None or call.parts:
                sequences = [
                    replace(
                        sequence,
                        requested_outputs=call.requested_outputs,
                        # The outputs of a part of a text are nobody else's.
                        shares_outputs=call.shares_outputs and item not in call.parts,
                    )
                    for item, sequence in zip(call.items[part], sequences, strict=True)
                ]
            yield sequences

    def _encode(
        self, tokenizer: Tokenizer, call: Call[Any], items: Sequence[Any]
    ) -> tuple[list[TokenSequence], list[int]]:
        started = time.perf_counter()
        if self._kind == "reranker":
            encoded = tokenizer.encode_pairs(
                items, self.pair_prompt, max_length=self.max_length, limit=self.capacity
            )
        elif any(call.around):
            encoded = tokenizer.encode_between(
                items, around=call.around, max_length=self.max_length, limit=self.capacity
            )
        else:
            encoded = tokenizer.encode(items, max_length=self.max_length)
        self.counters.add_tokenizing(time.perf_counter() - started)
        return encoded

    def _report(self, call: Call[Any]) -> None:
        if call.reports:
            self.report_truncation(
                call.what,
                call.truncated_lengths(),
                pairs=call.truncated_pairs(),
                windows=call.windows,
            )

    def report_truncation(
        self,
        what: str,
        lengths: Sequence[int],
        *,
        pairs: Sequence[int] | None = None,
        windows: bool = False,
    ) -> None:
        """Log once a call which texts were truncated, or refuse them; see `tokenizer`.

        Raises:
            TruncationError: Some were, and `on_truncation="error"`.
        """
        report_truncation(
            what=what,
            lengths=lengths,
            pairs=pairs,
            max_length=self.max_length,
            capacity=self.capacity,
            windows=windows,
            policy=self.options.on_truncation,
            model=self.model,
        )

    def non_finite_error(self, which: str) -> ComputationError:
        """Return the error that says that NaN or infinity came out."""
        return non_finite_error(self.model, which)
