"""What executes packs of bge-m3: dense, sparse and multi-vector rows from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from bge_core.backends.base import begin_copy
from bge_core.backends.loading import load_head
from bge_core.checkpoints.metadata import missing_head_error
from bge_core.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from bge_core.backends.base import Encoder, Fetch
    from bge_core.backends.output_cache import CachedOutput, OutputCache
    from bge_core.backends.packed import Heads, MakePack
    from bge_core.backends.packing import Pack
    from bge_core.checkpoints.catalog import Output
    from bge_core.checkpoints.metadata import Checkpoint
    from bge_core.tokenizer import TokenSequence

__all__ = ["M3Heads", "M3Row"]

_DENSE: frozenset[Output] = frozenset({"dense"})
_SHARED: frozenset[Output] = frozenset({"dense", "sparse"})


class M3Row(NamedTuple):
    """What was asked for of one sequence; None for the rest.

    Attributes:
        dense: The first token's hidden state, [hidden] float32, not normalised.
        sparse: Distinct token ids [k] int32, special ones included, and the greatest weight of
            each, [k] float32, above 0 (or NaN, for the caller to refuse).
        multi_vector: A unit vector of every token but the first, [tokens - 1, width] float32.
    """

    dense: NDArray[np.float32] | None = None
    sparse: tuple[NDArray[np.int32], NDArray[np.float32]] | None = None
    multi_vector: NDArray[np.float32] | None = None


class M3Heads:
    """Makes bge-m3's outputs of an encoder's packs.

    Sequences that request nothing run as on any other encoder. A damaged layer beyond the encoder
    is in nobody's way who wants dense vectors alone.

    Args:
        checkpoint: Where the further layers are.
        plain: Makes the row of a sequence that requests nothing: its dense vector.
        device: Where the model is.
        dtype: The encoder's number format, by name.
        output_cache: Where passes look first and leave the output that was not asked for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plain: Heads,
        *,
        device: torch.device,
        dtype: str,
        output_cache: OutputCache,
    ) -> None:
        self._checkpoint = checkpoint
        self._plain = plain
        self._cache = output_cache
        # With the encoder, since a file that is replaced later is another model's. What is wrong
        # with one is said to those who ask for its output.
        self._layers: dict[Output, torch.nn.Linear | str] = {}
        for output in checkpoint.m3_heads:
            try:
                head = load_head(checkpoint, output)
                self._layers[output] = head.to(device, getattr(torch, dtype))
            except CheckpointError as exc:
                self._layers[output] = str(exc)

    def launch(
        self, sequences: Sequence[TokenSequence], encoder: Encoder, make_pack: MakePack
    ) -> Fetch:
        """Begin to compute one row a sequence.

        Returns:
            Waits for the rows: a dense vector, [hidden] float32, for a sequence that requests no
            outputs, and an `M3Row` for one that does.

        Raises:
            CheckpointError: A layer that is asked for is missing or damaged.
        """
        shared = self._cache.is_shared
        if not shared:
            self._cache.clear_unless_shared()
            if all(sequence.requested_outputs is None for sequence in sequences):
                return self._plain.launch(sequences, encoder, make_pack)
        cached = [self._cached_row(sequence) if shared else None for sequence in sequences]
        missing = [one for one, row in zip(sequences, cached, strict=True) if row is None]
        computed: Callable[[], list[M3Row]] = list
        if missing:
            computed = self._computed(missing, encoder, make_pack, shared=shared)

        def fetch() -> list[Any]:
            further = iter(computed())
            rows = [next(further) if row is None else row for row in cached]
            return [_only_requested(one, row) for one, row in zip(sequences, rows, strict=True)]

        return fetch

    def _cached_row(self, sequence: TokenSequence) -> M3Row | None:
        """Return the cached row of another caller's pass, where it is all that is requested."""
        requested = _requested(sequence)
        if not sequence.shares_outputs or len(requested) > 1 or not requested <= _SHARED:
            return None
        (output,) = requested
        arrays: Any = self._cache.take(sequence.id_array, output)
        if arrays is None:
            return None
        return M3Row(dense=arrays[0]) if output == "dense" else M3Row(sparse=arrays)

    def _computed(
        self,
        sequences: Sequence[TokenSequence],
        encoder: Encoder,
        make_pack: MakePack,
        *,
        shared: bool,
    ) -> Callable[[], list[M3Row]]:
        caching = shared and any(sequence.shares_outputs for sequence in sequences)
        weighted = self._is_requested(sequences, "sparse") or (
            caching and self._can_compute_sparse()
        )
        multi = [
            position for position, one in enumerate(sequences) if "multi_vector" in _requested(one)
        ]
        if not weighted and not multi:
            plain = self._plain.launch(sequences, encoder, make_pack)
            return lambda: [M3Row(dense=row) for row in plain()]
        pack = make_pack(sequences)
        hidden = encoder.hidden_states(pack)
        dense = begin_copy(hidden[pack.first_token_indices()])
        weights = begin_copy(torch.relu(self._layer("sparse")(hidden)[:, 0])) if weighted else None
        vectors = self._vectors(hidden, pack, multi)

        def fetch() -> list[M3Row]:
            firsts, all_weights = dense(), None if weights is None else weights()
            rows, start = [], 0
            for position, sequence in enumerate(sequences):
                end, sparse, vector = start + len(sequence), None, None
                if all_weights is not None:
                    sparse = _strongest(sequence.id_array, all_weights[start:end])
                if position in vectors:
                    vector = vectors[position]()
                rows.append(M3Row(firsts[position].copy(), sparse, vector))
                if caching:
                    self._cache_output(sequence, rows[-1])
                start = end
            return rows

        return fetch

    def _vectors(
        self, hidden: Tensor, pack: Pack, positions: Sequence[int]
    ) -> dict[int, Callable[[], NDArray[np.float32]]]:
        """Begin to compute the token vectors of some sequences of a pack, by position."""
        vectors = {}
        starts = np.cumsum([0, *pack.lengths])
        for position in positions:
            own = hidden[starts[position] + 1 : starts[position + 1]]
            unit = torch.nn.functional.normalize(self._layer("multi_vector")(own).float(), dim=-1)
            vectors[position] = begin_copy(unit)
        return vectors

    def _cache_output(self, sequence: TokenSequence, row: M3Row) -> None:
        """Cache the output that was computed and not requested, for the next caller."""
        if not sequence.shares_outputs or row.sparse is None or row.dense is None:
            return
        computed: dict[Output, CachedOutput] = {"dense": (row.dense,), "sparse": row.sparse}
        for output in _SHARED - _requested(sequence):
            self._cache.keep(sequence.id_array, output, computed[output])

    def _is_requested(self, sequences: Sequence[TokenSequence], output: Output) -> bool:
        return any(output in _requested(sequence) for sequence in sequences)

    def _can_compute_sparse(self) -> bool:
        try:
            self._layer("sparse")
        except CheckpointError:
            # It is the next asker's error, not this one's.
            return False
        return True

    def _layer(self, output: Output) -> torch.nn.Linear:
        layer = self._layers.get(output)
        if layer is None:
            raise missing_head_error(self._checkpoint, output)
        if isinstance(layer, str):
            raise CheckpointError(layer)
        return layer


def _requested(sequence: TokenSequence) -> frozenset[Output]:
    return sequence.requested_outputs or _DENSE


def _only_requested(sequence: TokenSequence, row: M3Row) -> Any:
    """Return the requested outputs of a sequence only."""
    outputs = sequence.requested_outputs
    if outputs is None:
        return row.dense
    return M3Row(
        dense=row.dense if "dense" in outputs else None,
        sparse=row.sparse if "sparse" in outputs else None,
        multi_vector=row.multi_vector,
    )


def _strongest(
    ids: NDArray[np.int32], weights: NDArray[np.float32]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return each distinct id with its greatest weight; ids without one are left out."""
    distinct, positions = np.unique(ids, return_inverse=True)
    strongest = np.zeros(len(distinct), dtype=np.float32)
    with np.errstate(invalid="ignore"):
        np.maximum.at(strongest, positions, weights)
    kept = ~(strongest <= 0)  # so that NaN is kept, to be refused
    return distinct[kept], strongest[kept]
