"""What every backend shares: the protocols, poolings, padded inputs and token budgets."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from bge_core.backends.cpu_threads import PackThreads, shareable_threads
from bge_core.backends.memory import Budget, is_out_of_memory, share_of_memory
from bge_core.backends.packing import Pack

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from bge_core.tokenizer import TokenSequence

__all__ = [
    "POOLS",
    "Fetch",
    "OverlappingRunner",
    "Runner",
    "TorchRunner",
    "begin_copy",
    "default_budget",
    "identity",
    "padded_inputs",
    "pooled",
    "takes_types",
    "to_numpy",
]

logger = logging.getLogger(__name__)

Pool = Callable[["Tensor", Pack], "Tensor"]
"""Hidden rows [rows, hidden] and their pack -> one row a sequence, [n, hidden]."""
Head = Callable[["Tensor"], "Tensor"]
"""One row a sequence, [n, hidden] -> what the caller wants of it, [n, width]."""


Fetch = Callable[[], Any]
"""Waits for what a device computes, and gives it: of a runner its rows, as `Runner.run` does."""


class Encoder(Protocol):
    """Computes the last layer's rows of a pack; what it is padded with has rows at the end."""

    bucketed: bool
    """Whether its packs should come in few sizes (see `Pack`)."""
    capturable: bool
    """Whether a pack's sizes alone say what it launches on a device, which it never waits for."""

    def hidden_states(self, pack: Pack) -> Tensor:
        """Compute the row of every token, [rows, hidden]."""
        ...

    def first_token_states(self, pack: Pack) -> Tensor:
        """Compute the row of each sequence's first token, [rows, hidden]."""
        ...


class Runner(Protocol):
    """Executes packs on one device."""

    padded: bool
    """Whether a short sequence costs as much as the longest of its pack."""
    default_budget: int
    """Tokens a pack may have unless the user says otherwise."""
    threads: int
    """Threads of a CPU that packs may share out among themselves; 1 where the device sees to it."""

    def run(self, sequences: Sequence[TokenSequence]) -> NDArray[np.float32] | list[Any]:
        """Compute one row a sequence: [n, width] float32, or a list of what was asked for."""
        ...


@runtime_checkable
class OverlappingRunner(Runner, Protocol):
    """A runner whose device may compute a pack while the next one is made."""

    overlaps: bool
    """Whether it does; where it doesn't, `launch` computes."""

    def launch(self, sequences: Sequence[TokenSequence]) -> Fetch:
        """Begin to compute; the function that is returned waits for the rows."""
        ...

    def on_thread(self, *, urgent: bool) -> AbstractContextManager[Any]:
        """Return a context in which a thread computes.

        Args:
            urgent: Whether the device takes this thread's work before the others'.
        """
        ...


class TorchRunner(ABC):
    """What the runners on a device of torch's share.

    Args:
        device: Where the model is.
        budget: What a pack may have unless the user says otherwise.
        dtype: The model's number format, by name.
    """

    padded = False

    def __init__(self, *, device: torch.device, budget: Budget, dtype: str = "float32") -> None:
        self._device = device
        self._budget = budget
        # A CPU computes no float16, save in tests.
        self._half = dtype == "float16" and device.type in ("cuda", "cpu")
        self.default_budget = budget.tokens
        self._pack_threads = PackThreads() if device.type == "cpu" else None
        self.threads = shareable_threads() if device.type == "cpu" else 1
        self.overlaps = device.type == "cuda"
        if self.overlaps:
            # The workers have streams of their own, which don't wait for the weights. Waiting for
            # the whole device isn't allowed while another model's worker captures a graph.
            torch.cuda.current_stream(device).synchronize()

    @abstractmethod
    def _launch(self, sequences: Sequence[TokenSequence]) -> Fetch:
        """Do what `launch` does."""

    @torch.inference_mode()
    def launch(self, sequences: Sequence[TokenSequence]) -> Fetch:
        """Begin to compute one row a sequence; the function that is returned waits for them."""
        tokens = sum(map(len, sequences))
        with self._pack_threads.computing(tokens) if self._pack_threads else nullcontext():
            fetch = self._launch(sequences)
        return partial(self._fetch_finite, sequences, fetch) if self._half else fetch

    def _fetch_finite(self, sequences: Sequence[TokenSequence], fetch: Fetch) -> Any:
        """Fetch rows, and compute those again that overflowed."""
        rows = fetch()
        if isinstance(rows, np.ndarray) and np.isfinite(rows).all():
            return rows
        bad = [place for place, row in enumerate(rows) if not _is_finite(row)]
        if bad:
            logger.debug("%d of %d rows overflowed in float16.", len(bad), len(rows))
            try:
                again = self._launch_in_bfloat16([sequences[place] for place in bad])()
            except Exception as exc:
                if is_out_of_memory(exc):
                    raise
                # The caller says which text it was, and what to do.
                logger.debug("bfloat16 in place of float16: %s", exc)
            else:
                for place, row in zip(bad, again, strict=True):
                    rows[place] = row
        return rows

    @torch.inference_mode()
    def _launch_in_bfloat16(self, sequences: Sequence[TokenSequence]) -> Fetch:
        # It has float32's range. Weights are converted where they are used; norms are in float32.
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            return self._launch(sequences)

    def run(self, sequences: Sequence[TokenSequence]) -> NDArray[np.float32] | list[Any]:
        """Compute one row a sequence: [n, width] float32, or a list of what was asked for.

        Raises:
            CheckpointError: A further layer that is asked for is missing or damaged.
        """
        rows: NDArray[np.float32] | list[Any] = self.launch(sequences)()
        return rows

    def on_thread(self, *, urgent: bool) -> AbstractContextManager[Any]:
        """Return a context in which a thread computes: on CUDA with a stream of its own."""
        if not self.overlaps:
            return nullcontext()
        # The lower number goes first. Both work on the device at once: a query's kernels start
        # when some of a bulk pack's have ended, and not when the pack has.
        return _on_own_stream(self._device, priority=-1 if urgent else 0)


# Of workers that have ended, by device and priority. cuBLAS keeps 32 MiB for each stream that it
# has met, and torch's allocator what was freed on it, for as long as the process lives.
_idle_streams: defaultdict[tuple[torch.device, int], list[Any]] = defaultdict(list)


@contextmanager
def _on_own_stream(device: torch.device, *, priority: int) -> Iterator[None]:
    """Return a context in which a thread launches on a stream that is nobody else's meanwhile."""
    cuda: Any = torch.cuda  # whose classes have no types
    idle = _idle_streams[device, priority]
    try:
        stream = idle.pop()
    except IndexError:
        stream = cuda.Stream(device, priority=priority)
    try:
        with cuda.stream(stream):
            yield
    finally:
        idle.append(stream)


def _is_finite(row: Any) -> bool:
    """Return whether a row, or each part of one that there is, has neither NaN nor infinity."""
    if isinstance(row, tuple):
        return all(_is_finite(part) for part in row if part is not None)
    return bool(np.isfinite(row).all())


def padded_inputs(
    sequences: Sequence[TokenSequence], *, pad: int, types: bool
) -> dict[str, NDArray[np.int64]]:
    """Make a padded batch's inputs.

    Args:
        sequences: The sequences.
        pad: The padding token's id.
        types: Whether the model takes token types.

    Returns:
        input_ids, attention_mask and, if asked for, token_type_ids, each [n, longest].
    """
    shape = (len(sequences), max(len(sequence) for sequence in sequences))
    ids = np.full(shape, pad, dtype=np.int64)
    mask, second = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence.id_array
        mask[row, : len(sequence)] = 1
        second[row, sequence.second_segment_start : len(sequence)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "token_type_ids": second} if types else inputs


def takes_types(encoder: Any) -> bool:
    """Return whether a model takes token types."""
    return (getattr(encoder.config, "type_vocab_size", None) or 0) > 0


def _first(hidden: Tensor, pack: Pack) -> Tensor:
    return hidden[pack.first_token_indices()]


def _last(hidden: Tensor, pack: Pack) -> Tensor:
    return hidden[pack.last_token_indices()]


def _mean(hidden: Tensor, pack: Pack) -> Tensor:
    # In float32: a half-precision sum over hundreds of tokens loses digits.
    if hidden.is_cuda:  # one call, where the one below is a call a length
        rows = torch.arange(pack.tokens, device=hidden.device)
        return embedding_bag(
            rows, hidden.float(), pack.first_token_indices()[: len(pack.sequences)], mode="mean"
        )
    return torch.cat(
        [
            hidden[group.start : group.end].float().view(group.count, group.length, -1).mean(1)
            for group in pack.length_groups
        ]
    )


POOLS: dict[str, Pool] = {"cls": _first, "last": _last, "mean": _mean}


def pooled(pooling: str, head: Head) -> Pool:
    """Pool hidden states by a pooling mode's name."""
    return lambda hidden, pack: head(POOLS[pooling](hidden, pack))


def identity(rows: Tensor) -> Tensor:
    """Return the rows as they are."""
    return rows


def default_budget(
    config: Any, device: torch.device, dtype: str, *, eager_length: int = 0
) -> Budget:
    """Compute what a batch may have on a device.

    Args:
        config: The sizes, by transformers' names.
        device: The device, which has the model's weights.
        dtype: The number format.
        eager_length: Tokens of the longest sequence, where the model makes all scores of its
            attention before it uses them; 0 where it doesn't.
    """
    if device.type == "cpu":
        # A small working set: activations stay in the cache (docs/decisions/16).
        return Budget(2048)
    if device.type != "cuda":
        return Budget(8192)
    # Live at once in a layer: a few rows of hidden size and three of the feed-forward, which are
    # SwiGLU's gate, what it lets through, and what it is of.
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    wide = 3 * inner + 8 * config.hidden_size
    if eager_length:
        # As many scores as tokens, before and after the softmax and in float32.
        wide += 4 * config.num_attention_heads * eager_length
    return share_of_memory(device, wide * getattr(torch, dtype).itemsize)


def begin_copy(rows: Tensor) -> Callable[[], NDArray[np.float32]]:
    """Begin to copy rows to the CPU as float32; the function that is returned waits for them."""
    rows = rows.float()
    if not rows.is_cuda:
        return lambda: rows.cpu().numpy()
    copied = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    copied.copy_(rows, non_blocking=True)
    # Without blocking it would wait with a whole core.
    cuda: Any = torch.cuda  # whose classes have no types
    done = cuda.Event(blocking=True)
    # Of the rows' device: a thread that loads a model may be at another one.
    done.record(cuda.current_stream(rows.device))

    def fetch() -> NDArray[np.float32]:
        done.synchronize()
        return copied.numpy().copy()  # pinned memory is scarce, and rows live long

    return fetch


def to_numpy(rows: Tensor) -> NDArray[np.float32]:
    """Copy rows to the CPU as float32."""
    return begin_copy(rows)()
