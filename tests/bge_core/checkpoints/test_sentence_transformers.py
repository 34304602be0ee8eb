"""sentence-transformers' settings of a checkpoint: the same vectors and scores as it gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.version import Version

from bge_core import ArgumentError, CheckpointError, Embedder, M3Embedder, Reranker

SHORT = ["Paris is in France.", "A cat sat on the mat.", "巴黎是法国的首都"]
TEXTS = [*SHORT, "The giant panda is a bear. " * 40]
PROMPTS = {"query": "where is: ", "document": "passage of a page: "}


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(value | changes), encoding="utf-8")


def settings(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, **changes)


def both(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for step in steps:
            step(folder)

    return change


def renamed_length(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "sentence_bert_config.json").unlink(missing_ok=True)
        edit(folder / name, max_seq_length=64, do_lower_case=False)

    return change


def dense(folder: Path) -> None:
    """Put a normalisation and a layer behind the pooling."""
    from safetensors.numpy import save_file

    listed = json.loads((folder / "modules.json").read_text())[:2]
    for number, kind in ((2, "Normalize"), (3, "Dense"), (4, "Normalize")):
        own = f"{number}_{kind}"
        (folder / own).mkdir(exist_ok=True)
        listed.append(
            {
                "idx": number,
                "name": str(number),
                "path": own,
                "type": f"sentence_transformers.models.{kind}",
            }
        )
    (folder / "modules.json").write_text(json.dumps(listed))
    edit(
        folder / "3_Dense" / "config.json",
        in_features=32,
        out_features=8,
        bias=True,
        activation_function="torch.nn.modules.activation.Tanh",
    )
    numbers = np.random.default_rng(1)
    weights = {
        "linear.weight": numbers.normal(size=(8, 32)).astype(np.float32),
        "linear.bias": numbers.normal(size=8).astype(np.float32),
    }
    save_file(weights, folder / "3_Dense" / "model.safetensors")


SENTENCE = "config_sentence_transformers.json"
POOLING = "1_Pooling/config.json"
HONOURED = {
    "prompts": settings(SENTENCE, prompts=PROMPTS),
    "prompts left out of the pooling": both(
        settings(SENTENCE, prompts=PROMPTS), settings(POOLING, include_prompt=False)
    ),
    "prompts left out of two poolings": both(
        settings(SENTENCE, prompts=PROMPTS),
        settings(POOLING, include_prompt=False, pooling_mode=["cls", "mean"]),
    ),
    "truncate_dim": settings(SENTENCE, truncate_dim=16),
    "more than there is": settings(SENTENCE, truncate_dim=1000),
    "truncate_dim of two poolings": both(
        settings(SENTENCE, truncate_dim=40), settings(POOLING, pooling_mode=["cls", "max"])
    ),
    "cut on the left": both(
        settings("tokenizer_config.json", truncation_side="left"),
        settings("sentence_bert_config.json", max_seq_length=64),
    ),
    "cut on the left by an argument": settings(
        "sentence_bert_config.json", tokenizer_args={"truncation_side": "left"}, max_seq_length=64
    ),
    "a tokenizer's length": settings("sentence_bert_config.json", max_seq_length=20),
    "normalised before a layer": dense,
    **{
        f"length in {name}": renamed_length(f"sentence_{name}_config.json")
        for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    },
    **{
        f"pooling {mode}": settings(POOLING, pooling_mode=mode)
        for mode in ("max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ["mean"])
    },
}


# What sentence-transformers 5 writes and reads in another place, or not at all.
SINCE_6 = (
    "prompts left out of two poolings",
    "truncate_dim",
    "truncate_dim of two poolings",
    "pooling ['mean']",
)
needs_6 = pytest.mark.skipif(
    Version(version("sentence-transformers")) < Version("6"),
    reason="sentence-transformers 5 does not read this setting itself",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_6) if name in SINCE_6 else name for name in HONOURED]
)
def test_a_setting_is_honoured(unknown_folder, copy_of, name):
    from sentence_transformers import SentenceTransformer

    folder = copy_of(unknown_folder)
    HONOURED[name](folder)
    theirs = SentenceTransformer(str(folder), device="cpu")
    options: dict[str, Any] = {"batch_size": 1, "normalize_embeddings": True}
    with Embedder(folder, on_truncation="ignore") as embedder:
        queries, documents = embedder.embed_queries(TEXTS), embedder.embed_documents(TEXTS)
        assert embedder.dimension == queries.shape[1] == documents.shape[1]
        assert embedder.embed_documents([]).shape == (0, embedder.dimension)
    expected = theirs.encode_query(TEXTS, **options)
    np.testing.assert_allclose(queries, expected, atol=1e-5)
    np.testing.assert_allclose(documents, theirs.encode_document(TEXTS, **options), atol=1e-5)


@needs_6
def test_bge_m3_keeps_as_many_numbers_of_a_dense_vector(m3_folder, copy_of):
    from sentence_transformers import SentenceTransformer

    folder = copy_of(m3_folder)
    edit(folder / SENTENCE, truncate_dim=16)
    theirs = SentenceTransformer(str(folder), device="cpu")
    expected = theirs.encode(SHORT, batch_size=1, normalize_embeddings=True)
    with M3Embedder(folder) as embedder:
        assert embedder.dimension == 16
        np.testing.assert_allclose(embedder.encode(SHORT).dense, expected, atol=1e-5)
        assert embedder.encode([]).dense.shape == (0, 16)
        weights = {"dense": 1.0, "sparse": 0.0, "multi_vector": 0.0}
        score = embedder.score([(SHORT[0], SHORT[1])], weights=weights)
    np.testing.assert_allclose(score, [expected[0] @ expected[1]], atol=1e-5)


@pytest.mark.parametrize("default", ["task", "query"])
def test_a_default_prompt_is_put_where_there_is_no_other(unknown_folder, copy_of, default):
    from sentence_transformers import SentenceTransformer

    folder = copy_of(unknown_folder)
    prompts = {"task": "do this: "} if default == "task" else PROMPTS
    edit(folder / SENTENCE, prompts=prompts, default_prompt_name=default)
    theirs = SentenceTransformer(str(folder), device="cpu")
    by_default = theirs.encode(SHORT, batch_size=1, normalize_embeddings=True)
    with Embedder(folder) as embedder:
        np.testing.assert_allclose(embedder.embed_queries(SHORT), by_default, atol=1e-5)
        documents = embedder.embed_documents(SHORT)
    if default == "task":
        np.testing.assert_allclose(documents, by_default, atol=1e-5)
    else:  # a query's is for no document, whatever `encode` makes of it
        expected = theirs.encode_document(SHORT, batch_size=1, normalize_embeddings=True)
        np.testing.assert_allclose(documents, expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_name_or_path": "bert-base-uncased"},
        {"processing_kwargs": {"text": {"max_length": 8}}},
        {"query_length": 32},
        {"query_expansion": {"strategy": "fixed", "length": 32}},
        {"transformer_task": "fill-mask"},
        {"modality_config": {"message": {"method": "forward"}}},
        {"tokenizer_args": {"add_prefix_space": True}},
    ],
)
def test_a_setting_that_is_not_honoured_is_said(unknown_folder, copy_of, changes):
    folder = copy_of(unknown_folder)
    edit(folder / "sentence_bert_config.json", **changes)
    with pytest.raises(
        CheckpointError, match=rf"setting that is not honoured.*{next(iter(changes))}"
    ):
        Embedder(folder)


def test_a_class_of_the_same_name_from_elsewhere_is_not_taken_for_the_known_one(
    unknown_folder, copy_of
):
    folder = copy_of(unknown_folder)
    listed = json.loads((folder / "modules.json").read_text())
    listed[0]["type"] = "custom_st.Transformer"
    (folder / "modules.json").write_text(json.dumps(listed))
    with (
        Embedder(folder, query_instruction="") as embedder,
        pytest.raises(CheckpointError, match=r"custom_st\.Transformer.*trust_remote_code=True"),
    ):
        embedder.embed_queries(SHORT)


def test_a_cross_encoder_scores_as_sentence_transformers_does(
    reranker_folder, bert_reranker_folder
):
    from sentence_transformers import CrossEncoder

    pairs = [("Where is Paris?", text) for text in SHORT]
    for folder in (reranker_folder, bert_reranker_folder):
        expected = CrossEncoder(str(folder), device="cpu").predict(pairs, batch_size=1)
        with Reranker(folder) as reranker:
            np.testing.assert_allclose(reranker.score_pairs(pairs), expected, atol=1e-5)


@pytest.mark.parametrize("role", ["query", "document"])
def test_an_instruction_that_fills_the_length_is_refused(unknown_folder, copy_of, role):
    """Two different texts would have one vector."""
    folder = copy_of(unknown_folder)
    edit(folder / SENTENCE, prompts={role: "one two three four five six seven eight"})
    with Embedder(folder, max_length=8, query_instruction=None) as embedder:
        embed = embedder.embed_queries if role == "query" else embedder.embed_documents
        with pytest.raises(
            ArgumentError, match=r"max_length=8 leaves no room for text.*instruction"
        ):
            embed(SHORT)
