"""Instructions in front of documents, and vectors that are cut: numbers as plain references'."""

import logging
import re
from typing import Any

import numpy as np
import pytest

from bge_core import ArgumentError, BGEError, Embedder, M3Embedder, make_embedder
from bge_core import dimensions as dimensions_module
from bge_core import embedder as embedder_module
from langchain_bge import BGEEmbeddings
from llamaindex_bge import BGEEmbedding

TEXTS = ["Where is Paris?", "Paris is in France.", "panda " * 600, ""]


@pytest.fixture(autouse=True)
def _nobody_was_warned(monkeypatch):
    monkeypatch.setattr(embedder_module, "_warned_of_documents", set())
    monkeypatch.setattr(dimensions_module, "_warned", set())


def theirs(folder, **options):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", **options)


def in_both_hosts(folder, texts, **options):
    """The vectors of documents and of one query, of each host's class."""
    with BGEEmbeddings(model=folder, **options) as langchain:
        yield langchain, langchain.embed_documents(texts), langchain.embed_query(texts[0])
    with BGEEmbedding(model=folder, **options) as llamaindex:
        documents = llamaindex.get_text_embedding_batch(texts)
        yield llamaindex, documents, llamaindex.get_query_embedding(texts[0])


@pytest.mark.parametrize("long_passages", ["truncate", "window"])
def test_documents_get_the_instruction_and_queries_don_t(unknown_folder, long_passages):
    options = {"batch_size": 1, "normalize_embeddings": True}
    texts = TEXTS[:2] if long_passages == "window" else TEXTS
    expected = theirs(unknown_folder).encode(texts, prompt="passage: ", **options)
    query = theirs(unknown_folder).encode([texts[0]], prompt="query: ", **options)
    instructions = {"document_instruction": "passage: ", "query_instruction": "query: "}
    own = {**instructions, "long_passages": long_passages, "on_truncation": "ignore"}
    with Embedder(unknown_folder, **own) as embedder:
        np.testing.assert_allclose(embedder.embed_documents(texts), expected, atol=1e-5)
        np.testing.assert_allclose(embedder.embed_queries(texts[:1]), query, atol=1e-5)
    for adapter, documents, asked in in_both_hosts(unknown_folder, texts, **own):
        np.testing.assert_allclose(documents, expected, atol=1e-5)
        np.testing.assert_allclose([asked], query, atol=1e-5)
        assert adapter.resolved.document_instruction == "passage: "
        assert adapter.document_instruction == "passage: "


def test_a_checkpoint_s_own_prompt_stays_and_an_argument_wins(prompt_folder, unknown_folder):
    model = theirs(prompt_folder)
    cases = {None: "passage: ", "doc: ": "doc: ", "": ""}
    for given, prompt in cases.items():
        expected = model.encode(TEXTS[:2], prompt=prompt, normalize_embeddings=True)
        with Embedder(prompt_folder, document_instruction=given) as embedder:
            np.testing.assert_allclose(embedder.embed_documents(TEXTS[:2]), expected, atol=1e-5)


def test_of_bge_it_is_applied_and_one_warning_says_why_not(en_folder, caplog):
    expected = theirs(en_folder).encode(TEXTS[:2], prompt="passage: ", normalize_embeddings=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with Embedder(en_folder, document_instruction="passage: ") as embedder:
                np.testing.assert_allclose(embedder.embed_documents(TEXTS[:2]), expected, atol=1e-5)
        Embedder(en_folder, document_instruction="")
    (message,) = caplog.messages
    assert "documents get none" in message
    assert str(en_folder) in message


def test_no_warning_where_an_instruction_has_its_place(
    unknown_folder, prompt_folder, llm_embedder_folder, caplog
):
    for folder in (unknown_folder, prompt_folder, llm_embedder_folder):
        Embedder(
            folder,
            document_instruction="passage: ",
            truncate_dim=8 if "acme" in str(folder) else None,
        )
    assert not caplog.messages


def test_an_instruction_counts_in_max_length_as_the_query_s_does(unknown_folder):
    long = "one two three four five " * 20
    with Embedder(
        unknown_folder,
        document_instruction="passage: ",
        query_instruction="passage: ",
        max_length=16,
        on_truncation="ignore",
    ) as embedder:
        np.testing.assert_array_equal(
            embedder.embed_documents([long]), embedder.embed_queries([long])
        )
    with (
        pytest.raises(ArgumentError, match="leaves no room for text"),
        Embedder(unknown_folder, document_instruction="passage " * 30, max_length=16) as embedder,
    ):
        embedder.embed_documents(["a"])


@pytest.mark.parametrize("long_passages", ["truncate", "window"])
@pytest.mark.parametrize(("words", "more"), [(30, True), (600, False)])
async def test_no_more_tokens_are_asked_for_than_the_model_takes(
    unknown_folder, call, long_passages, words, more
):
    given = {"document_instruction": "a " * words, "long_passages": long_passages}
    with (
        Embedder(unknown_folder, max_length=16, **given) as embedder,
        pytest.raises(ArgumentError, match=r"a shorter (document_)?instruction\.$") as refused,
    ):
        await call(embedder, "embed_documents", ["b " * 20])
    needed = re.findall(r"max_length=(\d+) or more", str(refused.value))
    assert needed == ([str(words + 3)] if more else [])
    if more:
        with Embedder(
            unknown_folder, max_length=words + 3, on_truncation="ignore", **given
        ) as embedder:
            assert (await call(embedder, "embed_documents", ["b " * 20])).shape == (1, 32)
    else:
        assert "No max_length that the model can take is enough" in str(refused.value)


@pytest.mark.parametrize("wrong", [1, ["passage: "], "\ud800"])
def test_what_is_no_instruction_is_a_sentence(unknown_folder, wrong):
    for make in (Embedder, BGEEmbeddings, BGEEmbedding):
        with pytest.raises(BGEError, match="document_instruction"):
            make(model=unknown_folder, document_instruction=wrong)


def test_vectors_are_cut_as_sentence_transformers_cuts_them(unknown_folder, m3_folder, caplog):
    own = {"truncate_dim": 8, "query_instruction": "", "on_truncation": "ignore"}
    model = theirs(unknown_folder, truncate_dim=8)
    options = {"batch_size": 1, "normalize_embeddings": True}
    expected = model.encode(TEXTS, **options)
    with Embedder(unknown_folder, **own) as embedder:
        assert embedder.dimension == 8
        found = embedder.embed_documents(TEXTS)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
        np.testing.assert_allclose(embedder.embed_queries(TEXTS), expected, atol=1e-5)
        assert embedder.embed_documents([]).shape == (0, 8)
    raw = model.encode(TEXTS, batch_size=1, normalize_embeddings=False)
    with Embedder(unknown_folder, **own, normalize=False) as embedder:
        np.testing.assert_allclose(embedder.embed_documents(TEXTS), raw, atol=1e-5)
    for adapter, documents, query in in_both_hosts(unknown_folder, TEXTS, **own):
        np.testing.assert_allclose(documents, expected, atol=1e-5)
        np.testing.assert_allclose(query, expected[0], atol=1e-5)
        assert (adapter.dimension, adapter.resolved.dimension) == (8, 8)
    assert not caplog.messages
    expected = theirs(m3_folder, truncate_dim=8).encode(TEXTS[:2], normalize_embeddings=True)
    with M3Embedder(m3_folder, truncate_dim=8) as m3:
        assert m3.dimension == 8
        np.testing.assert_allclose(m3.encode(TEXTS[:2]).dense, expected, atol=1e-5)
    assert "not trained to be cut" in caplog.text


def test_an_argument_wins_over_a_checkpoint_s_own_length(unknown_folder, copy_of):
    folder = copy_of(unknown_folder)
    (folder / "config_sentence_transformers.json").write_text('{"truncate_dim": 16}')
    whole = Embedder(unknown_folder).dimension
    for asked, dimension in ((None, 16), (8, 8), (20, 20), (whole, whole)):
        with Embedder(folder, truncate_dim=asked) as embedder:
            assert embedder.dimension == embedder.embed_documents(["a"]).shape[1] == dimension


@pytest.mark.parametrize("wrong", [0, -1, 10_000, True, 8.0, "8"])
def test_what_is_no_length_is_a_sentence_at_once(unknown_folder, m3_folder, wrong):
    for make in (Embedder, BGEEmbeddings, BGEEmbedding):
        with pytest.raises(BGEError, match="truncate_dim"):
            make(model=unknown_folder, truncate_dim=wrong)
    with pytest.raises(BGEError, match="truncate_dim"):
        M3Embedder(m3_folder, truncate_dim=wrong)
    for endpoint in (None, "http://localhost:1"):
        with pytest.raises(BGEError, match="truncate_dim"):
            make_embedder("BAAI/bge-small-en-v1.5", truncate_dim=wrong, endpoint=endpoint)


def test_both_are_in_the_fingerprint_and_nothing_is_where_neither_is_given(unknown_folder):
    options: tuple[dict[str, Any], ...] = (
        {},
        {"truncate_dim": 8},
        {"truncate_dim": 9},
        {"document_instruction": "a: "},
    )
    prints = [Embedder(unknown_folder, **each).fingerprint for each in options]
    assert len(set(prints)) == len(options)
    assert Embedder(unknown_folder, document_instruction="").fingerprint == prints[0]
    assert BGEEmbeddings(model=unknown_folder, truncate_dim=8).fingerprint == prints[1]
    one, other = (
        BGEEmbedding(model=unknown_folder),
        BGEEmbedding(model=unknown_folder, truncate_dim=8),
    )
    assert str(one.to_dict()) != str(other.to_dict())


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_server_s_vectors_are_cut_here_and_its_documents_get_the_instruction(server):
    width = 32
    server.embed = lambda texts: np.random.default_rng(0).normal(size=(len(texts), width))
    full = server.embed(["a"])[0]
    served = {"endpoint": server.address, "truncate_dim": 8, "document_instruction": "passage: "}
    for _, documents, _ in in_both_hosts("acme/e5-like", ["a"], query_instruction="", **served):
        np.testing.assert_allclose(documents[0], full[:8] / np.linalg.norm(full[:8]), atol=1e-6)
        assert ["passage: a"] in [body["input"] for _, body in server.asked]
    assert all("dimensions" not in body for _, body in server.asked)
    with (
        make_embedder("acme/e5-like", endpoint=server.address, truncate_dim=33) as embedder,
        pytest.raises(ArgumentError, match="truncate_dim=33 is more than the 32 numbers"),
    ):
        embedder.embed_documents(["a"])


def test_the_words_of_huggingface_embeddings(unknown_folder):
    expected = BGEEmbeddings(model=unknown_folder, truncate_dim=8)
    for name in ("model_kwargs", "encode_kwargs"):
        assert BGEEmbeddings(model=unknown_folder, **{name: {"truncate_dim": 8}}) == expected
