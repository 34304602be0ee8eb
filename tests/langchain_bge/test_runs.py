"""A rerank in LangChain's traces and chains: a run of its own, with query, counts and scores."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from bge_core import ArgumentError, InputTypeError
from langchain_bge import BGEReranker

TEXTS = ["A cat sat on the mat.", "Paris is the capital of France.", "Water boils."]
QUERY = "what is the capital of France?"


class Fixed(BaseRetriever):
    """Finds the same documents whatever is asked."""

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [Document(id=str(n), page_content=text) for n, text in enumerate(TEXTS)]


class Recorder(BaseCallbackHandler):
    """Keeps runs: name, parent, inputs, outputs, error."""

    def __init__(self) -> None:
        self.runs: dict[Any, dict[str, Any]] = {}

    def on_chain_start(self, serialized, inputs, *, run_id, parent_run_id=None, **kwargs):
        self.runs[run_id] = {"name": kwargs.get("name"), "parent": parent_run_id, "in": inputs}

    def on_chain_end(self, outputs, *, run_id, **kwargs):
        self.runs[run_id]["out"] = outputs

    def on_chain_error(self, error, *, run_id, **kwargs):
        self.runs[run_id]["error"] = error

    def named(self, name):
        return [run for run in self.runs.values() if run["name"] == name]


class AsyncRecorder(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.ended: list[Any] = []

    async def on_chain_end(self, outputs, **kwargs):
        self.ended.append(outputs)


@pytest.fixture
def reranker(reranker_folder):
    return BGEReranker(model=reranker_folder, top_n=2)


@pytest.fixture
def documents():
    return Fixed().invoke(QUERY)


def check(run, reranker, documents, kept):
    assert run["in"]["query"] == QUERY
    assert run["in"]["documents"] == documents
    assert (run["in"]["count"], run["in"]["top_n"]) == (3, 2)
    assert run["in"]["model"] == reranker.model_name
    assert run["out"]["documents"] == kept
    assert run["out"]["count"] == len(kept) == 2
    assert run["out"]["scores"] == [document.metadata["relevance_score"] for document in kept]


async def test_callbacks_are_told(call, reranker, documents):
    recorder = Recorder()
    kept = await call(reranker, "compress_documents", documents, QUERY, callbacks=[recorder])
    ((run),) = recorder.runs.values()
    assert run["name"] == "BGEReranker"
    check(run, reranker, documents, kept)
    assert kept == reranker.compress_documents(documents, QUERY)


async def test_async_callbacks_are_told(reranker, documents):
    recorder = AsyncRecorder()
    kept = await reranker.acompress_documents(documents, QUERY, callbacks=[recorder])
    assert [outputs["documents"] for outputs in recorder.ended] == [kept]


async def test_an_error_ends_the_run(call, reranker):
    recorder = Recorder()
    broken = [Document(page_content="a lone surrogate: \ud800")]
    with pytest.raises(ArgumentError, match="surrogate") as caught:
        await call(reranker, "compress_documents", broken, QUERY, callbacks=[recorder])
    (run,) = recorder.runs.values()
    assert run["error"] is caught.value
    assert "out" not in run


async def test_a_compression_retriever_hands_its_callbacks_down(call, reranker):
    recorder = Recorder()
    retriever = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=Fixed())
    kept = await call(retriever, "invoke", QUERY, config={"callbacks": [recorder]})
    (run,) = recorder.named("BGEReranker")
    assert run["parent"] is not None
    check(run, reranker, Fixed().invoke(QUERY), kept)


async def test_within_a_lambda_it_is_a_child(call, reranker, documents):
    async def arerank(query):
        return await reranker.acompress_documents(documents, query)

    chain = RunnableLambda(lambda query: reranker.compress_documents(documents, query), arerank)
    recorder = Recorder()
    await call(chain, "invoke", QUERY, config={"callbacks": [recorder]})
    (run,) = recorder.named("BGEReranker")
    assert run["parent"] in recorder.runs


STEPS = {
    "dict": lambda reranker: (
        {"documents": Fixed(), "query": RunnablePassthrough()} | reranker.as_runnable()
    ),
    "retriever": lambda reranker: reranker.as_runnable(Fixed()),
    "keys": lambda reranker: (
        {"context": Fixed(), "question": RunnablePassthrough()}
        | reranker.as_runnable(query_key="question", documents_key="context")
    ),
}


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_of_a_chain(call, reranker, documents, step):
    chain = STEPS[step](reranker) | RunnableLambda(lambda found: found)
    recorder = Recorder()
    kept = await call(chain, "invoke", QUERY, config={"callbacks": [recorder]})
    assert kept == reranker.compress_documents(documents, QUERY)
    (run,) = recorder.named("BGEReranker")
    assert run["parent"] in recorder.runs
    check(run, reranker, documents, kept)
    batch = await call(chain, "batch", [QUERY, QUERY])
    assert batch == [kept, kept]


async def test_the_step_s_name(call, reranker):
    step = reranker.as_runnable(Fixed(), name="second stage")
    recorder = Recorder()
    await call(step, "invoke", QUERY, config={"callbacks": [recorder]})
    assert len(recorder.named("second stage")) == 1
    alone = reranker.as_runnable(name="rerank")
    assert alone.get_name() == "rerank"
    given = {"query": QUERY, "documents": Fixed().invoke(QUERY)}
    renamed = alone.with_config(run_name="another", tags=["mine"])
    await call(renamed, "invoke", given, config={"callbacks": [recorder]})
    assert len(recorder.named("another")) == 1


async def test_astream_events(reranker):
    chain = reranker.as_runnable(Fixed()) | RunnableLambda(lambda found: found)
    events = [event async for event in chain.astream_events(QUERY, version="v2")]
    start, end = (event for event in events if event["name"] == "BGEReranker")
    assert (start["event"], end["event"]) == ("on_chain_start", "on_chain_end")
    assert start["data"]["input"]["query"] == QUERY
    assert end["data"]["output"]["count"] == 2
    assert all(0 <= score <= 1 for score in end["data"]["output"]["scores"])


async def test_what_a_step_can_t_take_is_a_sentence(call, reranker, documents):
    step = reranker.as_runnable()
    with pytest.raises(InputTypeError, match=r"documents alone don't say the query. Write \{"):
        await call(Fixed() | step, "invoke", QUERY)
    with pytest.raises(ArgumentError, match="got the keys 'question', 'documents'"):
        await call(step, "invoke", {"question": QUERY, "documents": documents})
    with pytest.raises(InputTypeError, match="documents must be a list"):
        await call(step, "invoke", {"query": QUERY, "documents": "abc"})


async def test_two_stages_keep_both_scores(call, reranker, bert_reranker_folder, documents):
    first = BGEReranker(model=bert_reranker_folder, top_n=None)
    found = [
        document.model_copy(update={"metadata": {"retrieval_score": n / 10}})
        for n, document in enumerate(documents)
    ]
    once = await call(first, "compress_documents", found, QUERY)
    twice = await call(reranker, "compress_documents", once, QUERY)
    thrice = await call(first, "compress_documents", twice, QUERY)
    scores = {document.id: document.metadata["relevance_score"] for document in once}
    second = {document.id: document.metadata["relevance_score"] for document in twice}
    assert len(thrice) == 2
    for document in thrice:
        assert document.metadata == {
            "retrieval_score": int(document.id) / 10,
            "relevance_score": pytest.approx(scores[document.id], abs=1e-6),
            "relevance_score_1": scores[document.id],
            "relevance_score_2": second[document.id],
        }
    assert all("relevance_score_1" not in document.metadata for document in once)
