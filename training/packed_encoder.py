"""A BERT cross-encoder for training on a CPU: texts laid end to end, a low-rank update on top.

The numbers are those of transformers' BertForSequenceClassification with peft's adapter. What
differs is the work: no token is padding, and the update is added into the frozen layer's outcome
instead of beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

PREFIX = "base_model.model."  # peft's, in front of every name in an adapter's file
ALPHA_OVER_RANK = 2.0


@dataclass(frozen=True)
class PairTokens:
    """One question with one passage.

    Attributes:
        ids: [CLS] question [SEP] passage [SEP].
        question: How many of them are up to the first [SEP], with it.
    """

    ids: Sequence[int]
    question: int


class PackedCrossEncoder:
    """Scores pairs, and has gradients for the adapter.

    Attributes:
        trained: The adapter's tensors that training changes, by name.
    """

    def __init__(self, trunk: Path, adapter: Path, *, frozen_layers: int = 0) -> None:
        """Load the trunk and the adapter.

        Args:
            trunk: A folder with a BERT encoder.
            adapter: A folder with a peft adapter, pooler and classifier in it.
            frozen_layers: The first layers keep the adapter's update as it is, which saves a part
                of the backward pass.
        """
        model = AutoModelForSequenceClassification.from_pretrained(
            trunk, num_labels=1, dtype=torch.float32
        )
        self._weights = {name: value.detach() for name, value in model.state_dict().items()}
        self._layers = model.config.num_hidden_layers
        self._heads = model.config.num_attention_heads
        self._epsilon = model.config.layer_norm_eps
        self._frozen = frozen_layers
        self._adapter = {
            name.removeprefix(PREFIX): value.float()
            for name, value in load_file(adapter / "adapter_model.safetensors").items()
        }
        for name in list(self._adapter):
            if name.endswith(".lora_A.weight") and _layer(name) < frozen_layers:
                layer = name.removesuffix(".lora_A.weight")
                update = self._adapter[f"{layer}.lora_B.weight"] @ self._adapter[name]
                self._weights[f"{layer}.weight"] += ALPHA_OVER_RANK * update
        self.trained = {
            name: value.requires_grad_()
            for name, value in self._adapter.items()
            if _layer(name) >= frozen_layers
        }

    def __call__(self, pairs: Sequence[PairTokens]) -> Tensor:
        """Score pairs.

        Args:
            pairs: Any number of them, of any lengths.

        Returns:
            One logit for each, float32.
        """
        lengths = [len(pair.ids) for pair in pairs]
        hidden = self._embed(pairs, lengths)
        for layer in range(self._layers):
            if layer == self._frozen:
                hidden = hidden.detach()
            hidden = self._encode(hidden, f"bert.encoder.layer.{layer}.", lengths)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        pooled = functional.linear(
            hidden[starts],
            self._adapter["bert.pooler.dense.weight"],
            self._adapter["bert.pooler.dense.bias"],
        )
        logits = functional.linear(
            pooled.tanh(), self._adapter["classifier.weight"], self._adapter["classifier.bias"]
        )
        return logits[:, 0]

    def save(self, file: Path, values: dict[str, Tensor]) -> None:
        """Write an adapter in half precision.

        Args:
            file: Where to.
            values: What takes the place of `trained`, an average of it for instance.
        """
        whole = {**self._adapter, **values}
        save_file(
            {PREFIX + name: value.detach().half().contiguous() for name, value in whole.items()},
            file,
        )

    def _embed(self, pairs: Sequence[PairTokens], lengths: Sequence[int]) -> Tensor:
        ids = torch.tensor([token for pair in pairs for token in pair.ids])
        places = torch.cat([torch.arange(length) for length in lengths])
        parts = torch.tensor(
            [int(place >= pair.question) for pair in pairs for place in range(len(pair.ids))]
        )
        tables = "bert.embeddings."
        hidden = (
            self._weights[f"{tables}word_embeddings.weight"][ids]
            + self._weights[f"{tables}position_embeddings.weight"][places]
            + self._weights[f"{tables}token_type_embeddings.weight"][parts]
        )
        return self._normalized(hidden, f"{tables}LayerNorm")

    def _encode(self, hidden: Tensor, layer: str, lengths: list[int]) -> Tensor:
        # Each text attends to itself; a loop over texts costs less than masks over padding.
        parts = zip(
            *(
                self._linear(hidden, f"{layer}attention.self.{name}").split(lengths)
                for name in ("query", "key", "value")
            ),
            strict=True,
        )
        mixed = torch.cat([self._attend(*part) for part in parts])
        attended = self._normalized(
            hidden + self._linear(mixed, f"{layer}attention.output.dense"),
            f"{layer}attention.output.LayerNorm",
        )
        wide = functional.gelu(self._linear(attended, f"{layer}intermediate.dense"))
        return self._normalized(
            attended + self._linear(wide, f"{layer}output.dense"), f"{layer}output.LayerNorm"
        )

    def _attend(self, *query_key_value: Tensor) -> Tensor:
        heads = [part.unflatten(1, (self._heads, -1)).movedim(1, 0) for part in query_key_value]
        return functional.scaled_dot_product_attention(*heads).movedim(0, 1).flatten(1)

    def _linear(self, inputs: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        if _layer(name) < self._frozen:
            return functional.linear(inputs, weight, bias)
        down, up = self._adapter[f"{name}.lora_A.weight"], self._adapter[f"{name}.lora_B.weight"]
        return _LowRank.apply(inputs, weight, bias, down, up)  # type: ignore[no-any-return]

    def _normalized(self, hidden: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return functional.layer_norm(hidden, hidden.shape[-1:], weight, bias, self._epsilon)


class _LowRank(torch.autograd.Function):
    """A frozen linear layer plus a low-rank update, with no intermediate of the full width."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor
    ) -> Tensor:
        narrow = inputs @ down.t()
        outputs = torch.addmm(bias, inputs, weight.t())
        outputs.addmm_(narrow, up.t(), alpha=ALPHA_OVER_RANK)
        ctx.save_for_backward(inputs, narrow, weight, down, up)
        return outputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        inputs, narrow, weight, down, up = ctx.saved_tensors
        narrow_gradient = (gradient @ up).mul_(ALPHA_OVER_RANK)
        up_gradient = (gradient.t() @ narrow).mul_(ALPHA_OVER_RANK)
        below = None
        if ctx.needs_input_grad[0]:
            below = (gradient @ weight).addmm_(narrow_gradient, down)
        return below, None, None, narrow_gradient.t() @ inputs, up_gradient


def _layer(name: str) -> int:
    """Give the number of the layer that a tensor belongs to; those of the head come last."""
    parts = name.split(".")
    return int(parts[3]) if parts[1:3] == ["encoder", "layer"] else 1000
