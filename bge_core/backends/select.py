"""Which runner executes a checkpoint: our BERT, transformers' model on packs, or padded batches."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from bge_core.backends.base import POOLS, default_budget, identity, pooled, takes_types
from bge_core.backends.bert import FAMILIES, load_bert
from bge_core.backends.int8 import int8_works, quantize_linear_weights
from bge_core.backends.loading import (
    Originals,
    check_computes,
    load_model,
    out_of_memory_error,
)
from bge_core.backends.m3_heads import M3Heads
from bge_core.backends.memory import is_out_of_memory
from bge_core.backends.one_text import OneText
from bge_core.backends.onednn import prepack_linear_weights
from bge_core.backends.output_cache import OutputCache
from bge_core.backends.packed import PackedRunner, PooledHead
from bge_core.backends.padded import PaddedRunner, eager_length, load_sentence_transformers
from bge_core.checkpoints.metadata import is_m3_architecture
from bge_core.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from bge_core.backends.base import Encoder, Head, Runner
    from bge_core.backends.bert import Bert
    from bge_core.backends.packed import Heads
    from bge_core.backends.runner_options import RunnerOptions
    from bge_core.checkpoints.metadata import Checkpoint

__all__ = ["load_runner"]

logger = logging.getLogger(__name__)


def load_runner(
    checkpoint: Checkpoint,
    options: RunnerOptions,
    *,
    device: str,
    originals: Originals | None = None,
) -> Runner:
    """Load a checkpoint's weights onto a device, ready to execute packs.

    Args:
        checkpoint: What the checkpoint says of itself.
        options: How it is to be run.
        device: A device that this machine has.
        originals: What was loaded for the GPUs before this one; None where the model is changed
            afterwards, as on a CPU, or there is one device.

    Raises:
        ArgumentError: int8 on a processor, or a torch, that lacks what computes it.
        CheckpointError: The weights are missing or damaged, or no int8 can be had of them.
        ComputationError: They don't fit on the device.
    """
    place = torch.device(device)
    int8 = options.dtype == "int8"
    # What is not a linear layer of the encoder stays in float32.
    options = replace(options, dtype="float32") if int8 else options
    kind, dtype, trust = options.kind, options.dtype, options.trust_remote_code
    pooling = options.pooling or "cls"
    if int8:
        _check_int8(checkpoint, options)
    if checkpoint.layer_heads is not None and options.depth is not None:
        from bge_core.backends.layerwise import load_layerwise_runner

        return load_layerwise_runner(
            checkpoint,
            checkpoint.layer_heads,
            options.depth,
            tail=options.tail,
            dtype=dtype,
            device=place,
            originals=originals,
        )
    if kind == "embedder" and (not checkpoint.only_standard_modules or pooling not in POOLS):
        return load_sentence_transformers(checkpoint, place, dtype, trust)

    def own() -> Bert | None:
        return load_bert(checkpoint, kind=kind, dtype=getattr(torch, dtype), device=place)

    bert = own() if originals is None else originals.on("bert", place, own)
    if bert is not None:
        # Ours alone: other models' code may look at the weights of a layer itself.
        if int8:
            quantize_linear_weights(bert)
        elif place.type == "cpu" and dtype == "float32":
            bert.bucketed = prepack_linear_weights(bert)
        if int8 or bert.bucketed:
            bert.one_text = OneText(bert)
        heads = _heads(checkpoint, options, pooling, bert.head, place)
        return _packed(bert, heads, checkpoint, bert.shape, options, place)
    from bge_core.backends.stock import classifier_head, transformers_encoder

    copied = place.type == "cpu"

    def stock_model() -> PreTrainedModel:
        return load_model(
            checkpoint, kind=kind, dtype=dtype, trust_remote_code=trust, copied=copied
        )

    # Of several GPUs none gets the one that was read: it is changed below.
    model: Any = stock_model() if originals is None else originals.on("model", place, stock_model)
    if int8:
        raise _no_int8(checkpoint)
    try:
        model.to(place)
    except Exception as exc:
        if not is_out_of_memory(exc):
            raise
        raise out_of_memory_error(checkpoint.name, device) from exc
    encoder = model if kind == "embedder" else model.base_model
    # A decoder would keep keys and values for the tokens that nobody will generate.
    encoder.config.use_cache = False
    pooling = pooling if options.answer is None else "last"
    head: Head | None = identity if kind == "embedder" else classifier_head(model, options.answer)
    stock = None if head is None else transformers_encoder(encoder, checkpoint, place)
    if head is not None and stock is not None:
        heads = _heads(checkpoint, options, pooling, head, place)
        return _packed(stock, heads, checkpoint, encoder.config, options, place)
    logger.debug("%r can't run packed: it runs padded.", checkpoint.name)
    # Without a head that takes rows, the whole model gives the outcome itself.
    whole, pool = model, None
    if head is not None:
        whole, pool = encoder, pooled(pooling, head)

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        out: Tensor = whole(**inputs)[0]
        return out

    runner = PaddedRunner(
        forward,
        pool,
        types=takes_types(encoder),
        pad=checkpoint.pad_token_id,
        device=place,
        budget=default_budget(
            encoder.config, place, dtype, eager_length=eager_length(encoder, checkpoint)
        ),
        dtype=dtype,
    )
    check_computes(checkpoint, runner)
    return runner


def _check_int8(checkpoint: Checkpoint, options: RunnerOptions) -> None:
    """Refuse int8 where nothing computes it, before the weights are read."""
    if not int8_works():
        msg = (
            "dtype='int8' needs torch's FBGEMM operators on an x86 processor with AVX2, which this "
            f"machine or torch {torch.__version__} lacks: pass dtype='float32'."
        )
        raise ArgumentError(msg)
    own_modules = options.kind == "embedder" and (
        not checkpoint.only_standard_modules or (options.pooling or "cls") not in POOLS
    )
    if own_modules or options.depth is not None or checkpoint.family not in FAMILIES:
        raise _no_int8(checkpoint)


def _no_int8(checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(
        f"dtype='int8' runs encoders of the families {', '.join(FAMILIES)} as they are published, "
        f"and {checkpoint.name!r} ({checkpoint.family}) is another model: pass dtype='float32'."
    )


def _heads(
    checkpoint: Checkpoint, options: RunnerOptions, pooling: str, head: Head, device: torch.device
) -> Heads:
    plain = PooledHead(pooling, head)
    if not is_m3_architecture(checkpoint, pooling):
        return plain
    cache = OutputCache() if options.output_cache is None else options.output_cache
    return M3Heads(checkpoint, plain, device=device, dtype=options.dtype, output_cache=cache)


def _packed(
    encoder: Encoder,
    heads: Heads,
    checkpoint: Checkpoint,
    config: Any,
    options: RunnerOptions,
    device: torch.device,
) -> PackedRunner:
    return PackedRunner(
        encoder,
        heads,
        device=device,
        position_offset=checkpoint.position_offset,
        budget=default_budget(config, device, options.dtype),
        dtype=options.dtype,
    )
