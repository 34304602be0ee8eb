"""What is said of texts that don't fit: which, how long, and what would read them."""

import logging

import pytest
from transformers import AutoTokenizer

from bge_core import Embedder, M3Embedder, M3Reranker, Reranker, TruncationError, make_reranker
from langchain_bge import BGEEmbeddings
from llamaindex_bge import BGEEmbedding

LONG, LONGER = "panda " * 40, "panda " * 70
TEXTS = ["a", LONG, "b", LONGER, *["c"] * 20, *[LONG] * 5]
LIMIT = 16


@pytest.fixture(autouse=True)
def _logged(caplog):
    caplog.set_level(logging.WARNING, logger="bge_core.tokenizer")


def said(caplog, what, places, longest, capacity, where="at"):
    (message,) = caplog.messages
    caplog.clear()
    are = "is" if what.startswith("1 ") else "are"
    assert message.startswith(f"{what} {are} longer than max_length={LIMIT} tokens of ")
    assert f"({where} index {places}; the longest has {longest})" in message
    assert f"raise max_length, of which the model takes {capacity}" in message
    assert ", or " in message.partition("not read.")[2]
    return "long_passages='window'" in message


async def test_of_documents_and_queries(en_folder, m3_folder, call, caplog):
    tokens = {folder: AutoTokenizer.from_pretrained(folder) for folder in (en_folder, m3_folder)}
    own = len(tokens[en_folder](LONGER)["input_ids"])
    places = "1, 3, 24, 25, 26, ..."
    with Embedder(en_folder, max_length=LIMIT, query_instruction="") as embedder:
        await call(embedder, "embed_documents", TEXTS)
        assert said(caplog, "7 of 29 documents", places, own, 512)
        await call(embedder, "embed_queries", TEXTS)
        assert not said(caplog, "7 of 29 queries", places, own, 512)
        await call(embedder, "embed_queries", ["a", "b"])
        assert not caplog.messages
    m3 = len(tokens[m3_folder](LONGER)["input_ids"])
    with M3Embedder(m3_folder, max_length=LIMIT) as embedder:
        await call(embedder, "encode", TEXTS)
        assert not said(caplog, "7 of 29 texts", places, m3, 8192)
        await call(embedder, "score", [("a", text) for text in TEXTS])
        assert not said(caplog, "2 of 5 texts", places, m3, 8192, "in the pairs at")


async def test_of_pairs(bert_reranker_folder, m3_folder, call, caplog):
    tokenizer = AutoTokenizer.from_pretrained(bert_reranker_folder)
    with Reranker(bert_reranker_folder, max_length=LIMIT) as reranker:
        await call(reranker, "score", "a", ["b", LONGER])
        longest = len(tokenizer("a", LONGER)["input_ids"])
        assert said(caplog, "1 of 2 pairs", "1", longest, 512)
        await call(reranker, "score", LONG, ["b", LONGER])
        longest = len(tokenizer(LONG, LONGER)["input_ids"])
        assert said(caplog, "2 of 2 pairs", "0, 1", longest, 512)
    tokenizer = AutoTokenizer.from_pretrained(m3_folder)
    longest = len(tokenizer(LONGER)["input_ids"])
    with M3Reranker(M3Embedder(m3_folder, max_length=LIMIT)) as reranker:
        await call(reranker, "score", "a", ["b", LONGER])
        assert said(caplog, "1 of 3 texts", "1", longest, 8192, "in the pairs at")
    with make_reranker(m3_folder, max_length=LIMIT, long_passages="window") as reranker:
        await call(reranker, "score", "a", ["b", LONGER])
        assert not caplog.messages
        await call(reranker, "score", LONGER, ["b", LONGER])
        assert not said(caplog, "2 of 2 queries", "0, 1", longest, 8192)


def test_an_error_says_it_too_and_a_model_s_own_limit_can_t_be_raised(en_folder):
    with (
        Embedder(en_folder, on_truncation="error") as embedder,
        pytest.raises(TruncationError, match=r"\(at index 1; the longest has \d+\)") as caught,
    ):
        embedder.embed_documents(["a", "panda " * 600])
    assert "raise max_length" not in str(caught.value)
    assert str(caught.value).endswith("or pass on_truncation='warn'.")


def test_in_both_hosts(en_folder, caplog):
    with BGEEmbeddings(model=en_folder, max_length=LIMIT) as embeddings:
        embeddings.embed_documents(["a", LONG])
        assert "1 of 2 documents" in caplog.text
        assert "at index 1;" in caplog.text
    caplog.clear()
    with BGEEmbedding(model=en_folder, max_length=LIMIT) as embedding:
        embedding.get_text_embedding_batch(["a", LONG])
        assert "at index 1;" in caplog.text
