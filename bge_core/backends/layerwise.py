"""Decoders with a score after each layer, on packs: MiniCPM and Gemma 2, as BGE trained them.

Their published code is Python in the checkpoints' folders, which is never run; this computes what
FlagEmbedding computes. As there, the scores of Gemma's attention are not capped: FlagEmbedding
leaves them to torch's own attention, which has no such cap. Only the layers below the cutoff are
loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from bge_core.backends.base import TorchRunner, begin_copy, default_budget
from bge_core.backends.loading import load_tensors
from bge_core.backends.packing import Pack, attend
from bge_core.checkpoints.files import JsonFile
from bge_core.errors import CheckpointError
from bge_core.tokenizer import TokenSequence

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from bge_core.backends.base import Fetch
    from bge_core.backends.loading import Originals
    from bge_core.backends.memory import Budget
    from bge_core.checkpoints.catalog import LayerHeads
    from bge_core.checkpoints.metadata import Checkpoint
    from bge_core.layers import Depth

__all__ = ["LayerwiseRunner", "load_layerwise_runner"]

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda rows: functional.gelu(rows, approximate="tanh"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What a config.json says of the layers, in the terms of both families.

    Attributes:
        vocab_size: Tokens that have an embedding.
        hidden_size: Width of a row.
        intermediate_size: Width inside the feed-forward.
        heads: Query heads.
        key_heads: Key and value heads.
        head_dim: Width of a head.
        bias: Whether the attention's linear layers have a bias.
        activation: The feed-forward's, by transformers' name.
        eps: Of the norms.
        theta: The base of the rotary positions.
        embedding_scale: Factor on the embeddings.
        residual_scale: Factor on what a layer's halves add.
        attention_scale: Factor on the attention's scores.
        windows: Of each layer, how many places away a token sees others; None for all.
        gemma: Norms have a weight beside 1, and stand behind each half, too.
        softcap: The score never exceeds this; None for no limit.
        head: The head's index among those in the weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    key_heads: int
    head_dim: int
    bias: bool
    activation: str
    eps: float
    theta: float
    embedding_scale: float
    residual_scale: float
    attention_scale: float
    windows: tuple[int | None, ...]
    gemma: bool
    softcap: float | None
    head: int


class _Norm(torch.nn.Module):
    def __init__(self, shape: _Shape) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(shape.hidden_size))
        self._eps = shape.eps
        self._beside = 1.0 if shape.gemma else 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.float()
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self._eps)
        return (rows * (self._beside + self.weight.float())).to(hidden.dtype)


class _Attention(torch.nn.Module):
    def __init__(self, shape: _Shape, window: int | None) -> None:
        super().__init__()
        self._head_dim = shape.head_dim
        self._scale = shape.attention_scale
        self._window = window
        inner, keys = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
        self.q_proj = torch.nn.Linear(shape.hidden_size, inner, bias=shape.bias)
        self.k_proj = torch.nn.Linear(shape.hidden_size, keys, bias=shape.bias)
        self.v_proj = torch.nn.Linear(shape.hidden_size, keys, bias=shape.bias)
        self.o_proj = torch.nn.Linear(inner, shape.hidden_size, bias=shape.bias)

    def forward(self, hidden: Tensor, pack: Pack, turns: tuple[Tensor, Tensor]) -> Tensor:
        queries, keys, values = (
            project(hidden).view(len(hidden), -1, self._head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attend(
            _rotated(queries, turns),
            _rotated(keys, turns),
            values,
            pack,
            causal=True,
            scaling=self._scale,
            sliding_window=self._window,
        )
        out: Tensor = self.o_proj(attended.flatten(1))
        return out


class _FeedForward(torch.nn.Module):
    def __init__(self, shape: _Shape) -> None:
        super().__init__()
        self._activation = _ACTIVATIONS[shape.activation]
        self.gate_proj = torch.nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = torch.nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = torch.nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate = self._activation(self.gate_proj(hidden))
        out: Tensor = self.down_proj(gate * self.up_proj(hidden))
        return out


class _Layer(torch.nn.Module):
    def __init__(self, shape: _Shape, window: int | None) -> None:
        super().__init__()
        self._gemma = shape.gemma
        self._scale = shape.residual_scale
        self.self_attn = _Attention(shape, window)
        self.mlp = _FeedForward(shape)
        self.input_layernorm = _Norm(shape)
        self.post_attention_layernorm = _Norm(shape)
        if shape.gemma:
            self.pre_feedforward_layernorm = _Norm(shape)
            self.post_feedforward_layernorm = _Norm(shape)

    def forward(self, hidden: Tensor, pack: Pack, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Compute every row, [rows, hidden] -> [rows, hidden]."""
        added: Tensor = self.self_attn(self.input_layernorm(hidden), pack, turns)
        if self._gemma:
            hidden = hidden + self.post_attention_layernorm(added)
            added = self.mlp(self.pre_feedforward_layernorm(hidden))
            added = self.post_feedforward_layernorm(added)
            return hidden + added
        hidden = hidden + added * self._scale
        # What is named after the attention stands before the feed-forward here.
        added = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + added * self._scale


class _Decoder(torch.nn.Module):
    """The layers below the cutoff, and the head that reads their last row."""

    def __init__(self, shape: _Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = torch.nn.Embedding(
            shape.vocab_size,
            shape.hidden_size,
            # Without the random numbers that the class would draw.
            _weight=torch.empty(shape.vocab_size, shape.hidden_size),
        )
        self.layers = torch.nn.ModuleList(_Layer(shape, window) for window in shape.windows)
        self.norm = _Norm(shape)
        self.head = torch.nn.Linear(shape.hidden_size, 1, bias=False)

    def embedded(self, pack: Pack) -> Tensor:
        """Return the embedding of every token, [rows, hidden]."""
        hidden: Tensor = self.embed_tokens(pack.inputs()["input_ids"][0])
        # In the weights' number format, as the models were trained.
        return hidden * torch.tensor(
            self.shape.embedding_scale, dtype=hidden.dtype, device=hidden.device
        )

    def turns(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of every token's rotary position, each [rows, 1, head_dim / 2]."""
        positions = pack.inputs()["position_ids"][0]
        steps = torch.arange(0, self.shape.head_dim, 2, device=positions.device).float()
        speeds = 1.0 / (self.shape.theta ** (steps / self.shape.head_dim))
        angles = positions.float()[:, None, None] * speeds
        return angles.cos(), angles.sin()

    def scores(self, rows: Tensor) -> Tensor:
        """Read the score of each row, [n, hidden] -> [n, 1] float32."""
        scores = self.norm(rows).float() @ self.head.weight.float().T
        cap = self.shape.softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)


class LayerwiseRunner(TorchRunner):
    """Runs a decoder up to its cutoff, on packs that get shorter on the way if asked to.

    Args:
        decoder: The layers below the cutoff.
        depth: Where passages are shortened.
        tail: Tokens behind a passage, which are never shortened.
        device: Where the decoder is.
        budget: What a pack may have unless the user says otherwise.
        dtype: The decoder's number format, by name.
    """

    def __init__(
        self,
        decoder: _Decoder,
        depth: Depth,
        *,
        tail: int,
        device: torch.device,
        budget: Budget,
        dtype: str = "float32",
    ) -> None:
        super().__init__(device=device, budget=budget, dtype=dtype)
        self._decoder = decoder
        self._depth = depth
        self._tail = tail

    def _launch(self, sequences: Sequence[TokenSequence]) -> Fetch:
        decoder = self._decoder
        pack = Pack(sequences, self._device)
        hidden, turns = decoder.embedded(pack), decoder.turns(pack)
        for index, layer in enumerate(decoder.layers):
            if index in self._depth.compress_layers:
                pack, hidden = self._shortened(pack, hidden)
                turns = decoder.turns(pack)
            hidden = layer(hidden, pack, turns)
        return begin_copy(decoder.scores(hidden[pack.last_token_indices()]))

    def _shortened(self, pack: Pack, hidden: Tensor) -> tuple[Pack, Tensor]:
        """Put the mean of so many neighbouring rows of each passage in their place."""
        ratio = self._depth.compress_ratio
        shorter: list[TokenSequence] = []
        starts: list[int] = []
        counts: list[int] = []
        start = 0
        for sequence in pack.sequences:
            size = len(sequence)
            first, last = sequence.second_segment_start, size - self._tail
            heads = [*range(first), *range(first, last, ratio), *range(last, size)]
            shorter.append(TokenSequence(sequence.id_array[heads], first))
            starts += [start + head for head in heads]
            counts += [min(ratio, last - head) if first <= head < last else 1 for head in heads]
            start += size
        places = torch.tensor(starts, device=self._device)[:, None]
        count = torch.tensor(counts, device=self._device)[:, None]
        each = torch.arange(ratio, device=self._device)
        # Rows beyond a group's end are read as its first, and count nothing.
        inside = each < count
        weights = (inside / count).to(hidden.dtype)
        groups = hidden[places + each * inside]
        return Pack(shorter, self._device), (groups * weights[..., None]).sum(1)


def load_layerwise_runner(
    checkpoint: Checkpoint,
    heads: LayerHeads,
    depth: Depth,
    *,
    tail: int,
    dtype: str,
    device: torch.device,
    originals: Originals | None = None,
) -> LayerwiseRunner:
    """Load the layers below the cutoff onto a device.

    Args:
        checkpoint: What the checkpoint says of itself.
        heads: After which layers it has a score.
        depth: How many layers, and where passages are shortened.
        tail: Tokens behind a passage, which are never shortened.
        dtype: The number format of the weights.
        device: Where they go.
        originals: What was loaded for the devices before this one; None for nothing.

    Raises:
        CheckpointError: Weights are missing, damaged or of another shape, or config.json
            describes what this module doesn't compute.
        ComputationError: They don't fit on the device.
    """
    shape = _shape(checkpoint, heads, depth)

    def load() -> _Decoder:
        with torch.device("meta"):
            decoder = _Decoder(shape)
        named = {f"model.{ours}": ours for ours in decoder.state_dict() if ours != "head.weight"}
        named[f"lm_head.{shape.head}.linear_head.weight"] = "head.weight"
        shapes = {name: decoder.get_parameter(ours).shape for name, ours in named.items()}
        read = load_tensors(checkpoint, shapes, dtype=getattr(torch, dtype), device=device)
        decoder.load_state_dict({named[name]: tensor for name, tensor in read.items()}, assign=True)
        return decoder.eval().requires_grad_(requires_grad=False)

    return LayerwiseRunner(
        load() if originals is None else originals.on("decoder", device, load),
        depth,
        tail=tail,
        device=device,
        budget=default_budget(shape, device, dtype),
        dtype=dtype,
    )


def _rotated(heads: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys by their positions, [rows, heads, head_dim]."""
    cosine, sine = turns
    one, two = heads.float().chunk(2, -1)
    turned = torch.cat((one * cosine - two * sine, two * cosine + one * sine), -1)
    return turned.to(heads.dtype)


def _shape(checkpoint: Checkpoint, heads: LayerHeads, depth: Depth) -> _Shape:
    """Read the sizes; what config.json leaves out is as the published code has it."""
    config = JsonFile(checkpoint.transformer_folder / "config.json")
    values = config.values
    gemma = heads.compresses
    activation = str(
        values.get("hidden_activation", "gelu_pytorch_tanh")
        if gemma
        else values.get("hidden_act", "silu")
    )
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    turned = rope.get("rope_type", rope.get("type", "default"))
    for what, said, known in (
        ("activation", activation, list(_ACTIVATIONS)),
        ("rotary positions", turned, ["default"]),
    ):
        if said not in known:
            msg = (
                f"{config.path} asks for the {what} {said!r}, which no published checkpoint of "
                f"this kind has, and only {' and '.join(map(repr, known))} can be computed."
            )
            raise CheckpointError(msg)
    width, count = config.whole("hidden_size", 0), config.whole("num_attention_heads", 0)
    if width < 1 or count < 1:
        config.refuse("hidden_size and num_attention_heads are missing")
    head_dim = config.whole("head_dim", 256) if gemma else width // count
    scaled = config.number("query_pre_attn_scalar", 256) if gemma else head_dim
    scale_depth = config.number("scale_depth", 1.0)
    return _Shape(
        vocab_size=checkpoint.vocabulary,
        hidden_size=width,
        intermediate_size=config.whole("intermediate_size", 0),
        heads=count,
        key_heads=config.whole("num_key_value_heads", count),
        head_dim=head_dim,
        bias=bool(values.get("attention_bias")),
        activation=activation,
        eps=config.number("rms_norm_eps", 1e-6),
        theta=config.number("rope_theta", rope.get("rope_theta", 10000.0)),
        embedding_scale=math.sqrt(width) if gemma else config.number("scale_emb", 1.0),
        residual_scale=1.0 if gemma else scale_depth / math.sqrt(heads.last),
        attention_scale=scaled**-0.5,
        windows=_windows(config, depth.cutoff) if gemma else (None,) * depth.cutoff,
        gemma=gemma,
        softcap=values.get("final_logit_softcapping", 30.0) if gemma else None,
        # FlagEmbedding reads Gemma's heads in the order of the layers that are asked for: of one
        # layer the first head, whichever layer it is.
        head=0 if gemma else depth.cutoff - heads.first,
    )


def _windows(config: JsonFile, layers: int) -> tuple[int | None, ...]:
    """Return how far each layer of Gemma 2 sees: every other one not far."""
    window = config.whole("sliding_window", 4096)
    kinds = config.values.get("layer_types") or ["sliding_attention", "full_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])
