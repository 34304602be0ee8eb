"""The page for a bug report."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from bge_core import Embedder, Reranker, doctor
from bge_core.backends.int8 import int8_works
from bge_core.doctor import main


@pytest.fixture
def page(capsys, monkeypatch):
    """Run it and give its rows by name, and its exit code; every row is one line."""
    monkeypatch.setenv("HF_TOKEN", "a secret of any shape")

    def run(*arguments: object) -> tuple[dict[str, str], int]:
        code = main([str(argument) for argument in arguments])
        text = capsys.readouterr().out
        assert "a secret of any shape" not in text
        assert "Traceback" not in text
        rows = dict(line.split("  ", maxsplit=1) for line in text.splitlines())
        return {name: value.strip() for name, value in rows.items()}, code

    return run


@pytest.fixture
def hub(tmp_path, en_folder):
    """A hub cache with one checkpoint."""
    repo = tmp_path / "hub" / "models--BAAI--bge-small-en-v1.5"
    shutil.copytree(en_folder, repo / "snapshots" / "0123456789abcdef")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123456789abcdef")
    return tmp_path / "hub"


def test_without_a_model_it_shows_versions_devices_and_the_cache(page, hub):
    rows, code = page("--cache-folder", hub)
    assert code == 0
    for name in ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy"):
        assert rows[name] == version(name)
    assert rows["python"].startswith(sys.version.split()[0])
    assert f"{os.cpu_count()} cores" in rows["cpu"]
    assert rows["hub cache"] == str(hub)
    assert rows["published models"] == "BAAI/bge-small-en-v1.5"
    assert "model" not in rows


def test_what_is_not_installed_is_said(page, monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    rows, code = page()
    assert (rows["no-such-package"], code) == ("not installed", 0)


def test_what_the_processor_has_is_what_torch_sees(page):
    rows, _ = page()
    seen = torch.backends.cpu.get_cpu_capability()
    if seen in ("AVX2", "AVX512"):
        assert ("AVX-512" in rows["cpu instructions"].split(", ")) == (seen == "AVX512")
        assert "AVX2" in rows["cpu instructions"]
    assert ("int8" in rows["dtypes that pay"]) == int8_works()


@pytest.mark.parametrize(
    ("flags", "int8", "said"),
    [
        ((), False, "float32 always; not bfloat16"),
        (("avx2",), True, "float32 always; int8 .* 1.5 times as fast in bulk; not bfloat16"),
        (("avx512_vnni", "avx512_bf16"), True, "float32 always; int8 .* bulk; bfloat16: compare"),
        (("avx512_bf16", "amx_bf16"), True, "float32 always; int8 .* bulk; bfloat16, twice as"),
    ],
)
def test_which_dtypes_pay(flags, int8, said):
    assert re.match(said, "; ".join(doctor._dtypes(frozenset(flags), int8=int8)))


def test_an_embedder(page, en_folder):
    rows, code = page(en_folder, "--device", "cpu")
    assert code == 0
    assert rows["folder"] == str(en_folder)
    assert rows["kind"] == "embedder, bert, BAAI/bge-small-en-v1.5"
    assert rows["licence"] == "mit"
    with Embedder(en_folder) as embedder:
        assert rows["query instruction"].startswith(repr(embedder.query_instruction))
        assert rows["fingerprint"] == embedder.fingerprint
    assert rows["query instruction"].endswith("(published for BAAI/bge-small-en-v1.5)")
    assert rows["pooling"].startswith("cls, ")
    assert rows["max_length"] == "512 tokens of 512"
    assert rows["computes on"] == "cpu, float32"
    assert rows["runs (interactive)"] == rows["runs (background)"] == "packed, PackedRunner"
    assert "a vector of 32, norm 1.0000" in rows["self-check"]
    assert re.fullmatch(r"\d+\.\d s", rows["loaded in"])


def test_a_hub_id_is_found_in_the_cache(page, hub):
    rows, code = page("BAAI/bge-small-en-v1.5", "--cache-folder", hub, "--local-files-only")
    assert code == 0
    assert Path(rows["hub cache"]).name == "0123456789abcdef"


def test_a_reranker_gives_a_score(page, reranker_folder):
    rows, code = page(reranker_folder)
    assert (code, rows["kind"]) == (0, "reranker, xlm-roberta, BAAI/bge-reranker-base")
    with Reranker(reranker_folder) as reranker:
        score = reranker.score(doctor._QUERY, doctor._PASSAGES)[0]
    shown = re.match(r"a score of ([\d.]+), finite; alone", rows["self-check"])
    assert float(shown[1]) == pytest.approx(float(score), abs=1e-5)
    assert "query instruction" not in rows


def test_m3_has_three_outputs(page, m3_folder):
    rows, code = page(m3_folder)
    assert (code, rows["outputs"]) == (0, "dense, multi_vector, sparse")


@pytest.mark.parametrize(
    ("name", "instruction", "document"),
    [
        ("prompt_folder", "'query: ' (config_sentence_transformers.json)", "'passage: '"),
        ("unknown_folder", "'' (nothing says one)", "''"),
    ],
)
def test_where_an_instruction_comes_from(page, request, name, instruction, document):
    rows, code = page(request.getfixturevalue(name))
    assert code == 0
    assert rows["query instruction"] == instruction
    assert rows["document instruction"] == document
    assert rows["pooling"].startswith("mean, ")


def test_what_would_be_logged_is_in_the_report(page, unknown_folder, monkeypatch):
    monkeypatch.setattr("bge_core.embedder._warned_models", set())
    rows, _ = page(unknown_folder)
    assert "query_instruction='...'" in rows["warning"]


def broken_torch(report):
    msg = "libcudart.so: cannot open\nmore of it"
    raise OSError(msg)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("BAAI/bge-m3", "--local-files-only"), "not in the hub cache"),
        (("no folder at all",), "no folder on this machine"),
        (("{two_label_folder}",), "has 2 labels"),
        (("{bare_unknown_folder}",), "nothing of its pooling"),
        (("BAAI/bge-en-icl", "--local-files-only"), "not in the hub cache"),
        (("{en_folder}", "--device", "cuda:99"), "can't compute here"),
        (("{en_folder}", "--dtype", "int3"), "not supported"),
    ],
)
def test_a_problem_is_a_sentence(page, request, arguments, sentence):
    given = [
        request.getfixturevalue(word[1:-1]) if word.startswith("{") else word for word in arguments
    ]
    rows, code = page(*given)
    assert code == 1
    assert sentence in rows["PROBLEM"]


def test_what_nobody_foresaw_is_a_sentence_too(page, monkeypatch):
    monkeypatch.setattr(doctor, "_devices", broken_torch)
    rows, code = page()
    assert (rows["PROBLEM"], code) == ("OSError: libcudart.so: cannot open", 1)
    assert "hub cache" in rows, "the rest is still there"


def test_a_text_that_differs_in_company_is_a_problem(page, en_folder, monkeypatch):
    embed = Embedder.embed_documents

    def shifted(self, texts, **options):
        vectors = embed(self, texts, **options)
        return vectors + np.float32(0.001) if len(texts) > 1 else vectors

    monkeypatch.setattr(Embedder, "embed_documents", shifted)
    rows, code = page(en_folder)
    assert code == 1
    assert "other numbers in other company" in rows["PROBLEM"]


def test_neither_the_home_folder_nor_a_token_is_shown(page, en_folder, copy_of, monkeypatch):
    folder = copy_of(en_folder, "hf_0123456789abcdef/bge-small-en-v1.5")
    monkeypatch.setenv("HOME", str(folder.parent.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent.parent))
    rows, _ = page(folder)
    assert rows["folder"] == "~/***/bge-small-en-v1.5"
    monkeypatch.setenv("HOME", str(folder.parent.parent)[:-1])
    monkeypatch.setenv("USERPROFILE", str(folder.parent.parent)[:-1])
    assert "~" not in page(folder)[0]["folder"], "another folder's name that begins alike"


def test_it_runs_as_a_module_and_prints_where_only_ascii_can_be(zh_folder):
    done = subprocess.run(
        [sys.executable, "-m", "bge_core.doctor", zh_folder],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "self-check" in done.stdout
    assert r"\u4e3a" in done.stdout
    assert len(done.stdout.splitlines()) < 40, "one screen"
