"""bge-m3 in full: dense, sparse and multi-vector outputs of a text from one forward pass."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Unpack, cast, overload

import numpy as np

from bge_core import arguments
from bge_core.arguments import shown
from bge_core.backends.loading import load_head
from bge_core.backends.output_cache import share_outputs
from bge_core.checkpoints.catalog import find_profile
from bge_core.checkpoints.metadata import is_m3_architecture, missing_head_error
from bge_core.dimensions import check_truncate_dim, kept_dimension
from bge_core.engine.call import Call, adrive, drive, slices_of
from bge_core.engine.local_model import LocalModel
from bge_core.engine.model import HasModel
from bge_core.engine.process import hold_interpreter_exit
from bge_core.errors import ArgumentError, CheckpointError, InputTypeError
from bge_core.lifecycle import fingerprint_of
from bge_core.options import ModelArguments, ModelOptions, with_options_of
from bge_core.reranker import Scored, Scorer
from bge_core.tokenizer import can_tokenize_inline
from bge_core.windows import score_windows, split

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import TypeVar

    from bge_core.arguments import Priority
    from bge_core.backends.m3_heads import M3Row
    from bge_core.checkpoints.catalog import Output
    from bge_core.checkpoints.metadata import Checkpoint
    from bge_core.engine.call import Steps
    from bge_core.engine.scheduler import Rows
    from bge_core.engine.stats import ModelStats

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
        M3Weights(dense=1.0, sparse=0.0, multi_vector=1.0)
    """

    dense: float = 1.0
    sparse: float = 0.3
    multi_vector: float = 1.0

    def __post_init__(self) -> None:
        """Refuse weights that give no score; numpy's numbers become Python's."""
        for name, given in self.named().items():
            value = arguments.number(f"The weight {name}", given)
            if not math.isfinite(value) or value < 0:
                msg = f"The weight {name} must be 0 or more and finite, got {shown(given)}."
                raise ArgumentError(msg)
            object.__setattr__(self, name, value)
        if not sum(self.named().values()):
            msg = "All three weights are 0, which scores nothing: give at least one of them."
            raise ArgumentError(msg)

    @classmethod
    def of(cls, weights: M3Weights | Mapping[str, float] | None) -> M3Weights:
        """Make weights of what a user wrote.

        Args:
            weights: Weights, a mapping of their names, or None for the defaults.

        Raises:
            ArgumentError: A name is unknown, or a weight is not supported.
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
                f"{shown(weights)}: name each, M3Weights(dense=1.0, sparse=0.3, multi_vector=1.0)."
            )
            raise InputTypeError(msg)
        for name in weights:
            if name not in known:
                msg = f"{shown(name)} is no weight: the names are {', '.join(known)}."
                raise ArgumentError(msg)
        return cls(**weights)

    def named(self) -> dict[Output, float]:
        """Return the weights by output."""
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


if TYPE_CHECKING:
    # What was asked of `encode`, as far as it is known before the code runs.
    Dense = TypeVar("Dense", Literal[True], Literal[False], bool, default=Literal[True])
    Sparse = TypeVar("Sparse", Literal[True], Literal[False], bool, default=Literal[True])
    MultiVector = TypeVar(
        "MultiVector", Literal[True], Literal[False], bool, default=Literal[False]
    )
    Tokens = TypeVar("Tokens", Literal[True], Literal[False], bool, default=Literal[False])

    class _Dense:
        @overload
        def __get__(
            self, outputs: Asked[Literal[True], Any, Any, Any], owner: Any = ..., /
        ) -> NDArray[np.float32]: ...
        @overload
        def __get__(
            self, outputs: Asked[Any, Any, Any, Any], owner: Any = ..., /
        ) -> NDArray[np.float32] | None: ...
        def __get__(self, outputs: Any, owner: Any = None, /) -> Any: ...

    class _Sparse:
        @overload
        def __get__(
            self, outputs: Asked[Any, Literal[True], Any, Any], owner: Any = ..., /
        ) -> list[dict[int, float]]: ...
        @overload
        def __get__(
            self, outputs: Asked[Any, Any, Any, Any], owner: Any = ..., /
        ) -> list[dict[int, float]] | None: ...
        def __get__(self, outputs: Any, owner: Any = None, /) -> Any: ...

    class _MultiVector:
        @overload
        def __get__(
            self, outputs: Asked[Any, Any, Literal[True], Any], owner: Any = ..., /
        ) -> list[NDArray[np.float32]]: ...
        @overload
        def __get__(
            self, outputs: Asked[Any, Any, Any, Any], owner: Any = ..., /
        ) -> list[NDArray[np.float32]] | None: ...
        def __get__(self, outputs: Any, owner: Any = None, /) -> Any: ...

    class _Tokens:
        @overload
        def __get__(
            self, outputs: Asked[Any, Any, Any, Literal[True]], owner: Any = ..., /
        ) -> list[dict[str, float]]: ...
        @overload
        def __get__(
            self, outputs: Asked[Any, Any, Any, Any], owner: Any = ..., /
        ) -> list[dict[str, float]] | None: ...
        def __get__(self, outputs: Any, owner: Any = None, /) -> Any: ...

    class Asked(M3Outputs, Generic[Dense, Sparse, MultiVector, Tokens]):
        """`M3Outputs` for type checkers: what was asked for is there, the rest may be None."""

        dense: _Dense
        sparse: _Sparse
        multi_vector: _MultiVector
        tokens: _Tokens


class M3Embedder(HasModel):
    """bge-m3: a dense vector, a weight a token, and a vector a token, from one forward pass.

    Queries and documents are encoded alike: bge-m3 wants no instruction. Arguments are checked at
    once; weights load at first use and are shared with every `Embedder` and `M3Embedder` on the
    same model, revision, device and dtype.

    Args:
        model: `"BAAI/bge-m3"`, or a folder of its architecture: XLM-RoBERTa with
            `sparse_linear.pt` and `colbert_linear.pt` beside its weights.
        share_outputs: While this embedder lives, one pass serves its next call and that of an
            `Embedder` on the same model: whoever asks first for the dense or the sparse output of
            some texts leaves the other, at most 64 MiB, for the second. For vector stores, which
            ask for one after the other.
        truncate_dim: How many of a dense vector's numbers are kept, as `Embedder` takes it.
        **options: `device`, `dtype`, `use_fp16`, `max_length`, `batch_tokens`, `on_truncation`,
            `backend`, `cache_folder`, `revision`, `local_files_only`, `trust_remote_code` and
            `token`, as `bge_core.options.ModelOptions` describes them. `backend="auto"` is torch
            here, since only torch gives all outputs.

    Raises:
        ArgumentError: A value that is not supported.
        CheckpointError: A model that can't be found, is damaged, or has another architecture.
        InputTypeError: A value of the wrong type.

    Example:
        >>> embedder = M3Embedder("BAAI/bge-m3")
        >>> encoded = embedder.encode(["Paris is in France.", "大熊猫是熊。"], return_tokens=True)
        >>> len(encoded.dense), len(encoded.sparse[1]) == len(encoded.tokens[1])
        (2, True)
        >>> embedder.score([("Where is Paris?", "Paris is in France.")]).shape
        (1,)
    """

    _model: LocalModel

    @with_options_of(ModelOptions)
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        share_outputs: bool = False,
        truncate_dim: int | None = None,
        **options: Unpack[ModelArguments],
    ) -> None:
        self._share = arguments.flag("share_outputs", share_outputs)
        backend = options.get("backend", "torch")
        if isinstance(backend, str) and backend == "auto":
            options["backend"] = "torch"
        # CLS of a bare folder, too: the further layers say what it is.
        local = LocalModel(ModelOptions(model=model, **options), kind="embedder", pooling="cls")
        if local.options.backend != "torch":
            msg = (
                f"backend={local.options.backend!r} gives dense vectors only: pass backend='torch' "
                "or use an embedding class."
            )
            raise ArgumentError(msg)
        self._model = local
        self._check_architecture()
        self._truncate_dim = check_truncate_dim(
            truncate_dim, model=local.model, width=local.known_dimension
        )
        self._init_process_state()

    @property
    def dimension(self) -> int:
        """Length of a dense vector."""
        found = self.checkpoint
        return kept_dimension(
            self._truncate_dim, saved=found.truncate_dim, width=found.hidden_size, model=self.model
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the outputs.

        As `Embedder.fingerprint`: the weights and the length count, not the device or the place.
        """
        kept = () if self._truncate_dim is None else ("truncate_dim", self._truncate_dim)
        return fingerprint_of("m3", *self._model.fingerprint, *kept)

    def require(self, *outputs: Output) -> None:
        """Refuse a checkpoint that can't give some outputs, where that is known by now.

        A hub id that is not in the table of published checkpoints is looked at when it is used.

        Args:
            outputs: Any of `"dense"`, `"sparse"` and `"multi_vector"`.

        Raises:
            CheckpointError: A file that an output needs is missing; says which.
        """
        found = self._model.known_checkpoint
        if found is None:
            profile = find_profile(self.model, "embedder")
            lacking = [output for output in outputs if profile and output not in profile.outputs]
            if lacking:
                raise _missing_output_error(self.model, lacking[0])
            return
        for output in outputs:
            if output != "dense" and output not in found.m3_heads:
                raise missing_head_error(found, output)

    def encode(
        self,
        texts: Iterable[str],
        *,
        dense: Dense = True,  # type: ignore[assignment]
        sparse: Sparse = True,  # type: ignore[assignment]
        multi_vector: MultiVector = False,  # type: ignore[assignment]
        return_tokens: Tokens = False,  # type: ignore[assignment]
        priority: Priority = "background",
        show_progress: bool = False,
    ) -> Asked[Dense, Sparse, MultiVector, Tokens]:
        """Encode texts; one forward pass a distinct text gives all that is asked for.

        Args:
            texts: Queries or documents; an empty one is encoded as the model itself would.
            dense: Return dense vectors.
            sparse: Return token weights.
            multi_vector: Return a vector a token: 4 kB each in bge-m3, half a gigabyte for 250
                texts of 512 tokens.
            return_tokens: Return the weighted tokens as text as well.
            priority: `"interactive"` for what somebody waits for, `"background"` for documents.
            show_progress: Show a progress bar.

        Returns:
            The outputs, in the order of the texts. Type checkers know what was asked for.

        Raises:
            ArgumentError: Nothing is asked for, or a text is not valid Unicode.
            CheckpointError: The checkpoint lacks the file of an output, or it is damaged.
            ClosedError: The model was closed.
            ComputationError: The model gave NaN or infinity.
            InputTypeError: `texts` is no list of str.
            TruncationError: A text is too long and `on_truncation="error"`.
        """
        asked = self._asked(dense, sparse, multi_vector, return_tokens)
        steps = self._encode(texts, asked, return_tokens, priority, show_progress)
        return cast("Asked[Dense, Sparse, MultiVector, Tokens]", drive(steps))

    async def aencode(
        self,
        texts: Iterable[str],
        *,
        dense: Dense = True,  # type: ignore[assignment]
        sparse: Sparse = True,  # type: ignore[assignment]
        multi_vector: MultiVector = False,  # type: ignore[assignment]
        return_tokens: Tokens = False,  # type: ignore[assignment]
        priority: Priority = "background",
        show_progress: bool = False,
    ) -> Asked[Dense, Sparse, MultiVector, Tokens]:
        """Encode texts without blocking the event loop; see `encode`."""
        asked = self._asked(dense, sparse, multi_vector, return_tokens)
        steps = self._encode(texts, asked, return_tokens, priority, show_progress)
        ready = self._ready(asked)
        outputs = await adrive(steps, inline=can_tokenize_inline(texts), at_once=ready)
        return cast("Asked[Dense, Sparse, MultiVector, Tokens]", outputs)

    def score(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        weights: M3Weights | Mapping[str, float] | None = None,
        priority: Priority = "background",
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Score (query, passage) pairs by all outputs, each distinct text encoded once.

        Args:
            pairs: Pairs of str.
            weights: How much each output counts; None for 1, 0.3 and 1. An output of weight 0
                is not computed.
            priority: `"background"` for bulk, which live queries overtake; `"interactive"` for
                what somebody waits for.
            show_progress: Show a progress bar.

        Returns:
            [n] float32, in order: the weighted sum of the three scores by the sum of the
            weights. Cosines reach 1, the sparse score has no bound, and neither is a probability.

        Raises:
            ArgumentError: A weight is not supported, or a text is not valid Unicode.
            CheckpointError: The checkpoint lacks the file of an output, or it is damaged.
            ClosedError: The model was closed.
            ComputationError: The model gave NaN or infinity.
            InputTypeError: An argument of the wrong type.
            TruncationError: A text is too long and `on_truncation="error"`.
        """
        return drive(self.score_steps(pairs, M3Weights.of(weights), priority, show_progress))

    async def ascore(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        weights: M3Weights | Mapping[str, float] | None = None,
        priority: Priority = "background",
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Score pairs without blocking the event loop; see `score`."""
        known = M3Weights.of(weights)
        steps = self.score_steps(pairs, known, priority, show_progress)
        ready = self._ready(known.outputs)
        return await adrive(steps, inline=can_tokenize_inline(pairs), at_once=ready)

    def score_steps(
        self,
        pairs: Iterable[tuple[str, str]],
        weights: M3Weights,
        priority: Priority,
        show_progress: bool,
        *,
        begins: bool = True,
        windows: bool = False,
    ) -> Steps[NDArray[np.float32]]:
        """Score pairs step by step, as `score` and `ascore` do; see `Steps`.

        Args:
            pairs: Pairs of str.
            weights: How much each output counts.
            priority: As `score` takes it.
            show_progress: Show a progress bar.
            begins: Whether it is a call of its own, for `stats` and for what is said of texts that
                are too long; False for a part of one.
            windows: As of `Call`.
        """
        known = arguments.pairs("pairs", pairs)
        call = _Scoring(known, weights, self._read, reports=begins, windows=windows)
        asked = len(known) if begins else None
        yield from self._compute(call, weights.outputs, priority, show_progress, asked)
        return call.scores

    def close(self) -> None:
        """Release the model, and what passes left for others; see `HasModel.close`."""
        engine = self._model.engine
        super().close()
        if self._stop_sharing is not None:
            self._stop_sharing()
        if engine is not None and engine.output_cache is not None:
            engine.output_cache.clear_unless_shared()

    def __getstate__(self) -> dict[str, Any]:
        """Return the configuration only."""
        state = super().__getstate__()
        del state["_stop_sharing"], state["_checked"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a configuration."""
        self.__dict__.update(state)
        self._init_process_state()

    def _init_process_state(self) -> None:
        self._checked: frozenset[Output] = frozenset()
        self._stop_sharing: Callable[[], object] | None = None
        if self._share:
            self._stop_sharing = share_outputs(self, self._model.options.source.name)

    def _check_architecture(self) -> None:
        """Refuse what is known by now to have another architecture than bge-m3."""
        if (found := self._model.known_checkpoint) is not None:
            _check_architecture(found)
        elif (profile := find_profile(self.model, "embedder")) and profile.family != "xlm-roberta":
            raise _missing_output_error(self.model, "sparse")

    def _asked(
        self, dense: bool, sparse: bool, multi_vector: bool, tokens: bool
    ) -> frozenset[Output]:
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
        return outputs

    def _ready(self, outputs: frozenset[Output]) -> bool:
        """Whether a call for these outputs starts without loading anything."""
        return self._model.ready and outputs <= self._checked

    def _encode(
        self,
        texts: Iterable[str],
        outputs: frozenset[Output],
        return_tokens: bool,
        priority: Priority,
        show_progress: bool,
    ) -> Steps[M3Outputs]:
        call = Call(arguments.texts("texts", texts), requested_outputs=outputs)
        asked = len(call.inverse)
        yield from self._compute(call, outputs, priority, show_progress, asked)
        return self._outputs(call, outputs, return_tokens=return_tokens)

    def _compute(
        self,
        call: Call[str],
        outputs: frozenset[Output],
        priority: Priority,
        show_progress: bool,
        asked: int | None,
    ) -> Steps[None]:
        priority = arguments.one_of("priority", priority, arguments.PRIORITIES)
        self._model.check_open()
        if asked is not None:
            self._begin(asked)
        if call.items:
            self._check_heads(outputs)
        yield from self._compute_with_bar(call, priority=priority, show_progress=show_progress)

    def _check_heads(self, outputs: frozenset[Output]) -> None:
        """Refuse a missing or damaged layer here: in a worker it would fail its whole pack."""
        if outputs <= self._checked:
            return
        _check_architecture(self.checkpoint)
        for output in sorted(outputs - self._checked):
            if output != "dense":
                with hold_interpreter_exit():
                    load_head(self.checkpoint, output)
            self._checked |= {output}

    def _outputs(
        self, call: Call[str], outputs: frozenset[Output], *, return_tokens: bool
    ) -> M3Outputs:
        read = [self._read(row, call, index) for index, row in enumerate(call.rows)]
        texts = [read[index] for index in call.inverse]
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
        spell = self._model.tokenizer().text_of
        heaviest = sorted(weights.items(), key=lambda item: -item[1])
        return {spell(token): weight for token, weight in heaviest}

    def _read(self, row: M3Row, call: Call[str], index: int) -> _Text:
        """Check a row, bring the dense vector to unit length and drop the tokens of no word."""
        arrays = (row.dense, None if row.sparse is None else row.sparse[1], row.multi_vector)
        if not all(array is None or np.isfinite(array).all() for array in arrays):
            raise self._model.non_finite_error(call.describe_item(index))
        dense, sparse = row.dense, {}
        if dense is not None:
            dense = dense[: self.dimension]
            dense = dense / np.maximum(np.linalg.norm(dense), np.finfo(np.float32).tiny)
        if row.sparse is not None:
            special = self._model.tokenizer().special_token_ids
            found = zip(row.sparse[0].tolist(), row.sparse[1].tolist(), strict=True)
            sparse = {token: weight for token, weight in found if token not in special}
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
        reports: As of `Call`.
        windows: As of `Call`.
    """

    shares_outputs = False
    rows_are_small = False

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        weights: M3Weights,
        read: Callable[[M3Row, Call[str], int], _Text],
        *,
        reports: bool,
        windows: bool,
    ) -> None:
        queries = dict.fromkeys(query for query, _ in pairs)
        texts = queries | dict.fromkeys(passage for _, passage in pairs)
        # Queries first: they stay, and a passage goes when its pairs are scored.
        super().__init__(
            list(texts),
            requested_outputs=weights.outputs,
            reports=reports,
            windows=windows,
        )
        position = {text: index for index, text in enumerate(texts)}
        self.scores = np.zeros(len(pairs), dtype=np.float32)
        self._weights = weights.named()
        self._read = read
        self._queries = len(queries)
        self._held: list[_Text | None] = []
        self._pending: dict[int, list[tuple[int, int, int]]] = {}
        self._ends = [(position[query], position[passage]) for query, passage in pairs]
        for index, ends in enumerate(self._ends):
            self._pending.setdefault(max(ends), []).append((index, *ends))

    def slices(self) -> Iterator[slice]:
        """Cut by characters, since token vectors are large; a longer text is a slice of its own."""
        return slices_of(self.items, characters=_SCORED_CHARACTERS)

    def truncated_pairs(self) -> list[int] | None:
        """Return the places of the pairs with a truncated text."""
        found = enumerate(self._ends)
        return [index for index, ends in found if any(self.truncated[end] for end in ends)]

    def describe_item(self, index: int) -> str:
        """Return a text's name for a message: it may be in any number of pairs."""
        return f"the text {self.items[index]!r:.60}"

    def add_rows(self, rows: Rows) -> None:
        """Score the pairs whose texts are both here by now."""
        for row in rows:
            text = len(self._held)
            self._held.append(self._read(row, self, text))
            for pair, query, passage in self._pending.pop(text, ()):
                self.scores[pair] = self._score(self._held[query], self._held[passage])
            if text >= self._queries:
                self._held[text] = None

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


def _check_architecture(checkpoint: Checkpoint) -> None:
    if not is_m3_architecture(
        checkpoint, checkpoint.pooling or ("cls" if checkpoint.m3_heads else None)
    ):
        msg = (
            f"{checkpoint.name!r} is not of bge-m3's make, which is XLM-RoBERTa with CLS pooling "
            "and nothing beyond: give it to an embedding class, or use 'BAAI/bge-m3' here."
        )
        raise CheckpointError(msg)


def _missing_output_error(name: str, output: Output) -> CheckpointError:
    msg = (
        f"{name!r} gives no {output.replace('_', '-')} outputs: use 'BAAI/bge-m3' for them, and an "
        "embedding class for this model's dense vectors."
    )
    return CheckpointError(msg)


class M3Reranker(Scorer):
    """bge-m3 in a reranker's place: dense, sparse and multi-vector scores in one.

    Query and passages are encoded apart, the query once, so that a user of bge-m3 reranks with
    the model that is loaded already.

    Args:
        embedder: The model; closing the reranker closes it.
        weights: How much each of the three scores counts; None for 1, 0.3 and 1.
        long_passages: What happens with a passage that doesn't fit: `"truncate"` reads its
            beginning; `"window"` scores overlapping windows of it and takes the best.

    Raises:
        ArgumentError: A weight or word that is not supported.
        CheckpointError: The checkpoint lacks the file of an output that counts.
        InputTypeError: `embedder` is no `M3Embedder`.

    Example:
        >>> reranker = M3Reranker(M3Embedder("BAAI/bge-m3"), weights=M3Weights(sparse=0.5))
        >>> (best,) = reranker.rank("what is a panda?", ["hi", "A panda is a bear."], top_n=1)
        >>> isinstance(best.index, int), isinstance(best.score, float)
        (True, True)
    """

    def __init__(
        self,
        embedder: M3Embedder,
        *,
        weights: M3Weights | Mapping[str, float] | None = None,
        long_passages: str = "truncate",
    ) -> None:
        if not isinstance(embedder, M3Embedder):
            msg = (
                f"embedder must be a bge_core.M3Embedder, got {type(embedder).__name__}: pass "
                "M3Embedder('BAAI/bge-m3'), or make both with make_reranker('BAAI/bge-m3')."
            )
            raise InputTypeError(msg)
        self._embedder = embedder
        self._weights = M3Weights.of(weights)
        self._long_passages = arguments.one_of(
            "long_passages", long_passages, arguments.LONG_PASSAGES
        )
        embedder.require(*sorted(self._weights.outputs))

    @property
    def model(self) -> str:
        """The hub id or folder."""
        return self._embedder.model

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the scores."""
        weights = sorted(self._weights.named().items())
        return fingerprint_of(self._embedder.fingerprint, weights, self._long_passages)

    @property
    def is_local(self) -> bool:
        """True: it runs on this machine."""
        return True

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that were asked for; empty for the best one of whichever machine loads it."""
        return self._embedder.devices

    def stats(self) -> ModelStats:
        """Return what its embedder has done so far; `texts` are pairs, `sequences` texts."""
        return self._embedder.stats()

    def close(self) -> None:
        """Release the model; see `M3Embedder.close`."""
        self._embedder.close()

    @property
    def _ready(self) -> bool:
        return self._embedder._ready(self._weights.outputs)

    def _scored(
        self, pairs: list[tuple[str, str]], *, priority: Priority, show_progress: bool
    ) -> Steps[Scored]:
        def score(some: list[tuple[str, str]], _parts: object = None) -> Steps[NDArray[np.float32]]:
            return self._embedder.score_steps(
                some, self._weights, priority, show_progress, begins=not windowed, windows=True
            )

        windowed = self._long_passages == "window" and bool(pairs)
        if not windowed:
            scores = yield from score(pairs)
            return Scored(scores, scores)
        self._embedder._begin(len(pairs))
        model = self._embedder.local
        tokenizer = model.tokenizer()
        layout = tokenizer.text_layout(model.max_length)
        queries = list(dict.fromkeys(query for query, _ in pairs))
        lengths = dict(
            zip(queries, tokenizer.encode(queries, max_length=model.max_length)[1], strict=True)
        )
        model.report_truncation("queries", [lengths[query] for query, _ in pairs])
        scores, spans = yield from score_windows(
            pairs,
            split_item=lambda pair: split(tokenizer, pair[1], layout, capacity=model.capacity),
            compute=score,
        )
        return Scored(scores, scores, spans)
