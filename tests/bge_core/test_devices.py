import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from bge_core import ArgumentError, Embedder, InputTypeError
from bge_core.devices import Placement

BEST = (
    "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
)
on_cpu_only = pytest.mark.skipif(BEST != "cpu", reason="for a machine without accelerator")


def resolved(**words):
    return Placement.of(**words).resolve()


def test_no_device_picks_the_best_one_of_this_machine():
    assert resolved()[0] == (BEST,)


@pytest.mark.parametrize(
    ("cuda", "mps", "best", "dtype"),
    [
        (True, True, "cuda:0", "float16"),
        (False, True, "mps", "float32"),
        (False, False, "cpu", "float32"),
    ],
)
def test_cuda_comes_before_mps_before_cpu(monkeypatch, cuda, mps, best, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolved() == ((best,), dtype)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("auto", "float32"),
        ("float32", "float32"),
        ("fp32", "float32"),
        ("bfloat16", "bfloat16"),
        ("bf16", "bfloat16"),
        (torch.float32, "float32"),
        (torch.bfloat16, "bfloat16"),
        ("int8", "int8"),
    ],
)
def test_accepted_words_for_a_dtype(word, name):
    assert resolved(device="cpu", dtype=word) == (("cpu",), name)


@pytest.mark.parametrize("word", ["float16", "fp16", torch.float16])
@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), ["cpu", "cpu:0"], None])
def test_float16_on_any_spelling_of_a_cpu_runs_float32(word, device, monkeypatch):
    monkeypatch.setattr("bge_core.devices._best_device", lambda: "cpu")
    assert resolved(device=device, dtype=word)[1] == "float32"


def test_float16_on_a_cpu_is_said_once_and_auto_is_silent():
    code = """
import logging
from bge_core.devices import Placement
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
Placement.of(device="cpu").resolve()
for _ in range(3):
    Placement.of(device="cpu:0", dtype="float16").resolve()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("WARNING bge_core.devices ")
    assert "float16" in line
    assert "float32" in line


@pytest.mark.parametrize(("fp16", "name"), [(True, "float16"), (False, "float32")])
def test_use_fp16_is_another_word_for_a_dtype(fp16, name):
    assert Placement.of(use_fp16=fp16) == Placement.of(dtype=name)
    assert Placement.of(use_fp16=fp16, dtype=name) == Placement.of(dtype=name)


@pytest.mark.parametrize(
    ("fp16", "dtype"), [(True, "float32"), (True, "bf16"), (False, "fp16"), (False, torch.float16)]
)
def test_use_fp16_and_dtype_that_disagree_are_refused(fp16, dtype):
    with pytest.raises(ArgumentError, match=r"use_fp16.*dtype"):
        Placement.of(use_fp16=fp16, dtype=dtype)


@pytest.mark.parametrize("dtype", ["int4", "float64", "", "Float16 ", torch.int16])
def test_an_unknown_dtype_is_refused(dtype):
    with pytest.raises(ArgumentError, match="dtype"):
        Placement.of(dtype=dtype)


@pytest.mark.parametrize("device", ["", "gpu!", "cuda:", "cuda:x", "cuda 0", [], ["cpu", "?"]])
def test_what_is_no_device_s_name_is_refused(device):
    with pytest.raises(ArgumentError, match="device"):
        Placement.of(device=device)


@pytest.mark.parametrize(
    "words", [{"device": 0}, {"device": [0, 1]}, {"dtype": None}, {"dtype": 16}, {"use_fp16": 1}]
)
def test_a_wrong_type_is_a_type_error(words):
    with pytest.raises(InputTypeError, match=next(iter(words))):
        Placement.of(**words)


@on_cpu_only
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "quantum", ["cpu", "cuda"]])
def test_a_device_that_this_machine_lacks_is_an_error_that_names_it(device):
    with pytest.raises(ArgumentError, match="device=") as caught:
        resolved(device=device)
    assert (device if isinstance(device, str) else device[-1]) in str(caught.value)


def test_an_embedder_refuses_a_wrong_placement_before_it_loads(en_folder):
    with pytest.raises(ArgumentError, match="dtype"):
        Embedder(en_folder, dtype="int4")
    with pytest.raises(ArgumentError, match="use_fp16"):
        Embedder(en_folder, dtype="float32", use_fp16=True)


@pytest.mark.parametrize(
    "words",
    [
        {"dtype": "bfloat16"},
        {"dtype": torch.float16},
        {"use_fp16": True},
        {"device": "cpu:0"},
        {"device": ["cpu", "cpu"]},
    ],
)
def test_vectors_are_float32_wherever_they_were_computed(en_folder, reference_embed, caplog, words):
    caplog.set_level(logging.ERROR)
    options = {"device": "cpu", **words}
    with Embedder(en_folder, **options) as embedder:
        vectors = embedder.embed_documents(["Paris is in France.", "A cat sat on the mat."])
    expected = reference_embed(en_folder, ["Paris is in France.", "A cat sat on the mat."])
    assert vectors.dtype == np.float32
    exact = words.get("dtype") != "bfloat16"
    np.testing.assert_allclose(vectors, expected, atol=1e-5 if exact else 0.1)
    assert exact or not np.allclose(vectors, expected, atol=1e-5)
