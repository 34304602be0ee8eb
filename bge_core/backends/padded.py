"""The runner of padded batches, for models that can't run on packs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bge_core.backends.base import (
    TorchRunner,
    begin_copy,
    default_budget,
    padded_inputs,
    takes_types,
)
from bge_core.backends.loading import (
    check_computes,
    check_numbers,
    copy_weights,
    no_progress_bars,
    out_of_memory_error,
)
from bge_core.backends.memory import is_out_of_memory
from bge_core.backends.packing import Pack
from bge_core.checkpoints.files import variant_of, weight_files
from bge_core.checkpoints.trust import reject_remote_classes
from bge_core.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from bge_core.backends.base import Fetch, Pool, Runner
    from bge_core.backends.memory import Budget
    from bge_core.checkpoints.metadata import Checkpoint
    from bge_core.tokenizer import TokenSequence

__all__ = ["PaddedRunner", "eager_length", "load_sentence_transformers"]

logger = logging.getLogger(__name__)


class PaddedRunner(TorchRunner):
    """Runs any model on padded batches: the path of what can't run packed.

    Args:
        forward: Takes input_ids, attention_mask and, if the model has types, token_type_ids.
        pool: Makes rows of the hidden states that `forward` gives; None if it gives the outcome.
        types: Whether the model takes token types.
        pad: The padding token's id.
        device: Where the model is.
        budget: What a batch may have unless the user says otherwise.
        dtype: The model's number format, by name.
    """

    padded = True

    def __init__(
        self,
        forward: Callable[[dict[str, Any]], Tensor],
        pool: Pool | None,
        *,
        types: bool,
        pad: int,
        device: torch.device,
        budget: Budget,
        dtype: str = "float32",
    ) -> None:
        super().__init__(device=device, budget=budget, dtype=dtype)
        self._forward = forward
        self._pool = pool
        self._types = types
        self._pad = pad

    def _launch(self, sequences: Sequence[TokenSequence]) -> Fetch:
        return self._compute(sequences, {})

    def _compute(self, sequences: Sequence[TokenSequence], further: dict[str, Any]) -> Fetch:
        inputs = padded_inputs(sequences, pad=self._pad, types=self._types)
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        out = self._forward({**tensors, **further})
        if self._pool is not None:
            out = self._pool(out[tensors["attention_mask"].bool()], Pack(sequences, self._device))
        return begin_copy(out)


class _ModulesRunner(PaddedRunner):
    """Runs sentence-transformers' modules, which may leave a prompt's tokens out of the pooling."""

    def _launch(self, sequences: Sequence[TokenSequence]) -> Fetch:
        lengths = np.array([sequence.prompt_length for sequence in sequences])
        parts: list[tuple[list[int], Fetch]] = []
        for length in np.unique(lengths):  # one for a whole batch is what they take
            positions = np.flatnonzero(lengths == length).tolist()
            chosen = [sequences[place] for place in positions]
            fetch = self._compute(chosen, {"prompt_length": int(length)} if length else {})
            parts.append((positions, fetch))

        def fetch_all() -> NDArray[np.float32]:
            outcome: dict[int, NDArray[np.float32]] = {}
            for positions, fetch in parts:
                outcome.update(zip(positions, fetch(), strict=True))
            return np.stack([outcome[place] for place in range(len(outcome))])

        return fetch_all


def eager_length(encoder: Any, checkpoint: Checkpoint) -> int:
    """Return the longest sequence of a model that makes all scores of its attention at once.

    Returns:
        Its tokens; 0 for a model that doesn't.
    """
    eager = getattr(encoder.config, "_attn_implementation", None) == "eager"
    return checkpoint.default_max_length if eager else 0


def load_sentence_transformers(
    checkpoint: Checkpoint, device: torch.device, dtype: str, trust_remote_code: bool
) -> Runner:
    """Run the checkpoint's own modules, where they go beyond transformer, pooling, normalise."""
    from sentence_transformers import SentenceTransformer

    if not trust_remote_code:
        reject_remote_classes(checkpoint)
    if checkpoint.routes:
        msg = (
            f"{checkpoint.name!r} has a router to a model of its own for queries, which is not run "
            "here: load it with sentence-transformers."
        )
        raise CheckpointError(msg)
    files = weight_files(checkpoint.transformer_folder)
    check_numbers(checkpoint, files)
    variant = {"variant": variant_of(files[0])} if files else {}
    try:
        with no_progress_bars():
            model = SentenceTransformer(
                str(checkpoint.folder),
                device=str(device),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                model_kwargs={"dtype": getattr(torch, dtype), **variant},
            )
    except Exception as exc:
        if is_out_of_memory(exc):
            raise out_of_memory_error(checkpoint.name, device) from exc
        msg = (
            f"sentence-transformers can't load {checkpoint.name!r}, whose modules go beyond "
            f"transformer, pooling and normalisation: {exc}"
        )
        raise CheckpointError(msg) from exc
    encoder: Any = model[0].auto_model
    logger.debug("%r has modules of its own: it runs padded.", checkpoint.name)
    copy_weights(model)
    # What comes last is the caller's to choose; what comes before another layer is the model's.
    modules = list(model)
    while type(modules[-1]).__name__ == "Normalize":
        modules.pop()

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        features: Any = inputs
        for module in modules:
            features = module(features)
        vectors: Tensor = features["sentence_embedding"]
        return vectors

    runner = _ModulesRunner(
        forward,
        None,
        types=takes_types(encoder),
        pad=checkpoint.pad_token_id,
        device=device,
        budget=default_budget(
            encoder.config, device, dtype, eager_length=eager_length(encoder, checkpoint)
        ),
        dtype=dtype,
    )
    check_computes(checkpoint, runner)
    return runner
