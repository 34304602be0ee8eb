"""A hub token is in nothing that is shown, logged, stored or sent."""

from __future__ import annotations

import copy
import logging
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.load import dumpd, dumps
from llama_index.core.schema import NodeWithScore, TextNode

import langchain_bge
import llamaindex_bge
from bge_core import ArgumentError, BGEError, Embedder, M3Embedder, Reranker
from bge_core.checkpoints.source import Source
from tests.contract.llamaindex_suite import LegacyRecorder, recorded

__all__ = ["recorded"]

TOKEN = "hf_AbCdEfGhIjKlMnOp"
NAME = "acme/own-model"  # no published checkpoint: everything about it has to be fetched

MAKE: dict[str, Callable[..., Any]] = {
    "Embedder": lambda **more: Embedder(NAME, token=TOKEN, **more),
    "M3Embedder": lambda **more: M3Embedder(NAME, token=TOKEN, **more),
    "Reranker": lambda **more: Reranker(NAME, token=TOKEN, **more),
    "BGEEmbeddings": lambda **more: langchain_bge.BGEEmbeddings(model=NAME, token=TOKEN, **more),
    "BGESparseEmbeddings": lambda **more: langchain_bge.BGESparseEmbeddings(
        model=NAME, token=TOKEN, **more
    ),
    "BGEEmbedding": lambda **more: llamaindex_bge.BGEEmbedding(
        model_name=NAME, token=TOKEN, **more
    ),
    "BGESparseEmbedding": lambda **more: llamaindex_bge.BGESparseEmbedding(
        model_name=NAME, token=TOKEN, **more
    ),
}
WORK = (
    ("embed_documents", (["a"],)),
    ("encode", (["a"],)),
    ("score", ("q", ["a"])),
    ("score_pairs", ([("q", "a")],)),
    ("get_text_embedding_batch", (["a"],)),
)


def shown(model: Any) -> list[str]:
    """Everything by which a model, or a copy of it, may come to be read."""
    texts = []
    for one in (model, copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        texts += [repr(one), str(one), f"{one}"]
        for name in ("model_dump", "model_dump_json", "to_dict", "to_json", "to_payload"):
            if hasattr(one, name):
                texts.append(repr(getattr(one, name)()))
    if isinstance(model, langchain_bge.BGEEmbeddings):
        texts += [dumps(model), repr(dumpd(model))]
    return texts


@pytest.mark.parametrize("name", MAKE)
def test_what_shows_a_model_shows_no_token(name: str):
    model = MAKE[name]()
    assert not [text for text in shown(model) if TOKEN in text]


@pytest.mark.parametrize("name", MAKE)
async def test_what_fails_says_no_token(
    name: str, call: Any, caplog: Any, capfd: Any, recorded: Any
):
    caplog.set_level(logging.DEBUG, logger="")
    with MAKE[name]() as model:
        for method, arguments in WORK:
            if hasattr(model, method) and not (method == "score" and isinstance(model, M3Embedder)):
                with pytest.raises(BGEError, match="can't be found") as caught:
                    await call(model, method, *arguments)
                # With its causes, which are the hub's own errors.
                assert TOKEN not in "".join(traceback.format_exception(caught.value))
    for wrong in ({"dtype": "int3"}, {"max_length": -1}, {"nonsense": 1}, {"device": 7}):
        with pytest.raises((BGEError, TypeError)) as refused:
            MAKE[name](**wrong)
        assert TOKEN not in "".join(traceback.format_exception(refused.value))
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())
    assert TOKEN not in repr(recorded.seen)


@pytest.mark.parametrize("wrong", [7, ["hf_AbCdEfGhIjKlMnOp"]])
@pytest.mark.parametrize("name", ["BGEEmbeddings", "BGEEmbedding"])
def test_a_token_of_a_wrong_type_is_not_shown_either(name: str, wrong: Any):
    classes = {
        "BGEEmbeddings": langchain_bge.BGEEmbeddings,
        "BGEEmbedding": llamaindex_bge.BGEEmbedding,
    }
    with pytest.raises(BGEError, match="token") as caught:
        classes[name](model_name=NAME, token=wrong)
    assert "AbCdEf" not in "".join(traceback.format_exception(caught.value))


async def test_events_have_no_token(call: Any, en_folder: Any, reranker_folder: Any, recorded: Any):
    from llama_index.core.callbacks import CallbackManager

    older = LegacyRecorder()
    manager = CallbackManager([older])
    with (
        llamaindex_bge.BGEEmbedding(
            model_name=en_folder, token=TOKEN, callback_manager=manager
        ) as embedding,
        llamaindex_bge.BGEReranker(
            model=reranker_folder, token=TOKEN, callback_manager=manager
        ) as reranker,
    ):
        await call(embedding, "get_text_embedding_batch", ["a", "b"])
        await call(embedding, "get_query_embedding", "a")
        nodes = [NodeWithScore(node=TextNode(text="a"))]
        await call(reranker, "postprocess_nodes", nodes, query_str="q")
    assert recorded.seen
    assert older.started
    events = [repr(event) + event.model_dump_json() for event in recorded.seen]
    assert TOKEN not in "".join(events) + repr(older.started) + repr(older.ended)


@pytest.mark.parametrize("token", [TOKEN + "\n", f" {TOKEN}"])
def test_a_token_that_was_read_from_a_file_is_taken_bare(token: str):
    assert Source.of("BAAI/bge-m3", token=token).token == TOKEN


@pytest.mark.parametrize("token", ["", "\n", f"{TOKEN}\nX: y", f"{TOKEN}é"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(token: str):
    with pytest.raises(ArgumentError, match="token is empty, or has characters") as refused:
        Source.of("BAAI/bge-m3", token=token)
    assert TOKEN not in str(refused.value)
