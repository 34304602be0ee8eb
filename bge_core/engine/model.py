"""The model that embedders and rerankers have: on this machine, or on a server."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from bge_core.errors import ArgumentError
from bge_core.lifecycle import ContextManaged
from bge_core.progress import progress_bar

if TYPE_CHECKING:
    from bge_core.arguments import Priority
    from bge_core.checkpoints.catalog import PairPrompt, Profile
    from bge_core.checkpoints.metadata import Checkpoint
    from bge_core.engine.call import Call, Progress, Steps
    from bge_core.engine.local_model import LocalModel
    from bge_core.engine.stats import Counters, ModelStats
    from bge_core.errors import ComputationError
    from bge_core.tokenizer import Tokenizer

__all__ = ["HasModel", "TextModel"]


class TextModel(Protocol):
    """What embedders and rerankers have: a model on this machine, or one on a server."""

    @property
    def model(self) -> str:
        """The hub id or folder."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine."""
        ...

    @property
    def ready(self) -> bool:
        """Whether the next call starts without loading or downloading anything."""
        ...

    @property
    def profile(self) -> Profile | None:
        """Its row in the table of published checkpoints; None if it has none."""
        ...

    @property
    def prompts(self) -> Mapping[str, str]:
        """The prompts that the checkpoint carries, by name."""
        ...

    @property
    def pair_prompt(self) -> PairPrompt | None:
        """How it is asked to score a pair, where it is a language model."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens that are read of a text, special ones included."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that it can take at all."""
        ...

    @property
    def truncate_dim(self) -> int | None:
        """How many of a vector's numbers are kept, where its checkpoint says it; None for all."""
        ...

    @property
    def dimension(self) -> int | None:
        """Length of its vectors, as far as its files say it."""
        ...

    @property
    def known_dimension(self) -> int | None:
        """As `dimension`, of what is here already: nothing is fetched for it."""
        ...

    @property
    def dtype(self) -> str:
        """The number format that computes."""
        ...

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """What of it changes the numbers: its weights or its name, limits, number format."""
        ...

    @property
    def counters(self) -> Counters:
        """What counts its work."""
        ...

    def stats(self) -> ModelStats:
        """Return what it has done so far."""
        ...

    def tokenizer(self) -> Tokenizer:
        """Return its tokenizer, loading what that needs."""
        ...

    def steps(
        self, call: Call[Any], *, priority: Priority, progress: Progress = None
    ) -> Steps[None]:
        """Compute a call's items and add their rows to it."""
        ...

    def report_truncation(
        self,
        what: str,
        lengths: Sequence[int],
        *,
        pairs: Sequence[int] | None = None,
        windows: bool = False,
    ) -> None:
        """Log or refuse that texts were truncated, as the model's owner asked for."""
        ...

    def non_finite_error(self, which: str) -> ComputationError:
        """Return the error that says that NaN or infinity came out."""
        ...

    def check_open(self) -> None:
        """Raise a ClosedError if it was closed."""
        ...

    def close(self) -> None:
        """Release it; callers that still wait get a ClosedError."""
        ...


class HasModel(ContextManaged):
    """An object over a model; closing the one closes the other.

    Pickles and copies carry the configuration, and load a model of their own when they are used.
    """

    _model: TextModel

    @property
    def model(self) -> str:
        """The hub id or folder."""
        return self._model.model

    @property
    def is_local(self) -> bool:
        """Whether the model runs on this machine, and not on a server."""
        return self._model.is_local

    @property
    def dtype(self) -> str:
        """The number format that computes; `"unknown"` on a server, which doesn't say it."""
        return self._model.dtype

    @property
    def local(self) -> LocalModel:
        """The model on this machine: its checkpoint, devices and engine.

        Raises:
            ArgumentError: It is on a server.
        """
        if not self._model.is_local:
            msg = f"{self.model!r} runs on a server: leave endpoint=... out to run it here."
            raise ArgumentError(msg)
        return cast("LocalModel", self._model)

    @property
    def checkpoint(self) -> Checkpoint:
        """What the checkpoint says of itself; a hub id is downloaded for it if need be.

        Raises:
            ArgumentError: The model is on a server.
            CheckpointError: It can't be found, or it is damaged or of another kind.
        """
        return self.local.checkpoint

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that were asked for; empty for the best one of whichever machine loads it.

        Raises:
            ArgumentError: The model is on a server.
        """
        return self.local.devices

    @property
    def max_length(self) -> int:
        """Tokens that are read of a text or pair, special ones included."""
        return self._model.max_length

    def stats(self) -> ModelStats:
        """Return what this object has done so far, and what waits for its model right now.

        Reading it loads nothing. After `close` it says what was done until then.
        """
        return self._model.stats()

    def close(self) -> None:
        """Release the model; the weights are freed when nobody else holds them.

        Callers that still wait get a `ClosedError`. Closing twice is harmless.
        """
        self._model.close()

    def _begin(self, texts: int) -> None:
        """Count a call whose arguments are accepted, unless the model is closed."""
        self._model.check_open()
        self._model.counters.add_request(texts)

    def _compute_with_bar(
        self, call: Call[Any], *, priority: Priority, show_progress: bool
    ) -> Steps[None]:
        """Compute a call's items beside a bar of all that was given, equal ones included."""
        given = len(call.inverse)
        with progress_bar(given, show=show_progress) as progress:
            yield from self._model.steps(call, priority=priority, progress=progress)
            if progress is not None and len(call.items) < given:
                progress(given - len(call.items))  # those that are equal to another

    def __getstate__(self) -> dict[str, Any]:
        """Return the configuration; a copy's model is another, which can be closed by itself."""
        return {**self.__dict__, "_model": copy.copy(self._model)}
