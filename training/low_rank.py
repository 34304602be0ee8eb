"""A BERT cross-encoder with a low-rank update that is trained, in peft's format."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoModelForSequenceClassification

PREFIX = "base_model.model."  # peft's, in front of every name in an adapter's file
ALPHA_OVER_RANK = 2.0
TARGETS = re.compile(r".*layer\.\d+\..*(query|key|value|dense)")
WHOLE = ("bert.pooler.dense", "classifier")


@dataclass(frozen=True)
class PairTokens:
    """One question with one passage.

    Attributes:
        ids: [CLS] question [SEP] passage [SEP].
        question: How many of them are up to the first [SEP], with it.
    """

    ids: Sequence[int]
    question: int


class LowRank(nn.Module):
    """What is added to a frozen weight: two narrow matrices' product."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        """Begin with an update of nothing.

        Args:
            linear: The layer.
            rank: How narrow.
        """
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Give the updated weight, [out, in]."""
        return weight + ALPHA_OVER_RANK * (self.up @ self.down)


class LowRankCrossEncoder:
    """Scores pairs; the pooler, the classifier and the updates of all other layers are trained.

    Attributes:
        trained: What training changes, by its name in the adapter's file.
    """

    def __init__(self, trunk: Path, *, rank: int, adapter: Path | None, device: str) -> None:
        """Load the trunk.

        Args:
            trunk: A folder with a BERT encoder.
            rank: Of the updates.
            adapter: A folder with an adapter of this rank to go on from; None for nothing.
            device: Where to compute. On CUDA linear layers are in bfloat16.
        """
        self.device = torch.device(device)
        self._rank = rank
        self.model = AutoModelForSequenceClassification.from_pretrained(
            trunk, num_labels=1, dtype=torch.float32
        )
        for weight in self.model.parameters():
            weight.requires_grad = False
        self.trained: dict[str, Tensor] = {}
        for name, module in list(self.model.named_modules()):
            if name in WHOLE:
                self._train(f"{name}.weight", module.weight)
                self._train(f"{name}.bias", module.bias)
            elif TARGETS.fullmatch(name):
                update = LowRank(module, rank)
                register_parametrization(module, "weight", update)
                self._train(f"{name}.lora_A.weight", update.down)
                self._train(f"{name}.lora_B.weight", update.up)
        if adapter is not None:
            self.load(adapter)
        self.model.to(self.device)

    def _train(self, name: str, weight: nn.Parameter) -> None:
        self.trained[PREFIX + name] = weight.requires_grad_()

    def __call__(self, pairs: Sequence[PairTokens], *, batches: int = 1) -> Tensor:
        """Score pairs.

        Args:
            pairs: Any number of them, of any lengths.
            batches: In how many batches, those of like length together.

        Returns:
            One logit for each, float32.
        """
        order = sorted(range(len(pairs)), key=lambda place: len(pairs[place].ids))
        size = -(-len(order) // batches)
        logits = [
            self._score([pairs[place] for place in order[start : start + size]])
            for start in range(0, len(order), size)
        ]
        places = torch.tensor(order).argsort().to(self.device)
        return torch.cat(logits)[places]

    def _score(self, pairs: Sequence[PairTokens]) -> Tensor:
        shape = (3, len(pairs), max(len(pair.ids) for pair in pairs))
        inputs = torch.zeros(shape, dtype=torch.long)
        for row, pair in enumerate(pairs):
            length = len(pair.ids)
            inputs[0, row, :length] = torch.tensor(pair.ids)
            inputs[1, row, :length] = 1
            inputs[2, row, pair.question : length] = 1
        ids, mask, types = inputs.to(self.device)
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        ):
            found = self.model(input_ids=ids, attention_mask=mask, token_type_ids=types)
        logits: Tensor = found.logits[:, 0].float()
        return logits

    def load(self, adapter: Path) -> None:
        """Take an adapter's values.

        Args:
            adapter: Its folder.
        """
        self.take(load_file(adapter / "adapter_model.safetensors"), adapter)

    def take(self, values: Mapping[str, Tensor], source: Path) -> None:
        """Take values.

        Args:
            values: By their names in an adapter's file.
            source: Where they are from.

        Raises:
            ValueError: They are of another rank.
        """
        rank = next(len(value) for name, value in values.items() if "lora_A" in name)
        if rank != self._rank:
            msg = f"{source} is of rank {rank}, not {self._rank}: pass --rank {rank}."
            raise ValueError(msg)
        with torch.no_grad():
            for name, value in values.items():
                self.trained[name].copy_(value)

    def save(self, folder: Path, values: dict[str, Tensor], config: Path) -> None:
        """Write an adapter in half precision.

        Args:
            folder: Where to.
            values: `trained`, or an average of it.
            config: The configuration of an adapter like it, of any rank.
        """
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.detach().half().cpu().contiguous() for name, value in values.items()},
            folder / "adapter_model.safetensors",
        )
        settings = json.loads(config.read_text())
        settings["r"], settings["lora_alpha"] = self._rank, int(ALPHA_OVER_RANK * self._rank)
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))

    def parameters(self) -> Iterator[Tensor]:
        """Yield what is trained."""
        yield from self.trained.values()
