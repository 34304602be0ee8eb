"""The encoders that load without transformers' modelling code, and those that are left to it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bge_core import Embedder, Reranker
from bge_core.backends.bert import load_bert
from bge_core.backends.packed import PackedRunner
from bge_core.backends.runner_options import RunnerOptions
from bge_core.backends.select import load_runner
from bge_core.checkpoints.metadata import read
from bge_core.checkpoints.source import Source
from bge_core.tokenizer import TokenSequence

CPU = torch.device("cpu")


def loaded(folder, kind="embedder"):
    checkpoint = read(Source.of(folder), folder)
    return load_bert(checkpoint, kind=kind, dtype=torch.float32, device=CPU)


def renamed(folder, rename):
    """Write a folder's weights under other names."""
    file = folder / "model.safetensors"
    weights = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def as_pickle(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("name", ["en_folder", "m3_folder", "unknown_folder"])
def test_published_encoders_need_no_modelling_code(name, request):
    assert loaded(request.getfixturevalue(name)) is not None


@pytest.mark.parametrize("name", ["reranker_folder", "bert_reranker_folder"])
def test_so_do_rerankers(name, request):
    assert loaded(request.getfixturevalue(name), kind="reranker") is not None


@pytest.mark.parametrize("tokens", [2, 16, 17, 27])
@pytest.mark.parametrize("name", ["en_folder", "m3_folder"])
def test_one_text_alone_has_the_rows_of_transformers(name, tokens, request):
    from transformers import AutoModel

    folder = request.getfixturevalue(name)
    runner = load_runner(
        read(Source.of(folder), folder), RunnerOptions(kind="embedder"), device="cpu"
    )
    assert isinstance(runner, PackedRunner)
    ids = np.arange(7, 7 + tokens, dtype=np.int32)
    pack = runner._pack([TokenSequence(ids, tokens)])
    with torch.inference_mode():
        ours = runner._encoder.hidden_states(pack)[:tokens]
        first = runner._encoder.first_token_states(pack)[:1]
        theirs = AutoModel.from_pretrained(folder)(torch.from_numpy(ids).long()[None])[0][0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(first, theirs[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: renamed(folder, lambda name: f"bert.{name}"),
        lambda folder: renamed(
            folder,
            lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ),
        ),
        as_pickle,
    ],
    ids=["with a prefix", "of TensorFlow", "a pickle"],
)
def test_weights_under_other_names_are_the_same_weights(en_folder, copy_of, corpus, change):
    folder = copy_of(en_folder)
    change(folder)
    assert loaded(folder) is not None
    with Embedder(en_folder) as expected, Embedder(folder) as embedder:
        np.testing.assert_array_equal(
            embedder.embed_documents(corpus), expected.embed_documents(corpus)
        )


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_what_it_does_not_compute_is_left_to_transformers(
    en_folder, copy_of, corpus, reference_embed, activation
):
    folder = copy_of(en_folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": activation}))
    assert loaded(folder) is None
    with Embedder(folder, query_instruction="") as embedder:
        np.testing.assert_allclose(
            embedder.embed_documents(corpus), reference_embed(folder, corpus), atol=1e-5
        )


def test_a_reranker_of_another_activation_scores_the_same(
    bert_reranker_folder, copy_of, corpus, reference_score
):
    folder = copy_of(bert_reranker_folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu"}))
    assert loaded(folder, kind="reranker") is None
    pairs = [("a query", text) for text in corpus]
    with Reranker(folder, normalize=False) as reranker:
        np.testing.assert_allclose(
            reranker.score("a query", corpus), reference_score(folder, pairs), atol=1e-5
        )


def test_a_tensor_that_is_missing_is_left_to_transformers(en_folder, copy_of):
    folder = copy_of(en_folder)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert loaded(folder) is None


def test_a_config_without_a_padding_token_has_its_family_s(m3_folder, copy_of, corpus):
    """A config.json may leave out what is transformers' default: 1 here, and positions from 2."""
    folder = copy_of(m3_folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("pad_token_id") == 1
    path.write_text(json.dumps(config))
    with Embedder(m3_folder) as expected, Embedder(folder) as embedder:
        assert embedder.max_length == expected.max_length
        np.testing.assert_allclose(
            embedder.embed_documents(corpus), expected.embed_documents(corpus), atol=1e-6
        )
