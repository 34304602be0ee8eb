"""Runners: packed where a family's stock code carries it, padded elsewhere, or OpenVINO."""

from __future__ import annotations

import json
import logging
import re
from importlib.metadata import version

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from bge_core import ArgumentError, CheckpointError, Embedder, Reranker
from bge_core.backends import stock
from bge_core.backends.base import TorchRunner
from bge_core.backends.packing import Pack
from bge_core.backends.runner_options import RunnerOptions
from bge_core.backends.select import load_runner
from bge_core.checkpoints.metadata import read
from bge_core.checkpoints.source import Source
from bge_core.tokenizer import TokenSequence

WIDTH = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
DECODER = {**WIDTH, "num_key_value_heads": 2}
FAMILIES = {
    "Bert": WIDTH,
    "XLMRoberta": {**WIDTH, "pad_token_id": 1, "max_position_embeddings": 60},
    "ModernBert": {
        **WIDTH,
        "num_hidden_layers": 4,
        # Narrower than the texts, so that the sliding window must be honoured.
        "local_attention": 16,
        "global_attn_every_n_layers": 2,
        "cls_token_id": 1,
        "bos_token_id": 1,
        "sep_token_id": 2,
        "eos_token_id": 2,
        "max_position_embeddings": 64,
    },
    "DistilBert": {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "Mistral": {**DECODER, "sliding_window": 8},
    "Qwen2": DECODER,
    "Qwen3": {**DECODER, "head_dim": 8},
    "Gemma2": {**DECODER, "head_dim": 8},
}
# Gemma2 soft-caps its scores, which the packed attention does not do; transformers 4 lets not as
# many take an attention function.
PADDED = {"Gemma2"}
if Version(transformers.__version__) < Version("5"):
    PADDED |= {"ModernBert", "DistilBert"}
LENGTHS = (1, 2, 3, 3, 7, 20, 20, 33, 40)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_gives_the_rows_of_each_text_alone(family, pooling, tmp_path, caplog):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}Model")(config).eval()
    model.save_pretrained(tmp_path)
    checkpoint = read(Source.of(tmp_path), tmp_path)
    with caplog.at_level(logging.DEBUG, logger="bge_core"):
        options = RunnerOptions(kind="embedder", pooling=pooling)
        runner = load_runner(checkpoint, options, device="cpu")
    assert runner.padded == (family in PADDED)
    assert ("runs padded" in caplog.text) == runner.padded
    rng = np.random.default_rng(0)
    texts = [TokenSequence(rng.integers(5, 90, n).tolist(), n) for n in LENGTHS]
    expected = []
    for text in texts:
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([text.ids]))[0][0]
        rows = {"cls": hidden[0], "mean": hidden.mean(0), "last": hidden[-1]}
        expected.append(rows[pooling].numpy())
    np.testing.assert_allclose(runner.run(texts), np.stack(expected), atol=1e-5)


def rounded_attend(queries, keys, values, pack, *, causal=False, scaling=None, **_):
    """Give what packing's attention does, rounded at other places: after each product."""
    grouped = queries.shape[1] // keys.shape[1]
    keys, values = (rows.repeat_interleave(grouped, dim=1) for rows in (keys, values))
    parts = []
    texts = (rows.split(pack.lengths) for rows in (queries, keys, values))
    for query, key, value in zip(*texts, strict=True):
        scores = torch.einsum("qhd,khd->hqk", query, key) * (scaling or query.shape[-1] ** -0.5)
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        parts.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(parts)


def leaking_attend(queries, keys, values, pack, **options):
    """Let the texts of a pack see each other."""
    one = TokenSequence([5] * sum(pack.lengths), sum(pack.lengths))
    return rounded_attend(queries, keys, values, Pack([one], pack.device), **options)


def half_precision_runner(family, tmp_path, dtype):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Hidden states of some size, as those of trained decoders.
            if name.endswith(("layernorm.weight", "model.norm.weight")) or name == "norm.weight":
                weight.mul_(4)
            elif weight.dim() == 2:
                weight.mul_(5)
    model.save_pretrained(tmp_path)
    options = RunnerOptions(kind="embedder", pooling="last", dtype=dtype)
    return load_runner(read(Source.of(tmp_path), tmp_path), options, device="cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_another_rounding_in_half_precision_is_no_reason_to_pad(
    family, dtype, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(stock, "attend", rounded_attend)
    assert not half_precision_runner(family, tmp_path, dtype).padded
    assert not caplog.records


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["Mistral", "Qwen3"])
def test_attention_across_texts_is_found_and_said(family, dtype, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stock, "attend", leaking_attend)
    assert half_precision_runner(family, tmp_path, dtype).padded
    assert "runs on padded batches" in caplog.text


@pytest.mark.parametrize("name", ["en_folder", "m3_folder", "unknown_folder"])
def test_openvino_gives_torch_s_vectors(request, name, corpus, kept):
    folder = request.getfixturevalue(name)
    texts = [*corpus, "", "long " * 300]
    with (
        Embedder(folder, query_instruction="q: ", on_truncation="ignore") as torch_one,
        Embedder(
            folder, query_instruction="q: ", on_truncation="ignore", backend="openvino"
        ) as openvino_one,
    ):
        for method in ("embed_documents", "embed_queries"):
            np.testing.assert_allclose(
                getattr(openvino_one, method)(texts), getattr(torch_one, method)(texts), atol=1e-4
            )


@pytest.mark.parametrize("name", ["reranker_folder", "bert_reranker_folder"])
def test_openvino_gives_torch_s_scores(request, name, corpus, kept):
    folder = request.getfixturevalue(name)
    with (
        Reranker(folder, normalize=False) as torch_one,
        Reranker(folder, normalize=False, backend="openvino") as openvino_one,
    ):
        np.testing.assert_allclose(
            openvino_one.score("a query", corpus), torch_one.score("a query", corpus), atol=1e-4
        )


def test_openvino_converts_once_and_again_for_other_weights(en_folder, copy_of, kept):
    with Embedder(en_folder, backend="openvino") as embedder:
        embedder.embed_queries(["x"])
    (first,) = (kept / "bge-adapters" / "openvino").iterdir()
    written = (first / "model.bin").stat().st_mtime_ns
    with Embedder(en_folder, backend="openvino") as embedder:
        embedder.embed_queries(["x"])
    assert (first / "model.bin").stat().st_mtime_ns == written
    other = copy_of(en_folder)
    config = json.loads((other / "1_Pooling" / "config.json").read_text())
    config |= {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (other / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with Embedder(other, backend="openvino") as embedder:
        embedder.embed_queries(["x"])
    assert len(list((kept / "bge-adapters" / "openvino").iterdir())) == 2


def test_openvino_s_conversion_is_a_line_and_a_bar_and_nothing_of_others(
    en_folder, bert_reranker_folder, m3_folder, kept, caplog, capfd, recwarn
):
    for folder, make in (
        (en_folder, Embedder),
        (bert_reranker_folder, Reranker),
        (m3_folder, Embedder),
    ):
        with caplog.at_level(logging.INFO), make(folder, backend="openvino") as model:
            model.embed_queries(["x"]) if make is Embedder else model.score("q", ["x"])
        lines = [
            record.name for record in caplog.records if record.name != "bge_core.engine.local_model"
        ]
        assert lines == ["bge_core.backends.openvino"]
        assert "Converting" in caplog.text
        out, err = capfd.readouterr()
        assert out == ""
        if Version(version("openvino")) < Version("2025"):  # it forks, and tokenizers says so
            err = re.sub(r"huggingface/tokenizers: .*\n.*\n(\t- .*\n)*", "", err)
        (bar,) = {
            line.partition(":")[0].strip()
            for line in err.replace("\r", "\n").split("\n")
            if line.strip()
        }
        assert bar == f"Converting {folder.name} for OpenVINO"
        caplog.clear()
        with make(folder, backend="openvino") as model:
            model.embed_queries(["x"]) if make is Embedder else model.score("q", ["x"])
        assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_auto_gives_the_same_vectors_in_both_lanes(en_folder, kept):
    with Embedder(en_folder, query_instruction="", backend="auto", device="cpu") as embedder:
        query, document = embedder.embed_queries(["one"]), embedder.embed_documents(["one"])
    np.testing.assert_allclose(query, document, atol=1e-4)


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"dtype": "float16"}, {"backend": "onnx"}])
def test_openvino_is_refused_where_it_can_t_run(en_folder, options):
    with pytest.raises(ArgumentError, match=r"backend=.*pass|backend='onnx' is not supported"):
        Embedder(en_folder, **{"backend": "openvino", **options})


def test_openvino_does_not_run_modules_of_a_checkpoint_s_own(en_folder, copy_of, kept):
    folder = copy_of(en_folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "x.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with (
        pytest.raises(CheckpointError, match="pass backend='torch'"),
        Embedder(folder, backend="openvino") as embedder,
    ):
        embedder.embed_queries(["x"])


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The cache in which converted models are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("family", "pooling"), [("Qwen2", "last"), ("Mistral", "mean")])
def test_what_overflows_in_float16_is_computed_again_in_bfloat16(family, pooling, tmp_path):
    """tests/cuda has BERT, whose norms a CPU's autocast leaves alone."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}Model")(config).eval()
    rare = 99  # a token for which one number of the first layer exceeds 65,504
    with torch.no_grad():
        pattern = torch.tensor([1.0, -1.0]).repeat(16)
        model.get_input_embeddings().weight[rare] = 10 * pattern
        for name, module in model.named_modules():
            if name.endswith("0.mlp.up_proj"):
                module.weight[0] = 3e3 * pattern
            if name.endswith("0.self_attn.o_proj"):
                module.weight *= 0.01
    model.save_pretrained(tmp_path)
    checkpoint = read(Source.of(tmp_path), tmp_path)
    options = RunnerOptions(kind="embedder", pooling=pooling, dtype="float16")
    runner = load_runner(checkpoint, options, device="cpu")
    assert isinstance(runner, TorchRunner)
    texts = [TokenSequence(ids, 4) for ids in ([5, 6, 7, 8], [rare, 6, 7, 8], [9, 8, 7, 6])]
    with torch.inference_mode():
        first_try = runner._launch(texts)()
        hidden = [model(input_ids=torch.tensor([text.ids]))[0][0] for text in texts]
    rows = {"cls": lambda own: own[0], "mean": lambda own: own.mean(0), "last": lambda own: own[-1]}
    expected = np.stack([rows[pooling](own).numpy() for own in hidden])
    finite = np.isfinite(first_try).all(axis=1)
    assert not finite.all()
    found = runner.run(texts)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[finite], first_try[finite])
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1)
    assert (cosines / np.linalg.norm(expected, axis=1) > 0.99).all()
