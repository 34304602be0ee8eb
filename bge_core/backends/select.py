"""Which runner executes a checkpoint: our BERT, transformers' model on packs, or padded batches."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from bge_core.backends.base import POOLS, default_budget, identity, pooled, takes_types
from bge_core.backends.bert import load_bert
from bge_core.backends.loading import load_model, out_of_memory_error
from bge_core.backends.onednn import prepack_linear_weights
from bge_core.backends.output_cache import OutputCache
from bge_core.backends.packed import PackedRunner
from bge_core.backends.padded import PaddedRunner, load_sentence_transformers
from bge_core.checkpoints.metadata import is_m3_architecture

if TYPE_CHECKING:
    from torch import Tensor

    from bge_core.backends.base import Encoder, Head, Runner
    from bge_core.checkpoints.metadata import Checkpoint, Kind

__all__ = ["load_runner"]

logger = logging.getLogger(__name__)


def load_runner(
    checkpoint: Checkpoint,
    *,
    kind: Kind,
    pooling: str | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    answer: int | None = None,
    output_cache: OutputCache | None = None,
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
        output_cache: Where bge-m3's passes look first and leave the other output; None for none.

    Raises:
        CheckpointError: The weights are missing or damaged.
    """
    place = torch.device(device)
    pooling = pooling or "cls"
    if kind == "embedder" and (not checkpoint.plain or pooling not in POOLS):
        return load_sentence_transformers(checkpoint, place, dtype, trust_remote_code)
    bert = load_bert(checkpoint, kind=kind, dtype=getattr(torch, dtype), device=place)
    if bert is not None:
        # Ours alone: other models' code may look at the weights of a layer itself.
        bert.bucketed = place.type == "cpu" and dtype == "float32" and prepack_linear_weights(bert)
        return _packed(bert, checkpoint, pooling, bert.head, bert.shape, place, dtype, output_cache)
    from bge_core.backends.stock import classifier_head, transformers_encoder

    model: Any = load_model(checkpoint, kind=kind, dtype=dtype, trust_remote_code=trust_remote_code)
    try:
        model.to(place)
    except torch.OutOfMemoryError as exc:
        raise out_of_memory_error(checkpoint.name, device) from exc
    encoder = model if kind == "embedder" else model.base_model
    # A decoder would keep keys and values for the tokens that nobody will generate.
    encoder.config.use_cache = False
    pooling = pooling if answer is None else "last"
    head: Head | None = identity if kind == "embedder" else classifier_head(model, answer)
    stock = None if head is None else transformers_encoder(encoder, checkpoint, place)
    if head is not None and stock is not None:
        return _packed(stock, checkpoint, pooling, head, encoder.config, place, dtype, output_cache)
    logger.debug("%r can't run packed: it runs padded.", checkpoint.name)
    # Without a head that takes rows, the whole model gives the outcome itself.
    whole, pool = model, None
    if head is not None:
        whole, pool = encoder, pooled(pooling, head)

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        out: Tensor = whole(**inputs)[0]
        return out

    return PaddedRunner(
        forward,
        pool,
        types=takes_types(encoder),
        pad=checkpoint.pad,
        device=place,
        budget=default_budget(encoder.config, place, dtype),
    )


def _packed(
    encoder: Encoder,
    checkpoint: Checkpoint,
    pooling: str,
    head: Head,
    config: Any,
    device: torch.device,
    dtype: str,
    output_cache: OutputCache | None,
) -> PackedRunner:
    budget = default_budget(config, device, dtype)
    if is_m3_architecture(checkpoint, pooling):
        from bge_core.backends.m3_heads import M3Runner

        return M3Runner(
            encoder,
            checkpoint=checkpoint,
            dtype=dtype,
            device=device,
            budget=budget,
            output_cache=OutputCache() if output_cache is None else output_cache,
        )
    return PackedRunner(
        encoder,
        pooling,
        head,
        device=device,
        padding_position=checkpoint.padding_position,
        budget=budget,
    )
