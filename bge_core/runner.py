"""What executes a pack: tokens in, one row a sequence out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from bge_core.checkpoint import Checkpoint, Kind, gives_m3, load_model, without_bars
from bge_core.errors import CheckpointError
from bge_core.packing import PACKED_ATTENTION, Pack, first_rows_of_layer
from bge_core.tokens import Tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Runner", "load_runner", "padded_inputs", "takes_types"]

logger = logging.getLogger(__name__)

Pool = Callable[["Tensor", Pack], "Tensor"]
"""Hidden rows [tokens, hidden] and their pack -> one row a sequence, [n, hidden]."""
Head = Callable[["Tensor"], "Tensor"]
"""One row a sequence, [n, hidden] -> what the caller wants of it, [n, width]."""

# Families whose stock code is known to run packed; the others show it on two short sequences.
_PACKED_FAMILIES = ("bert", "roberta", "xlm-roberta")


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
    """Runs a stock encoder on packs, without padding.

    Args:
        encoder: A transformers base model with the packed attention set.
        pool: Makes each sequence's row of the last hidden states.
        head: Makes the outcome of those rows.
        last_layer: The encoder's last layer, taken out of it, where first rows of it are enough.
        device: Where the model is.
        padding_position: Where positions are counted from; None for 0 (see `Pack`).
    """

    padded = False

    def __init__(
        self,
        encoder: Any,
        pool: Pool,
        head: Head,
        *,
        last_layer: torch.nn.Module | None = None,
        device: torch.device,
        padding_position: int | None,
    ) -> None:
        self._encoder = encoder
        self._pool = pool
        self._head = head
        self._last_layer = last_layer
        self._device = device
        self._padding_position = padding_position
        self._takes_types = takes_types(encoder)
        self.default_budget = _default_budget(encoder, device)

    @torch.inference_mode()
    def run(self, sequences: Sequence[Tokens]) -> NDArray[np.float32] | list[Any]:
        """Compute one row a sequence, [n, width] float32."""
        pack = Pack(sequences, self._device, self._padding_position)
        return self._outcome(self._hidden(pack), pack)

    def _hidden(self, pack: Pack) -> Tensor:
        """Run the encoder, [tokens, hidden]; without its last layer if that was taken out."""
        inputs = pack.inputs()
        if not self._takes_types:
            del inputs["token_type_ids"]
        hidden: Tensor = self._encoder(**inputs, pack=pack)[0][0]
        return hidden

    def _outcome(self, hidden: Tensor, pack: Pack) -> NDArray[np.float32]:
        """Make one row a sequence of what the encoder gave, [n, width] float32."""
        if self._last_layer is None:
            rows = self._pool(hidden, pack)
        else:
            rows = first_rows_of_layer(self._last_layer, hidden, pack)
        return _numpy(self._head(rows))


class PaddedRunner:
    """Runs any model on padded batches: the path of what can't run packed.

    Args:
        forward: Takes input_ids, attention_mask and, if the model has types, token_type_ids.
        pool: Makes rows of the hidden states that `forward` gives; None if it gives the outcome.
        encoder: The transformers model inside, for its config.
        pad: The padding token's id.
        device: Where the model is.
    """

    padded = True

    def __init__(
        self,
        forward: Callable[[dict[str, Tensor]], Tensor],
        pool: Pool | None,
        *,
        encoder: Any,
        pad: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._pool = pool
        self._device = device
        self._takes_types = takes_types(encoder)
        self._pad = pad
        self.default_budget = _default_budget(encoder, device)

    @torch.inference_mode()
    def run(self, sequences: Sequence[Tokens]) -> NDArray[np.float32]:
        """Compute one row a sequence, [n, width] float32."""
        inputs = padded_inputs(sequences, pad=self._pad, types=self._takes_types)
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        out = self._forward(tensors)
        if self._pool is not None:
            out = self._pool(out[tensors["attention_mask"].bool()], Pack(sequences, self._device))
        return _numpy(out)


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
    if kind == "embedder" and (not checkpoint.plain or pooling not in ("cls", "mean", "last")):
        return _sentence_transformers(checkpoint, place, dtype, trust_remote_code)
    model: Any = load_model(checkpoint, kind=kind, dtype=dtype, trust_remote_code=trust_remote_code)
    model.to(place)
    encoder = model if kind == "embedder" else model.base_model
    # A decoder would keep keys and values for the tokens that nobody will generate.
    encoder.config.use_cache = False
    pooling = "last" if answer is not None else pooling or "cls"
    head: Head | None = _same if kind == "embedder" else _classifier(model, answer)
    if head is not None and _runs_packed(encoder, checkpoint, place):
        if gives_m3(checkpoint, pooling):
            from bge_core.m3_runner import M3Runner

            last = _take_last_layer(encoder, checkpoint, "cls")
            return M3Runner(
                encoder, last_layer=last, checkpoint=checkpoint, dtype=dtype, device=place
            )
        return PackedRunner(
            encoder,
            _POOLS[pooling],
            head,
            last_layer=_take_last_layer(encoder, checkpoint, pooling),
            device=place,
            padding_position=checkpoint.padding_position,
        )
    logger.debug("%r can't run packed: it runs padded.", checkpoint.name)
    if head is not None:
        pool = _POOLS[pooling]
        return PaddedRunner(
            lambda inputs: encoder(**inputs)[0],
            lambda hidden, pack: head(pool(hidden, pack)),
            encoder=encoder,
            pad=checkpoint.pad,
            device=place,
        )
    return PaddedRunner(
        lambda inputs: model(**inputs).logits,
        None,
        encoder=model,
        pad=checkpoint.pad,
        device=place,
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


def _cls(hidden: Tensor, pack: Pack) -> Tensor:
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


_POOLS: dict[str, Pool] = {"cls": _cls, "last": _last, "mean": _mean}


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


def _take_last_layer(encoder: Any, checkpoint: Checkpoint, pooling: str) -> Any:
    """Take the last layer out of an encoder whose pooling reads only its first rows."""
    if pooling != "cls" or checkpoint.family not in _PACKED_FAMILIES:
        return None
    *others, last = encoder.encoder.layer
    encoder.encoder.layer = torch.nn.ModuleList(others)
    return last


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
            _same,
            device=device,
            padding_position=checkpoint.padding_position,
        )
        short, long = Tokens([5, 6, 7], 3), Tokens([7, 8, 9, 6, 5], 5)
        together = np.asarray(runner.run([short, long]))
        apart = np.concatenate([runner.run([short]), runner.run([long])])
        encoder.set_attn_implementation(before)
        with torch.inference_mode():
            alone = _numpy(encoder(input_ids=torch.tensor([long.ids], device=device))[0][0])
        close = 1e-4 if next(encoder.parameters()).dtype == torch.float32 else 2e-2
        if np.allclose(together, apart, atol=close) and np.allclose(alone, apart[3:], atol=close):
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
    encoder = model[0].auto_model
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
        encoder=encoder,
        pad=checkpoint.pad,
        device=device,
    )


def _default_budget(encoder: Any, device: torch.device) -> int:
    if device.type == "cpu":
        # A small working set: activations stay in the cache (docs/architecture.md).
        return 2048
    if device.type != "cuda":
        return 8192
    # Live at once in a layer: a few rows of hidden size and one of the feed-forward.
    config = encoder.config
    wide = getattr(config, "intermediate_size", 4 * config.hidden_size) + 8 * config.hidden_size
    size = next(encoder.parameters()).element_size()
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(max(free // 2 // (wide * size), 2048), 131_072))


def _numpy(rows: Tensor) -> NDArray[np.float32]:
    return rows.float().cpu().numpy()
