"""BERT and RoBERTa encoders on packs, read straight from a checkpoint's weights.

transformers' own modelling code takes seconds to import, and every published BGE encoder is one of
these. A checkpoint that deviates in any way (another activation, relative positions, a tensor that
is missing or of another shape) is left to transformers, whose errors are also the better ones.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bge_core.backends.loading import checked_weight_files, out_of_memory_error
from bge_core.backends.memory import is_out_of_memory
from bge_core.backends.packing import attend, attend_first

if TYPE_CHECKING:
    from torch import Tensor

    from bge_core.backends.packing import Pack
    from bge_core.checkpoints.metadata import Checkpoint, Kind

__all__ = ["FAMILIES", "Bert", "load_bert"]

logger = logging.getLogger(__name__)

FAMILIES = ("bert", "roberta", "xlm-roberta")
"""The families, by `model_type`, that share this architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """The sizes in a config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float


class _Layer(torch.nn.Module):
    def __init__(self, shape: _Shape, *, last: bool) -> None:
        super().__init__()
        width = shape.hidden_size
        self._heads = (shape.num_attention_heads, width // shape.num_attention_heads)
        self._last = last
        if last:
            # Its queries are computed of the first tokens only, where that will do.
            self.query = torch.nn.Linear(width, width)
            self.key_value = torch.nn.Linear(width, 2 * width)
        else:
            self.query_key_value = torch.nn.Linear(width, 3 * width)
        self.attention_output = torch.nn.Linear(width, width)
        self.attention_output_norm = torch.nn.LayerNorm(width, shape.layer_norm_eps)
        self.intermediate = torch.nn.Sequential(
            torch.nn.Linear(width, shape.intermediate_size), torch.nn.GELU()
        )
        self.output = torch.nn.Linear(shape.intermediate_size, width)
        self.output_norm = torch.nn.LayerNorm(width, shape.layer_norm_eps)

    def forward(self, hidden: Tensor, pack: Pack) -> Tensor:
        """Compute every row, [rows, hidden] -> [rows, hidden]."""
        if self._last:
            queries = self.query(hidden).view(-1, *self._heads)
            keys, values = self._keys_and_values(hidden)
        else:
            together = self.query_key_value(hidden).view(-1, 3, *self._heads)
            queries, keys, values = together.unbind(1)
        return self._after(attend(queries, keys, values, pack), hidden)

    def first_token_states(self, hidden: Tensor, pack: Pack) -> Tensor:
        """Compute the row of each sequence's first token only, [rows, hidden] -> [n, hidden].

        Of the other rows it takes the keys and values alone, so the rest isn't computed.
        """
        first = hidden[pack.first_token_indices()]
        queries = self.query(first).view(-1, *self._heads)
        keys, values = self._keys_and_values(hidden)
        return self._after(attend_first(queries, keys, values, pack), first)

    def _keys_and_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.key_value(hidden).view(-1, 2, *self._heads).unbind(1)
        return keys, values

    def _after(self, attended: Tensor, hidden: Tensor) -> Tensor:
        rows = self.attention_output_norm(_plus(self.attention_output, attended.flatten(1), hidden))
        out: Tensor = self.output_norm(_plus(self.output, self.intermediate(rows), rows))
        return out


def _plus(linear: Any, rows: Tensor, others: Tensor) -> Tensor:
    """Add other rows to what a linear layer makes: ours do both in one pass."""
    plain = isinstance(linear, torch.nn.Linear)
    out: Tensor = linear(rows) + others if plain else linear.plus(rows, others)
    return out


class Bert(torch.nn.Module):
    """An encoder and, of a reranker, its head.

    Args:
        shape: Its sizes.
        head: Make a head of one label.
    """

    bucketed = False  # unless its layers are laid out for oneDNN
    capturable = True
    one_text: Callable[[Tensor, int], Tensor] | None = None
    """Computes all layers but the last of a pack of one text; None for as of any other."""

    def __init__(self, shape: _Shape, *, head: bool) -> None:
        super().__init__()
        self.shape = shape
        width = shape.hidden_size
        self.word_embeddings = _table(shape.vocab_size, width)
        self.position_embeddings = _table(shape.max_position_embeddings, width)
        self.token_type_embeddings = _table(shape.type_vocab_size, width)
        self.norm = torch.nn.LayerNorm(width, shape.layer_norm_eps)
        self.layers = torch.nn.ModuleList(
            _Layer(shape, last=index == shape.num_hidden_layers - 1)
            for index in range(shape.num_hidden_layers)
        )
        # The pooler and classifier of BERT and the classifier of RoBERTa are one computation.
        self.head = (
            torch.nn.Sequential(
                torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
            )
            if head
            else torch.nn.Identity()
        )

    def hidden_states(self, pack: Pack) -> Tensor:
        """Compute the last layer's row of every token, [rows, hidden]."""
        rows: Tensor = self.layers[-1](self._before_last(pack), pack)
        return rows

    def first_token_states(self, pack: Pack) -> Tensor:
        """Compute the last layer's row of each sequence's first token, [n, hidden]."""
        last: Any = self.layers[-1]
        rows: Tensor = last.first_token_states(self._before_last(pack), pack)
        return rows

    def _before_last(self, pack: Pack) -> Tensor:
        hidden = self._embedded(pack)
        if self.one_text is not None and len(pack.sequences) == 1:
            return self.one_text(hidden, pack.tokens)
        for layer in list(self.layers)[:-1]:
            hidden = layer(hidden, pack)
        return hidden

    def _embedded(self, pack: Pack) -> Tensor:
        inputs = {name: tensor[0] for name, tensor in pack.inputs().items()}
        words = self.word_embeddings(inputs["input_ids"])
        types = self.token_type_embeddings(inputs["token_type_ids"])
        positions = self.position_embeddings(inputs["position_ids"])
        embedded: Tensor = self.norm(words + types + positions)
        return embedded


def _table(rows: int, width: int) -> torch.nn.Embedding:
    # Without the random numbers that the class would draw, for which torch imports its compiler.
    return torch.nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def load_bert(
    checkpoint: Checkpoint, *, kind: Kind, dtype: torch.dtype, device: torch.device
) -> Bert | None:
    """Load an encoder onto a device, if it is just what this module computes.

    Args:
        checkpoint: What the checkpoint says of itself.
        kind: `"embedder"` or `"reranker"`.
        dtype: The number format of the weights.
        device: Where they go.

    Returns:
        The encoder, in evaluation mode; None for one that transformers had better load.

    Raises:
        ComputationError: It doesn't fit on the device.
    """
    config = json.loads((checkpoint.transformer_folder / "config.json").read_text(encoding="utf-8"))
    shape = _shape(config) if checkpoint.family in FAMILIES else None
    files = checked_weight_files(checkpoint)
    if shape is None or len(files) != 1:
        return None
    try:
        with torch.device("meta"):
            model = Bert(shape, head=kind == "reranker")
        weights = _renamed(_read(files[0]), shape.num_hidden_layers, head=kind == "reranker")
        model.load_state_dict(
            {name: tensor.to(device, dtype, copy=True) for name, tensor in weights.items()},
            assign=True,
        )
    except Exception as exc:
        if is_out_of_memory(exc):
            raise out_of_memory_error(checkpoint.name, device) from exc
        logger.debug("%r is left to transformers: %s", checkpoint.name, exc)
        return None
    return model.eval().requires_grad_(requires_grad=False)


def _shape(config: Mapping[str, Any]) -> _Shape | None:
    """Return the sizes of what this module computes; None for anything that goes beyond it."""
    beyond = (
        "add_cross_attention",
        "auto_map",
        "is_decoder",
        "pruned_heads",
        "quantization_config",
    )
    if (
        config.get("hidden_act") != "gelu"
        or config.get("position_embedding_type", "absolute") != "absolute"
        or any(config.get(name) for name in beyond)
    ):
        return None
    try:
        shape = _Shape(**{field.name: config[field.name] for field in fields(_Shape)})
        # Of a text torch would say so at the first text only.
        if not isinstance(shape.layer_norm_eps, (int, float)):
            return None
        return None if shape.hidden_size % shape.num_attention_heads else shape
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    read: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return read


def _renamed(weights: Mapping[str, Tensor], layers: int, *, head: bool) -> dict[str, Tensor]:
    """Rename the tensors for this module; those that it doesn't need are left out.

    Raises:
        KeyError: One is missing.
    """
    # Checkpoints that were converted from TensorFlow have these names.
    weights = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        ): tensor
        for name, tensor in weights.items()
    }
    prefix = next(
        prefix for prefix in ("", "bert.", "roberta.") if f"{prefix}{_WORDS}.weight" in weights
    )
    renamed = {
        f"{name}.weight": weights[f"{prefix}embeddings.{name}.weight"] for name in _EMBEDDINGS
    }
    modules: dict[str, tuple[str, ...]] = {"norm": (f"{prefix}embeddings.LayerNorm",)}
    for index in range(layers):
        layer = f"{prefix}encoder.layer.{index}"
        for ours, theirs in (_LAYER | (_LAST if index == layers - 1 else _NOT_LAST)).items():
            modules[f"layers.{index}.{ours}"] = tuple(f"{layer}.{name}" for name in theirs)
    if head:
        of_bert = "classifier.dense.weight" not in weights
        modules["head.0"] = (f"{prefix}pooler.dense" if of_bert else "classifier.dense",)
        modules["head.2"] = ("classifier" if of_bert else "classifier.out_proj",)
    for ours, theirs in modules.items():
        for end in ("weight", "bias"):
            parts = [weights[f"{name}.{end}"] for name in theirs]
            renamed[f"{ours}.{end}"] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return renamed


_WORDS = "embeddings.word_embeddings"
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_LAYER = {
    "attention_output": ("attention.output.dense",),
    "attention_output_norm": ("attention.output.LayerNorm",),
    "intermediate.0": ("intermediate.dense",),
    "output": ("output.dense",),
    "output_norm": ("output.LayerNorm",),
}
_QUERY, _KEY_VALUE = ("attention.self.query",), ("attention.self.key", "attention.self.value")
_NOT_LAST = {"query_key_value": _QUERY + _KEY_VALUE}
_LAST = {"query": _QUERY, "key_value": _KEY_VALUE}
