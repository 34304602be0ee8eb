"""A query and passages -> scores and ranks, by a cross-encoder or a language model."""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bge_core import arguments
from bge_core.checkpoints.source import Source
from bge_core.devices import Placement
from bge_core.engine.call import run_off_loop
from bge_core.engine.local_model import LocalModel
from bge_core.errors import ArgumentError
from bge_core.lifecycle import fingerprint_of
from bge_core.tokenizer import can_check_inline, can_tokenize_inline
from bge_core.windows import BestWindow, cut_windows

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from bge_core.engine.call import Call, Encode
    from bge_core.engine.scheduler import Priority
    from bge_core.errors import ComputationError
    from bge_core.tokenizer import Tokenizer, TokenSequence
    from bge_core.windows import Span, Window

__all__ = [
    "PairScorer",
    "Ranked",
    "Ranking",
    "Reranker",
    "Scorer",
    "check_limits",
    "query_pairs",
    "rank_scores",
]

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
        >>> (best,) = reranker.rank_spans("what is a panda?", [passage])
        >>> start, end = best.span
        >>> 0 < len(passage[start:end]) < len(passage)
        True
    """

    index: int
    score: float
    span: Span | None = None


class Ranking(Protocol):
    """The two verbs that rank, made of the two that say the spans, too."""

    @abstractmethod
    def rank_spans(
        self,
        query: str,
        passages: Iterable[str],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[Ranked]:
        """Rank passages, and say what of each the score is of."""

    @abstractmethod
    async def arank_spans(
        self,
        query: str,
        passages: Iterable[str],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[Ranked]:
        """Rank passages without blocking the event loop; see `rank_spans`."""

    def rank(
        self,
        query: str,
        passages: Iterable[str],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[tuple[int, float]]:
        """Rank passages by their score, best first; equal scores keep the order given.

        Args:
            query: The query.
            passages: The passages.
            top_n: How many to give, 1 or more; None for all.
            score_threshold: The least score to give, itself included; None for any.

        Returns:
            (index into `passages`, score) as Python numbers.

        Raises:
            ArgumentError: `top_n` is below 1, the threshold is NaN, or as `score` says.
            InputTypeError: An argument of the wrong type.
        """
        ranked = self.rank_spans(query, passages, top_n=top_n, score_threshold=score_threshold)
        return [(found.index, found.score) for found in ranked]

    async def arank(
        self,
        query: str,
        passages: Iterable[str],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[tuple[int, float]]:
        """Rank passages without blocking the event loop; see `rank`."""
        ranked = await self.arank_spans(
            query, passages, top_n=top_n, score_threshold=score_threshold
        )
        return [(found.index, found.score) for found in ranked]


class PairScorer(Ranking):
    """What is the same wherever the logits are computed: verbs, scale, limits and order.

    Args:
        normalize: Give the sigmoid of the logit, from 0 to 1; False gives the logit.
    """

    def __init__(self, *, normalize: bool) -> None:
        self._normalize = arguments.flag("normalize", normalize)

    @property
    @abstractmethod
    def model(self) -> str:
        """The hub id or folder."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the scores."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the model."""

    @abstractmethod
    def _compute(
        self, items: Sequence[Pair], *, priority: Priority, show_progress: bool = False
    ) -> NDArray[np.float32] | None:
        """Give a row of one logit a pair, or None for no pairs."""

    @abstractmethod
    async def _acompute(
        self, items: Sequence[Pair], *, priority: Priority, show_progress: bool = False
    ) -> NDArray[np.float32] | None:
        """Give a row of one logit a pair without blocking the event loop."""

    @abstractmethod
    def _non_finite_error(self, which: str) -> ComputationError:
        """Say that NaN or infinity came out."""

    def score(
        self, query: str, passages: Iterable[str], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Score passages against one query.

        Args:
            query: The query.
            passages: The passages; empty ones are scored as the model itself would.
            show_progress: Show a progress bar.

        Returns:
            [n] float32, in order: from 0 to 1, or raw logits with `normalize=False`.

        Raises:
            ArgumentError: A text is not valid Unicode.
            ClosedError: The model was closed.
            ComputationError: The model gave NaN or infinity.
            InputTypeError: An argument of the wrong type.
            TruncationError: A pair is too long and `on_truncation="error"`.
        """
        pairs = query_pairs(query, passages)
        return self._shown(self._logits(pairs, show_progress=show_progress))

    async def ascore(
        self, query: str, passages: Iterable[str], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Score passages without blocking the event loop; see `score`."""
        pairs = await run_off_loop(query_pairs, query, passages, inline=can_check_inline(passages))
        return self._shown(await self._alogits(pairs, show_progress=show_progress))

    def score_pairs(
        self, pairs: Iterable[Pair], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Score (query, passage) pairs, each for itself.

        Args:
            pairs: Pairs of str.
            show_progress: Show a progress bar.

        Returns:
            [n] float32, in order: from 0 to 1, or raw logits with `normalize=False`.

        Raises:
            ArgumentError: A text is not valid Unicode.
            ClosedError: The model was closed.
            ComputationError: The model gave NaN or infinity.
            InputTypeError: An argument of the wrong type.
            TruncationError: A pair is too long and `on_truncation="error"`.
        """
        return self._shown(
            self._logits(arguments.pairs("pairs", pairs), show_progress=show_progress)
        )

    async def ascore_pairs(
        self, pairs: Iterable[Pair], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Score pairs without blocking the event loop; see `score_pairs`."""
        known = await run_off_loop(arguments.pairs, "pairs", pairs, inline=can_check_inline(pairs))
        return self._shown(await self._alogits(known, show_progress=show_progress))

    def rank_spans(
        self,
        query: str,
        passages: Iterable[str],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[Ranked]:
        """Rank passages as `rank` does, and say which characters of each the score is of.

        Args:
            query: The query.
            passages: The passages.
            top_n: How many to give, 1 or more; None for all.
            score_threshold: The least score to give, itself included; None for any.

        Returns:
            The best first, each with its span: with `long_passages="window"` the best window,
            which is the whole of a passage that fits; else None.

        Raises:
            ArgumentError: As `rank` says.
            InputTypeError: An argument of the wrong type.
        """
        self.check_limits(top_n=top_n, score_threshold=score_threshold)
        logits, spans = self._scored(query_pairs(query, passages))
        return self._ranked(logits, spans, top_n, score_threshold)

    async def arank_spans(
        self,
        query: str,
        passages: Iterable[str],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[Ranked]:
        """Rank passages without blocking the event loop; see `rank_spans`."""
        self.check_limits(top_n=top_n, score_threshold=score_threshold)
        pairs = await run_off_loop(query_pairs, query, passages, inline=can_check_inline(passages))
        logits, spans = await self._ascored(pairs)
        return self._ranked(logits, spans, top_n, score_threshold)

    def check_limits(self, *, top_n: int | None, score_threshold: float | None) -> None:
        """Refuse a `top_n` or a threshold that can't be meant.

        Raises:
            ArgumentError: `top_n` is below 1, or no score can reach the threshold.
            InputTypeError: One of them is no number.
        """
        check_limits(top_n=top_n, score_threshold=score_threshold)
        if score_threshold is not None and self._normalize and score_threshold > 1:
            msg = (
                f"score_threshold={score_threshold} can't be reached: scores go from 0 to 1. Pass "
                "normalize=False to compare raw logits, or 1 / (1 + exp(-threshold)) here."
            )
            raise ArgumentError(msg)

    def _logits(self, pairs: list[Pair], *, show_progress: bool = False) -> NDArray[np.float32]:
        return self._checked(
            self._compute(pairs, priority="interactive", show_progress=show_progress)
        )

    async def _alogits(
        self, pairs: list[Pair], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        rows = await self._acompute(pairs, priority="interactive", show_progress=show_progress)
        return self._checked(rows)

    def _scored(self, pairs: list[Pair]) -> tuple[NDArray[np.float32], list[Span] | None]:
        """Give a logit a pair, and what of each passage it is of, where that is known."""
        return self._logits(pairs), None

    async def _ascored(self, pairs: list[Pair]) -> tuple[NDArray[np.float32], list[Span] | None]:
        return await self._alogits(pairs), None

    def _checked(self, rows: NDArray[np.float32] | None) -> NDArray[np.float32]:
        if rows is None:
            return np.empty(0, dtype=np.float32)
        logits: NDArray[np.float32] = rows[:, 0]
        finite = np.isfinite(logits)
        if not finite.all():
            which = f"passage {int(finite.argmin())}"
            raise self._non_finite_error(which)
        return logits

    def _shown(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self._normalize:
            return logits
        # Of the exponent that is never positive, so that nothing overflows.
        small = np.exp(-np.abs(logits.astype(np.float64)))
        return (np.where(logits >= 0, 1.0, small) / (1.0 + small)).astype(np.float32)

    def _ranked(
        self,
        logits: NDArray[np.float32],
        spans: Sequence[Span] | None,
        top_n: int | None,
        score_threshold: float | None,
    ) -> list[Ranked]:
        # By the logit: in float32 the sigmoid of everything above 17 is 1.
        ranked = rank_scores(
            logits, self._shown(logits), top_n=top_n, score_threshold=score_threshold
        )
        return [
            Ranked(index, score, None if spans is None else spans[index]) for index, score in ranked
        ]


class Reranker(LocalModel[Pair], PairScorer):
    """A BGE reranker: a cross-encoder with one label, or bge-reranker-v2-gemma.

    A pair is built as FlagEmbedding builds it: the query is cut to three quarters of
    `max_length`, then the passage to what is left. bge-reranker-v2-gemma is a language model: a
    question follows the pair, and the score is the logit of "Yes" as the next word. Arguments are
    checked at once; weights load at first use and are shared as those of `Embedder` are.

    Args:
        model: A hub id (`"BAAI/bge-reranker-base"`) or a folder.
        normalize: Give the sigmoid of the logit, from 0 to 1, each score for itself. False gives
            the raw logit of the model card, unbounded. The order is the same.
        device: `"cuda"`, `"cuda:1"`, `"mps"`, `"cpu"`, or several of them; None for the best.
        dtype: `"auto"` (on cuda float16, of decoders bfloat16; else float32), `"float32"`,
            `"float16"` or `"bfloat16"`. Scores are float32 always.
        use_fp16: FlagEmbedding's word for float16 (True) or float32 (False).
        max_length: Tokens that are read of a pair, special ones included; None for the
            checkpoint's own limit. bge-reranker-v2-gemma reads as many more as its question has,
            as in FlagEmbedding, and asks the question whatever was cut.
        batch_tokens: Tokens computed in one pass; None for the device's default.
        on_truncation: `"warn"` logs one line a call, `"error"` refuses, `"ignore"` is silent.
        long_passages: What happens with a passage that doesn't fit: `"truncate"` reads its
            beginning; `"window"` scores overlapping windows of it and takes the best, so that
            only a query is ever cut. One that fits has the same score either way.
        backend: What executes the model: `"torch"`; `"openvino"`, on a CPU, with the extra
            `[openvino]`; or `"auto"`, which is torch for every reranker.
        cache_folder: The hub's cache; None for the usual one.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never go to the network.
        trust_remote_code: Run Python code that the checkpoint carries; off for good reason.
        token: A hub token for private models.

    Raises:
        ArgumentError: A value that can't be served.
        CheckpointError: A model that can't be found, is damaged, or is no reranker of one label.
        InputTypeError: A value of the wrong type.

    Example:
        >>> reranker = Reranker("BAAI/bge-reranker-base")
        >>> ranked = reranker.rank("what is a panda?", ["hi", "A panda is a bear."], top_n=1)
        >>> len(ranked), isinstance(ranked[0][1], float)
        (1, True)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
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
    ) -> None:
        PairScorer.__init__(self, normalize=normalize)
        self._long_passages = arguments.one_of(
            "long_passages", long_passages, arguments.LONG_PASSAGES
        )
        LocalModel.__init__(
            self,
            kind="reranker",
            source=Source.of(
                model,
                revision=revision,
                cache_folder=cache_folder,
                local_files_only=local_files_only,
                trust_remote_code=trust_remote_code,
                token=token,
            ),
            placement=Placement.of(device=device, dtype=dtype, use_fp16=use_fp16),
            pooling=None,
            max_length=max_length,
            batch_tokens=batch_tokens,
            on_truncation=on_truncation,
            backend=backend,
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the scores."""
        parts = (
            self._content(),
            self._normalize,
            self.max_length,
            self.dtype,
            *(["window"] if self._long_passages == "window" else []),
        )
        return fingerprint_of(*parts)

    def _scored(self, pairs: list[Pair]) -> tuple[NDArray[np.float32], list[Span] | None]:
        if self._long_passages == "truncate" or not pairs:
            return super()._scored(pairs)
        self._check_open()
        call = self._call(pairs)
        self._fill(call, priority="interactive")
        return self._checked(call.stacked()), _spans(call)

    async def _ascored(self, pairs: list[Pair]) -> tuple[NDArray[np.float32], list[Span] | None]:
        if self._long_passages == "truncate" or not pairs:
            return await super()._ascored(pairs)
        self._check_open()
        small = can_tokenize_inline(pairs)
        call = await run_off_loop(self._call, pairs, inline=small)
        await self._afill(call, priority="interactive")
        return self._checked(await run_off_loop(call.stacked, inline=small)), _spans(call)

    def _call(self, items: Sequence[Pair], encode: Encode[Pair] | None = None) -> Call[Pair]:
        if self._long_passages == "window":
            return BestWindow(items, cut=self._cut)
        return super()._call(items, encode)

    def _cut(
        self, tokenizer: Tokenizer, items: Sequence[Pair]
    ) -> tuple[list[list[Window]], list[bool]]:
        queries, passages = zip(*items, strict=True)
        found = self.checkpoint
        lead = ""
        if (prompt := found.pair_prompt) is None:
            rooms = tokenizer.pair_rooms(queries, max_length=self.max_length)
        else:
            lead = prompt.passage
            rooms = tokenizer.prompted_rooms(
                queries, prompt, max_length=self.max_length, most=found.max_length
            )
        texts = [lead + passage for passage in passages] if lead else passages
        windows = cut_windows(tokenizer, rooms, texts, lead=len(lead))
        return windows, [room.cut for room in rooms]

    def _encode(
        self, tokenizer: Tokenizer, items: Sequence[Pair]
    ) -> tuple[list[TokenSequence], list[bool]]:
        queries, passages = zip(*items, strict=True)
        found = self.checkpoint
        if found.pair_prompt is not None:
            return tokenizer.encode_prompted(
                queries,
                passages,
                found.pair_prompt,
                max_length=self.max_length,
                most=found.max_length,
            )
        return tokenizer.encode_pairs(queries, passages, max_length=self.max_length)


def check_limits(*, top_n: int | None, score_threshold: float | None) -> None:
    """Refuse a `top_n` or a threshold that can't be meant, whatever the scores are.

    Raises:
        ArgumentError: `top_n` is below 1, or the threshold is NaN.
        InputTypeError: One of them is no number.
    """
    if top_n is not None:
        arguments.whole_number("top_n", top_n, instead=" or None for all")
    if score_threshold is None:
        return
    if math.isnan(arguments.number("score_threshold", score_threshold, instead=" or None")):
        msg = "score_threshold is NaN, which no score reaches: pass a number or None."
        raise ArgumentError(msg)


def rank_scores(
    keys: NDArray[np.float32],
    scores: NDArray[np.float32],
    *,
    top_n: int | None,
    score_threshold: float | None,
) -> list[tuple[int, float]]:
    """Give (index, score) as Python numbers, best first; equal ones keep their order.

    Args:
        keys: What is sorted by, [n].
        scores: What is given, [n].
        top_n: How many to give; None for all.
        score_threshold: The least score to give, itself included; None for any.
    """
    order = np.argsort(-keys, kind="stable").tolist()
    given = scores.tolist()
    ranked = [(index, given[index]) for index in order]
    if score_threshold is not None:
        ranked = [(index, score) for index, score in ranked if score >= score_threshold]
    return ranked[:top_n]


def _spans(call: Call[Pair]) -> list[Span] | None:
    return [call.spans[place] for place in call.places] if isinstance(call, BestWindow) else None


def query_pairs(query: str, passages: Iterable[str]) -> list[Pair]:
    """Check a query and passages, and pair them."""
    query = arguments.text("query", query)
    return [(query, passage) for passage in arguments.texts("passages", passages)]


class Scorer(Ranking, Protocol):
    """What scores passages against a query, on this machine or by a server."""

    @property
    def model(self) -> str:
        """The hub id or folder."""
        ...

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the scores."""
        ...

    def score_pairs(
        self, pairs: Iterable[tuple[str, str]], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Score (query, passage) pairs, each for itself; see `Reranker.score_pairs`."""
        ...

    def check_limits(self, *, top_n: int | None, score_threshold: float | None) -> None:
        """Refuse a `top_n` or a threshold that can't be meant; see `Reranker.check_limits`."""
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...
