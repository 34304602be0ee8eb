import subprocess
import sys
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from bge_core import (
    ArgumentError,
    CheckpointError,
    Embedder,
    MissingExtraError,
    Reranker,
    make_embedder,
    make_reranker,
)
from bge_core.backends import table
from bge_core.backends.runner_options import RunnerOptions
from bge_core.backends.table import BACKENDS, Backend, BackendName, choose_backends
from langchain_bge import BGECrossEncoder, BGEEmbeddings, BGEReranker
from llamaindex_bge import BGEEmbedding
from llamaindex_bge import BGEReranker as NodeReranker

QUERIES_BY_OPENVINO = {"interactive": "openvino", "background": "torch"}
ALL_BY_TORCH = {"interactive": "torch", "background": "torch"}


@pytest.fixture
def checkpoint(en_folder):
    return Embedder(en_folder).checkpoint


def test_the_names_are_the_rows_and_auto():
    assert {*get_args(BackendName)} == {*BACKENDS, "auto"}


def test_importing_the_table_loads_no_backend():
    code = (
        "import sys, bge_core.backends.table; "
        "print(sorted({'torch', 'openvino', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("options", "devices", "expected"),
    [
        ({}, ["cpu"], QUERIES_BY_OPENVINO),
        ({}, ["cpu", "cpu:0"], QUERIES_BY_OPENVINO),
        ({"kind": "reranker", "pooling": None}, ["cpu"], ALL_BY_TORCH),
        ({"dtype": "bfloat16"}, ["cpu"], ALL_BY_TORCH),
        ({}, ["cuda"], ALL_BY_TORCH),
        ({}, ["cpu", "cuda:1"], ALL_BY_TORCH),
        ({"pooling": "last"}, ["cpu"], ALL_BY_TORCH),
    ],
)
def test_auto_is_torch_but_for_an_embedder_s_queries(checkpoint, options, devices, expected):
    asked = replace(RunnerOptions(kind="embedder", pooling="cls"), **options)
    assert choose_backends("auto", checkpoint, asked, devices) == expected


def test_auto_is_torch_where_openvino_is_not_installed(checkpoint, monkeypatch):
    monkeypatch.setattr(table, "find_spec", lambda package: None)
    asked = RunnerOptions(kind="embedder", pooling="cls")
    assert choose_backends("auto", checkpoint, asked, ["cpu"]) == ALL_BY_TORCH


def test_a_backend_that_is_not_installed_is_refused_at_construction(
    en_folder, bert_reranker_folder, monkeypatch
):
    monkeypatch.setattr(table, "find_spec", lambda package: None)
    making = {
        en_folder: (Embedder, make_embedder, BGEEmbeddings, BGEEmbedding),
        bert_reranker_folder: (Reranker, make_reranker, BGEReranker, BGECrossEncoder, NodeReranker),
    }
    for folder, kinds in making.items():
        for make in kinds:
            with pytest.raises(MissingExtraError, match=r"pip install 'bge-adapters\[openvino\]'"):
                make(model=folder, backend="openvino")
            make(model=folder, backend="auto")


class Lengths:
    """A backend that counts tokens."""

    padded = False
    threads = 1
    default_budget = 64

    def run(self, sequences):
        return np.array([[len(sequence), 1.0] for sequence in sequences], dtype=np.float32)


def test_a_row_is_all_that_a_new_backend_needs(en_folder, reranker_folder, monkeypatch):
    loaded = []

    def load(checkpoint, options, devices):
        loaded.append((checkpoint.name, options.kind, list(devices)))
        return [Lengths() for _ in devices]

    row = Backend(
        load=load,
        unsupported=lambda checkpoint, options: "no mean" if options.pooling == "mean" else None,
        device="cpu",
        dtype="float32",
        for_queries=True,
    )
    monkeypatch.setitem(BACKENDS, "lengths", row)
    monkeypatch.delitem(BACKENDS, "openvino")
    with Embedder(en_folder, backend="lengths", normalize=False) as embedder:
        assert embedder.embed_documents(["", "panda cat"]).tolist() == [[2, 1], [4, 1]]
        assert (embedder.devices, embedder.dtype) == (("cpu",), "float32")
    with Reranker(reranker_folder, backend="lengths", normalize=False) as reranker:
        assert reranker.score("", [""]).tolist() == [4]
    assert [kind for _, kind, _ in loaded] == ["embedder", "reranker"]
    # "auto" takes it for an embedder's queries alone.
    with Embedder(en_folder, backend="auto", query_instruction="", normalize=False) as embedder:
        assert embedder.embed_queries(["panda cat"]).tolist() == [[4, 1]]
        assert embedder.embed_documents(["panda cat"]).shape == (1, embedder.dimension)
    with pytest.raises(CheckpointError, match="no mean"):
        Embedder(en_folder, backend="lengths", pooling="mean").embed_documents(["a"])
    with pytest.raises(ArgumentError, match=r"backend='lengths' runs on the CPU, not on .*cuda"):
        Embedder(en_folder, backend="lengths", device="cuda")
    with pytest.raises(ArgumentError, match=r"computes in float32, not in dtype='float16'"):
        Embedder(en_folder, backend="lengths", dtype="float16")
    with pytest.raises(ArgumentError, match=r"'torch', 'lengths' or 'auto'"):
        Embedder(en_folder, backend="openvino")


def test_auto_shares_the_model_of_torch_where_it_means_torch(reranker_folder, monkeypatch):
    with (
        Reranker(reranker_folder, backend="auto") as auto,
        Reranker(reranker_folder, backend="torch") as torch,
    ):
        assert auto.local.loaded() is torch.local.loaded()
