"""What executes a pack: tokens in, one row a sequence out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from bge_core.bert import load_bert
from bge_core.checkpoint import (
    Checkpoint,
    Kind,
    check_classes,
    gives_m3,
    load_model,
    no_room,
    without_bars,
)
from bge_core.cpu_linear import lay_out
from bge_core.errors import CheckpointError
from bge_core.packing import Pack
from bge_core.tokens import Tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["PackedRunner", "Runner", "load_runner", "padded_inputs", "takes_types", "to_numpy"]

logger = logging.getLogger(__name__)

Pool = Callable[["Tensor", Pack], "Tensor"]
"""Hidden rows [rows, hidden] and their pack -> one row a sequence, [n, hidden]."""
Head = Callable[["Tensor"], "Tensor"]
"""One row a sequence, [n, hidden] -> what the caller wants of it, [n, width]."""


class Encoder(Protocol):
    """Computes the last layer's rows of a pack; what it is padded with has rows at the end."""

    few_sizes: bool
    """Whether its packs should come in few sizes (see `Pack`)."""

    def rows(self, pack: Pack) -> Tensor:
        """Compute the row of every token, [rows, hidden]."""
        ...

    def first_rows(self, pack: Pack) -> Tensor:
        """Compute the row of each sequence's first token, [rows, hidden]."""
        ...


class Runner(Protocol):
    """Executes packs on one device."""

    padded: bool
    """Whether a short sequence costs as much as the longest of its pack."""
    default_budget: int
    """Tokens a pack may have unless the user says otherwise."""

    def run(self, sequences: Sequence[Tokens]) -> NDArray[np.float32] | list[Any]:
        """Compute one row a sequence: [n, width] float32, or a list of what was asked for."""
        ...


class PackedRunner:
    """Runs an encoder on packs, without padding to the longest.

    Args:
        encoder: Computes rows of the last layer.
        pooling: Which of them make a sequence's row: `"cls"`, `"mean"` or `"last"`.
        head: Makes the outcome of a sequence's row.
        device: Where the model is.
        padding_position: Where positions are counted from; None for 0 (see `Pack`).
        budget: Tokens a pack may have unless the user says otherwise.
    """

    padded = False

    def __init__(
        self,
        encoder: Encoder,
        pooling: str,
        head: Head,
        *,
        device: torch.device,
        padding_position: int | None,
        budget: int,
    ) -> None:
        self._encoder = encoder
        self._pooling = pooling
        self._head = head
        self._device = device
        self._padding_position = padding_position
        self.default_budget = budget

    @torch.inference_mode()
    def run(self, sequences: Sequence[Tokens]) -> NDArray[np.float32] | list[Any]:
        """Compute one row a sequence, [n, width] float32."""
        return self._outcome(self._pack(sequences))

    def _pack(self, sequences: Sequence[Tokens]) -> Pack:
        return Pack(sequences, self._device, self._padding_position, self._encoder.few_sizes)

    def _outcome(self, pack: Pack) -> NDArray[np.float32]:
        """Make one row a sequence, [n, width] float32."""
        if self._pooling == "cls":
            rows = self._encoder.first_rows(pack)
        else:
            rows = _POOLS[self._pooling](self._encoder.rows(pack), pack)
        return to_numpy(self._head(rows))[: len(pack.sequences)]


class PaddedRunner:
    """Runs any model on padded batches: the path of what can't run packed.

    Args:
        forward: Takes input_ids, attention_mask and, if the model has types, token_type_ids.
        pool: Makes rows of the hidden states that `forward` gives; None if it gives the outcome.
        types: Whether the model takes token types.
        pad: The padding token's id.
        device: Where the model is.
        budget: Tokens a batch may have unless the user says otherwise.
    """

    padded = True

    def __init__(
        self,
        forward: Callable[[dict[str, Tensor]], Tensor],
        pool: Pool | None,
        *,
        types: bool,
        pad: int,
        device: torch.device,
        budget: int,
    ) -> None:
        self._forward = forward
        self._pool = pool
        self._types = types
        self._pad = pad
        self._device = device
        self.default_budget = budget

    @torch.inference_mode()
    def run(self, sequences: Sequence[Tokens]) -> NDArray[np.float32]:
        """Compute one row a sequence, [n, width] float32."""
        inputs = padded_inputs(sequences, pad=self._pad, types=self._types)
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        out = self._forward(tensors)
        if self._pool is not None:
            out = self._pool(out[tensors["attention_mask"].bool()], Pack(sequences, self._device))
        return to_numpy(out)


def load_runner(
    checkpoint: Checkpoint,
    *,
    kind: Kind,
    pooling: str | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    answer: int | None = None,
) -> Runner:
    """Load a checkpoint's weights onto a device, ready to execute packs.

    Args:
        checkpoint: What the checkpoint says of itself.
        kind: `"embedder"` or `"reranker"`.
        pooling: The rows that make the vector; None for a reranker.
        device: A device that this machine has.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        trust_remote_code: Run Python code that the checkpoint carries.
        answer: The token whose logit is the score, of a reranker that is a language model.

    Raises:
        CheckpointError: The weights are missing or damaged.
    """
    place = torch.device(device)
    pooling = pooling or "cls"
    if kind == "embedder" and (not checkpoint.plain or pooling not in _POOLS):
        return _sentence_transformers(checkpoint, place, dtype, trust_remote_code)
    bert = load_bert(checkpoint, kind=kind, dtype=getattr(torch, dtype), device=place)
    if bert is not None:
        # Ours alone: other models' code may look at the weights of a layer itself.
        bert.few_sizes = place.type == "cpu" and dtype == "float32" and lay_out(bert)
        return _packed(bert, checkpoint, pooling, bert.head, bert.shape, place, dtype)
    model: Any = load_model(checkpoint, kind=kind, dtype=dtype, trust_remote_code=trust_remote_code)
    try:
        model.to(place)
    except torch.OutOfMemoryError as exc:
        raise no_room(checkpoint.name, device) from exc
    encoder = model if kind == "embedder" else model.base_model
    # A decoder would keep keys and values for the tokens that nobody will generate.
    encoder.config.use_cache = False
    pooling = pooling if answer is None else "last"
    head: Head | None = _same if kind == "embedder" else _classifier(model, answer)
    stock = None if head is None else _stock_encoder(encoder, checkpoint, place)
    if head is not None and stock is not None:
        return _packed(stock, checkpoint, pooling, head, encoder.config, place, dtype)
    logger.debug("%r can't run packed: it runs padded.", checkpoint.name)
    # Without a head that takes rows, the whole model gives the outcome itself.
    whole, pool = model, None
    if head is not None:
        whole, pool = encoder, _pooled(pooling, head)

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        out: Tensor = whole(**inputs)[0]
        return out

    return PaddedRunner(
        forward,
        pool,
        types=takes_types(encoder),
        pad=checkpoint.pad,
        device=place,
        budget=_default_budget(encoder.config, place, dtype),
    )


def padded_inputs(
    sequences: Sequence[Tokens], *, pad: int, types: bool
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
        ids[row, : len(sequence)] = sequence.ids
        mask[row, : len(sequence)] = 1
        second[row, sequence.second : len(sequence)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "token_type_ids": second} if types else inputs


def takes_types(encoder: Any) -> bool:
    """Say whether a model takes token types."""
    return (getattr(encoder.config, "type_vocab_size", None) or 0) > 0


def _first(hidden: Tensor, pack: Pack) -> Tensor:
    return hidden[pack.first_rows()]


def _last(hidden: Tensor, pack: Pack) -> Tensor:
    return hidden[pack.last_rows()]


def _mean(hidden: Tensor, pack: Pack) -> Tensor:
    # In float32: a half-precision sum over hundreds of tokens loses digits.
    return torch.cat(
        [
            hidden[run.start : run.end].float().view(run.count, run.length, -1).mean(1)
            for run in pack.runs
        ]
    )


_POOLS: dict[str, Pool] = {"cls": _first, "last": _last, "mean": _mean}


def _pooled(pooling: str, head: Head) -> Pool:
    return lambda hidden, pack: head(_POOLS[pooling](hidden, pack))


def _same(rows: Tensor) -> Tensor:
    return rows


def _classifier(model: Any, answer: int | None) -> Head | None:
    """Give the model's own head on one row a sequence; None if it needs more."""
    if answer is not None:
        # The other words' logits, a quarter of a million of them, are nobody's business.
        word = model.get_output_embeddings().weight[answer].float()
        return lambda rows: (rows.float() @ word)[:, None]
    name = type(model).__name__
    if name == "BertForSequenceClassification":
        return lambda rows: model.classifier(model.bert.pooler(rows[:, None]))
    if name in ("XLMRobertaForSequenceClassification", "RobertaForSequenceClassification"):
        return lambda rows: model.classifier(rows[:, None])
    return None


def _packed(
    encoder: Encoder,
    checkpoint: Checkpoint,
    pooling: str,
    head: Head,
    config: Any,
    device: torch.device,
    dtype: str,
) -> PackedRunner:
    budget = _default_budget(config, device, dtype)
    if gives_m3(checkpoint, pooling):
        from bge_core.m3_runner import M3Runner

        return M3Runner(encoder, checkpoint=checkpoint, dtype=dtype, device=device, budget=budget)
    return PackedRunner(
        encoder,
        pooling,
        head,
        device=device,
        padding_position=checkpoint.padding_position,
        budget=budget,
    )


def _stock_encoder(model: Any, checkpoint: Checkpoint, device: torch.device) -> Encoder | None:
    """Set the packed attention where the model's own code carries it; None where it doesn't."""
    if not getattr(model, "_supports_attention_backend", False):
        return None
    from bge_core.packed_attention import PACKED_ATTENTION, StockEncoder

    before = model.config._attn_implementation
    encoder = StockEncoder(model, types=takes_types(model))
    with contextlib.suppress(Exception):
        # Anything that goes wrong here goes right on padded batches.
        model.set_attn_implementation(PACKED_ATTENTION)
        short, long = Tokens([5, 6, 7], 3), Tokens([7, 8, 9, 6, 5], 5)

        def rows(*sequences: Tokens) -> NDArray[np.float32]:
            return to_numpy(encoder.rows(Pack(sequences, device, checkpoint.padding_position)))

        with torch.inference_mode():
            together = rows(short, long)
            apart = np.concatenate([rows(short), rows(long)])
            model.set_attn_implementation(before)
            alone = to_numpy(model(input_ids=torch.tensor([long.ids], device=device))[0][0])
        close = 1e-4 if next(model.parameters()).dtype == torch.float32 else 2e-2
        if np.allclose(together, apart, atol=close) and np.allclose(alone, apart[3:], atol=close):
            model.set_attn_implementation(PACKED_ATTENTION)
            return encoder
    model.set_attn_implementation(before)
    return None


def _sentence_transformers(
    checkpoint: Checkpoint, device: torch.device, dtype: str, trust_remote_code: bool
) -> Runner:
    """Run the checkpoint's own modules, where they go beyond transformer, pooling, normalise."""
    from sentence_transformers import SentenceTransformer

    if not trust_remote_code:
        check_classes(checkpoint)
    try:
        with without_bars():
            model = SentenceTransformer(
                str(checkpoint.folder),
                device=str(device),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                model_kwargs={"dtype": getattr(torch, dtype)},
            )
    except Exception as exc:
        msg = (
            f"sentence-transformers can't load {checkpoint.name!r}, whose modules go beyond "
            f"transformer, pooling and normalisation: {exc}"
        )
        raise CheckpointError(msg) from exc
    encoder: Any = model[0].auto_model
    logger.debug("%r has modules of its own: it runs padded.", checkpoint.name)
    # Normalisation is the caller's to choose.
    modules = [module for module in model if type(module).__name__ != "Normalize"]

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        features: Any = inputs
        for module in modules:
            features = module(features)
        vectors: Tensor = features["sentence_embedding"]
        return vectors

    return PaddedRunner(
        forward,
        None,
        types=takes_types(encoder),
        pad=checkpoint.pad,
        device=device,
        budget=_default_budget(encoder.config, device, dtype),
    )


def _default_budget(config: Any, device: torch.device, dtype: str) -> int:
    if device.type == "cpu":
        # A small working set: activations stay in the cache (docs/architecture.md).
        return 2048
    if device.type != "cuda":
        return 8192
    # Live at once in a layer: a few rows of hidden size and one of the feed-forward.
    wide = getattr(config, "intermediate_size", 4 * config.hidden_size) + 8 * config.hidden_size
    size = getattr(torch, dtype).itemsize
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(max(free // 2 // (wide * size), 2048), 131_072))


def to_numpy(rows: Tensor) -> NDArray[np.float32]:
    """Bring rows to the caller's side, float32."""
    return rows.float().cpu().numpy()
