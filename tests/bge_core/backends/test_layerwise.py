"""Rerankers with a score after each layer, against the layers of plain transformers."""

from __future__ import annotations

import functools
import json
import logging
import math
import pickle
import sys
import threading

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bge_core import (
    ArgumentError,
    CheckpointError,
    Embedder,
    InputTypeError,
    Reranker,
    make_reranker,
    make_scorer,
)
from bge_core.checkpoints.catalog import LayerHeads, PairPrompt, Profile

LONG = "one two three four " * 60
PAIRS = [
    ("Where is Paris?", "Paris is in France."),
    ("Where is Paris?", ""),
    ("", "a"),
    ("大熊猫", "大熊猫是中国特有的一种熊科动物。\n\U0001f43c"),
    ("Where is Paris?", LONG),
    (LONG, "Paris is in France."),
    (LONG, LONG),
    ("Where is Paris?", "Paris is in France."),
]
QUESTIONS = {
    "minicpm": (
        "Given a query A and a passage B, determine whether the passage contains an answer to the "
        "query by providing a prediction of either 'Yes' or 'No'."
    ),
    "gemma": "Predict whether passage B contains an answer to query A.",
}
FOLDERS = ["minicpm_folder", "lightweight_folder"]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def weights_of(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("model-*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def parts_of(folder, question, query, passage, max_length):
    """Tokenise a pair as FlagEmbedding does: query, passage, and what is asked about them."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False
    )

    def ids(text):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    bos = json.loads((folder / "config.json").read_text())["bos_token_id"]
    sep, asked = ids("\n"), ids(question)
    first = [bos, *ids(f"A: {query}")[: max_length * 3 // 4]]
    second = [*sep, *ids(f"B: {passage}")[:max_length]]
    second = second[: max_length + len(sep) + len(asked) - len(first)]
    return [*first, *sep], second[len(sep) :], [*sep, *asked]


class MiniCPM:
    """Llama's layers, with MiniCPM's factors multiplied into the weights."""

    question = QUESTIONS["minicpm"]

    def __init__(self, folder):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = weights_of(folder)

    @functools.cache  # noqa: B019 -- as long as the fixture
    def logit(self, query, passage, *, max_length, cutoff):
        config = self.config
        sizes = {name: value for name, value in config.items() if name.startswith(("num", "max"))}
        model = transformers.LlamaModel(
            transformers.LlamaConfig(
                **{**sizes, "num_hidden_layers": cutoff},
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                rms_norm_eps=config["rms_norm_eps"],
            )
        ).eval()
        added = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
        factors = {"embed_tokens": config["scale_emb"], "o_proj": added, "down_proj": added}
        model.load_state_dict(
            {
                name: self.weights[f"model.{name}"] * factors.get(name.split(".")[-2], 1.0)
                for name in model.state_dict()
            }
        )
        parts = parts_of(self.folder, self.question, query, passage, max_length)
        ids = [token for part in parts for token in part]
        head = self.weights[f"lm_head.{cutoff - config['start_layer']}.linear_head.weight"]
        with torch.inference_mode():
            return float(model(input_ids=torch.tensor([ids]))[0][0, -1] @ head[0])


class Lightweight:
    """Gemma 2's layers one after the other, and means of the passage's rows between them."""

    question = QUESTIONS["gemma"]

    def __init__(self, folder):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = weights_of(folder)
        self.kinds = self.config.get("layer_types", ["sliding_attention", "full_attention"] * 3)
        unlike = ("model_type", "architectures", "auto_map", "attn_logit_softcapping")
        self.model = transformers.Gemma2Model(
            transformers.Gemma2Config(
                **{name: value for name, value in self.config.items() if name not in unlike},
                attn_logit_softcapping=None,
                attn_implementation="eager",
            )
        ).eval()
        self.model.load_state_dict(
            {name: self.weights[f"model.{name}"] for name in self.model.state_dict()}
        )

    @functools.cache  # noqa: B019 -- as long as the fixture
    @torch.inference_mode()
    def logit(self, query, passage, *, max_length, cutoff, compress_layers=(), ratio=1):
        before, ids, after = parts_of(self.folder, self.question, query, passage, max_length)
        model = self.model
        rows = model.embed_tokens.weight[torch.tensor([*before, *ids, *after])]
        rows = rows * math.sqrt(self.config["hidden_size"])
        for index, layer in enumerate(model.layers[:cutoff]):
            if index in compress_layers:
                middle = rows[len(before) : len(rows) - len(after)]
                means = [group.mean(0, keepdim=True) for group in middle.split(ratio) if len(group)]
                rows = torch.cat([rows[: len(before)], *means, rows[len(rows) - len(after) :]])
            places = torch.arange(len(rows))
            distance = places[:, None] - places[None]
            seen = distance >= 0
            if self.kinds[index] == "sliding_attention":
                seen &= distance < self.config["sliding_window"]
            mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
            out = layer(
                rows[None],
                position_embeddings=model.rotary_emb(rows[None], places[None]),
                attention_mask=mask[None, None],
                position_ids=places[None],
            )
            rows = (out[0] if isinstance(out, tuple) else out)[0]
        head = self.weights["lm_head.0.linear_head.weight"]
        cap = self.config["final_logit_softcapping"]
        return cap * math.tanh(float(model.norm(rows[-1]) @ head[0]) / cap)


@pytest.fixture(scope="module")
def minicpm(minicpm_folder):
    return MiniCPM(minicpm_folder)


@pytest.fixture(scope="module")
def lightweight(lightweight_folder):
    return Lightweight(lightweight_folder)


def expected_of(reference, pairs=PAIRS, **options):
    options = {"max_length": 2000, **options}
    return np.array([reference.logit(*pair, **options) for pair in pairs])


# The right score.


@pytest.mark.parametrize("max_length", [None, 24, 64])
@pytest.mark.parametrize("cutoff", [None, 2, 3, 4])
async def test_minicpm_s_scores_are_those_of_the_layer_that_is_asked_for(
    minicpm, call, cutoff, max_length
):
    with Reranker(
        minicpm.folder,
        cutoff_layers=cutoff,
        normalize=False,
        max_length=max_length,
        on_truncation="ignore",
    ) as reranker:
        scores = await call(reranker, "score_pairs", PAIRS)
    expected = expected_of(minicpm, cutoff=cutoff or 4, max_length=max_length or 1900)
    assert expected.std() > 0.1
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_length", [None, 24, 64])
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"cutoff": 6}),
        ({"cutoff_layers": [3]}, {"cutoff": 3}),
        ({"cutoff_layers": 2}, {"cutoff": 2}),
        (
            {"compress_layers": [2], "compress_ratio": 2},
            {"cutoff": 6, "compress_layers": (2,), "ratio": 2},
        ),
        (
            {"cutoff_layers": 5, "compress_layers": [4, 2], "compress_ratio": 2},
            {"cutoff": 5, "compress_layers": (2, 4), "ratio": 2},
        ),
        (
            {"compress_layers": 1, "compress_ratio": 4},
            {"cutoff": 6, "compress_layers": (1,), "ratio": 4},
        ),
        (
            {"compress_layers": (3, 5), "compress_ratio": 8},
            {"cutoff": 6, "compress_layers": (3, 5), "ratio": 8},
        ),
        # Neither of these shortens anything.
        ({"compress_layers": [2], "compress_ratio": 1}, {"cutoff": 6}),
        ({"cutoff_layers": 3, "compress_layers": [4], "compress_ratio": 2}, {"cutoff": 3}),
    ],
)
async def test_lightweight_s_scores_are_those_of_its_layers_and_shorter_passages(
    lightweight, call, given, wanted, max_length
):
    with Reranker(
        lightweight.folder, normalize=False, max_length=max_length, on_truncation="ignore", **given
    ) as reranker:
        scores = await call(reranker, "score_pairs", PAIRS)
    expected = expected_of(lightweight, **wanted, max_length=max_length or 2000)
    assert expected.std() > 0.1
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-5)


SHORTER = {"cutoff_layers": 5, "compress_layers": [2, 3], "compress_ratio": 4}


@pytest.mark.parametrize("budget", [1, 300, 4096])
def test_a_score_doesn_t_depend_on_what_is_scored_beside_it(lightweight_folder, budget):
    pairs = [("Where?", "word " * count) for count in (1, 2, 3, 5, 8, 9, 40, 41, 100)]
    with Reranker(lightweight_folder, normalize=False, **SHORTER) as reranker:
        alone = np.concatenate([reranker.score_pairs([pair]) for pair in pairs])
    with Reranker(lightweight_folder, normalize=False, batch_tokens=budget, **SHORTER) as reranker:
        together = reranker.score_pairs(pairs)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(set(alone.round(3))) == len(pairs)


@pytest.mark.parametrize("name", FOLDERS)
def test_weights_in_other_files_are_the_same_model(request, name, copy_of):
    folder = request.getfixturevalue(name)
    whole, pickled = copy_of(folder, "whole"), copy_of(folder, "pickled")
    for other in (whole, pickled):
        weights = weights_of(other)
        for file in other.glob("model*"):
            file.unlink()
        if other is whole:
            save_file(weights, other / "model.safetensors")
        else:
            torch.save(weights, other / "pytorch_model.bin")
    scores = []
    for place in (folder, whole, pickled):
        with Reranker(place, normalize=False) as reranker:
            scores.append(reranker.score_pairs(PAIRS[:4]))
    np.testing.assert_array_equal(scores[1], scores[0])
    np.testing.assert_array_equal(scores[2], scores[0])


@pytest.mark.parametrize("name", FOLDERS)
def test_half_precision_is_near(request, name):
    folder = request.getfixturevalue(name)
    with Reranker(folder, normalize=False) as whole, Reranker(folder, dtype="bfloat16") as half:
        assert half.dtype == "bfloat16"
        expected = 1 / (1 + np.exp(-whole.score_pairs(PAIRS)))
        np.testing.assert_allclose(half.score_pairs(PAIRS), expected, atol=0.1)


def test_layers_in_steps(lightweight, copy_of):
    folder = copy_of(lightweight.folder)
    config = {**lightweight.config, "layer_sep": 2}
    (folder / "config.json").write_text(json.dumps(config))
    with Reranker(folder, cutoff_layers=4, normalize=False) as reranker:
        scores = reranker.score_pairs(PAIRS[:4])
    np.testing.assert_allclose(scores, expected_of(lightweight, PAIRS[:4], cutoff=4), atol=1e-5)
    with pytest.raises(ArgumentError, match="from 2 to 6 in steps of 2"):
        Reranker(folder, cutoff_layers=3)


def test_layers_of_gemma_are_named_by_newer_configs(lightweight, copy_of):
    folder = copy_of(lightweight.folder)
    config = dict(lightweight.config)
    del config["rope_theta"]
    kinds = ["full_attention", "sliding_attention"] * 3
    config |= {"layer_types": kinds, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    (folder / "config.json").write_text(json.dumps(config))
    with Reranker(folder, normalize=False) as reranker:
        scores = reranker.score_pairs(PAIRS)
    config["rope_theta"] = 1e4  # as older versions read it
    (folder / "config.json").write_text(json.dumps(config))
    np.testing.assert_allclose(scores, expected_of(Lightweight(folder), cutoff=6), atol=1e-5)


# Ranks, windows, threads, copies: as with every reranker.


@pytest.mark.parametrize("name", FOLDERS)
async def test_ranks_are_those_of_the_scores(request, name, call):
    folder = request.getfixturevalue(name)
    passages = [passage for _, passage in PAIRS]
    with Reranker(folder, cutoff_layers=3) as reranker:
        scores = reranker.score_pairs([("Where is Paris?", passage) for passage in passages])
        ranked = await call(reranker, "rank", "Where is Paris?", passages, top_n=3)
    order = np.argsort(-scores, kind="stable")[:3]
    assert [(found.index, found.score) for found in ranked] == [
        (int(place), pytest.approx(float(scores[place]))) for place in order
    ]
    assert ((scores > 0) & (scores < 1)).all()


@pytest.mark.parametrize("options", [{}, SHORTER])
def test_a_long_passage_is_read_in_windows(lightweight, options):
    passage = "".join(f"{word} " for word in range(150)) + "Paris is in France."
    with Reranker(
        lightweight.folder, normalize=False, max_length=64, long_passages="window", **options
    ) as reranker:
        (best,) = reranker.rank("Where is Paris?", [passage])
        assert best.span is not None
        start, end = best.span
        (alone,) = reranker.score("Where is Paris?", [passage[start:end]])
    assert end - start < len(passage)
    assert best.score == pytest.approx(float(alone), abs=1e-4)


def test_a_copy_keeps_its_layers_and_threads_share_them(lightweight):
    with Reranker(lightweight.folder, normalize=False, **SHORTER) as reranker:
        other = pickle.loads(pickle.dumps(reranker))
        assert other.fingerprint == reranker.fingerprint
        expected = reranker.score_pairs(PAIRS)
        found: list[np.ndarray] = []
        threads = [
            threading.Thread(target=lambda: found.append(other.score_pairs(PAIRS)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    for scores in found:
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_layers_change_the_fingerprint(minicpm_folder, lightweight_folder):
    arguments: tuple[dict[str, object], ...] = (
        {},
        {"cutoff_layers": 5},
        {"compress_layers": [2], "compress_ratio": 2},
        {"compress_layers": [2], "compress_ratio": 4},
        {"compress_layers": [2, 3], "compress_ratio": 4},
        {"cutoff_layers": 5, "compress_layers": [2, 3], "compress_ratio": 4},
    )
    prints = [Reranker(lightweight_folder, **words).fingerprint for words in arguments]
    assert len(set(prints)) == len(arguments)
    same: tuple[dict[str, object], ...] = (
        {"cutoff_layers": [6]},
        {"compress_layers": [3]},
        {"compress_ratio": 2},
    )
    for words in same:  # the last of them shortens before layer 8, which isn't there
        assert Reranker(lightweight_folder, **words).fingerprint == prints[0]
    assert Reranker(minicpm_folder, cutoff_layers=4).fingerprint == (
        Reranker(minicpm_folder).fingerprint
    )


def test_only_the_layers_below_the_cutoff_are_read(minicpm, copy_of):
    folder = copy_of(minicpm.folder)
    for file in folder.glob("model*"):
        file.unlink()
    kept = {name: tensor for name, tensor in minicpm.weights.items() if "layers.3." not in name}
    save_file(kept, folder / "model.safetensors")
    with Reranker(folder, cutoff_layers=3, normalize=False) as reranker:
        scores = reranker.score_pairs(PAIRS[:4])
    np.testing.assert_allclose(
        scores, expected_of(minicpm, PAIRS[:4], cutoff=3), atol=1e-5, rtol=1e-5
    )
    with Reranker(folder) as reranker, pytest.raises(CheckpointError, match="lack 9 of"):
        reranker.score("a", ["b"])


# What is refused.


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        ({"cutoff_layers": 1}, ArgumentError, "it has them from 2 to 6"),
        ({"cutoff_layers": 7}, ArgumentError, "no layer after which"),
        ({"cutoff_layers": [3, 5]}, ArgumentError, "2 scores a pair"),
        ({"cutoff_layers": []}, ArgumentError, "cutoff_layers is empty"),
        ({"cutoff_layers": "3"}, InputTypeError, "cutoff_layers must be"),
        ({"cutoff_layers": 3.0}, InputTypeError, "cutoff_layers must be"),
        ({"cutoff_layers": [True]}, InputTypeError, r"cutoff_layers\[0\] must be a whole number"),
        ({"cutoff_layers": True}, InputTypeError, "must be a whole number"),
        ({"cutoff_layers": -1}, ArgumentError, "must be 0 or more"),
        ({"compress_layers": [0]}, ArgumentError, "layers 1 to 5, not before 0"),
        ({"compress_layers": [2, 6]}, ArgumentError, "not before 6"),
        ({"compress_layers": [2, "a"]}, InputTypeError, r"compress_layers\[1\]"),
        ({"compress_ratio": 3}, ArgumentError, r"use 1 \(off\), 2, 4 or 8"),
        ({"compress_ratio": 0}, ArgumentError, "compress_ratio"),
        ({"compress_ratio": None}, InputTypeError, "compress_ratio must be a whole number"),
        ({"compress_ratio": 2.0}, InputTypeError, "compress_ratio must be a whole number"),
    ],
)
@pytest.mark.parametrize("make", [Reranker, make_reranker, make_scorer])
def test_wrong_layers_are_refused_in_a_sentence(lightweight_folder, make, words, error, said):
    with pytest.raises(error, match=said):
        make(lightweight_folder, **words)


@pytest.mark.parametrize("name", ["cutoff_layers", "compress_layers", "compress_ratio"])
@pytest.mark.parametrize(
    "model", ["reranker_folder", "gemma_reranker_folder", "m3_folder", "BAAI/bge-reranker-v2-m3"]
)
def test_other_models_have_no_such_layers(request, model, name):
    model = model if "/" in model else request.getfixturevalue(model)
    with pytest.raises(ArgumentError, match=rf"{name} is for BAAI/bge-reranker-v2.*leave it out"):
        make_scorer(model, **{name: 2})


@pytest.mark.parametrize("name", ["compress_layers", "compress_ratio"])
@pytest.mark.parametrize("model", ["minicpm_folder", "BAAI/bge-reranker-v2-minicpm-layerwise"])
def test_minicpm_shortens_nothing(request, model, name):
    model = model if "/" in model else request.getfixturevalue(model)
    with pytest.raises(ArgumentError, match=rf"{name} is for .*lightweight"):
        Reranker(model, **{name: 2})


def test_a_hub_id_s_layers_are_checked_without_its_files():
    with pytest.raises(ArgumentError, match="from 8 to 40"):
        Reranker("BAAI/bge-reranker-v2-minicpm-layerwise", cutoff_layers=41)
    with pytest.raises(ArgumentError, match="from 8 to 42"):
        Reranker("BAAI/bge-reranker-v2.5-gemma2-lightweight", cutoff_layers=7)
    reranker = Reranker(
        "BAAI/bge-reranker-v2.5-gemma2-lightweight",
        cutoff_layers=28,
        compress_layers=[24, 40],
        compress_ratio=2,
    )
    assert reranker.model == "BAAI/bge-reranker-v2.5-gemma2-lightweight"


@pytest.mark.parametrize("name", ["cutoff_layers", "compress_layers", "compress_ratio"])
def test_a_server_has_layers_of_its_own(name):
    with pytest.raises(ArgumentError, match=f"{name} can't be set with endpoint"):
        make_scorer(
            "BAAI/bge-reranker-v2.5-gemma2-lightweight", endpoint="http://localhost:1", **{name: 8}
        )


def test_openvino_is_refused(minicpm_folder, lightweight_folder):
    for folder in (minicpm_folder, lightweight_folder):
        with (
            pytest.raises(CheckpointError, match=r"is a decoder.*backend='torch'"),
            Reranker(folder, backend="openvino") as reranker,
        ):
            reranker.score("a", ["b"])


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("name", FOLDERS)
def test_the_checkpoint_s_own_code_is_never_run(request, name, trusted):
    folder = request.getfixturevalue(name)
    assert "raise" in (folder / "own_code.py").read_text()
    with Reranker(folder, trust_remote_code=trusted) as reranker:
        assert reranker.score("a", ["b"]).shape == (1,)
    assert not any("own_code" in module for module in sys.modules)


@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_is_said_by_the_libraries_beneath(request, name, caplog, recwarn, capfd):
    caplog.set_level(logging.INFO)
    with Reranker(request.getfixturevalue(name)) as reranker:
        reranker.score("a", ["b"])
    assert {record.name.partition(".")[0] for record in caplog.records} <= {"bge_core"}
    assert not recwarn.list
    assert not capfd.readouterr().out


def test_they_are_no_embedders(minicpm_folder):
    with pytest.raises(CheckpointError, match="is a reranker"):
        Embedder(minicpm_folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_that_was_trained_further_is_known_by_its_classes(request, name, copy_of):
    folder = request.getfixturevalue(name)
    with (
        Reranker(folder, cutoff_layers=3) as one,
        Reranker(copy_of(folder, "mine"), cutoff_layers=3) as two,
    ):
        assert two.checkpoint.profile == one.checkpoint.profile
        np.testing.assert_array_equal(one.score_pairs(PAIRS[:4]), two.score_pairs(PAIRS[:4]))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("minicpm_folder", {"head_type": "complex"}),
        ("minicpm_folder", {"head_multi": False}),
        ("minicpm_folder", {"model_type": "llama"}),
        ("lightweight_folder", {"layer_wise": False}),
        ("lightweight_folder", {"model_type": "gemma"}),
    ],
)
def test_another_model_under_the_name_is_refused(request, name, change, copy_of):
    folder = copy_of(request.getfixturevalue(name))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match="describes another model than BAAI/bge-reranker-v2"):
        Reranker(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"start_layer": 9}, "start_layer=9 is none of num_hidden_layers=6"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be 1 or more"),
        ({"layer_sep": 0}, "layer_sep must be 1 or more"),
        ({"hidden_activation": "relu"}, "asks for the activation 'relu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary positions 'linear'"),
        ({"hidden_size": None}, "hidden_size and num_attention_heads are missing"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"hidden_size": 64}, "'model.* is of shape .*config.json describes"),
        ({"num_hidden_layers": 7}, "tensors, 'model.layers.6"),
    ],
)
def test_a_damaged_config_is_refused_in_a_sentence(lightweight_folder, copy_of, change, said):
    folder = copy_of(lightweight_folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=said), Reranker(folder) as reranker:
        reranker.score("a", ["b"])


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "all"])
def test_damaged_weights_are_refused_in_a_sentence(lightweight_folder, copy_of, name):
    folder = copy_of(lightweight_folder)
    for file in folder.glob("model*" if name == "all" else name):
        file.unlink()
    said = "has no weights" if name == "all" else f"lacks {name}"
    with pytest.raises(CheckpointError, match=said), Reranker(folder) as reranker:
        reranker.score("a", ["b"])
    folder = copy_of(lightweight_folder, "torn")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="can't be read"), Reranker(folder) as reranker:
        reranker.score("a", ["b"])


def test_a_profile_s_layers_are_checked():
    row = {"id": "acme/mine", "kind": "reranker", "family": "minicpm", "max_length": 512}
    heads = LayerHeads(first=2, last=4)
    made = Profile(**row, pair_prompt=PairPrompt(answer=None), layer_heads=heads)
    assert made.layer_heads == heads
    with pytest.raises(InputTypeError, match="layer_heads must be a LayerHeads"):
        Profile(**row, layer_heads=[2, 4])
    with pytest.raises(ArgumentError, match="layer_heads is for a reranker"):
        Profile(**{**row, "kind": "embedder"}, layer_heads=heads)
