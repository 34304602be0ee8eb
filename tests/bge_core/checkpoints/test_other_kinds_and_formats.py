"""What can be told of a checkpoint before it is loaded: of an id in the cache, of odd weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bge_core import (
    CheckpointError,
    Embedder,
    M3Embedder,
    PairPrompt,
    Profile,
    Reranker,
    make_embedder,
    make_reranker,
    register,
)
from langchain_bge import BGECrossEncoder, BGEEmbeddings, BGESparseEmbeddings
from langchain_bge import BGEReranker as DocumentReranker
from llamaindex_bge import BGEEmbedding, BGESparseEmbedding
from llamaindex_bge import BGEReranker as NodeReranker

COMMIT = "5c38ec7c405ec4b44b94cc5a9bb96e735b38267a"
TEXTS = ["Paris is in France.", "A cat sat on the mat."]
EMBEDDERS: tuple[Any, ...] = (Embedder, make_embedder, BGEEmbeddings, BGEEmbedding)
SPARSE: tuple[Any, ...] = (M3Embedder, BGESparseEmbeddings, BGESparseEmbedding)
RERANKERS: tuple[Any, ...] = (
    Reranker,
    make_reranker,
    BGECrossEncoder,
    DocumentReranker,
    NodeReranker,
)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Lay a checkpoint out as the hub's cache does, whole or its config alone, off line."""
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "hub"))

    def lay_out(folder: Path, name: str, *, only: str = "*") -> str:
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(COMMIT)
        snapshot = home / "snapshots" / COMMIT
        shutil.copytree(folder, snapshot)
        for path in snapshot.rglob("*"):
            if path.is_file() and not path.match(only):
                path.unlink()
        return name

    return lay_out


def renamed(folder: Path, copy_of: Any) -> Path:
    """A copy under a name that says nothing, nor does its config."""
    copied: Path = copy_of(folder, "acme-weights")
    config = json.loads((copied / "config.json").read_text())
    config.pop("_name_or_path", None)
    (copied / "config.json").write_text(json.dumps(config))
    return copied


@pytest.mark.parametrize("only", ["*", "config.json"])
def test_an_id_of_the_other_kind_is_refused_at_once_where_it_is_cached(
    bert_reranker_folder, unknown_folder, gemma_reranker_folder, copy_of, cached, only
):
    scorer = cached(bert_reranker_folder, "acme/scorer", only=only)
    for make in (*EMBEDDERS, *SPARSE):
        with pytest.raises(CheckpointError, match="'acme/scorer' is a reranker"):
            make(model=scorer)
    encoder = cached(unknown_folder, "acme/encoder", only=only)
    for make in RERANKERS:
        with pytest.raises(CheckpointError, match="'acme/encoder' is an embedding model"):
            make(model=encoder)
    qwen = cached(renamed(gemma_reranker_folder, copy_of), "acme/Qwen3-like", only=only)
    for make in RERANKERS:
        with pytest.raises(CheckpointError, match=r"is a language model \(gemma\).*register"):
            make(model=qwen)


def test_an_id_of_the_right_kind_is_not_and_nothing_is_fetched(
    bert_reranker_folder, unknown_folder, cached
):
    for only in ("*", "config.json"):
        scorer = cached(bert_reranker_folder, f"acme/scorer-{len(only)}", only=only)
        encoder = cached(unknown_folder, f"acme/encoder-{len(only)}", only=only)
        for make in RERANKERS:
            make(model=scorer)
        for make in EMBEDDERS:
            make(model=encoder)
    with Embedder("acme/encoder-1", local_files_only=True) as embedder:
        assert embedder.embed_documents(TEXTS).shape == (2, 32)
    with pytest.raises(CheckpointError, match="not of bge-m3's make"):
        M3Embedder("acme/encoder-1")
    Embedder("acme/nobody-has-it", revision="no/such/../branch")


def test_with_an_endpoint_the_cache_counts_too_but_a_server_may_rank_with_a_language_model(
    bert_reranker_folder, unknown_folder, gemma_reranker_folder, copy_of, cached
):
    at = {"endpoint": "http://localhost:9"}
    cached(bert_reranker_folder, "acme/scorer")
    cached(unknown_folder, "acme/encoder")
    cached(renamed(gemma_reranker_folder, copy_of), "acme/qwen")
    for make in EMBEDDERS[1:]:
        with pytest.raises(CheckpointError, match="is a reranker"):
            make(model="acme/scorer", **at)
        make(model="acme/encoder", **at)
    for make in RERANKERS[1:]:
        with pytest.raises(CheckpointError, match="is an embedding model"):
            make(model="acme/encoder", **at)
        make(model="acme/qwen", **at)


def test_a_language_model_reranks_when_it_is_said_how(gemma_reranker_folder, copy_of):
    folder = renamed(gemma_reranker_folder, copy_of)
    for make in RERANKERS:
        with pytest.raises(CheckpointError, match="none of its files says that it scores pairs"):
            make(model=folder)
    row = Profile(
        id="acme-weights",
        kind="reranker",
        family="gemma",
        max_length=8192,
        half="bfloat16",
        pair_prompt=PairPrompt(),
    )
    register(row)
    with Reranker(folder) as ours, Reranker(gemma_reranker_folder) as known:
        np.testing.assert_allclose(ours.score("q", TEXTS), known.score("q", TEXTS), atol=1e-6)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("format_", ["model.{}.safetensors", "pytorch_model.{}.bin"])
def test_a_single_variant_of_the_weights_is_read(
    unknown_folder, bert_reranker_folder, m3_folder, copy_of, variant, format_
):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    for source, make in (
        (unknown_folder, Embedder),
        (bert_reranker_folder, Reranker),
        (m3_folder, M3Embedder),
    ):
        folder, plain = copy_of(source, f"{make.__name__}-v"), copy_of(source, f"{make.__name__}-p")
        tensors = {n: t.to(dtype) for n, t in load_file(plain / "model.safetensors").items()}
        save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").unlink()
        file = folder / format_.format(variant)
        if file.suffix == ".bin":
            torch.save(tensors, file)
        else:
            save_file(tensors, file, metadata={"format": "pt"})

        def numbers(where: Path, make: Any = make) -> Any:
            with make(where) as model:
                if make is Reranker:
                    return model.score("q", TEXTS)
                return (
                    model.encode(TEXTS).dense
                    if make is M3Embedder
                    else model.embed_documents(TEXTS)
                )

        np.testing.assert_array_equal(numbers(folder), numbers(plain))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("rust_model.ot",), "rust-bert's"),
        (("model.tflite",), "TensorFlow Lite's"),
        (("tflite/model.tflite",), "TensorFlow Lite's"),
        (("coreml/model.mlpackage",), "CoreML's"),
        (("model.mlmodel",), "CoreML's"),
        (("tf_model.h5",), r"save_pretrained\(folder\)"),
        (("flax_model.msgpack",), r"save_pretrained\(folder\)"),
        (("model.fp16.safetensors", "model.bf16.safetensors"), r"several variants.*rename the one"),
        (("pytorch_model.a.bin", "pytorch_model.b.bin"), r"rename .* to pytorch_model\.bin"),
    ],
)
def test_other_files_of_weights_are_called_what_they_are(
    unknown_folder, bert_reranker_folder, copy_of, names, said
):
    for source, make in ((unknown_folder, Embedder), (bert_reranker_folder, Reranker)):
        folder = copy_of(source, make.__name__)
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=said) as caught, make(folder) as model:
            model.embed_documents(["a"]) if make is Embedder else model.score("q", ["a"])
        assert "fetch it again" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, "fp8"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_quantised_weights_without_a_word_are_refused(
    unknown_folder, bert_reranker_folder, m3_folder, copy_of, dtype, suffix
):
    for source, make in (
        (unknown_folder, Embedder),
        (bert_reranker_folder, Reranker),
        (m3_folder, Embedder),
    ):
        folder = copy_of(source, f"{source.name}-{make.__name__}")
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith("query.weight"))
        wide = tensors[name] * 100
        tensors[name] = wide.to(torch.float8_e4m3fn if dtype == "fp8" else dtype)
        if dtype == "fp8":
            tensors[f"{name}_scale"] = torch.ones(1)
        if suffix == "bin":
            (folder / "model.safetensors").unlink()
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with (
            pytest.raises(CheckpointError, match=r"are quantised .*no quantization_config"),
            make(folder, pooling="cls") if make is Embedder else make(folder) as model,
        ):
            model.embed_documents(["a"]) if make is Embedder else model.score("q", ["a"])


def test_a_folder_without_a_config_and_an_endpoint_need_the_model_s_id(tmp_path):
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "bge-m3-q8_0.gguf").write_bytes(b"GGUF")
    for model in (folder, folder / "bge-m3-q8_0.gguf", str(folder / "bge-m3-q8_0.gguf")):
        for make in EMBEDDERS[1:]:
            with pytest.raises(CheckpointError, match="pass the model's id") as caught:
                make(model=model, endpoint="http://localhost:9")
            assert "endpoint=" not in str(caught.value)
            with pytest.raises(CheckpointError, match="GGUF"):
                make(model=model)
