"""Checkpoints that a user makes known by name."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from bge_core import (
    ArgumentError,
    CheckpointError,
    Embedder,
    InputTypeError,
    Profile,
    RemoteEmbedder,
    Reranker,
    doctor,
    register,
    supported_models,
)
from bge_core.checkpoints.catalog import PROFILES, TaskInstruction, find_profile
from langchain_bge import BGEEmbeddings
from llamaindex_bge import BGEEmbedding

TEXTS = ["Paris is in France.", "A cat sat on the mat."]


def row(**values: Any) -> Profile:
    known = {
        "id": "acme/search",
        "kind": "embedder",
        "family": "bert",
        "max_length": 64,
        "pooling": "mean",
        "query_instruction": "find: ",
    }
    return Profile(**(known | values))


def test_a_registered_folder_gets_its_instruction_pooling_and_limit(
    bare_unknown_folder, copy_of, reference_embed
):
    register(row())
    folder = copy_of(bare_unknown_folder, "search")
    with Embedder(folder, max_length=None) as embedder:
        assert embedder.query_instruction == "find: "
        assert embedder.max_length == 64
        queries, documents = embedder.embed_queries(TEXTS), embedder.embed_documents(TEXTS)
    asked = [f"find: {text}" for text in TEXTS]
    np.testing.assert_allclose(queries, reference_embed(folder, asked, "mean"), atol=1e-5)
    np.testing.assert_allclose(documents, reference_embed(folder, TEXTS, "mean"), atol=1e-5)
    with pytest.raises(ArgumentError, match="65 is more than the 64"):
        Embedder(folder, max_length=65)


@pytest.mark.parametrize(
    "name",
    [
        "acme/search",
        "ACME/Search",
        "mirror/search",
        "search",
        "/models/search",
        "/runs/search/checkpoint-500",
        "/hub/models--acme--search/snapshots/5c38ec7c405ec4b44b94cc5a9bb96e735b38267a",
    ],
)
def test_a_registered_name_is_found_as_a_published_one_is(name):
    assert find_profile(name) is None
    register(row())
    assert find_profile(name) == PROFILES["acme/search"] == row()


def test_a_name_without_an_organisation_can_be_registered(bare_unknown_folder, copy_of):
    register(row(id="search.v2"))
    assert Embedder("search.v2").query_instruction == "find: "
    assert Embedder(copy_of(bare_unknown_folder, "search.v2")).query_instruction == "find: "


def test_both_hosts_a_server_s_client_and_the_doctor_know_it(bare_unknown_folder, copy_of, capsys):
    register(row(licence="apache-2.0", licence_note="Ask first."))
    folder = copy_of(bare_unknown_folder, "search")
    expected = Embedder(folder).embed_queries(TEXTS)
    langchain, llamaindex = BGEEmbeddings(model=str(folder)), BGEEmbedding(model_name=str(folder))
    np.testing.assert_allclose(langchain.embed_query(TEXTS[0]), expected[0], atol=1e-6)
    np.testing.assert_allclose(llamaindex.get_query_embedding(TEXTS[0]), expected[0], atol=1e-6)
    assert (
        RemoteEmbedder("acme/search", endpoint="http://localhost:9").query_instruction == "find: "
    )
    assert doctor.main([str(folder)]) == 0
    page = capsys.readouterr().out
    assert "acme/search" in page
    assert "apache-2.0 Ask first." in page
    assert "'find: '" in page


def test_a_registered_kind_is_the_kind():
    register(row(id="acme/ranks", kind="reranker", pooling=None, query_instruction=""))
    with pytest.raises(CheckpointError, match="is a reranker"):
        Embedder("acme/ranks")
    register(row())
    with pytest.raises(CheckpointError, match="is an embedding model"):
        Reranker("acme/search")


def test_it_is_listed_among_the_supported_models():
    before = supported_models()
    assert len(before) == len([known for known in PROFILES.values() if known.refusal is None])
    register(row(languages=("en", "de"), dimension=32))
    assert supported_models()[:-1] == before
    listed = supported_models()[-1]
    assert (listed.id, listed.kind, listed.max_length) == ("acme/search", "embedder", 64)
    assert str(listed).split() == ["acme/search", "embedder", "32", "64", "en,", "de", "unknown"]
    assert len({str(known).rindex(known.kind) for known in supported_models()}) == 1


def test_the_same_row_again_is_no_error_and_another_one_is():
    register(row())
    register(row())
    register(row(max_length=np.int64(64)))  # and another type is the same number
    assert repr(row(max_length=np.int64(64))) == repr(row())
    with pytest.raises(ArgumentError, match=r"'acme/search' is registered with other values"):
        register(row(max_length=128))
    with pytest.raises(ArgumentError, match=r"'acme/search' is registered"):
        register(row(id="other/Search"))
    with pytest.raises(ArgumentError, match=r"'BAAI/bge-m3' is published"):
        register(row(id="acme/bge-m3"))
    assert PROFILES["acme/search"].max_length == 64
    assert "other/Search" not in PROFILES


def test_of_many_threads_with_one_name_one_wins():
    ready = threading.Barrier(8)

    def attempt(length: int) -> int | None:
        ready.wait()
        try:
            register(row(max_length=length))
        except ArgumentError:
            return None
        return length

    with ThreadPoolExecutor(8) as pool:
        won = [length for length in pool.map(attempt, range(1, 9)) if length]
    assert won == [PROFILES["acme/search"].max_length]


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({"id": 3}, InputTypeError, "id must be a str"),
        ({"id": "/models/mine"}, ArgumentError, "it must be a hub id"),
        ({"id": ""}, ArgumentError, "it must be a hub id"),
        ({"kind": "embedding"}, ArgumentError, "use 'embedder' or 'reranker'"),
        ({"family": ""}, ArgumentError, "family is empty: pass the model_type"),
        ({"max_length": 0}, ArgumentError, "max_length must be 1 or more, got 0"),
        ({"max_length": "512"}, InputTypeError, "max_length must be a whole number"),
        ({"max_length": True}, InputTypeError, "max_length must be a whole number"),
        ({"dimension": -1}, ArgumentError, "dimension must be 1 or more"),
        ({"pooling": "max"}, ArgumentError, "use 'cls', 'mean' or 'last', or None"),
        ({"outputs": ("sparse",)}, ArgumentError, "has no 'dense'"),
        ({"outputs": ("dense", "colbert")}, ArgumentError, "outputs='colbert' is not supported"),
        ({"outputs": "dense"}, InputTypeError, "outputs must be a tuple"),
        ({"languages": "en"}, InputTypeError, "languages must be a tuple"),
        ({"languages": (1,)}, InputTypeError, r"languages\[0\] must be a str"),
        ({"half": "float32"}, ArgumentError, "use 'float16' or 'bfloat16'"),
        ({"query_instruction": 1}, InputTypeError, "query_instruction must be a str"),
        ({"query_instruction": "\ud800"}, ArgumentError, "lone surrogate"),
        ({"query_format": "{instruction}"}, ArgumentError, "must have the fields"),
        ({"query_format": "{query} {task}"}, ArgumentError, "must have the fields"),
        ({"query_format": "{query"}, ArgumentError, "must have the fields"),
        ({"example_format": "{query}"}, ArgumentError, "must have the fields"),
        ({"tasks": {"qa": "find: "}}, InputTypeError, "tasks must map names"),
        ({"pair_prompt": "Yes or no?"}, InputTypeError, "pair_prompt must be a PairPrompt"),
        ({"kind": "reranker"}, ArgumentError, "pooling, query_instruction is for an embedder"),
    ],
)
def test_a_wrong_value_is_a_sentence(values, error, said):
    with pytest.raises(error, match=said):
        row(**values)


@pytest.mark.parametrize(
    "name", ["acme/models--acme--search", "acme/checkpoint-500", "BAAI_search", "acme/a___b"]
)
def test_a_name_that_no_lookup_would_find_is_refused(name):
    with pytest.raises(ArgumentError, match=r"can't be registered: as a folder's it would be read"):
        register(row(id=name))
    assert find_profile(name) is None


def test_only_a_profile_is_registered():
    with pytest.raises(InputTypeError, match=r"takes a bge_core\.Profile, got dict"):
        register({"id": "acme/search"})


def test_a_row_is_frozen_whatever_it_was_made_of():
    tasks = {"qa": TaskInstruction("ask: ", "say: ")}
    made = row(tasks=tasks, languages=["en"])
    tasks.clear()
    assert made.tasks["qa"].query == "ask: "
    assert made.languages == ("en",)
    assert pickle.loads(pickle.dumps(made)) == made


def in_another_process(code, file):
    return subprocess.run(
        [sys.executable, "-c", code, file],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )


@pytest.mark.parametrize("make", [Embedder, BGEEmbeddings])
def test_a_row_that_another_process_knows_otherwise_is_a_warning(make, tmp_path):
    register(row())
    (tmp_path / "model").write_bytes(pickle.dumps(make(model="BAAI/bge-small-en-v1.5")))
    code = (
        "import pickle, sys; from bge_core import Profile, register\n"
        "register(Profile(id='acme/search', kind='reranker', family='bert', max_length=64))\n"
        "print(pickle.load(open(sys.argv[1], 'rb')).model)"
    )
    done = in_another_process(code, tmp_path / "model")
    assert done.stdout == "BAAI/bge-small-en-v1.5\n"
    assert "'acme/search' is registered with other values" in done.stderr


@pytest.mark.parametrize(
    ("make", "argument"),
    [(Embedder, "model"), (BGEEmbeddings, "model"), (BGEEmbedding, "model_name")],
)
def test_a_pickled_model_takes_its_row_to_another_process(make, argument, tmp_path):
    register(row())
    (tmp_path / "model").write_bytes(pickle.dumps(make(**{argument: "acme/search"})))
    code = (
        "import pickle, sys; from bge_core.checkpoints.catalog import find_profile\n"
        "pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(find_profile('acme/search').query_instruction)"
    )
    done = in_another_process(code, tmp_path / "model")
    assert done.stdout == "find: \n"
