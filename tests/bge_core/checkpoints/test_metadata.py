"""What is read of a folder or a hub id, and what is refused."""

import contextlib
import json
import logging
import shutil

import numpy as np
import pytest

from bge_core import ArgumentError, BGEError, CheckpointError, Embedder, InputTypeError, Reranker

EN = "Represent this sentence for searching relevant passages: "
ZH = "为这个句子生成表示以用于检索相关文章："
COMMIT = "5c38ec7c405ec4b44b94cc5a9bb96e735b38267a"
TEXTS = ["Paris is in France.", "A cat sat on the mat.", "巴黎是法国的首都"]


def edit(path, **changes):
    """Change a JSON file's keys; None takes a key away."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {name: item for name, item in value.items() if item is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


@pytest.fixture
def hub_cache(tmp_path):
    """Lay a checkpoint out as the hub's cache does: `hub_cache(folder, id)` -> the snapshot."""

    def prepack_linear_weights(folder, name, *, revision="main"):
        home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = shutil.copytree(folder, home / "snapshots" / COMMIT)
        (home / "refs").mkdir()
        (home / "refs" / revision).write_text(COMMIT)
        return snapshot

    return prepack_linear_weights


# Which instruction.


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("bge-small-en-v1.5", EN),
        ("bge-base-zh", ZH),
        ("bge-m3", ""),
        ("bge-large-zh-noinstruct", ""),
        ("run/bge-small-en-v1.5/checkpoint-500", EN),
        (f"models--BAAI--bge-small-en-v1.5/snapshots/{COMMIT}", EN),
        (f"models--BAAI--bge-large-zh-v1.5/snapshots/{COMMIT}", ZH),
        ("my-bge-small-en-v1.5", ""),
        ("bge-small-en-v1.5-tuned/checkpoint-500", ""),
        ("bge-small-en-v1.5/other", ""),
    ],
)
def test_a_folder_gets_the_instruction_of_its_whole_name(
    bare_unknown_folder, copy_of, name, instruction
):
    folder = copy_of(bare_unknown_folder, name)
    assert Embedder(folder, pooling="cls").query_instruction == instruction
    assert Embedder(str(folder), pooling="cls").query_instruction == instruction


@pytest.mark.parametrize(
    ("known_as", "instruction"),
    [
        ("BAAI/bge-small-zh-v1.5", ZH),
        ("/home/me/bge-small-en-v1.5", EN),
        ("/runs/bge-small-en/checkpoint-10", EN),
        ("acme/encoder", ""),
        ("", ""),
    ],
)
def test_a_renamed_folder_is_known_by_its_config(
    bare_unknown_folder, copy_of, known_as, instruction
):
    folder = copy_of(bare_unknown_folder)
    edit(folder / "config.json", _name_or_path=known_as)
    assert Embedder(folder, pooling="cls").query_instruction == instruction


def test_the_folder_s_name_comes_before_its_config(bare_en_folder, copy_of):
    folder = copy_of(bare_en_folder)
    edit(folder / "config.json", _name_or_path="BAAI/bge-small-zh-v1.5")
    assert Embedder(folder).query_instruction == EN


def test_the_table_comes_before_a_prompt_of_the_checkpoint(prompt_folder, copy_of):
    assert Embedder(copy_of(prompt_folder, "bge-small-en-v1.5")).query_instruction == EN


def test_the_checkpoint_s_own_query_prompt_is_used(prompt_folder, caplog):
    assert Embedder(prompt_folder).query_instruction == "query: "
    assert not caplog.records


def test_a_relative_folder_is_known_as_an_absolute_one_is(bare_en_folder, copy_of, monkeypatch):
    folder = copy_of(bare_en_folder, "bge-small-en-v1.5/checkpoint-500")
    monkeypatch.chdir(folder)
    assert Embedder(".").query_instruction == EN
    monkeypatch.chdir(folder.parent)
    assert Embedder("checkpoint-500").query_instruction == EN


@pytest.mark.parametrize("given", ["", "find: ", "  ", "{query}"])
@pytest.mark.parametrize("model", ["en_folder", "prompt_folder", "unknown_folder", "m3_folder"])
def test_a_given_instruction_always_wins(request, model, given, caplog):
    folder = request.getfixturevalue(model)
    assert Embedder(folder, query_instruction=given).query_instruction == given
    assert not caplog.records


@pytest.mark.parametrize("given", [b"find: ", 1, ["find: "]])
def test_an_instruction_is_a_str(en_folder, given):
    with pytest.raises(InputTypeError, match="query_instruction"):
        Embedder(en_folder, query_instruction=given)


async def test_no_instruction_is_said_once_with_the_way_out(unknown_folder, copy_of, call, caplog):
    caplog.set_level(logging.WARNING)
    folder = copy_of(unknown_folder)
    with Embedder(folder) as embedder:
        for _ in range(3):
            await call(embedder, "embed_queries", ["where?"])
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("bge_core.embedder", logging.WARNING)
    assert str(folder) in record.getMessage()
    assert "query_instruction=" in record.getMessage()


def test_no_instruction_is_said_once_a_model_however_many_embedders(
    unknown_folder, copy_of, caplog
):
    folder = copy_of(unknown_folder)
    for _ in range(3):
        assert Embedder(folder).query_instruction == ""
    assert len(caplog.records) == 1


@pytest.mark.parametrize("model", ["en_folder", "m3_folder", "bare_en_folder", "prompt_folder"])
def test_a_known_instruction_or_a_known_lack_of_one_is_not_worth_a_warning(request, model, caplog):
    with Embedder(request.getfixturevalue(model)) as embedder:
        embedder.embed_queries(["where?"])
    assert not caplog.records


# Which pooling.


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_a_bare_unknown_folder_is_served_with_a_pooling(
    bare_unknown_folder, reference_embed, pooling
):
    with Embedder(bare_unknown_folder, pooling=pooling, query_instruction="") as embedder:
        vectors = embedder.embed_documents(TEXTS)
    expected = reference_embed(bare_unknown_folder, TEXTS, pooling=pooling)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_a_bare_unknown_folder_is_refused_at_once_with_the_two_ways_out(bare_unknown_folder):
    with pytest.raises(CheckpointError, match=r"pooling='cls', 'mean' or 'last'") as caught:
        Embedder(bare_unknown_folder)
    assert "sentence-transformers" in str(caught.value)
    assert str(bare_unknown_folder) in str(caught.value)


def test_a_bare_bge_folder_gets_cls(bare_en_folder, reference_embed):
    with Embedder(bare_en_folder) as embedder:
        vectors = embedder.embed_documents(TEXTS)
    np.testing.assert_allclose(vectors, reference_embed(bare_en_folder, TEXTS), atol=1e-5)


def test_the_checkpoint_s_pooling_comes_before_the_table_s(unknown_folder, copy_of):
    mean = copy_of(unknown_folder, "bge-small-en-v1.5")
    with Embedder(mean) as known, Embedder(unknown_folder, query_instruction="") as unknown:
        np.testing.assert_array_equal(known.embed_documents(TEXTS), unknown.embed_documents(TEXTS))


def test_a_given_pooling_comes_before_the_checkpoint_s(en_folder, reference_embed):
    with Embedder(en_folder, pooling="mean") as embedder:
        vectors = embedder.embed_documents(TEXTS)
    expected = reference_embed(en_folder, TEXTS, pooling="mean")
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "CLS", "", "mean "])
def test_an_unknown_pooling_is_refused(en_folder, pooling):
    with pytest.raises(ArgumentError, match="pooling"):
        Embedder(en_folder, pooling=pooling)


def test_the_newer_spelling_of_a_pooling_config_is_read(unknown_folder, copy_of, reference_embed):
    folder = copy_of(unknown_folder)
    config = {"word_embedding_dimension": 32, "pooling_mode": "lasttoken"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with Embedder(folder, query_instruction="") as embedder:
        vectors = embedder.embed_documents(TEXTS)
    np.testing.assert_allclose(vectors, reference_embed(folder, TEXTS, pooling="last"), atol=1e-5)


def test_lower_casing_that_the_checkpoint_asks_for_is_done(m3_folder, copy_of, reference_embed):
    folder = copy_of(m3_folder)
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    with Embedder(folder) as embedder:
        vectors = embedder.embed_documents(["PARIS and Berlin"])
    expected = reference_embed(folder, ["paris and berlin"])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_the_checkpoint_s_own_length_is_the_default(unknown_folder, copy_of, stand_in_folder):
    folder = copy_of(unknown_folder)
    edit(folder / "sentence_bert_config.json", max_seq_length=40)
    assert Embedder(folder).max_length == 40
    assert Embedder(folder, max_length=300).max_length == 300
    assert Embedder(stand_in_folder).max_length == 256


# Modules beyond transformer, pooling, normalise: sentence-transformers is the reference.


@pytest.fixture
def by_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    def embed(folder):
        return SentenceTransformer(str(folder), device="cpu").encode(TEXTS, batch_size=1)

    return embed


def test_a_plain_checkpoint_agrees_with_sentence_transformers(en_folder, by_sentence_transformers):
    with Embedder(en_folder) as embedder:
        vectors = embedder.embed_documents(TEXTS)
    np.testing.assert_allclose(vectors, by_sentence_transformers(en_folder), atol=1e-5)


@pytest.mark.parametrize("modes", [("max",), ("cls", "mean")])
async def test_other_poolings_are_left_to_sentence_transformers(
    unknown_folder, copy_of, call, by_sentence_transformers, modes
):
    folder = copy_of(unknown_folder)
    keys = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    flags = {f"pooling_mode_{key}": mode in modes for mode, key in keys.items()}
    edit(folder / "1_Pooling" / "config.json", **flags)
    with Embedder(folder, normalize=False, query_instruction="") as embedder:
        vectors = await call(embedder, "embed_documents", TEXTS)
        assert embedder.dimension == vectors.shape[1] == 32 * len(modes)
        assert (await call(embedder, "embed_documents", [])).shape == (0, 32 * len(modes))
    np.testing.assert_allclose(vectors, by_sentence_transformers(folder), atol=1e-5)


def test_sentence_transformers_prints_nothing_either(unknown_folder, copy_of, capfd):
    folder = copy_of(unknown_folder)
    edit(folder / "1_Pooling" / "config.json", pooling_mode_max_tokens=True)
    with Embedder(folder, query_instruction="") as embedder:
        embedder.embed_documents(TEXTS)
    assert capfd.readouterr() == ("", "")


async def test_a_dense_module_is_run(unknown_folder, copy_of, call, by_sentence_transformers):
    from safetensors.numpy import save_file

    folder = copy_of(unknown_folder)
    listed = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*listed, dense]))
    (folder / "2_Dense").mkdir()
    config = {
        "in_features": 32,
        "out_features": 8,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    numbers = np.random.default_rng(1)
    weights = {
        "linear.weight": numbers.normal(size=(8, 32)).astype(np.float32),
        "linear.bias": numbers.normal(size=8).astype(np.float32),
    }
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    with Embedder(folder, normalize=False, query_instruction="") as embedder:
        vectors = await call(embedder, "embed_documents", TEXTS)
        assert embedder.dimension == 8
    np.testing.assert_allclose(vectors, by_sentence_transformers(folder), atol=1e-5)


# What is refused.


@pytest.mark.parametrize("cls", [Embedder, Reranker])
@pytest.mark.parametrize("name", ["/no/such/folder", "no/such/sub/folder", "C:\\nothing", "?"])
def test_a_folder_that_is_not_there_is_refused_at_once(cls, name):
    with pytest.raises(CheckpointError, match="no folder"):
        cls(name)


def test_an_empty_name_is_not_the_current_folder(en_folder, monkeypatch):
    monkeypatch.chdir(en_folder)
    with pytest.raises(BGEError, match="model=''"):
        Embedder("")


def test_a_path_that_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        Embedder(tmp_path / "nothing")


@pytest.mark.parametrize("model", [None, 7, b"BAAI/bge-m3", ["BAAI/bge-m3"]])
def test_a_model_is_a_str_or_a_path(model):
    with pytest.raises(InputTypeError, match="model must be"):
        Embedder(model)


@pytest.mark.parametrize("damage", ["{", "", "[]", "{}", "\x00\xff"])
def test_a_missing_or_damaged_config_is_refused_at_once(en_folder, copy_of, damage):
    folder = copy_of(en_folder)
    (folder / "config.json").write_text(damage, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Embedder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Embedder(folder)


def test_an_empty_folder_is_refused_at_once(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Reranker(tmp_path)


@pytest.mark.parametrize(
    "path", ["../elsewhere", "/etc", "1_Pooling/../../x", "..\\x", "C:\\x", "C:/x", "\\\\host\\x"]
)
def test_a_module_s_path_may_not_leave_the_folder(en_folder, copy_of, path):
    folder = copy_of(en_folder)
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        Embedder(folder)


@pytest.mark.parametrize(
    "damage", ["{", "[]", "{}", "[1]", '[{"path": 3, "type": 4}]', '{"a": 1}', "null"]
)
def test_damaged_modules_are_refused(en_folder, copy_of, damage):
    folder = copy_of(en_folder)
    (folder / "modules.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        Embedder(folder)


@pytest.mark.parametrize("damage", [None, "{", "{}"])
def test_modules_without_a_pooling_config_are_refused(en_folder, copy_of, damage):
    folder = copy_of(en_folder)
    if damage is None:
        (folder / "1_Pooling" / "config.json").unlink()
    else:
        (folder / "1_Pooling" / "config.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"1_Pooling|pooling"):
        Embedder(folder)


@pytest.mark.parametrize("prompts", [["query: "], "query: ", {"query": None}, {"query": 3}])
def test_damaged_prompts_are_refused_or_of_no_effect(prompt_folder, copy_of, prompts):
    folder = copy_of(prompt_folder)
    edit(folder / "config_sentence_transformers.json", prompts=prompts)
    with contextlib.suppress(CheckpointError):
        assert Embedder(folder).query_instruction == ""


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"max_position_embeddings": "many"}),
        ("config.json", {"hidden_size": [32]}),
        ("config.json", {"architectures": 7}),
        ("sentence_bert_config.json", {"max_seq_length": "long"}),
        ("tokenizer_config.json", {"model_max_length": "long"}),
    ],
)
def test_a_number_that_is_none_is_refused_in_a_sentence(en_folder, copy_of, file, changes):
    folder = copy_of(en_folder)
    edit(folder / file, **changes)
    with pytest.raises(CheckpointError):
        Embedder(folder)


@pytest.mark.parametrize("wrong", [[], {}, None, 1])
def test_classes_that_have_no_names_are_nobodys(en_folder, copy_of, wrong):
    folder = copy_of(en_folder)
    edit(folder / "config.json", architectures=[wrong])
    assert Embedder(folder).dimension == Embedder(en_folder).dimension
    with pytest.raises(CheckpointError, match="is an embedding model"):
        Reranker(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, 20_000])
def test_damaged_weights_are_refused_at_first_use(en_folder, copy_of, kept):
    folder = copy_of(en_folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    embedder = Embedder(folder)
    with pytest.raises(CheckpointError, match=r"weights.*damaged"):
        embedder.embed_queries(["where?"])


def test_missing_weights_are_refused(en_folder, copy_of):
    folder = copy_of(en_folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights.*model\.safetensors"):
        Embedder(folder).embed_queries(["where?"])


def test_weights_of_another_shape_are_refused(en_folder, copy_of):
    folder = copy_of(en_folder)
    edit(folder / "config.json", intermediate_size=128)
    with pytest.raises(CheckpointError, match="weights"):
        Embedder(folder).embed_queries(["where?"])


def test_tensors_that_are_missing_are_never_made_up(en_folder, reranker_folder, copy_of):
    from safetensors.numpy import load_file, save_file

    for source, lost, cls in (
        (en_folder, "encoder.layer.1.output.dense.weight", Embedder),
        (reranker_folder, "classifier.out_proj.weight", Reranker),
    ):
        folder = copy_of(source)
        tensors = load_file(folder / "model.safetensors")
        (name,) = (name for name in tensors if name.endswith(lost))
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=lost):
            _use(cls(folder))


def _use(model):
    if isinstance(model, Embedder):
        return model.embed_documents(["where?"])
    return model.score("where?", ["there"])


def test_a_pooler_that_was_not_saved_is_no_loss(en_folder, copy_of, reference_embed):
    from safetensors.numpy import load_file, save_file

    folder = copy_of(en_folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "pooler" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with Embedder(folder) as embedder:
        vectors = embedder.embed_documents(TEXTS)
    np.testing.assert_allclose(vectors, reference_embed(en_folder, TEXTS), atol=1e-5)


def test_older_weights_are_read_where_there_is_no_safetensors(en_folder, copy_of, reference_embed):
    import torch
    from safetensors.torch import load_file

    folder = copy_of(en_folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with Embedder(folder) as embedder:
        vectors = embedder.embed_documents(TEXTS)
    np.testing.assert_allclose(vectors, reference_embed(en_folder, TEXTS), atol=1e-5)


def test_safetensors_come_before_older_weights(en_folder, copy_of, reference_embed):
    folder = copy_of(en_folder)
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with Embedder(folder) as embedder:
        vectors = embedder.embed_documents(TEXTS)
    np.testing.assert_allclose(vectors, reference_embed(en_folder, TEXTS), atol=1e-5)


def test_a_missing_tokenizer_is_refused(en_folder, copy_of):
    folder = copy_of(en_folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink(missing_ok=True)  # transformers 4 writes both
    with pytest.raises(CheckpointError, match=r"no tokenizer.*tokenizer\.json"):
        Embedder(folder).embed_queries(["where?"])


@pytest.mark.parametrize("damage", ["{", "{}", ""])
def test_a_damaged_tokenizer_is_refused(en_folder, copy_of, damage):
    folder = copy_of(en_folder)
    (folder / "tokenizer.json").write_text(damage)
    with pytest.raises(CheckpointError, match="tokenizer"):
        Embedder(folder).embed_queries(["where?"])


@pytest.fixture
def folder_with_code(en_folder, copy_of):
    """A checkpoint whose classes are in a file of its own, which leaves a mark when it runs."""
    folder = copy_of(en_folder)
    (folder / "own_code.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(folder / 'it_ran')!r}).touch()\n"
        "from transformers import BertConfig, BertModel, BertTokenizerFast\n"
        "class Config(BertConfig): model_type = 'own-code'\n"
        "class Model(BertModel): config_class = Config\n"
        "class Tokenizer(BertTokenizerFast): pass\n"
    )
    classes = {"AutoConfig": "own_code.Config", "AutoModel": "own_code.Model"}
    edit(folder / "config.json", model_type="own-code", auto_map=classes)
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": [None, "own_code.Tokenizer"]},
    )
    return folder


def test_code_that_a_checkpoint_carries_is_not_run_nor_asked_about(folder_with_code, capfd):
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        Embedder(folder_with_code).embed_queries(["where?"])
    assert not (folder_with_code / "it_ran").exists()
    assert "Do you wish to run" not in capfd.readouterr().out


def test_code_that_a_checkpoint_carries_is_run_where_it_is_trusted(
    folder_with_code, en_folder, reference_embed
):
    with Embedder(folder_with_code, trust_remote_code=True) as embedder:
        vectors = embedder.embed_documents(TEXTS)
    assert (folder_with_code / "it_ran").exists()
    np.testing.assert_allclose(vectors, reference_embed(en_folder, TEXTS), atol=1e-5)


@pytest.mark.parametrize("model", ["reranker_folder", "bert_reranker_folder", "two_label_folder"])
def test_a_reranker_is_no_embedder(request, model):
    with pytest.raises(CheckpointError, match="reranker"):
        Embedder(request.getfixturevalue(model))


@pytest.mark.parametrize("model", ["en_folder", "m3_folder", "unknown_folder", "stand_in_folder"])
def test_an_embedder_is_no_reranker(request, model):
    with pytest.raises(CheckpointError, match="embedding"):
        Reranker(request.getfixturevalue(model))


def test_two_labels_are_no_reranker(two_label_folder):
    with pytest.raises(CheckpointError, match="2 labels"):
        Reranker(two_label_folder)


@pytest.mark.parametrize(
    ("cls", "name", "said"),
    [
        (Embedder, "BAAI/bge-reranker-base", "reranker"),
        (Reranker, "BAAI/bge-m3", "embedding"),
        (Embedder, "BAAI/bge-reranker-v2-gemma", "reranker"),
        (Reranker, "BAAI/bge-en-icl", "embedding"),
        (Embedder, "BAAI/bge-m3-retromae", "similarity"),
    ],
)
def test_a_hub_id_that_can_t_be_served_is_refused_by_name_before_any_download(cls, name, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        cls(name)
    assert name in str(caught.value)


def test_a_folder_that_can_t_be_served_is_refused_by_name(en_folder, copy_of):
    with pytest.raises(CheckpointError, match="similarity"):
        Embedder(copy_of(en_folder, "bge-m3-retromae"))


# The hub.


def test_a_hub_id_is_known_without_its_files():
    embedder = Embedder("BAAI/bge-small-zh-v1.5", local_files_only=True)
    assert embedder.query_instruction == ZH


def test_a_hub_id_s_length_is_checked_without_its_files():
    with pytest.raises(ArgumentError, match="max_length=513"):
        Embedder("BAAI/bge-small-zh-v1.5", max_length=513)


def test_the_offline_cache_is_used(en_folder, hub_cache, tmp_path, reference_embed):
    hub_cache(en_folder, "BAAI/bge-small-en-v1.5")
    with Embedder(
        "BAAI/bge-small-en-v1.5", cache_folder=tmp_path / "hub", local_files_only=True
    ) as embedder:
        documents, queries = embedder.embed_documents(TEXTS), embedder.embed_queries(TEXTS)
    np.testing.assert_allclose(documents, reference_embed(en_folder, TEXTS), atol=1e-5)
    asked = reference_embed(en_folder, [EN + text for text in TEXTS])
    np.testing.assert_allclose(queries, asked, atol=1e-5)


async def test_an_unknown_id_in_the_cache_is_read(unknown_folder, hub_cache, tmp_path, call):
    hub_cache(unknown_folder, "acme/encoder")
    with (
        Embedder("acme/encoder", cache_folder=str(tmp_path / "hub")) as embedder,
        Embedder(unknown_folder) as local,
    ):
        vectors = await call(embedder, "embed_queries", TEXTS)
        np.testing.assert_array_equal(vectors, local.embed_queries(TEXTS))


async def test_the_hub_is_never_asked_on_the_event_loop_s_thread(
    unknown_folder, hub_cache, tmp_path, monkeypatch
):
    import threading

    import huggingface_hub

    hub_cache(unknown_folder, "acme/encoder")
    threads = []
    ask = huggingface_hub.snapshot_download

    def remember(*args, **options):
        threads.append(threading.current_thread())
        return ask(*args, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", remember)
    for method in ("aembed_queries", "aembed_documents"):
        with Embedder("acme/encoder", cache_folder=tmp_path / "hub") as embedder:
            await getattr(embedder, method)(TEXTS)
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("revision", ["v2", COMMIT])
def test_a_revision_reaches_the_loader(en_folder, hub_cache, tmp_path, revision):
    hub_cache(en_folder, "BAAI/bge-small-en-v1.5", revision="v2")
    options = {"cache_folder": tmp_path / "hub", "local_files_only": True}
    with Embedder("BAAI/bge-small-en-v1.5", revision=revision, **options) as embedder:
        assert embedder.embed_documents(TEXTS).shape == (3, 32)
    with pytest.raises(CheckpointError, match="revision"):
        Embedder("BAAI/bge-small-en-v1.5", **options).embed_documents(TEXTS)


def test_a_snapshot_s_path_is_known_by_its_model(zh_folder, hub_cache):
    snapshot = hub_cache(zh_folder, "BAAI/bge-small-zh-v1.5")
    assert Embedder(snapshot).query_instruction == ZH


def test_a_hub_id_and_its_snapshot_have_one_fingerprint(en_folder, hub_cache, tmp_path):
    snapshot = hub_cache(en_folder, "BAAI/bge-small-en-v1.5")
    by_id = Embedder("BAAI/bge-small-en-v1.5", cache_folder=tmp_path / "hub")
    assert by_id.fingerprint == Embedder(snapshot).fingerprint == Embedder(en_folder).fingerprint


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("cls", [Embedder, Reranker])
def test_an_id_that_can_t_be_had_is_a_sentence(cls, tmp_path, local):
    name = "acme/encoder"
    model = cls(name, cache_folder=tmp_path / "hub", local_files_only=local)
    with pytest.raises(CheckpointError, match=r"acme/encoder.*can't be found") as caught:
        _use(model)
    assert str(tmp_path / "hub") in str(caught.value)
    assert ("local_files_only=True" in str(caught.value)) == local
    assert ("leave local_files_only out" in str(caught.value)) == local


def test_a_token_is_in_no_message_and_no_repr(tmp_path):
    embedder = Embedder("acme/encoder", cache_folder=tmp_path, token="hf_secret")
    with pytest.raises(CheckpointError) as caught:
        embedder.embed_queries(["where?"])
    assert "hf_secret" not in str(caught.value) + repr(embedder)
