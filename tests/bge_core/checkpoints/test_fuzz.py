"""Any JSON value at any place of a checkpoint's files: a right result, or a sentence.

`BGE_FUZZ_EXAMPLES=10000` asks for more examples than the few of every run.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bge_core import BGEError, Embedder, Reranker

EXAMPLES = int(os.environ.get("BGE_FUZZ_EXAMPLES", "120"))
TEXTS = ["Paris is in France.", "a much longer text about nothing " * 20]
PAIRS = [("Where is Paris?", text) for text in TEXTS]
SECONDS = 5
MIB = 1024  # of resource's kilobytes

ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2, 3, 7, 31, 64, 513, 10**6, 2**31, 2**63, 10**30, -(10**9)),
        *(0.5, -0.0, 1e30, 1e308, float("inf"), float("-inf"), float("nan")),
        *("", "0", "cls", "left", "../..", "/etc/passwd", "\ud800", "\x00", "query", "é" * 300),
        *([], {}, [[]], [None], {"": None}, {"query": "q: "}, ["BertForSequenceClassification"]),
    ]
)
JSON: st.SearchStrategy[Any] = st.one_of(
    ODD,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)
# What such files may have beside what the folders here have.
FURTHER = {
    "config.json": (
        *("quantization_config", "auto_map", "_name_or_path", "id2label", "num_labels", "dim"),
        *("tie_word_embeddings", "is_decoder", "add_cross_attention", "head_dim", "pruned_heads"),
        *("rope_parameters", "sliding_window", "position_embedding_type", "torch_dtype", "dtype"),
    ),
    "tokenizer_config.json": (
        *("truncation_side", "add_eos_token", "added_tokens_decoder", "extra_special_tokens"),
        *("chat_template", "do_lower_case", "tokenizer_file", "vocab_file"),
    ),
    "sentence_bert_config.json": (
        *("tokenizer_args", "model_args", "config_args", "processing_kwargs", "modality_config"),
        *("transformer_task", "query_length", "tokenizer_name_or_path"),
    ),
    "config_sentence_transformers.json": ("prompts", "default_prompt_name", "truncate_dim"),
    "1_Pooling/config.json": ("pooling_mode", "include_prompt"),
    "modules.json": (),
    "model.safetensors.index.json": ("weight_map", "metadata"),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value, the whole included."""
    found = [path]
    inner = dict(enumerate(value)) if isinstance(value, list) else value
    for key in inner if isinstance(inner, dict) else ():
        found += places(inner[key], (*path, key))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    inner = changed[path[0]] if isinstance(changed, list) or path[0] in changed else {}
    changed[path[0]] = put(inner, path[1:], new)
    return changed


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux counts it")
@pytest.mark.parametrize(
    "model", ["unknown_folder", "bert_reranker_folder", "m3_folder", "code_folder"]
)
def test_any_value_at_any_place_is_a_right_result_or_a_sentence(
    request: pytest.FixtureRequest, tmp_path: Path, model: str
) -> None:
    source: Path = request.getfixturevalue(model)
    make: Any = Reranker if "reranker" in model else Embedder
    files = {
        name: json.loads((source / name).read_text(encoding="utf-8"))
        if (source / name).exists()
        else {}
        for name in FURTHER
        if (source / name).exists()
        or name
        in (
            "sentence_bert_config.json",
            "model.safetensors.index.json",
            "config_sentence_transformers.json",
        )
    }
    spots = [
        (name, path)
        for name, value in files.items()
        for path in (*places(value), *((key,) for key in FURTHER[name]))
    ]
    folder = tmp_path / source.name
    numbers: list[int] = []

    def use() -> Any:
        with make(folder, device="cpu", on_truncation="ignore") as opened:
            return np.array(
                opened.score_pairs(PAIRS) if make is Reranker else opened.embed_documents(TEXTS)
            )

    shutil.copytree(source, folder)
    expected = use()  # everything that is imported is imported now

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize="BGE_FUZZ_EXAMPLES" not in os.environ,
    )
    @given(st.lists(st.tuples(st.sampled_from(spots), JSON), min_size=1, max_size=2))
    def attempt(changes: list[tuple[tuple[str, tuple[Any, ...]], Any]]) -> None:
        for name in {name for (name, _), _ in changes}:
            value = files[name]
            for (other, path), new in changes:
                if other == name:
                    try:
                        value = put(value, path, new)
                    except (TypeError, IndexError, KeyError, ValueError, AttributeError):
                        continue  # the first change took the second one's place away
            (folder / name).write_text(json.dumps(value), encoding="utf-8")
        begun, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with contextlib.suppress(BGEError):
                result = use()
                assert np.isfinite(result).all()
                assert len(result) == len(expected)
                numbers.append(1)
        finally:
            assert time.thread_time() - begun < SECONDS
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < 200 * MIB
            for name in {name for (name, _), _ in changes}:
                if (source / name).exists():
                    shutil.copyfile(source / name, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)

    attempt()
    assert numbers  # some changes are of no matter
    np.testing.assert_allclose(use(), expected, atol=1e-6)
