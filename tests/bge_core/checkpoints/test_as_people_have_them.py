"""Folders, names and caches as they come from elsewhere: the right model, or a true reason."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bge_core import (
    ArgumentError,
    CheckpointError,
    Embedder,
    InputTypeError,
    M3Embedder,
    RemoteReranker,
    Reranker,
    doctor,
    make_embedder,
    make_scorer,
)
from bge_core.checkpoints.catalog import find_profile

EN = "Represent this sentence for searching relevant passages: "
ZH = "为这个句子生成表示以用于检索相关文章："
COMMIT = "5c38ec7c405ec4b44b94cc5a9bb96e735b38267a"
TEXTS = ["Paris is in France.", "A cat sat on the mat.", "巴黎是法国的首都"]
PAIRS = [("Where is Paris?", text) for text in TEXTS]
NOWHERE = "http://localhost:9"


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(value | changes), encoding="utf-8")


# What a model was trained from is not what it is.


@pytest.mark.parametrize(
    "trained_from",
    ["BAAI/bge-m3", "BAAI/bge-base-en-v1.5", "BAAI/bge-m3-retromae", "/runs/bge-m3/checkpoint-500"],
)
@pytest.mark.parametrize("name", ["anything", "bge-m3", "bge-small-en-v1.5"])
def test_a_cross_encoder_is_one_whatever_it_was_trained_from(
    bert_reranker_folder, copy_of, reference_score, capsys, trained_from, name
):
    folder = copy_of(bert_reranker_folder, name)
    edit(folder / "config.json", _name_or_path=trained_from)
    expected = reference_score(folder, PAIRS)
    with Reranker(folder, normalize=False) as reranker:
        np.testing.assert_allclose(reranker.score_pairs(PAIRS), expected, atol=1e-5)
    scorer = make_scorer(folder, normalize=False)
    np.testing.assert_allclose(scorer.score_pairs(PAIRS), expected, atol=1e-5)
    scorer.close()
    assert RemoteReranker(folder, endpoint=NOWHERE).model == str(folder)
    for make in (Embedder, M3Embedder):
        with pytest.raises(CheckpointError, match="is a reranker"):
            make(folder)
    assert doctor.main([str(folder)]) == 0
    assert "reranker, bert" in capsys.readouterr().out


@pytest.mark.parametrize("trained_from", ["BAAI/bge-reranker-v2-m3", "BAAI/bge-reranker-v2-gemma"])
@pytest.mark.parametrize("name", ["anything", "bge-reranker-v2-m3"])
def test_an_embedder_is_one_whatever_it_was_trained_from(
    unknown_folder, copy_of, reference_embed, capsys, trained_from, name
):
    folder = copy_of(unknown_folder, name)
    edit(folder / "config.json", _name_or_path=trained_from)
    with Embedder(folder, query_instruction="") as embedder:
        expected = reference_embed(folder, TEXTS, "mean")
        np.testing.assert_allclose(embedder.embed_queries(TEXTS), expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="is an embedding model"):
        Reranker(folder)
    assert doctor.main([str(folder)]) == 0
    assert "embedder, bert" in capsys.readouterr().out


def test_a_fine_tune_is_not_asked_for_by_its_base_s_name(en_folder, copy_of):
    from bge_core import RemoteEmbedder

    folder = copy_of(en_folder, "acme-search")
    edit(folder / "config.json", _name_or_path="BAAI/bge-small-en-v1.5")
    served = RemoteEmbedder(folder, endpoint=NOWHERE)
    assert served.query_instruction == EN
    assert served._model.served_name == "acme-search"


@pytest.mark.parametrize("make", [Embedder, Reranker])
def test_a_mirror_s_id_of_the_other_kind_waits_for_its_files(make):
    """Somebody else's model of a published name may have been trained from it."""
    name = {Embedder: "acme/bge-reranker-v2-m3", Reranker: "acme/bge-m3"}[make]
    model = make(name, local_files_only=True)
    with pytest.raises(CheckpointError, match="can't be found"):
        model.embed_queries(TEXTS) if make is Embedder else model.score("q", TEXTS)


# The hub's cache.


@pytest.fixture
def cached(tmp_path):
    """Lay a checkpoint out as the hub's cache does, under a commit and a branch."""

    def lay_out(folder: Path, name: str) -> Path:
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = shutil.copytree(folder, home / "snapshots" / COMMIT)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)
        return Path(snapshot)

    return lay_out


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
@pytest.mark.parametrize("local", [True, False])
def test_a_revision_in_the_cache_is_found_off_line(
    unknown_folder, cached, tmp_path, revision, local
):
    cached(unknown_folder, "acme/encoder")
    with (
        Embedder(unknown_folder) as expected,
        Embedder(
            "acme/encoder",
            cache_folder=tmp_path / "hub",
            revision=revision,
            local_files_only=local,
        ) as embedder,
    ):
        np.testing.assert_array_equal(
            embedder.embed_documents(TEXTS), expected.embed_documents(TEXTS)
        )


def test_sentence_transformers_home_is_the_cache_where_none_is_given(
    unknown_folder, cached, tmp_path, monkeypatch, capsys
):
    cached(unknown_folder, "acme/encoder")
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "hub"))
    with Embedder("acme/encoder") as embedder:
        assert embedder.embed_documents(TEXTS).shape == (3, 32)
    with (
        Embedder("acme/other") as other,
        pytest.raises(CheckpointError, match="is not in SENTENCE_TRANSFORMERS_HOME="),
    ):
        other.embed_documents(TEXTS)
    with (
        Embedder("acme/encoder", cache_folder=tmp_path) as elsewhere,
        pytest.raises(CheckpointError, match="is not in cache_folder"),
    ):
        elsewhere.embed_documents(TEXTS)
    assert doctor.main([]) == 0
    assert str(tmp_path / "hub") in capsys.readouterr().out
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", "")
    with (
        Embedder("acme/encoder") as embedder,
        pytest.raises(CheckpointError, match="the hub cache"),
    ):
        embedder.embed_documents(TEXTS)


# Names of folders.


@pytest.mark.parametrize(
    ("path", "instruction"),
    [
        ("BAAI/bge-large-zh-v1___5", ZH),
        ("bge-small-en-v1___5/checkpoint-500", EN),
        ("models--BAAI--bge-large-zh-v1.5/snapshots/abc", ZH),
    ],
)
def test_modelscope_s_names_and_links_are_known(
    bare_unknown_folder, copy_of, tmp_path, path, instruction
):
    folder = copy_of(bare_unknown_folder, path)
    assert Embedder(folder).query_instruction == instruction
    for number, name in enumerate(("current", "again")):
        link = tmp_path / name
        link.symlink_to(folder if number == 0 else tmp_path / "current")
        assert Embedder(link).query_instruction == instruction


def test_a_link_s_own_name_comes_first(bare_unknown_folder, copy_of, tmp_path):
    folder = copy_of(bare_unknown_folder, "bge-large-zh-v1.5")
    (tmp_path / "bge-small-en-v1.5").symlink_to(folder)
    assert Embedder(tmp_path / "bge-small-en-v1.5").query_instruction == EN


def test_modelscope_s_name_is_a_hub_id_s():
    row = find_profile("BAAI/bge-large-zh-v1.5")
    assert row is find_profile("/home/me/.cache/modelscope/hub/models/BAAI/bge-large-zh-v1___5")


# Weights.


def shards(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for part, own in (("1", names[:7]), ("2", names[7:])):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(own, file))
    edit(folder / "model.safetensors.index.json", metadata={}, weight_map=index)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("model", ["en_folder", "bert_reranker_folder"])
def test_an_index_of_another_format_is_no_matter(request, copy_of, model, sharded):
    source = request.getfixturevalue(model)
    folder = copy_of(source)
    if sharded:
        shards(folder)
    part = "pytorch_model-00001-of-00002.bin"
    edit(folder / "pytorch_model.bin.index.json", metadata={}, weight_map={"a": part})
    if model == "en_folder":
        with Embedder(folder) as ours, Embedder(source) as whole:
            np.testing.assert_allclose(
                ours.embed_queries(TEXTS), whole.embed_queries(TEXTS), atol=1e-6
            )
    else:
        with Reranker(folder) as ours, Reranker(source) as whole:
            np.testing.assert_allclose(ours.score_pairs(PAIRS), whole.score_pairs(PAIRS), atol=1e-6)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 133466304\n" % (
    b"a" * 64
)


@pytest.mark.parametrize("make", [Embedder, Reranker, M3Embedder])
@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"onnx/model.onnx": b"x"}, r"ONNX.*onnxruntime.*endpoint="),
        ({"model.onnx": b"x"}, r"ONNX"),
        ({"bge-m3-q8_0.gguf": b"GGUF"}, r"GGUF.*llama\.cpp.*endpoint="),
        ({"tf_model.h5": b"x"}, r"TensorFlow"),
        ({"flax_model.msgpack": b"x"}, r"Flax"),
        ({"model.safetensors": POINTER}, r"pointer of Git LFS.*git lfs pull"),
        ({"tokenizer.json": POINTER}, r"pointer of Git LFS.*git lfs pull"),
        ({"pytorch_model.bin": POINTER}, r"pointer of Git LFS.*git lfs pull"),
    ],
)
def test_other_formats_are_called_what_they_are(request, copy_of, make, files, said):
    source = {Embedder: "en_folder", Reranker: "bert_reranker_folder", M3Embedder: "m3_folder"}
    folder = copy_of(request.getfixturevalue(source[make]))
    (folder / "model.safetensors").unlink()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        use(make(folder))
    assert "damaged" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert doctor.main([str(folder)]) == 1


def test_a_folder_of_gguf_alone_and_its_file_are_called_so(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError, match=r"GGUF, which llama\.cpp and Ollama serve"):
            Embedder(name)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", None])
def test_quantised_weights_are_called_so(en_folder, bert_reranker_folder, copy_of, method):
    for make, source in ((Embedder, en_folder), (Reranker, bert_reranker_folder)):
        folder = copy_of(source, f"{make.__name__}-{method}")
        edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
        with pytest.raises(CheckpointError, match=rf"quantised with {method or 'a method'}.*use"):
            make(folder)


def test_compressed_weights_are_called_so_by_their_older_word(en_folder, copy_of):
    folder = copy_of(en_folder)
    edit(folder / "config.json", compression_config={"quant_method": "compressed-tensors"})
    with pytest.raises(CheckpointError, match="quantised with compressed-tensors"):
        Embedder(folder)


def test_a_server_may_run_what_is_quantised(en_folder, bert_reranker_folder, copy_of):
    for make, source in ((make_embedder, en_folder), (make_scorer, bert_reranker_folder)):
        folder = copy_of(source, make.__name__)
        edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
        with pytest.raises(CheckpointError, match=r"a server that runs it .*endpoint="):
            make(folder)
        served = make(folder, endpoint="http://localhost:8080")
        assert served.model == str(folder)


def test_a_pointer_of_git_lfs_is_one_in_a_module_s_folder_too(en_folder, copy_of):
    folder = copy_of(en_folder)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 190\n"
    (folder / "1_Pooling" / "config.json").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json is a pointer of Git LFS"):
        Embedder(folder)


def test_a_message_can_be_printed_whatever_a_checkpoint_says(en_folder, copy_of):
    folder = copy_of(en_folder)
    edit(folder / "config.json", model_type="\ud800")
    with pytest.raises(CheckpointError, match=r"\\ud800") as caught, Embedder(folder) as embedder:
        embedder.embed_documents(TEXTS)
    assert str(caught.value).encode()


@pytest.mark.parametrize("argument", [{"revision": 5}, {"cache_folder": 5}])
def test_a_place_of_the_wrong_type_is_said(en_folder, argument):
    name = next(iter(argument))
    for model in (en_folder, "BAAI/bge-small-en-v1.5"):
        with pytest.raises(InputTypeError, match=f"^{name} must be"):
            Embedder(model, **argument)


@pytest.mark.parametrize("make", [Embedder, Reranker])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("what", ["pipe", "socket", "folder"])
def test_what_is_no_file_is_not_waited_for(
    en_folder, bert_reranker_folder, copy_of, make, name, what
):
    folder = copy_of({Embedder: en_folder, Reranker: bert_reranker_folder}[make])
    (folder / name).unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    try:
        os.chdir(folder)  # a socket's path has room for a hundred characters
        if what == "socket":
            bound.bind(name)
        else:
            (os.mkfifo if what == "pipe" else os.mkdir)(name)
    finally:
        os.chdir(here)
        bound.close()
    if what == "folder" and name == "special_tokens_map.json":
        use(make(folder))  # which is needed by nobody
        return
    said = {
        "model.safetensors": "has no weights",
        "config.json": "is missing or has no model_type",
    }
    with pytest.raises(CheckpointError, match=said[name] if what == "folder" else "is a pipe, a"):
        use(make(folder))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that can't be read")
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_can_t_be_read_is_not_called_damaged(en_folder, copy_of, name):
    folder = copy_of(en_folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/proc/self/mem")  # as a file that this user may not read
    with pytest.raises(
        CheckpointError, match=r"can't be read .*check that this user may"
    ) as caught:
        use(Embedder(folder))
    assert "damaged" not in str(caught.value)


def use(model: Any) -> None:
    with model:
        if isinstance(model, Embedder):
            model.embed_queries(TEXTS)
        elif isinstance(model, M3Embedder):
            model.encode(TEXTS, dense=True)
        else:
            model.score_pairs(PAIRS)


# Lengths and prompts.


@pytest.mark.parametrize("place", ["sentence_bert_config.json", "tokenizer_config.json"])
def test_a_saved_length_is_the_default_and_the_positions_are_the_limit(
    unknown_folder, copy_of, reference_embed, place
):
    folder = copy_of(unknown_folder)
    key = "max_seq_length" if place.startswith("sentence") else "model_max_length"
    if key == "model_max_length":
        edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / place, **{key: 32})
    long = ["word " * 300]
    with Embedder(folder, on_truncation="ignore") as by_default:
        assert by_default.max_length == 32
        vectors = by_default.embed_documents(long)
    np.testing.assert_allclose(
        vectors, reference_embed(folder, long, "mean", max_length=32), atol=1e-5
    )
    with Embedder(folder, max_length=256, on_truncation="ignore") as longer:
        vectors = longer.embed_documents(long)
    expected = reference_embed(folder, long, "mean", max_length=256)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    with pytest.raises(ArgumentError, match="max_length=513 is more than the 512"):
        Embedder(folder, max_length=513)


def test_empty_prompts_say_nothing(unknown_folder, copy_of, caplog):
    folder = copy_of(unknown_folder, "acme-empty-prompts")
    settings = {"prompts": {"query": "", "document": ""}, "default_prompt_name": None}
    edit(folder / "config_sentence_transformers.json", **settings)
    assert Embedder(folder).query_instruction == ""
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "queries get no instruction" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": {"query": "\ud800"}},
        {"prompts": {"query": 3}},
        {"prompts": ["query: "]},
        {"prompts": {"a": "b"}, "default_prompt_name": "c"},
        {"truncate_dim": 0},
        {"truncate_dim": "64"},
    ],
)
def test_a_checkpoint_s_settings_are_checked_when_they_are_read(unknown_folder, copy_of, settings):
    folder = copy_of(unknown_folder)
    edit(folder / "config_sentence_transformers.json", **settings)
    with pytest.raises(CheckpointError, match=r"config_sentence_transformers\.json is damaged"):
        Embedder(folder)


# Damage.


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "tokenizer_config.json",
    ],
)
@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[" * 500 + "]" * 500])
def test_json_that_nests_without_end_is_a_sentence(unknown_folder, copy_of, name, text):
    folder = copy_of(unknown_folder)
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=r"\.json is damaged \("):
        Embedder(folder)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -3},
        {"num_hidden_layers": 513},  # seconds of making layers
        {"num_hidden_layers": 10**9},
        {"num_labels": 343_137},  # half a minute of making names
        {"num_labels": 10**9},  # and a process that was killed
        {"num_attention_heads": -4},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"hidden_size": 0},
        {"hidden_size": 10**12},
        {"hidden_size": 10**7},
        {"intermediate_size": -1},
        {"intermediate_size": 10**9},
        {"vocab_size": 10**9},
        {"max_position_embeddings": 0},
        {"max_position_embeddings": 10**9},
        {"type_vocab_size": 10**9},
        {"layer_norm_eps": "1e-12"},
        {"layer_norm_eps": [1]},
        {"hidden_act": "no such"},
        {"pad_token_id": -5},
        {"pad_token_id": 10**6},
    ],
)
def test_sizes_that_no_model_has_are_a_sentence_at_load(en_folder, reranker_folder, copy_of, sizes):
    for make, source in ((Embedder, en_folder), (Reranker, reranker_folder)):
        folder = copy_of(source, f"{make.__name__}-sizes")
        edit(folder / "config.json", **sizes)
        if make is Embedder and "pad_token_id" in sizes:
            continue  # BERT's padding is nobody's business where nothing is padded
        with pytest.raises(CheckpointError):
            use(make(folder))


@pytest.mark.parametrize("named", [[], {}, 3, "nowhere"])
def test_a_default_prompt_of_no_name_is_refused(en_folder, copy_of, named):
    folder = copy_of(en_folder)
    path = folder / "config_sentence_transformers.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | {"default_prompt_name": named}))
    with pytest.raises(CheckpointError, match=r"default_prompt_name .* is none of its prompts"):
        Embedder(folder)
