"""Fakes for the tests of your own code: no weights, no torch, no network, and the same checks.

`fake_embedder` and `fake_reranker` take what `make_embedder` and `make_reranker` take, refuse what
they refuse, and give deterministic numbers that follow the words that texts share. The hosts' fakes
are in `langchain_bge.testing` and `llamaindex_bge.testing`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_core.embedder import Embedder
from bge_core.engine.call import Call, non_finite_error
from bge_core.engine.stats import Counters
from bge_core.errors import ArgumentError, closed_error
from bge_core.factory import make_embedder, make_reranker
from bge_core.progress import progress_bar
from bge_core.prompts import QueryExample
from bge_core.reranker import Reranker
from bge_core.servers.models import find_served_profile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.arguments import Priority
    from bge_core.checkpoints.catalog import PairPrompt, Profile
    from bge_core.checkpoints.metadata import Checkpoint
    from bge_core.engine.call import Progress, Steps
    from bge_core.engine.stats import ModelStats
    from bge_core.errors import ComputationError
    from bge_core.reranker import Scorer
    from bge_core.tokenizer import Tokenizer
    from bge_core.windows import Span

__all__ = ["fake_embedder", "fake_reranker"]

_DIMENSION = 384
# Chinese and Japanese have no spaces between words: there each character is one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def fake_embedder(model: str | os.PathLike[str], **options: Any) -> Embedder:
    """Make an embedder whose vectors are hashes of the words of a text.

    Texts that share words have similar vectors; equal texts have equal ones, on every machine.
    Queries get the model's instruction, and `dimension` is the model's, or 384.

    Args:
        model: A hub id or a folder; nothing of it is loaded or fetched.
        **options: As `make_embedder` takes them, and refused as there. No server is asked.

    Raises:
        BGEError: As `make_embedder` says.

    Example:
        >>> embedder = fake_embedder("BAAI/bge-small-en-v1.5")
        >>> vectors = embedder.embed_documents(["Cats purr.", "Paris is in France."])
        >>> int((vectors @ embedder.embed_queries(["where is Paris?"])[0]).argmax())
        1
    """
    examples = QueryExample.all_of(options.get("examples"))  # a generator gives them once
    made = make_embedder(model, **{**options, "examples": examples or None})
    embedder = _FakeEmbedder.__new__(_FakeEmbedder)
    embedder._set_up(
        FakeModel(made.model, max_length=options.get("max_length")),
        query_instruction=options.get("query_instruction"),
        document_instruction=options.get("document_instruction"),
        task_description=options.get("task_description"),
        examples=examples,
        task=options.get("task"),
        normalize=options.get("normalize", True),
        truncate_dim=options.get("truncate_dim"),
        long_passages=options.get("long_passages", "truncate"),
    )
    return embedder


def fake_reranker(model: str | os.PathLike[str], **options: Any) -> Scorer:
    """Make a reranker whose scores follow how many of a query's words a passage has.

    Args:
        model: A reranker, bge-m3, or a folder of either; nothing of it is loaded or fetched.
        **options: As `make_reranker` takes them, and refused as there. No server is asked.

    Raises:
        BGEError: As `make_reranker` says.

    Example:
        >>> reranker = fake_reranker("BAAI/bge-reranker-base")
        >>> (best,) = reranker.rank("where is Paris?", ["Cats purr.", "Paris is here."], top_n=1)
        >>> best.index
        1
    """
    made = make_reranker(model, **options)
    reranker = _FakeReranker.__new__(_FakeReranker)
    reranker._set_up(
        FakeModel(made.model, max_length=options.get("max_length")),
        normalize=options.get("normalize", True),
        long_passages=options.get("long_passages", "truncate"),
    )
    return reranker


class FakeModel:
    """A model that reads every text to its end, and computes at once, on the caller's thread.

    Args:
        model: The hub id or folder, whose name says what it would be.
        max_length: Tokens that would be read of a text.
    """

    is_local = True
    ready = True
    pair_prompt: PairPrompt | None = None
    dtype = "float32"
    devices = ("cpu",)
    backend = "torch"

    def __init__(self, model: str, *, max_length: int | None) -> None:
        self.model = model
        self.profile: Profile | None = find_served_profile(model)
        self.dimension: int | None = (self.profile and self.profile.dimension) or _DIMENSION
        self.truncate_dim: int | None = None
        self.capacity = self.profile.max_length if self.profile else 512
        self.max_length = max_length or self.capacity
        self.counters = Counters()
        self._closed = False

    @property
    def known_dimension(self) -> int | None:
        """As `dimension`."""
        return self.dimension

    @property
    def prompts(self) -> Mapping[str, str]:
        """None: what has no row in the table gets no instruction."""
        return {}

    @property
    def pooling(self) -> str | None:
        """What its row says."""
        return self.profile.pooling if self.profile else None

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Its name, in place of weights."""
        return "fake", self.model, self.max_length

    @property
    def checkpoint(self) -> Checkpoint:
        """Refuse: a fake has none."""
        msg = f"The fake of {self.model!r} has no checkpoint: use the real class."
        raise ArgumentError(msg)

    def tokenizer(self) -> Tokenizer:
        """Refuse: a fake has none."""
        msg = f"The fake of {self.model!r} has no tokenizer: use the real class."
        raise ArgumentError(msg)

    def placed(self) -> tuple[tuple[str, ...], str]:
        """Return its device and number format."""
        return self.devices, self.dtype

    def steps(
        self,
        call: Call[Any],
        *,
        priority: Priority,  # noqa: ARG002 -- nothing waits
        progress: Progress = None,
    ) -> Steps[None]:
        """Add a row an item to the call; nothing has to be waited for."""
        self.check_open()
        self.counters.add_sequences(len(call.items), 0)
        before, after = call.around
        rows = [
            _logit(*item) if isinstance(item, tuple) else self._vector(f"{before}{item}{after}")
            for item in call.items
        ]
        if progress is not None:
            progress(len(rows))
        call.add_rows(rows)
        yield from ()

    def stats(self) -> ModelStats:
        """Return what it was asked; nothing waits, and it has no tokens."""
        return self.counters.stats()

    def report_truncation(
        self,
        what: str,
        lengths: Sequence[int],
        *,
        pairs: Sequence[int] | None = None,
        windows: bool = False,
    ) -> None:
        """Do nothing: nothing is truncated."""

    def non_finite_error(self, which: str) -> ComputationError:
        """Return the error of a real model."""
        return non_finite_error(self.model, which)

    def check_open(self) -> None:
        """Raise a ClosedError if it was closed."""
        if self._closed:
            raise closed_error(self.model)

    def close(self) -> None:
        """Refuse work from now on."""
        self._closed = True

    def __getstate__(self) -> dict[str, Any]:
        """Return the configuration; a copy is open."""
        return {**self.__dict__, "_closed": False, "counters": Counters()}

    def _vector(self, text: str) -> NDArray[np.float32]:
        size = self.dimension or _DIMENSION
        # Of the text itself a little, so that no two texts have one vector.
        vector = 0.1 * _hashed(f"text {text}", size)
        for word in _words(text):
            vector += len(word) ** 0.5 * _hashed(word, size)
        return vector.astype(np.float32)


class _FakeEmbedder(Embedder):
    """An `Embedder` over a `FakeModel`: windows are the whole text."""

    def _embed_windows(
        self, documents: Sequence[str], priority: Priority, show_progress: bool
    ) -> Steps[NDArray[np.float32]]:
        prefix = self._template.document_prefix
        call = Call([prefix + document for document in documents])
        with progress_bar(len(call.items), show=show_progress) as progress:
            yield from self._model.steps(call, priority=priority, progress=progress)
        return self._vectors(call.to_array())


class _FakeReranker(Reranker):
    """A `Reranker` over a `FakeModel`: windows are the whole text."""

    def _window_logits(
        self, pairs: Sequence[tuple[str, str]], priority: Priority, progress: Progress
    ) -> Steps[tuple[NDArray[np.float32], list[Span]]]:
        logits = yield from self._logits(pairs, priority, progress)
        return logits, [(0, len(passage)) for _, passage in pairs]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _logit(query: str, passage: str) -> NDArray[np.float32]:
    """Return how many of the query's words the passage has, and how few others."""
    asked, read = set(_words(query)), set(_words(passage))
    shared = len(asked & read)
    found = shared / max(len(asked), 1)
    precise = shared / max(len(read), 1)
    return np.array([8 * found + precise - 4], dtype=np.float32)


@functools.lru_cache(maxsize=10_000)
def _hashed(word: str, size: int) -> NDArray[np.float64]:
    data = hashlib.shake_256(word.encode()).digest(2 * size)
    return np.frombuffer(data, dtype="<u2") / 32767.5 - 1.0
