"""`BGEEmbedding`: its numbers, its instructions, its configuration. See also tests/contract."""

from __future__ import annotations

import inspect
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.schema import TextNode

from bge_core import (
    ArgumentError,
    BGEError,
    CheckpointError,
    ClosedError,
    Embedder,
    InputTypeError,
    TruncationError,
)
from llamaindex_bge import BGEEmbedding

EN = "Represent this sentence for searching relevant passages: "
ZH = "为这个句子生成表示以用于检索相关文章："
TEXTS = ["Paris is the capital of France.", "大熊猫是中国特有的一种熊科动物。", ""]
QUERY = "where is the capital?"


def close(one: Any, two: Any) -> bool:
    return np.allclose(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fixture", "instruction", "pooling"),
    [
        ("en_folder", EN, "cls"),
        ("zh_folder", ZH, "cls"),
        ("m3_folder", "", "cls"),
        ("bare_en_folder", EN, "cls"),
        ("unknown_folder", "", "mean"),
    ],
)
async def test_vectors_are_those_of_transformers(
    request: pytest.FixtureRequest,
    call: Any,
    reference_embed: Any,
    fixture: str,
    instruction: str,
    pooling: str,
):
    folder = request.getfixturevalue(fixture)
    model = BGEEmbedding(model_name=folder)
    expected = reference_embed(folder, [*TEXTS, f"{instruction}{QUERY}"], pooling=pooling)
    assert close(await call(model, "get_text_embedding_batch", TEXTS), expected[:-1])
    assert close(await call(model, "get_text_embedding", TEXTS[0]), expected[0])
    assert close(await call(model, "get_query_embedding", QUERY), expected[-1])
    assert model.dimension == expected.shape[1]


@pytest.mark.parametrize("instruction", ["", "search: "])
async def test_a_given_instruction_wins(
    en_folder: Path, call: Any, reference_embed: Any, instruction: str
):
    model = BGEEmbedding(model_name=en_folder, query_instruction=instruction)
    expected = reference_embed(en_folder, [f"{instruction}{QUERY}", QUERY])
    assert close(await call(model, "get_query_embedding", QUERY), expected[0])
    assert close(await call(model, "get_text_embedding", QUERY), expected[1])


def test_options_reach_the_model(en_folder: Path, reference_embed: Any):
    text = " ".join(TEXTS)
    options: dict[str, Any] = {"normalize": False, "pooling": "mean", "max_length": 9}
    model = BGEEmbedding(model_name=en_folder, on_truncation="ignore", **options)
    assert close([model.get_text_embedding(text)], reference_embed(en_folder, [text], **options))


def test_task(llm_embedder_folder: Path, reference_embed: Any):
    model = BGEEmbedding(model_name=llm_embedder_folder, task="tool")
    expected = reference_embed(
        llm_embedder_folder,
        [
            f"Transform this user request for fetching helpful tool descriptions: {QUERY}",
            f"Transform this tool description for retrieval: {QUERY}",
        ],
    )
    assert close(model.get_query_embedding(QUERY), expected[0])
    assert close(model.get_text_embedding(QUERY), expected[1])


async def test_many_queries_are_one_batch(en_folder: Path, call: Any, monkeypatch: Any):
    batches = []
    real = Embedder._embed_queries

    def watched(self: Embedder, texts: Any, *given: Any) -> Any:
        batches.append(list(texts))
        return real(self, texts, *given)

    monkeypatch.setattr(Embedder, "_embed_queries", watched)
    model = BGEEmbedding(model_name=en_folder)
    await call(model, "get_agg_embedding_from_queries", ["a", "b", "a", "c"])
    assert batches == [["a", "b", "c"]]


def test_whole_batches_reach_the_core(en_folder: Path, monkeypatch: Any):
    sizes = []
    real = Embedder.embed_documents

    def watched(self: Embedder, texts: Any, **options: Any) -> Any:
        sizes.append(len(texts))
        return real(self, texts, **options)

    monkeypatch.setattr(Embedder, "embed_documents", watched)
    BGEEmbedding(model_name=en_folder).get_text_embedding_batch([f"{n}" for n in range(300)])
    assert sizes == [300]


def test_truncation_is_said(en_folder: Path, caplog: Any):
    model = BGEEmbedding(model_name=en_folder, max_length=5)
    with caplog.at_level(logging.WARNING, logger="bge_core.tokenizer"):
        model.get_text_embedding_batch([*TEXTS, TEXTS[0] + "!"])
    assert len(caplog.records) == 1
    strict = BGEEmbedding(model_name=en_folder, max_length=5, on_truncation="error")
    with pytest.raises(TruncationError):
        strict.get_text_embedding(TEXTS[0])


async def test_bad_input_is_a_sentence(en_folder: Path, call: Any):
    model = BGEEmbedding(model_name=en_folder)
    with pytest.raises(InputTypeError, match=r"texts\[1\] must be a str, got None"):
        await call(model, "get_text_embedding_batch", ["a", None])
    with pytest.raises(InputTypeError, match="must be a str"):
        await call(model, "get_query_embedding", 3)


# Arguments


def test_arguments_are_keywords_but_for_the_model(en_folder: Path):
    with pytest.raises(TypeError):
        BGEEmbedding(en_folder, "cls")
    parameters = inspect.signature(BGEEmbedding).parameters
    assert {"model_name", "query_instruction", "device", "embeddings_cache"} <= parameters.keys()
    model, *others = parameters.values()
    assert (model.name, model.kind) == ("model_name", model.POSITIONAL_OR_KEYWORD)
    assert all(item.kind is item.KEYWORD_ONLY for item in others)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"query_instruct": "x"}, "did you mean 'query_instruction'?"),
        ({"zzz": 1}, "it takes api_key, backend, batch_tokens"),
        ({"text_instruction": "x"}, "documents are embedded as they are"),
        ({"model_kwargs": {"dtype": 1}}, "dtype=..."),
        ({"model": "x"}, "model and model_name are one argument with two names"),
        ({"embed_batch_size": 4096}, "embed_batch_size: input should be less than or equal to"),
        ({"on_truncation": "shout"}, "on_truncation: input should be 'ignore', 'warn' or 'error'"),
        ({"dtype": "float17"}, "dtype='float17' is not supported"),
        ({"use_fp16": True, "dtype": "bfloat16"}, "drop one of the two"),
        ({"pooling": "max"}, "pooling='max' is not supported"),
        ({"max_length": 513}, "max_length=513 is more than the 512 tokens"),
        ({"max_length": 0}, "max_length must be 1 or more"),
        ({"task": "qa"}, "BAAI/llm-embedder only"),
        ({"device": "gpu!"}, "device='gpu!' is no device name"),
    ],
)
def test_refusals_are_sentences(en_folder: Path, arguments: dict[str, Any], said: str):
    with pytest.raises(ArgumentError) as refused:
        BGEEmbedding(model_name=en_folder, **arguments)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, BGEError)
    assert isinstance(refused.value, ValueError)


def test_a_wrong_token_is_not_shown(en_folder: Path):
    with pytest.raises(ArgumentError, match="token: input should be a valid string") as refused:
        BGEEmbedding(model_name=en_folder, token=["hf_secret"])
    assert "hf_secret" not in str(refused.value) + str(refused.value.__cause__)


def test_a_model_is_needed():
    with pytest.raises(ArgumentError, match="model_name is missing"):
        BGEEmbedding()


def test_wrong_models_are_refused(tmp_path: Path, reranker_folder: Path, bare_unknown_folder: Path):
    with pytest.raises(CheckpointError, match="reranker"):
        BGEEmbedding(model_name=reranker_folder)
    with pytest.raises(CheckpointError, match="pooling"):
        BGEEmbedding(model_name=bare_unknown_folder)
    with pytest.raises(CheckpointError, match="BGEReranker"):
        BGEEmbedding(model_name="BAAI/bge-reranker-base")
    with pytest.raises(CheckpointError, match="no folder"):
        BGEEmbedding(model_name=tmp_path / "nothing")
    # As a str it could be a hub id; as a path it can't.
    with pytest.raises(CheckpointError, match="no folder"):
        BGEEmbedding(model_name=Path("acme/nothing"))


def test_paths_and_torch_words_become_plain(en_folder: Path, tmp_path: Path):
    model = BGEEmbedding(
        model_name=en_folder,
        device=torch.device("cpu"),
        dtype=torch.float32,
        cache_folder=tmp_path,
    )
    assert (model.model_name, model.device, model.dtype) == (str(en_folder), "cpu", "float32")
    assert model.cache_folder == str(tmp_path)
    json.loads(model.to_json())
    several = BGEEmbedding(model_name=en_folder, device=[torch.device("cpu"), "cpu"])
    assert several.device == ["cpu", "cpu"]


def test_fields_of_the_model_are_frozen(en_folder: Path):
    model = BGEEmbedding(model_name=en_folder)
    for name, value in {"query_instruction": "", "max_length": 4, "model_name": "x"}.items():
        with pytest.raises(ArgumentError, match=rf"{name} of a BGEEmbedding can't be changed"):
            setattr(model, name, value)
    with pytest.raises(ArgumentError, match="no attribute 'nothing'"):
        model.nothing = 1  # type: ignore[attr-defined]
    model.embed_batch_size = 16
    model.num_workers = 2
    assert (model.embed_batch_size, model.num_workers) == (16, 2)
    with pytest.raises(ArgumentError, match="less than or equal to 2048, got 4096"):
        model.embed_batch_size = 4096


def test_model_copy_is_checked_and_takes_effect(en_folder: Path, reference_embed: Any):
    model = BGEEmbedding(model_name=en_folder, token="hf_x")
    plain = model.model_copy(update={"query_instruction": ""})
    assert close([plain.get_query_embedding(QUERY)], reference_embed(en_folder, [QUERY]))
    assert plain.token.get_secret_value() == "hf_x"
    with pytest.raises(ArgumentError, match="max_length"):
        model.model_copy(update={"max_length": 5000})


# Life of the weights


def test_weights_are_shared_and_closed(en_folder: Path):
    one, two = BGEEmbedding(model_name=en_folder), BGEEmbedding(model_name=en_folder)
    vector = one.get_text_embedding("a")
    two.get_text_embedding("a")
    cores: list[Any] = [one._core, two._core]
    assert cores[0]._model._engine is cores[1]._model._engine
    one.close()
    one.close()
    with pytest.raises(ClosedError):
        one.get_text_embedding("a")
    assert two.get_text_embedding("a") == vector
    with BGEEmbedding(model_name=en_folder) as three:
        three.get_text_embedding("a")
    with pytest.raises(ClosedError):
        three.get_query_embedding("a")


def test_construction_loads_no_weights(en_folder: Path, copy_of: Callable[..., Path]):
    folder = copy_of(en_folder)
    (folder / "model.safetensors").unlink()
    model = BGEEmbedding(model_name=folder)
    assert model.dimension == 32
    with pytest.raises(BGEError):
        model.get_text_embedding("a")


def test_a_pickle_of_a_missing_folder_says_so_when_used(
    en_folder: Path, copy_of: Callable[..., Path]
):
    folder = copy_of(en_folder)
    data = pickle.dumps(BGEEmbedding(model_name=folder))
    shutil.rmtree(folder)
    # Not when it is read: a pool whose workers can't read their task never ends.
    model = pickle.loads(data)
    with pytest.raises(CheckpointError, match="no folder"):
        model.get_text_embedding("a")


# The ingestion cache's key


def key(model: BGEEmbedding) -> str:
    return get_transformation_hash([TextNode(text="a")], model)


def test_key_changes_with_a_folders_content(en_folder: Path, copy_of: Callable[..., Path]):
    folder = copy_of(en_folder)
    before = BGEEmbedding(model_name=folder).to_dict()
    model = BGEEmbedding(model_name=folder)
    old = key(model)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-64:] = bytes(64)
    weights.write_bytes(data)
    retrained = BGEEmbedding(model_name=folder)
    assert key(retrained) != old
    assert retrained.to_dict()["fingerprint"] == retrained.fingerprint != before["fingerprint"]
    # What was saved before is still a configuration.
    assert BGEEmbedding.from_dict(before).to_dict() == retrained.to_dict()


def test_dict_needs_no_download():
    model = BGEEmbedding(model_name="BAAI/bge-small-en-v1.5", device="cpu")
    data = model.to_dict()
    assert (data["fingerprint"], data["computed_dtype"]) == (None, "float32")
    assert BGEEmbedding.from_dict(data).to_dict() == data
    half = model.model_copy(update={"dtype": "bfloat16"})
    assert half.to_dict()["computed_dtype"] == "bfloat16"
    pinned = model.model_copy(update={"revision": "abc"})
    assert len({key(model), key(half), key(pinned)}) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_dict_of_another_machines_device(en_folder: Path):
    data = BGEEmbedding(model_name=en_folder, device="cuda:7").to_dict()
    assert (data["device"], data["fingerprint"], data["computed_dtype"]) == ("cuda:7", None, None)


def test_text_of_the_dict_is_only_what_changes_a_vector(en_folder: Path):
    data = BGEEmbedding(model_name=en_folder, device="cpu").to_dict()
    assert isinstance(data, dict)
    assert json.loads(json.dumps(data))["device"] == data["device"] == "cpu"
    assert "device" not in str(data)
    assert "device" in repr(data)
    assert data["fingerprint"] in str(data)


def test_payload_tells_what_was_asked_for(en_folder: Path):
    payload = BGEEmbedding(model_name=en_folder, device="cpu", token="hf_x").to_payload()
    assert payload == {
        "class_name": "BGEEmbedding",
        "model_name": str(en_folder),
        "embed_batch_size": 2048,
        "query_instruction": None,
        "task_description": None,
        "normalize": True,
        "max_length": None,
        "device": "cpu",
        "dtype": "auto",
    }


@pytest.mark.parametrize("name", ["callback_manager", "embeddings_cache"])
@pytest.mark.parametrize("wrong", [3, "x", {}, object()])
def test_a_service_of_another_kind_is_a_sentence(en_folder, name, wrong):
    with pytest.raises(
        InputTypeError, match=rf"^{name} must be a \w+ or None, got {type(wrong).__name__}"
    ):
        BGEEmbedding(model_name=en_folder, **{name: wrong})
