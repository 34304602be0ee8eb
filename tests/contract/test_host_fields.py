"""What every adapter of both hosts says of its arguments, and when two of them are equal."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import pickle
import pydoc
import re
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

import langchain_bge
import llamaindex_bge
from bge_core import ArgumentError, BGEError, CheckpointError, InputTypeError

ADAPTERS = {
    "BGECrossEncoder": (langchain_bge.BGECrossEncoder, "reranker_folder"),
    "BGEEmbeddings": (langchain_bge.BGEEmbeddings, "en_folder"),
    "langchain BGEReranker": (langchain_bge.BGEReranker, "reranker_folder"),
    "BGESparseEmbeddings": (langchain_bge.BGESparseEmbeddings, "m3_folder"),
    "BGEEmbedding": (llamaindex_bge.BGEEmbedding, "en_folder"),
    "llamaindex BGEReranker": (llamaindex_bge.BGEReranker, "reranker_folder"),
    "BGESparseEmbedding": (llamaindex_bge.BGESparseEmbedding, "m3_folder"),
}


@pytest.fixture(params=ADAPTERS)
def kind(request: pytest.FixtureRequest) -> Any:
    return ADAPTERS[request.param][0]


@pytest.fixture
def folder(request: pytest.FixtureRequest, kind: Any) -> Path:
    fixture = next(fixture for cls, fixture in ADAPTERS.values() if cls is kind)
    found: Path = request.getfixturevalue(fixture)
    return found


def takes_bare(kind: Any) -> bool:
    """Return whether a class takes its model without a name, as the one that it replaces does."""
    return kind is langchain_bge.BGESparseEmbeddings or kind in vars(llamaindex_bge).values()


# The model's two names


@pytest.mark.parametrize("update", ["device", [("device", "cpu")], {1: "cpu"}])
def test_a_copy_s_changes_are_a_mapping_of_arguments(kind: Any, folder: Path, update: Any):
    with pytest.raises(BGEError, match=r"^update must be a mapping|has no argument '1'"):
        kind(model=folder).model_copy(update=update)


@pytest.mark.parametrize("name", ["model", "model_name"])
def test_the_model_has_two_names(kind: Any, folder: Path, name: str):
    for given in (folder, str(folder)):
        adapter = kind(**{name: given})
        assert adapter.model == adapter.model_name == str(folder)
        assert adapter == kind(model=folder)
        with pytest.raises(ArgumentError, match="can't be changed"):
            setattr(adapter, kind._model_field, "another")


def test_one_of_the_names_at_a_time(kind: Any, folder: Path):
    with pytest.raises(ArgumentError, match="one argument with two names: pass one of them"):
        kind(model=folder, model_name=folder)
    with pytest.raises(ArgumentError, match="is missing: pass model") as none:
        kind()
    named = re.search(r"pass (\w+)='([^']+)'", str(none.value))
    assert named
    kind(**{named[1]: named[2]})  # what the sentence says is accepted


@pytest.mark.parametrize("name", ["model", "model_name"])
def test_a_copy_for_another_model(kind: Any, folder: Path, copy_of: Any, name: str):
    other = copy_of(folder)
    changed = kind(model=folder, max_length=16).model_copy(update={name: other})
    assert (changed.model, changed.max_length) == (str(other), 16)


# A subclass


def test_a_subclass_takes_what_it_likes(kind: Any, folder: Path):
    class Own(kind):  # type: ignore[misc]
        colour: str

        def __init__(self, place: Path, colour: str, **arguments: Any) -> None:
            super().__init__(model=place, colour=colour, **arguments)

    own = Own(folder, "red", max_length=16)
    assert (own.model, own.colour, own.max_length) == (str(folder), "red", 16)
    assert list(inspect.signature(Own).parameters)[:2] == ["place", "colour"]


def test_a_subclass_s_own_field_is_missing_under_its_own_name(kind: Any, folder: Path):
    class Own(kind):  # type: ignore[misc]
        colour: str

    with pytest.raises(ArgumentError, match=r"colour is missing: pass colour=\.\.\.\.$"):
        Own(model=folder)
    assert Own(model=folder, colour="red").model_copy().colour == "red"


def test_what_has_no_name_is_asked_for_by_its_name(kind: Any, folder: Path):
    with pytest.raises(InputTypeError, match=r"takes keywords only") as refused:
        kind(str(folder), 512)
    assert ("but for its model" in str(refused.value)) is takes_bare(kind)
    if takes_bare(kind):
        assert kind(str(folder)) == kind(model=folder)


# What an argument is


def test_a_whole_number_is_numpy_s_too_and_a_bool_is_none(kind: Any, folder: Path):
    types = {name: str(field.annotation) for name, field in kind.model_fields.items()}
    numbers = [name for name, of in types.items() if re.search(r"\b(int|float)\b", of)]
    assert {"max_length", "batch_tokens"} <= set(numbers)
    for name in numbers:
        for wrong in (True, np.True_, "1"):
            with pytest.raises(ArgumentError, match=rf"{name}: input should be a valid"):
                kind(model=folder, **{name: wrong})
        given = np.int64(1 if name == "compress_ratio" else 8)
        value, said = None, ""
        try:
            value = getattr(kind(model=folder, **{name: given}), name)
        except ArgumentError as refused:  # of another model, of a server, or out of reach
            said = str(refused)
        assert "input should be" not in said
        assert said or (value, type(value)) == (given, float if "float" in types[name] else int)
        if "float" in types[name]:
            with pytest.raises(ArgumentError, match=rf"{name}: input should be a finite number"):
                kind(model=folder, **{name: 10**400})


def test_a_model_in_place_of_its_name_is_answered_with_the_name(kind: Any, folder: Path):
    for given in (kind(model=folder), kind(model=folder)._core):
        with pytest.raises(InputTypeError, match=f"got {type(given).__name__}: pass") as refused:
            kind(model=given)
        assert repr(str(folder)) in str(refused.value)
    with pytest.raises(InputTypeError, match=r"got int: pass an id such as 'BAAI/"):
        kind(model=5)


def test_help_has_a_sentence_for_every_argument(kind: Any):
    parameters = inspect.signature(kind).parameters
    assert parameters.keys() == kind.model_fields.keys()
    assert next(iter(parameters)) == kind._model_field
    model, *others = parameters.values()
    assert model.kind is (model.POSITIONAL_OR_KEYWORD if takes_bare(kind) else model.KEYWORD_ONLY)
    assert all(item.kind is item.KEYWORD_ONLY for item in others)
    assert parameters["max_length"].default is None
    shown = pydoc.plain(pydoc.render_doc(kind))
    assert "use_fp16: bool | None = None" in shown
    arguments = (inspect.getdoc(kind) or "").partition("Args:")[2].partition("Raises:")[0]
    said = dict(line.strip().split(": ", 1) for line in arguments.splitlines() if line[4:5].strip())
    assert said.keys() == kind.model_fields.keys()
    assert all(len(sentence.split()) >= 3 for sentence in said.values())
    schema = kind.model_fields["device"].description
    assert said["device"].startswith(schema[:40])


def test_secrets_are_secret_on_both_hosts(kind: Any, folder: Path):
    adapter = kind(model=folder, token="hf_secret")
    assert adapter.token == SecretStr("hf_secret")
    assert kind(model=folder, token=SecretStr("hf_secret")) == adapter
    for shown in (repr(adapter), str(adapter), adapter.model_dump_json(), str(vars(adapter))):
        assert "hf_secret" not in shown
    assert "token" not in adapter.model_dump()
    for again in (copy.copy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert again.token.get_secret_value() == "hf_secret"


def test_a_refusal_is_the_sentence_alone(kind: Any, folder: Path):
    for wrong in ({"on_truncation": "shout"}, {"max_length": "many"}, {"nonsense": 1}):
        with pytest.raises(BGEError) as caught:
            kind(model=folder, **wrong)
        assert "\n" not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("word", ["false", "no", "true", 0, 1, "1"])
def test_a_flag_is_a_bool_and_a_count_is_a_number(kind: Any, folder: Path, word: Any):
    """A word from the environment is refused: "no" would not have meant no everywhere."""
    flags = [name for name, field in kind.model_fields.items() if field.annotation is bool]
    assert "trust_remote_code" in flags
    for name in (*flags, "use_fp16"):
        with pytest.raises(ArgumentError, match=f"{name}: input should be a valid boolean"):
            kind(model=folder, **{name: word})
    for name in ("max_length", "batch_tokens"):
        with pytest.raises(ArgumentError, match=f"{name}: input should be a valid integer"):
            kind(model=folder, **{name: bool(word)})


def test_a_missing_model_is_the_sentence_alone(kind: Any, caplog: Any):
    adapter = kind(model="acme/nowhere")
    caplog.set_level(logging.DEBUG, logger="bge_core")
    with pytest.raises(CheckpointError, match="can't be found") as caught:
        _ = adapter.fingerprint
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    told = "".join(traceback.format_exception(caught.value))
    assert "huggingface_hub" not in told
    assert told.count("Traceback") == 1
    # What the hub's client said is for whoever looks further.
    (record,) = [item for item in caplog.records if item.name == "bge_core.checkpoints.source"]
    assert record.levelno == logging.DEBUG
    assert record.exc_info


# Equality


def test_equal_by_configuration(kind: Any, folder: Path):
    one = kind(model=folder, max_length=16, device="cpu")
    two = kind(model_name=str(folder), max_length=16, device="cpu")
    assert one == two
    assert hash(one) == hash(two)
    assert {one: "found"}[two] == "found"
    for again in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert again == one
        assert hash(again) == hash(one)
    others = [
        kind(model=folder, max_length=17, device="cpu"),
        kind(model=folder, max_length=16),
        kind(model=folder, max_length=16, device="cpu", token="hf_x"),
        kind(model=folder, max_length=16, device="cpu", revision="main"),
    ]
    assert one not in others
    assert one != 3


def test_use_changes_no_equality(kind: Any, folder: Path):
    used, fresh = kind(model=folder), kind(model=folder)
    before = hash(used)
    _ = used.fingerprint
    used.close()
    assert used == fresh
    assert hash(used) == hash(fresh) == before


def test_what_can_be_changed_is_compared_and_not_hashed(reranker_folder: Path):
    for kind in (langchain_bge.BGEReranker, llamaindex_bge.BGEReranker):
        one, two = kind(model=reranker_folder), kind(model=reranker_folder)
        held = {one}
        one.top_n = 7
        assert one != two
        assert one in held


def test_the_words_of_an_option_do_not_count(en_folder: Path):
    kind = langchain_bge.BGEEmbeddings
    assert kind(model=en_folder, model_kwargs={"device": "cpu"}) == kind(
        model=en_folder, device="cpu", encode_kwargs={"batch_size": 8}
    )


def test_a_host_s_services_do_not_count(en_folder: Path):
    from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
    from llama_index.core.storage.kvstore import SimpleKVStore

    one = llamaindex_bge.BGEEmbedding(model=en_folder)
    two = llamaindex_bge.BGEEmbedding(
        model=en_folder,
        embeddings_cache=SimpleKVStore(),
        callback_manager=CallbackManager([LlamaDebugHandler(print_trace_on_end=False)]),
    )
    assert one == two
    assert copy.copy(two).embeddings_cache is two.embeddings_cache
    assert one != llamaindex_bge.BGEEmbedding(model=en_folder, num_workers=2)


def test_classes_of_two_hosts_are_never_equal(reranker_folder: Path):
    ours = langchain_bge.BGEReranker(model=reranker_folder)
    assert ours != llamaindex_bge.BGEReranker(model=reranker_folder)
    assert ours != langchain_bge.BGECrossEncoder(model=reranker_folder)


def test_dumps_hold_what_was_said(kind: Any, folder: Path):
    adapter = kind(model=folder, cache_folder=folder.parent, max_length=16)
    data = json.loads(adapter.model_dump_json())
    assert data[kind._model_field] == str(folder)
    assert data["cache_folder"] == str(folder.parent)
    data.pop("class_name", None)
    assert kind(**data) == adapter


# What is in effect


EN = "Represent this sentence for searching relevant passages: "


@pytest.mark.parametrize(
    "kind", [langchain_bge.BGEEmbeddings, llamaindex_bge.BGEEmbedding], ids=["lc", "li"]
)
def test_resolved_is_what_is_in_effect(kind: Any, en_folder: Path, llm_embedder_folder: Path):
    with kind(model=en_folder, device="cpu") as adapter:
        assert (adapter.query_instruction, adapter.max_length) == (None, None)
        found = adapter.resolved
        assert (found.query_instruction, found.document_instruction) == (EN, "")
        assert (found.max_length, found.dimension, found.pooling) == (512, 32, "cls")
        assert (found.device, found.dtype, found.backend) == (("cpu",), "float32", "torch")
    given = kind(
        model=en_folder,
        query_instruction="",
        max_length=16,
        pooling="mean",
        dtype="bfloat16",
        device=["cpu", "cpu"],
    ).resolved
    assert (given.query_instruction, given.max_length, given.pooling) == ("", 16, "mean")
    assert (given.device, given.dtype) == (("cpu", "cpu"), "bfloat16")
    task = kind(model=llm_embedder_folder, task="tool").resolved
    assert task.query_instruction == (
        "Transform this user request for fetching helpful tool descriptions: "
    )
    assert task.document_instruction == "Transform this tool description for retrieval: "


def test_resolved_of_every_class(kind: Any, folder: Path):
    found = kind(model=folder, device="cpu").resolved
    most = 8192 if "m3" in folder.name else 512
    assert (found.device, found.dtype, found.max_length) == (("cpu",), "float32", most)
    if "Embedding" in kind.__name__:
        assert found.query_instruction is not None
        assert found.dimension == 32
    else:
        assert (found.query_instruction, found.dimension, found.pooling) == (None, None, None)


@pytest.mark.parametrize(
    "kind", [langchain_bge.BGEEmbeddings, llamaindex_bge.BGEEmbedding], ids=["lc", "li"]
)
def test_resolved_of_a_server_asks_nobody(kind: Any):
    found = kind(model="BAAI/bge-small-en-v1.5", endpoint="http://localhost:1").resolved
    assert (found.query_instruction, found.dimension, found.max_length) == (EN, 384, 512)
    assert (found.device, found.dtype, found.backend) == ((), "unknown", "server")
