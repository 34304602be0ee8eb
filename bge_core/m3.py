"""bge-m3 in full: dense, sparse and multi-vector outputs of a text from one forward pass."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bge_core import arguments
from bge_core.backends.loading import load_head
from bge_core.backends.output_cache import share_outputs
from bge_core.checkpoints.catalog import find_profile
from bge_core.checkpoints.metadata import is_m3_architecture, missing_head_error
from bge_core.checkpoints.source import Source
from bge_core.devices import Placement
from bge_core.engine.call import Call, non_finite_error, run_off_loop, slices_of
from bge_core.engine.local_model import LocalModel
from bge_core.engine.process import hold_interpreter_exit
from bge_core.errors import ArgumentError, CheckpointError, InputTypeError
from bge_core.lifecycle import fingerprint_of
from bge_core.reranker import Ranked, Ranking, check_limits, query_pairs, rank_scores
from bge_core.tokenizer import can_check_inline

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from bge_core.backends.m3_heads import M3Row
    from bge_core.checkpoints.catalog import Output
    from bge_core.checkpoints.metadata import Checkpoint
    from bge_core.engine.scheduler import Priority, Rows
    from bge_core.tokenizer import Tokenizer, TokenSequence

__all__ = ["M3Embedder", "M3Outputs", "M3Reranker", "M3Weights"]

# Texts whose token vectors are held at a time while pairs are scored: some 16,000 tokens of
# English, 64 MiB at a width of 1,024.
_SCORED_CHARACTERS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class M3Weights:
    """How much each of bge-m3's three scores counts; the defaults are those of its training.

    Attributes:
        dense: Of the cosine of the dense vectors.
        sparse: Of the dot product of the token weights, which has no upper bound.
        multi_vector: Of the mean, over the query's tokens, of the best cosine in the passage.

    Raises:
        ArgumentError: A weight is negative or not finite, or all are 0.
        InputTypeError: A weight is no number.

    Example:
        >>> M3Weights(sparse=0)
        M3Weights(dense=1.0, sparse=0, multi_vector=1.0)
    """

    dense: float = 1.0
    sparse: float = 0.3
    multi_vector: float = 1.0

    def __post_init__(self) -> None:
        """Refuse weights that give no score."""
        for name, value in self.named().items():
            arguments.number(f"The weight {name}", value)
            if not math.isfinite(value) or value < 0:
                msg = f"The weight {name} must be 0 or more and finite, got {value}."
                raise ArgumentError(msg)
        if not sum(self.named().values()):
            msg = "All three weights are 0, which scores nothing: give at least one of them."
            raise ArgumentError(msg)

    @classmethod
    def of(cls, weights: M3Weights | Mapping[str, float] | None) -> M3Weights:
        """Make weights of what a user wrote.

        Args:
            weights: Weights, a mapping of their names, or None for the defaults.

        Raises:
            ArgumentError: A name is unknown, or a weight can't be served.
            InputTypeError: Neither; a bare list, since its order could be mistaken.
        """
        if weights is None:
            return cls()
        if isinstance(weights, cls):
            return weights
        known = [field.name for field in fields(cls)]
        if not isinstance(weights, Mapping):
            msg = (
                f"Weights must be M3Weights or a mapping of {', '.join(known)}, got "
                f"{weights!r:.60}: name each, M3Weights(dense=1.0, sparse=0.3, multi_vector=1.0)."
            )
            raise InputTypeError(msg)
        for name in weights:
            if name not in known:
                msg = f"{name!r} is no weight: the names are {', '.join(known)}."
                raise ArgumentError(msg)
        return cls(**weights)

    def named(self) -> dict[Output, float]:
        """Give the weights by output."""
        return {"dense": self.dense, "sparse": self.sparse, "multi_vector": self.multi_vector}

    @property
    def outputs(self) -> frozenset[Output]:
        """The outputs that count, which are the ones that have to be computed."""
        return frozenset(output for output, weight in self.named().items() if weight)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class M3Outputs:
    """What `M3Embedder.encode` gives of n texts; None for what was not asked for.

    Example:
        >>> outputs = M3Outputs(sparse=[{6: 0.25}])
        >>> outputs.dense is None, outputs.sparse[0][6]
        (True, 0.25)

    Attributes:
        dense: [n, dimension] float32, unit length.
        sparse: Of each text, token id -> weight, as Python numbers; no weight is 0.
        multi_vector: Of each text, a unit vector of each token but the first, and so
            [tokens - 1, width] float32.
        tokens: `sparse` with the tokens as the vocabulary spells them, the heaviest first.
    """

    dense: NDArray[np.float32] | None = None
    sparse: list[dict[int, float]] | None = None
    multi_vector: list[NDArray[np.float32]] | None = None
    tokens: list[dict[str, float]] | None = None


class M3Embedder(LocalModel[str]):
    """bge-m3: a dense vector, a weight a token, and a vector a token, from one forward pass.

    Queries and documents are encoded alike: bge-m3 wants no instruction. Arguments are checked at
    once; weights load at first use and are shared with every `Embedder` and `M3Embedder` on the
    same model, revision, device and dtype.

    Args:
        model: `"BAAI/bge-m3"`, or a folder of its make: XLM-RoBERTa with `sparse_linear.pt` and
            `colbert_linear.pt` beside its weights.
        share_outputs: While this embedder lives, one pass serves its next call and that of an
            `Embedder` on the same model: whoever asks first for the dense or the sparse output of
            some texts leaves the other, at most 64 MiB, for the second. For vector stores, which
            ask for one after the other.
        device: `"cuda"`, `"cuda:1"`, `"mps"`, `"cpu"`, or several of them; None for the best.
        dtype: `"auto"` (float16 on cuda, else float32), `"float32"`, `"float16"` or
            `"bfloat16"`. Outcomes are float32 always.
        use_fp16: FlagEmbedding's word for float16 (True) or float32 (False).
        max_length: Tokens that are read of a text, special ones included; None for the
            checkpoint's own limit, 8,192.
        batch_tokens: Tokens computed in one pass; None for the device's default.
        on_truncation: `"warn"` logs one line a call, `"error"` refuses, `"ignore"` is silent.
        backend: `"torch"`; `"auto"` means the same here, since only torch gives all outputs.
        cache_folder: The hub's cache; None for the usual one.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never go to the network.
        trust_remote_code: Run Python code that the checkpoint carries; off for good reason.
        token: A hub token for private models.

    Raises:
        ArgumentError: A value that can't be served.
        CheckpointError: A model that can't be found, is damaged, or is not of bge-m3's make.
        InputTypeError: A value of the wrong type.

    Example:
        >>> embedder = M3Embedder("BAAI/bge-m3")
        >>> encoded = embedder.encode(["Paris is in France.", "大熊猫是熊。"], return_tokens=True)
        >>> len(encoded.dense), len(encoded.sparse[1]) == len(encoded.tokens[1])
        (2, True)
        >>> embedder.score([("Where is Paris?", "Paris is in France.")]).shape
        (1,)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        share_outputs: bool = False,
        device: str | Sequence[str] | None = None,
        dtype: str | torch.dtype = "auto",
        use_fp16: bool | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        on_truncation: str = "warn",
        backend: str = "torch",
        cache_folder: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        token: str | None = None,
    ) -> None:
        self._share = arguments.flag("share_outputs", share_outputs)
        super().__init__(
            kind="embedder",
            source=Source.of(
                model,
                revision=revision,
                cache_folder=cache_folder,
                local_files_only=local_files_only,
                trust_remote_code=trust_remote_code,
                token=token,
            ),
            placement=Placement.of(device=device, dtype=dtype, use_fp16=use_fp16),
            # Of a bare folder, too: the further layers say what it is.
            pooling="cls",
            max_length=max_length,
            batch_tokens=batch_tokens,
            on_truncation=on_truncation,
            backend="torch" if backend == "auto" else backend,
        )
        if self._backend != "torch":
            msg = (
                f"backend={backend!r} gives dense vectors only: pass backend='torch', or use an "
                "embedding class."
            )
            raise ArgumentError(msg)
        self._check_make()

    @property
    def dimension(self) -> int:
        """Length of a dense vector."""
        return self.checkpoint.hidden_size

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the outputs.

        As `Embedder.fingerprint`: the weights and the length count, not the device or the place.
        """
        parts = ("m3", self._content(), self.max_length, self.dtype)
        return fingerprint_of(*parts)

    def require(self, *outputs: Output) -> None:
        """Refuse a checkpoint that can't give some outputs, where that is known by now.

        A hub id that is not in the table of published checkpoints is looked at when it is used.

        Args:
            outputs: Any of `"dense"`, `"sparse"` and `"multi_vector"`.

        Raises:
            CheckpointError: A file that an output needs is missing; says which.
        """
        if not self._source.is_local and self._checkpoint is None:
            profile = find_profile(self.model, "embedder")
            lacking = [output for output in outputs if profile and output not in profile.outputs]
            if lacking:
                raise _gives_no(self.model, lacking[0])
            return
        found = self.checkpoint
        for output in outputs:
            if output != "dense" and output not in found.heads:
                raise missing_head_error(found, output)

    def encode(
        self,
        texts: Iterable[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        multi_vector: bool = False,
        return_tokens: bool = False,
        priority: Priority = "background",
        show_progress: bool = False,
    ) -> M3Outputs:
        """Encode texts; one forward pass a distinct text gives all that is asked for.

        Args:
            texts: Queries or documents; an empty one is encoded as the model itself would.
            dense: Give dense vectors.
            sparse: Give token weights.
            multi_vector: Give a vector a token: 4 kB each in bge-m3, half a gigabyte for 250
                texts of 512 tokens.
            return_tokens: Give the weighted tokens as text as well.
            priority: `"interactive"` for what somebody waits for, `"background"` for documents.
            show_progress: Show a progress bar.

        Returns:
            The outputs, in the order of the texts.

        Raises:
            ArgumentError: Nothing is asked for, or a text is not valid Unicode.
            CheckpointError: The checkpoint lacks the file of an output, or it is damaged.
            ClosedError: The model was closed.
            ComputationError: The model gave NaN or infinity.
            InputTypeError: `texts` is no list of str.
            TruncationError: A text is too long and `on_truncation="error"`.
        """
        call = self._asked(texts, dense, sparse, multi_vector, return_tokens)
        if call.items:
            self._check_heads(call)
            self._fill(call, priority=priority, show_progress=show_progress)
        return self._outputs(call, return_tokens=return_tokens)

    async def aencode(
        self,
        texts: Iterable[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        multi_vector: bool = False,
        return_tokens: bool = False,
        priority: Priority = "background",
        show_progress: bool = False,
    ) -> M3Outputs:
        """Encode texts without blocking the event loop; see `encode`."""
        asked = dense, sparse, multi_vector, return_tokens
        call = await run_off_loop(self._asked, texts, *asked, inline=can_check_inline(texts))
        if call.items:
            await self._acheck_heads(call)
            await self._afill(call, priority=priority, show_progress=show_progress)
        return await asyncio.to_thread(self._outputs, call, return_tokens=return_tokens)

    def score(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        weights: M3Weights | Mapping[str, float] | None = None,
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Score (query, passage) pairs by all outputs, each distinct text encoded once.

        Args:
            pairs: Pairs of str.
            weights: How much each output counts; None for 1, 0.3 and 1. An output of weight 0
                is not computed.
            show_progress: Show a progress bar.

        Returns:
            [n] float32, in order: the weighted sum of the three scores by the sum of the
            weights. Cosines reach 1, the sparse score has no bound, and neither is a probability.

        Raises:
            ArgumentError: A weight can't be served, or a text is not valid Unicode.
            CheckpointError: The checkpoint lacks the file of an output, or it is damaged.
            ClosedError: The model was closed.
            ComputationError: The model gave NaN or infinity.
            InputTypeError: An argument of the wrong type.
            TruncationError: A text is too long and `on_truncation="error"`.
        """
        call = self._scoring(pairs, weights)
        if call.items:
            self._check_heads(call)
            self._fill(call, priority="interactive", show_progress=show_progress)
        return call.scores

    async def ascore(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        weights: M3Weights | Mapping[str, float] | None = None,
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Score pairs without blocking the event loop; see `score`."""
        call = await run_off_loop(self._scoring, pairs, weights, inline=can_check_inline(pairs))
        if call.items:
            await self._acheck_heads(call)
            await self._afill(call, priority="interactive", show_progress=show_progress)
        return call.scores

    def close(self) -> None:
        """Let go of the model, and of what its passes left for others; see `LocalModel.close`."""
        engine = self._engine
        super().close()
        if self._stop_sharing is not None:
            self._stop_sharing()
        if engine is not None and engine.output_cache is not None:
            engine.output_cache.clear_unless_shared()

    def __getstate__(self) -> dict[str, Any]:
        """Give the configuration only."""
        state = super().__getstate__()
        del state["_stop_sharing"], state["_checked"]
        return state

    def _start(self) -> None:
        super()._start()
        self._checked: frozenset[Output] = frozenset()
        self._stop_sharing: Callable[[], object] | None = None
        if self._share:
            self._stop_sharing = share_outputs(self, self._source.name)

    def _check_make(self) -> None:
        """Refuse what is known by now to be no checkpoint of bge-m3's make."""
        if self._source.is_local:
            _check_make(self.checkpoint)
        elif (profile := find_profile(self.model, "embedder")) and profile.family != "xlm-roberta":
            raise _gives_no(self.model, "sparse")

    def _encode(
        self, tokenizer: Tokenizer, items: Sequence[str]
    ) -> tuple[list[TokenSequence], list[bool]]:
        return tokenizer.encode(items, max_length=self.max_length)

    def _asked(
        self, texts: Iterable[str], dense: bool, sparse: bool, multi_vector: bool, tokens: bool
    ) -> Call[str]:
        known = arguments.texts("texts", texts)
        self._check_open()
        asked: dict[Output, bool] = {
            "dense": arguments.flag("dense", dense),
            "sparse": arguments.flag("sparse", sparse),
            "multi_vector": arguments.flag("multi_vector", multi_vector),
        }
        outputs = frozenset(output for output, wanted in asked.items() if wanted)
        if not outputs:
            msg = "dense, sparse and multi_vector are all False: ask for at least one output."
            raise ArgumentError(msg)
        if arguments.flag("return_tokens", tokens) and not sparse:
            msg = "return_tokens=True spells the sparse output out: ask for it with sparse=True."
            raise ArgumentError(msg)
        return Call(known, requested_outputs=outputs)

    def _scoring(
        self, pairs: Iterable[tuple[str, str]], weights: M3Weights | Mapping[str, float] | None
    ) -> _Scoring:
        known = arguments.pairs("pairs", pairs)
        self._check_open()
        return _Scoring(known, M3Weights.of(weights), self._read)

    def _check_heads(self, call: Call[str]) -> None:
        """Refuse a missing or damaged layer here: in a worker it would fail its whole pack."""
        _check_make(self.checkpoint)
        for output in sorted(_outputs(call) - self._checked):
            if output != "dense":
                with hold_interpreter_exit():
                    load_head(self.checkpoint, output)
            self._checked |= {output}

    async def _acheck_heads(self, call: Call[str]) -> None:
        if not _outputs(call) <= self._checked:
            # A hub id may be downloaded, and files are read.
            await asyncio.to_thread(self._check_heads, call)

    def _outputs(self, call: Call[str], *, return_tokens: bool) -> M3Outputs:
        outputs = _outputs(call)
        read = [self._read(row, call, place) for place, row in enumerate(call.rows)]
        texts = [read[place] for place in call.places]
        dense = sparse = multi_vector = None
        if "dense" in outputs:
            dense = np.empty((0, self.dimension), dtype=np.float32)
            if texts:
                dense = np.stack([text.dense for text in texts])
        if "sparse" in outputs:
            # Equal texts get a dict each: they are the caller's to change.
            sparse = [dict(text.sparse) for text in texts]
        if "multi_vector" in outputs:
            multi_vector = [text.multi_vector for text in texts]
        tokens = [self._spelled(weights) for weights in sparse or ()] if return_tokens else None
        return M3Outputs(dense=dense, sparse=sparse, multi_vector=multi_vector, tokens=tokens)

    def _spelled(self, weights: Mapping[int, float]) -> dict[str, float]:
        spell = self._loaded().tokenizer.text_of
        heaviest = sorted(weights.items(), key=lambda item: -item[1])
        return {spell(token): weight for token, weight in heaviest}

    def _read(self, row: M3Row, call: Call[str], place: int) -> _Text:
        """Check a row, bring the dense vector to unit length and drop the tokens of no word."""
        arrays = (row.dense, None if row.sparse is None else row.sparse[1], row.multi_vector)
        if not all(array is None or np.isfinite(array).all() for array in arrays):
            raise non_finite_error(self.model, call.name_of(place))
        dense, sparse = row.dense, {}
        if dense is not None:
            dense = dense / np.maximum(np.linalg.norm(dense), np.finfo(np.float32).tiny)
        if row.sparse is not None:
            marks = self._loaded().tokenizer.marks
            found = zip(row.sparse[0].tolist(), row.sparse[1].tolist(), strict=True)
            sparse = {token: weight for token, weight in found if token not in marks}
        return _Text(dense, sparse, row.multi_vector)


class _Text(NamedTuple):
    """One text's outputs, ready to be given or compared; what was not asked for is empty."""

    dense: Any
    sparse: dict[int, float]
    multi_vector: Any


class _Scoring(Call[str]):
    """A call that scores pairs as their texts come in, and holds few token vectors at a time.

    Args:
        pairs: The pairs to be scored.
        weights: How much each output counts.
        read: Makes a text's outputs of its row.
    """

    shares_outputs = False

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        weights: M3Weights,
        read: Callable[[M3Row, Call[str], int], _Text],
    ) -> None:
        queries = dict.fromkeys(query for query, _ in pairs)
        texts = queries | dict.fromkeys(passage for _, passage in pairs)
        # Queries first: they stay, and a passage goes when its pairs are scored.
        super().__init__(list(texts), requested_outputs=weights.outputs)
        place = {text: index for index, text in enumerate(texts)}
        self.scores = np.zeros(len(pairs), dtype=np.float32)
        self._weights = weights.named()
        self._read = read
        self._queries = len(queries)
        self._held: list[_Text | None] = []
        self._due: dict[int, list[tuple[int, int, int]]] = {}
        for index, (query, passage) in enumerate(pairs):
            ends = place[query], place[passage]
            self._due.setdefault(max(ends), []).append((index, *ends))

    def slices(self) -> Iterator[slice]:
        """Cut by characters, since token vectors are large; a longer text is a slice of its own."""
        return slices_of(self.items, characters=_SCORED_CHARACTERS)

    def name_of(self, place: int) -> str:
        """Name a text for a message: it may be in any number of pairs."""
        return f"the text {self.items[place]!r:.60}"

    def take(self, rows: Rows) -> None:
        """Score the pairs whose texts are both here by now."""
        for row in rows:
            place = len(self._held)
            self._held.append(self._read(row, self, place))
            for index, query, passage in self._due.pop(place, ()):
                self.scores[index] = self._score(self._held[query], self._held[passage])
            if place >= self._queries:
                self._held[place] = None

    def _score(self, query: Any, passage: Any) -> float:
        scores: dict[Output, Callable[[], float]] = {
            "dense": lambda: float(query.dense @ passage.dense),
            "sparse": lambda: sum(
                weight * passage.sparse.get(token, 0.0) for token, weight in query.sparse.items()
            ),
            "multi_vector": lambda: float(
                (query.multi_vector @ passage.multi_vector.T).max(axis=1).mean()
            ),
        }
        given = {output: weight for output, weight in self._weights.items() if weight}
        total = sum(weight * scores[output]() for output, weight in given.items())
        return total / sum(given.values())


def _outputs(call: Call[str]) -> frozenset[Output]:
    return call.requested_outputs or frozenset()


def _check_make(checkpoint: Checkpoint) -> None:
    if not is_m3_architecture(
        checkpoint, checkpoint.pooling or ("cls" if checkpoint.heads else None)
    ):
        msg = (
            f"{checkpoint.name!r} is not of bge-m3's make, which is XLM-RoBERTa with CLS pooling "
            "and nothing beyond: give it to an embedding class, or use 'BAAI/bge-m3' here."
        )
        raise CheckpointError(msg)


def _gives_no(name: str, output: Output) -> CheckpointError:
    msg = (
        f"{name!r} gives no {output.replace('_', '-')} outputs: use 'BAAI/bge-m3' for them, and an "
        "embedding class for this model's dense vectors."
    )
    return CheckpointError(msg)


class M3Reranker(Ranking):
    """bge-m3 in a reranker's place: dense, sparse and multi-vector scores in one.

    Query and passages are encoded apart, the query once, so that a user of bge-m3 reranks with
    the model that is loaded already.

    Args:
        embedder: The model; closing the reranker closes it.
        weights: How much each of the three scores counts; None for 1, 0.3 and 1.

    Raises:
        CheckpointError: The checkpoint lacks the file of an output that counts.

    Example:
        >>> reranker = M3Reranker(M3Embedder("BAAI/bge-m3"), weights=M3Weights(sparse=0.5))
        >>> ranked = reranker.rank("what is a panda?", ["hi", "A panda is a bear."], top_n=1)
        >>> len(ranked), isinstance(ranked[0][1], float)
        (1, True)
    """

    def __init__(
        self, embedder: M3Embedder, *, weights: M3Weights | Mapping[str, float] | None = None
    ) -> None:
        self._embedder = embedder
        self._weights = M3Weights.of(weights)
        embedder.require(*sorted(self._weights.outputs))

    @property
    def model(self) -> str:
        """The hub id or folder."""
        return self._embedder.model

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the scores."""
        parts = (self._embedder.fingerprint, sorted(self._weights.named().items()))
        return fingerprint_of(*parts)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that were asked for; see `LocalModel.devices`."""
        return self._embedder.devices

    def score(self, query: str, passages: Iterable[str]) -> NDArray[np.float32]:
        """Score passages against one query, which is encoded once.

        Args:
            query: The query.
            passages: The passages.

        Returns:
            [n] float32, in order, as `M3Embedder.score` says: about 0 to 1, not a probability.

        Raises:
            BGEError: As `M3Embedder.score` says.
        """
        return self._embedder.score(query_pairs(query, passages), weights=self._weights)

    async def ascore(self, query: str, passages: Iterable[str]) -> NDArray[np.float32]:
        """Score passages without blocking the event loop; see `score`."""
        pairs = await run_off_loop(query_pairs, query, passages, inline=can_check_inline(passages))
        return await self._embedder.ascore(pairs, weights=self._weights)

    def score_pairs(
        self, pairs: Iterable[tuple[str, str]], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Score (query, passage) pairs, each distinct text encoded once.

        Args:
            pairs: Pairs of str.
            show_progress: Show a progress bar.

        Returns:
            [n] float32, in order, as `M3Embedder.score` says.

        Raises:
            BGEError: As `M3Embedder.score` says.
        """
        return self._embedder.score(pairs, weights=self._weights, show_progress=show_progress)

    async def ascore_pairs(
        self, pairs: Iterable[tuple[str, str]], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Score pairs without blocking the event loop; see `score_pairs`."""
        return await self._embedder.ascore(
            pairs, weights=self._weights, show_progress=show_progress
        )

    def rank_spans(
        self,
        query: str,
        passages: Iterable[str],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[Ranked]:
        """Rank passages as `rank` does; a score is of what was read, so no span is given."""
        self.check_limits(top_n=top_n, score_threshold=score_threshold)
        return _ranked(self.score(query, passages), top_n, score_threshold)

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
        return _ranked(await self.ascore(query, passages), top_n, score_threshold)

    def check_limits(self, *, top_n: int | None, score_threshold: float | None) -> None:
        """Refuse a `top_n` or a threshold that can't be meant.

        Raises:
            ArgumentError: `top_n` is below 1, or the threshold is NaN.
            InputTypeError: One of them is no number.
        """
        check_limits(top_n=top_n, score_threshold=score_threshold)

    def close(self) -> None:
        """Let go of the model; see `LocalModel.close`."""
        self._embedder.close()


def _ranked(
    scores: NDArray[np.float32], top_n: int | None, score_threshold: float | None
) -> list[Ranked]:
    ranked = rank_scores(scores, scores, top_n=top_n, score_threshold=score_threshold)
    return [Ranked(index, score) for index, score in ranked]
