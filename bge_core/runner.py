"""What executes a pack: tokens in, one row of float32 numbers a sequence out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from bge_core.checkpoint import Checkpoint, Kind, load_model
from bge_core.errors import CheckpointError
from bge_core.packing import PACKED_ATTENTION, Pack
from bge_core.tokens import Tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Runner", "load_runner"]

logger = logging.getLogger(__name__)

Head = Callable[["Tensor", Pack], "Tensor"]
"""Hidden rows [tokens, hidden] and their pack -> one row a sequence, [n, width]."""

# Families whose stock code is known to run packed; the others show it on two short sequences.
_PACKED_FAMILIES = ("bert", "roberta", "xlm-roberta")


class Runner(Protocol):
    """Executes packs on one device."""

    padded: bool
    """Whether a short sequence costs as much as the longest of its pack."""
    default_budget: int
    """Tokens a pack may have unless the user says otherwise."""

    def run(self, sequences: Sequence[Tokens]) -> NDArray[np.float32]:
        """Compute one row a sequence, [n, width] float32."""
        ...


class PackedRunner:
    """Runs a stock encoder on packs, without padding.

    Args:
        encoder: A transformers base model with the packed attention set.
        head: Makes each sequence's row of the last hidden states.
        device: Where the model is.
        first_position: Position of a sequence's first token.
    """

    padded = False

    def __init__(
        self, encoder: torch.nn.Module, head: Head, *, device: torch.device, first_position: int
    ) -> None:
        self._encoder = encoder
        self._head = head
        self._device = device
        self._first_position = first_position
        self.default_budget = _default_budget(encoder, device)
        self._takes_types = getattr(encoder.config, "type_vocab_size", 0) > 0

    @torch.inference_mode()
    def run(self, sequences: Sequence[Tokens]) -> NDArray[np.float32]:
        """Compute one row a sequence, [n, width] float32."""
        pack = Pack(sequences, self._device, self._first_position)
        inputs = pack.inputs()
        if not self._takes_types:
            del inputs["token_type_ids"]
        hidden = self._encoder(**inputs, pack=pack)[0][0]
        return _numpy(self._head(hidden, pack))


class PaddedRunner:
    """Runs any model on padded batches: the path of what can't run packed.

    Args:
        forward: Takes input_ids, attention_mask and, if the model has types, token_type_ids.
        head: Makes rows of what `forward` gives; None if that are the rows already.
        config: The model's config.
        device: Where the model is.
    """

    padded = True

    def __init__(
        self,
        forward: Callable[[dict[str, Tensor]], Tensor],
        head: Head | None,
        *,
        encoder: torch.nn.Module,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._head = head
        self._device = device
        self._takes_types = getattr(encoder.config, "type_vocab_size", 0) > 0
        self._pad = int(getattr(encoder.config, "pad_token_id", None) or 0)
        self.default_budget = _default_budget(encoder, device)

    @torch.inference_mode()
    def run(self, sequences: Sequence[Tokens]) -> NDArray[np.float32]:
        """Compute one row a sequence, [n, width] float32."""
        width = max(len(sequence) for sequence in sequences)
        shape = (len(sequences), width)
        ids = np.full(shape, self._pad, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        types = np.zeros(shape, dtype=np.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence.ids
            mask[row, : len(sequence)] = 1
            types[row, sequence.second : len(sequence)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._takes_types:
            inputs["token_type_ids"] = types
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        out = self._forward(tensors)
        if self._head is not None:
            out = self._head(out[tensors["attention_mask"].bool()], Pack(sequences, self._device))
        return _numpy(out)


def load_runner(
    checkpoint: Checkpoint,
    *,
    kind: Kind,
    pooling: str | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
) -> Runner:
    """Load a checkpoint's weights onto a device, ready to execute packs.

    Args:
        checkpoint: What the checkpoint says of itself.
        kind: `"embedder"` or `"reranker"`.
        pooling: The rows that make the vector; None for a reranker.
        device: A device that this machine has.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        trust_remote_code: Run Python code that the checkpoint carries.

    Raises:
        CheckpointError: The weights are missing or damaged.
    """
    place = torch.device(device)
    if kind == "embedder" and (not checkpoint.plain or pooling not in ("cls", "mean", "last")):
        return _sentence_transformers(checkpoint, place, dtype, trust_remote_code)
    model: Any = load_model(checkpoint, kind=kind, dtype=dtype, trust_remote_code=trust_remote_code)
    model.to(place)
    head = _pooling_head(pooling) if kind == "embedder" else _classification_head(model)
    encoder = model if kind == "embedder" else model.base_model
    if head is not None and _runs_packed(encoder, checkpoint, place):
        return PackedRunner(encoder, head, device=place, first_position=checkpoint.first_position)
    logger.debug("%r can't run packed: it runs padded.", checkpoint.name)
    if kind == "embedder":
        return PaddedRunner(lambda inputs: model(**inputs)[0], head, encoder=model, device=place)
    return PaddedRunner(lambda inputs: model(**inputs).logits, None, encoder=model, device=place)


def _pooling_head(pooling: str | None) -> Head:
    def cls(hidden: Tensor, pack: Pack) -> Tensor:
        return hidden[pack.first_rows()]

    def last(hidden: Tensor, pack: Pack) -> Tensor:
        return hidden[pack.last_rows()]

    def mean(hidden: Tensor, pack: Pack) -> Tensor:
        # Summed in float32: a half-precision sum over hundreds of tokens loses digits.
        return torch.cat(
            [
                hidden[run.start : run.end].float().view(run.count, run.length, -1).mean(1)
                for run in pack.runs
            ]
        )

    heads: dict[str | None, Head] = {"cls": cls, "last": last, "mean": mean}
    return heads[pooling]


def _classification_head(model: Any) -> Head | None:
    """Give the model's own pooler and classifier on first rows; None if they need more."""
    name = type(model).__name__
    if name == "BertForSequenceClassification":
        return lambda hidden, pack: model.classifier(
            model.bert.pooler(hidden[pack.first_rows()][:, None])
        )
    if name in ("XLMRobertaForSequenceClassification", "RobertaForSequenceClassification"):
        return lambda hidden, pack: model.classifier(hidden[pack.first_rows()][:, None])
    return None


def _runs_packed(encoder: Any, checkpoint: Checkpoint, device: torch.device) -> bool:
    """Set the packed attention where the model's own code carries it, and say whether it does."""
    if not getattr(encoder, "_supports_attention_backend", False):
        return False
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation(PACKED_ATTENTION)
    if checkpoint.family in _PACKED_FAMILIES:
        return True
    with contextlib.suppress(Exception):
        # Anything that goes wrong here goes right on padded batches.
        runner = PackedRunner(
            encoder,
            lambda hidden, _: hidden,
            device=device,
            first_position=checkpoint.first_position,
        )
        short, long = Tokens([5, 6, 7], 3), Tokens([7, 8, 9, 6, 5], 5)
        together = runner.run([short, long])
        apart = np.concatenate([runner.run([short]), runner.run([long])])
        encoder.set_attn_implementation(before)
        with torch.inference_mode():
            alone = _numpy(encoder(input_ids=torch.tensor([long.ids], device=device))[0][0])
        if np.allclose(together, apart, atol=1e-4) and np.allclose(alone, apart[3:], atol=1e-4):
            encoder.set_attn_implementation(PACKED_ATTENTION)
            return True
    encoder.set_attn_implementation(before)
    return False


def _sentence_transformers(
    checkpoint: Checkpoint, device: torch.device, dtype: str, trust_remote_code: bool
) -> Runner:
    """Run the checkpoint's own modules, where they go beyond transformer, pooling, normalise."""
    from sentence_transformers import SentenceTransformer

    try:
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
    return PaddedRunner(
        lambda inputs: model(inputs)["sentence_embedding"], None, encoder=encoder, device=device
    )


def _default_budget(encoder: torch.nn.Module, device: torch.device) -> int:
    if device.type == "cpu":
        # A small working set: activations stay in the cache (docs/architecture.md).
        return 2048
    if device.type != "cuda":
        return 8192
    # Live at once in a layer: a few rows of hidden size and one of the feed-forward.
    config: Any = encoder.config
    wide = getattr(config, "intermediate_size", 4 * config.hidden_size) + 8 * config.hidden_size
    size = next(encoder.parameters()).element_size()
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(max(free // 2 // (wide * size), 2048), 131_072))


def _numpy(rows: Tensor) -> NDArray[np.float32]:
    return rows.float().cpu().numpy()
