"""A query and passages -> scores and ranks, by a cross-encoder or a language model."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Unpack

import numpy as np

from bge_core import arguments
from bge_core.engine.call import Call, adrive, drive
from bge_core.engine.local_model import LocalModel
from bge_core.engine.model import HasModel
from bge_core.errors import ArgumentError
from bge_core.layers import LayerOptions
from bge_core.lifecycle import ContextManaged, fingerprint_of
from bge_core.options import ModelArguments, ModelOptions, with_options_of
from bge_core.progress import progress_bar
from bge_core.tokenizer import can_tokenize_inline
from bge_core.windows import score_windows, split

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.arguments import Priority
    from bge_core.engine.call import Progress, Steps
    from bge_core.engine.model import TextModel
    from bge_core.engine.stats import ModelStats
    from bge_core.windows import Span

__all__ = ["Ranked", "Reranker", "Scored", "Scorer"]

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Ranked:
    """One passage in a ranking.

    Attributes:
        index: Its place in what was given.
        score: Its score, a Python float.
        span: The characters [start, end) of the passage that the score is of, with
            `long_passages="window"`; else None.

    Example:
        >>> passage = "Cats purr. " * 40 + "A panda is a bear."
        >>> reranker = Reranker("BAAI/bge-reranker-base", max_length=40, long_passages="window")
        >>> (best,) = reranker.rank("what is a panda?", [passage])
        >>> start, end = best.span
        >>> 0 < len(passage[start:end]) < len(passage)
        True
    """

    index: int
    score: float
    span: Span | None = None


class Scored(NamedTuple):
    """What came of some pairs.

    Attributes:
        scores: What is given, [n] float32.
        keys: What is sorted by, [n] float32.
        spans: The characters of each passage that its score is of; None for all that was read.
    """

    scores: NDArray[np.float32]
    keys: NDArray[np.float32]
    spans: list[Span] | None = None


class Scorer(ContextManaged):
    """What scores and ranks passages: a `Reranker`, a `RemoteReranker` or an `M3Reranker`."""

    @property
    @abstractmethod
    def model(self) -> str:
        """The hub id or folder."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the scores."""

    @property
    @abstractmethod
    def is_local(self) -> bool:
        """Whether the model runs on this machine, and not on a server."""

    @property
    @abstractmethod
    def devices(self) -> tuple[str, ...]:
        """The devices that were asked for; empty for the best one of whichever machine loads it."""

    @abstractmethod
    def stats(self) -> ModelStats:
        """Return what this object has done so far, and what waits for its model right now."""

    @property
    @abstractmethod
    def _ready(self) -> bool:
        """Whether the next call starts without loading anything."""

    @abstractmethod
    def _scored(
        self, pairs: list[Pair], *, priority: Priority, show_progress: bool
    ) -> Steps[Scored]:
        """Score pairs that were checked."""

    def score(
        self,
        query: str,
        passages: Iterable[str],
        *,
        priority: Priority = "interactive",
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Score passages against one query.

        Args:
            query: The query.
            passages: The passages; empty ones are scored as the model itself would.
            priority: `"interactive"` for what somebody waits for, `"background"` for a job's.
            show_progress: Show a progress bar.

        Returns:
            [n] float32, in order: of a reranker from 0 to 1, or raw logits with
            `normalize=False`; of bge-m3 as `M3Embedder.score` says.

        Raises:
            ArgumentError: A text is not valid Unicode.
            ClosedError: The model was closed.
            ComputationError: The model gave NaN or infinity.
            EndpointError: The server can't be reached, fails, or gives no such answer.
            InputTypeError: An argument of the wrong type.
            TruncationError: A pair is too long and `on_truncation="error"`.
        """
        return drive(self._score(query, passages, priority, show_progress))

    async def ascore(
        self,
        query: str,
        passages: Iterable[str],
        *,
        priority: Priority = "interactive",
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Score passages without blocking the event loop; see `score`."""
        steps = self._score(query, passages, priority, show_progress)
        return await adrive(steps, inline=can_tokenize_inline(passages), at_once=self._ready)

    def score_pairs(
        self,
        pairs: Iterable[Pair],
        *,
        priority: Priority = "background",
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Score (query, passage) pairs, each for itself.

        Args:
            pairs: Pairs of str.
            priority: `"background"` for bulk, which live queries overtake; `"interactive"` for
                what somebody waits for.
            show_progress: Show a progress bar.

        Returns:
            [n] float32, in order, as `score` gives them.

        Raises:
            BGEError: As `score` says.
        """
        return drive(self._score_pairs(pairs, priority, show_progress))

    async def ascore_pairs(
        self,
        pairs: Iterable[Pair],
        *,
        priority: Priority = "background",
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Score pairs without blocking the event loop; see `score_pairs`."""
        steps = self._score_pairs(pairs, priority, show_progress)
        return await adrive(steps, inline=can_tokenize_inline(pairs), at_once=self._ready)

    def rank(
        self,
        query: str,
        passages: Iterable[str],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
        priority: Priority = "interactive",
    ) -> list[Ranked]:
        """Rank passages by their score, best first; equal scores keep the order given.

        Args:
            query: The query.
            passages: The passages.
            top_n: How many to give, 1 or more; None for all.
            score_threshold: The least score to give, itself included; None for any.
            priority: `"interactive"` for what somebody waits for, `"background"` for a job's.

        Returns:
            Each passage's index and score, as Python numbers. With `long_passages="window"` the
            span, too: the best window, which is the whole of a passage that fits.

        Raises:
            ArgumentError: `top_n` is below 1, the threshold is NaN or can't be reached, or as
                `score` says.
            BGEError: As `score` says.
        """
        return drive(self._rank(query, passages, top_n, score_threshold, priority))

    async def arank(
        self,
        query: str,
        passages: Iterable[str],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
        priority: Priority = "interactive",
    ) -> list[Ranked]:
        """Rank passages without blocking the event loop; see `rank`."""
        steps = self._rank(query, passages, top_n, score_threshold, priority)
        return await adrive(steps, inline=can_tokenize_inline(passages), at_once=self._ready)

    def check_limits(self, *, top_n: int | None, score_threshold: float | None) -> None:
        """Refuse a `top_n` or a threshold that can't be meant.

        Raises:
            ArgumentError: `top_n` is below 1, or no score can reach the threshold.
            InputTypeError: One of them is no number.
        """
        if top_n is not None:
            arguments.whole_number("top_n", top_n, instead=" or None for all")
        if score_threshold is None:
            return
        if math.isnan(arguments.number("score_threshold", score_threshold, instead=" or None")):
            msg = "score_threshold is NaN, which no score reaches: pass a number or None."
            raise ArgumentError(msg)

    def _score(
        self, query: str, passages: Iterable[str], priority: Priority, show_progress: bool
    ) -> Steps[NDArray[np.float32]]:
        pairs = _paired(query, passages)
        scored = yield from self._scored(pairs, priority=priority, show_progress=show_progress)
        return scored.scores

    def _score_pairs(
        self, pairs: Iterable[Pair], priority: Priority, show_progress: bool
    ) -> Steps[NDArray[np.float32]]:
        known = arguments.pairs("pairs", pairs)
        scored = yield from self._scored(known, priority=priority, show_progress=show_progress)
        return scored.scores

    def _rank(
        self,
        query: str,
        passages: Iterable[str],
        top_n: int | None,
        score_threshold: float | None,
        priority: Priority,
    ) -> Steps[list[Ranked]]:
        self.check_limits(top_n=top_n, score_threshold=score_threshold)
        pairs = _paired(query, passages)
        found = yield from self._scored(pairs, priority=priority, show_progress=False)
        scores, spans = found.scores.tolist(), found.spans
        ranked = [
            Ranked(index, scores[index], None if spans is None else spans[index])
            for index in np.argsort(-found.keys, kind="stable").tolist()
            if score_threshold is None or scores[index] >= score_threshold
        ]
        return ranked[:top_n]


class Reranker(HasModel, Scorer):
    """A BGE reranker: a cross-encoder with one label, or one of three language models.

    A pair is built as FlagEmbedding builds it: the query is cut to three quarters of
    `max_length`, then the passage to what is left. bge-reranker-v2-gemma,
    bge-reranker-v2-minicpm-layerwise and bge-reranker-v2.5-gemma2-lightweight are language models:
    a question follows the pair, and the score is the logit of "Yes" as the next word, or what a
    head of the last layer that is computed gives there. They read as many more tokens as the
    question has, and are asked it whatever was cut. Arguments are checked at once; weights load at
    first use and are shared as those of `Embedder` are.

    Args:
        model: A hub id (`"BAAI/bge-reranker-base"`) or a folder.
        normalize: Return the sigmoid of the logit, from 0 to 1, each score for itself. False gives
            the raw logit of the model card, unbounded. The order is the same.
        long_passages: What happens with a passage that doesn't fit: `"truncate"` reads its
            beginning; `"window"` scores overlapping windows of it and takes the best, so that
            only a query is ever truncated. One that fits has the same score either way.
        cutoff_layers: The layer after which the score is read, of a reranker that has one after
            each: bge-reranker-v2-minicpm-layerwise (8 to 40) and
            bge-reranker-v2.5-gemma2-lightweight (8 to 42). Those above it are not even loaded. A
            list of one layer is the same; None for the last.
        compress_layers: Layers, counted from 0, before which bge-reranker-v2.5-gemma2-lightweight
            shortens the passage, such as `[24, 40]`; None for `[8]`.
        compress_ratio: How many neighbouring tokens of the passage become one there: 1 (off), 2, 4
            or 8.
        **options: `device`, `dtype`, `use_fp16`, `max_length`, `batch_tokens`, `on_truncation`,
            `backend`, `cache_folder`, `revision`, `local_files_only`, `trust_remote_code` and
            `token`, as `bge_core.options.ModelOptions` describes them.

    Raises:
        ArgumentError: A value that is not supported.
        CheckpointError: A model that can't be found, is damaged, or is no reranker of one label.
        InputTypeError: A value of the wrong type.

    Example:
        >>> reranker = Reranker("BAAI/bge-reranker-base")
        >>> (best,) = reranker.rank("what is a panda?", ["hi", "A panda is a bear."], top_n=1)
        >>> isinstance(best.index, int), isinstance(best.score, float)
        (True, True)
    """

    @with_options_of(ModelOptions)
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        normalize: bool = True,
        long_passages: str = "truncate",
        cutoff_layers: int | Sequence[int] | None = None,
        compress_layers: int | Sequence[int] | None = None,
        compress_ratio: int = 1,
        **options: Unpack[ModelArguments],
    ) -> None:
        layers = LayerOptions.of(
            cutoff_layers=cutoff_layers,
            compress_layers=compress_layers,
            compress_ratio=compress_ratio,
        )
        local = LocalModel(ModelOptions(model=model, **options), kind="reranker", layers=layers)
        self._set_up(local, normalize=normalize, long_passages=long_passages)

    def _set_up(self, model: TextModel, *, normalize: bool, long_passages: str) -> None:
        """Check what is the same here and on a server."""
        self._model = model
        self._normalize = arguments.flag("normalize", normalize)
        self._long_passages = arguments.one_of(
            "long_passages", long_passages, arguments.LONG_PASSAGES
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the scores.

        What a server runs can't be known: there the model's name stands for it.
        """
        return fingerprint_of(*self._model.fingerprint, self._normalize, self._long_passages)

    def check_limits(self, *, top_n: int | None, score_threshold: float | None) -> None:
        """Refuse a `top_n` or a threshold that can't be meant.

        Raises:
            ArgumentError: `top_n` is below 1, or no score can reach the threshold.
            InputTypeError: One of them is no number.
        """
        super().check_limits(top_n=top_n, score_threshold=score_threshold)
        if score_threshold is not None and self._normalize and score_threshold > 1:
            msg = (
                f"score_threshold={score_threshold} can't be reached: scores go from 0 to 1. Pass "
                "normalize=False to compare raw logits, or 1 / (1 + exp(-threshold)) here."
            )
            raise ArgumentError(msg)

    @property
    def _ready(self) -> bool:
        return self._model.ready

    def _scored(
        self, pairs: list[Pair], *, priority: Priority, show_progress: bool
    ) -> Steps[Scored]:
        priority = arguments.one_of("priority", priority, arguments.PRIORITIES)
        self._begin(len(pairs))
        windowed = self._long_passages == "window" and bool(pairs)
        total, unit = (None, "window") if windowed else (len(set(pairs)), "text")
        spans = None
        with progress_bar(total, show=show_progress, unit=unit) as progress:
            if windowed:
                logits, spans = yield from self._window_logits(pairs, priority, progress)
            else:
                logits = yield from self._logits(pairs, priority, progress)
        finite = np.isfinite(logits)
        if not finite.all():
            which = f"passage {int(finite.argmin())}"
            raise self._model.non_finite_error(which)
        # Sorted by the logit: in float32 the sigmoid of everything above 17 is 1.
        return Scored(_sigmoid(logits) if self._normalize else logits, logits, spans)

    def _logits(
        self, pairs: Sequence[Pair], priority: Priority, progress: Progress, *, reports: bool = True
    ) -> Steps[NDArray[np.float32]]:
        call = Call(pairs, reports=reports, what="pairs", windows=True)
        yield from self._model.steps(call, priority=priority, progress=progress)
        if not pairs:
            return np.empty(0, dtype=np.float32)
        logits: NDArray[np.float32] = call.to_array()[:, 0]
        return logits

    def _window_logits(
        self, pairs: Sequence[Pair], priority: Priority, progress: Progress
    ) -> Steps[tuple[NDArray[np.float32], list[Span]]]:
        """Score pairs by their passages' windows."""
        model, prompt = self._model, self._model.pair_prompt
        tokenizer = model.tokenizer()
        queries = list(dict.fromkeys(query for query, _ in pairs))
        found = tokenizer.passage_layouts(
            queries, prompt, max_length=model.max_length, limit=model.capacity
        )
        layouts = dict(zip(queries, found, strict=True))
        model.report_truncation(
            "queries, with room left for a passage,",
            [
                len(layouts[query].before) + layouts[query].query_excess
                if layouts[query].query_excess
                else 0
                for query, _ in pairs
            ],
        )
        prefix = "" if prompt is None else prompt.passage
        return (
            yield from score_windows(
                pairs,
                split_item=lambda pair: split(
                    tokenizer, pair[1], layouts[pair[0]], capacity=model.capacity, prefix=prefix
                ),
                compute=lambda some, _: self._logits(some, priority, progress, reports=False),
            )
        )


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    # Of the exponent that is never positive, so that nothing overflows.
    small = np.exp(-np.abs(logits.astype(np.float64)))
    return (np.where(logits >= 0, 1.0, small) / (1.0 + small)).astype(np.float32)


def _paired(query: str, passages: Iterable[str]) -> list[Pair]:
    query = arguments.text("query", query)
    return [(query, passage) for passage in arguments.texts("passages", passages)]
