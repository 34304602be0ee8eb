"""Counters: against the tokenizer's own lengths, the passes that a hook sees, what was asked."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import os
import pickle
import threading
import time

import pytest
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoTokenizer

from bge_core import (
    ClosedError,
    Embedder,
    InputTypeError,
    M3Embedder,
    M3Reranker,
    ModelStats,
    RemoteEmbedder,
    RemoteReranker,
    Reranker,
)
from bge_core.engine.scheduler import Engine
from bge_core.engine.stats import Counters, Waiting
from bge_core.testing import fake_embedder, fake_reranker
from bge_core.tokenizer import TokenSequence
from langchain_bge import BGECrossEncoder, BGEEmbeddings, BGEReranker, BGESparseEmbeddings
from llamaindex_bge import BGEEmbedding
from tests.conftest import CORPUS

INSTRUCTION = "Represent this sentence for searching relevant passages: "
QUERIES = ["where is Paris?", "a cat", "where is Paris?"]
DOCUMENTS = ["Paris is the capital of France.", "Cats purr.", "", "Cats purr."]

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


def lengths(folder, texts, other=None):
    return sum(map(len, AutoTokenizer.from_pretrained(folder)(texts, other).input_ids))


def settled(owner):
    """Read the counters once a pack's rows are all handed out, which is counted last."""
    for _ in range(1000):
        if owner.stats().seconds.hand_out > 0:
            break
        time.sleep(0.005)
    return owner.stats()


@pytest.fixture
def forward_passes():
    """One entry a pass of the tests' BERT: it looks each pack's words up once."""
    counted = []

    def count(module, arguments):
        # Other tables than the words' have as many rows as there are positions or types.
        if type(module).__name__ == "Embedding" and module.num_embeddings not in (2, 512):
            counted.append(arguments)

    hook = register_module_forward_pre_hook(count)
    yield counted
    hook.remove()


async def test_texts_tokens_and_packs_of_an_embedder(en_folder, forward_passes):
    embedder = Embedder(en_folder)
    assert embedder.stats() == ModelStats()
    embedder.embed_queries(QUERIES)
    first = embedder.stats()
    distinct = [INSTRUCTION + text for text in dict.fromkeys(QUERIES)]
    assert (first.requests, first.texts, first.sequences) == (1, 3, 2)
    assert first.tokens == lengths(en_folder, distinct)
    assert first.packs == len(forward_passes) > 0
    await embedder.aembed_documents(DOCUMENTS)
    second = embedder.stats()
    assert (second.requests, second.texts, second.sequences) == (2, 7, 5)
    assert second.tokens - first.tokens == lengths(en_folder, list(dict.fromkeys(DOCUMENTS)))
    assert second.packs == len(forward_passes) > first.packs
    seconds = settled(embedder).seconds
    assert min(dataclasses.astuple(seconds)) > 0
    assert second.interactive == second.background == Waiting()
    embedder.close()


def test_tokens_are_those_that_are_read(en_folder):
    with Embedder(en_folder, max_length=8, on_truncation="ignore") as embedder:
        embedder.embed_documents([CORPUS[5], "Cats purr."])
        assert embedder.stats().tokens == 8 + lengths(en_folder, ["Cats purr."])
    with Embedder(en_folder, on_truncation="error") as embedder:
        embedder.embed_documents(DOCUMENTS)
        assert embedder.stats().tokens == lengths(en_folder, list(dict.fromkeys(DOCUMENTS)))


async def test_concurrent_queries_share_packs(en_folder, forward_passes):
    with Embedder(en_folder) as embedder:
        await embedder.aembed_queries(["warm"])
        before = embedder.stats()
        assert before.packs == len(forward_passes)
        await asyncio.gather(*(embedder.aembed_queries([f"query {i}"]) for i in range(40)))
        after = embedder.stats()
        assert after.requests - before.requests == after.sequences - before.sequences == 40
        assert after.packs == len(forward_passes)
        assert after.packs - before.packs < 40


def test_pairs_of_a_reranker(reranker_folder):
    pairs = [("a cat", text) for text in dict.fromkeys(DOCUMENTS)]
    with Reranker(reranker_folder) as reranker:
        reranker.rank("a cat", DOCUMENTS)
        asyncio.run(reranker.ascore_pairs([("a", "b")]))
        stats = reranker.stats()
    assert (stats.requests, stats.texts, stats.sequences) == (2, 5, 4)
    assert stats.tokens == lengths(reranker_folder, *map(list, zip(*pairs, strict=True))) + lengths(
        reranker_folder, ["a"], ["b"]
    )


@pytest.mark.parametrize("model", ["embedder", "reranker", "m3"])
def test_windows_are_one_request_and_many_sequences(model, en_folder, reranker_folder, m3_folder):
    long = " ".join(CORPUS)
    options = {"max_length": 40, "long_passages": "window"}
    texts = [long, "Cats purr."]
    owner: Embedder | Reranker | M3Reranker
    if model == "embedder":
        owner = Embedder(en_folder, **options)
        owner.embed_documents(texts)
    elif model == "reranker":
        owner = Reranker(reranker_folder, **options)
        owner.rank("a cat", texts)
    else:
        embedder = M3Embedder(m3_folder, max_length=40)
        owner = M3Reranker(embedder, long_passages="window")
        owner.rank("a cat", texts)
        assert owner.stats().requests == embedder.stats().requests
    owner.close()
    stats = owner.stats()
    assert (stats.requests, stats.texts) == (1, 2)
    assert stats.sequences > 10


def test_bge_m3_counts_passes_and_what_they_left_for_each_other(m3_folder, passes):
    texts = ["Paris is in France.", "Cats purr."]
    with M3Embedder(m3_folder, share_outputs=True) as embedder:
        embedder.encode(texts, sparse=False)
        embedder.encode(texts, dense=False)
        stats = embedder.stats()
        assert (stats.requests, stats.texts, stats.cache_hits) == (2, 4, 2)
        assert len(passes) == 1
        assert stats.tokens == 2 * lengths(m3_folder, texts)
        embedder.score([("a cat", texts[0]), ("a cat", texts[1])])
        stats = embedder.stats()
        assert (stats.requests, stats.texts, stats.sequences) == (3, 6, 7)
    assert embedder.stats().cache_hits == 2


def test_each_object_counts_its_own_on_shared_weights(en_folder):
    with Embedder(en_folder) as one, Embedder(en_folder) as other:
        one.embed_queries(["a cat"])
        assert other.stats() == ModelStats()
        other.embed_documents(DOCUMENTS)
        assert (one.stats().requests, one.stats().sequences) == (1, 1)
        assert (other.stats().requests, other.stats().sequences) == (1, 3)


def test_a_closed_model_s_counters_stay(en_folder):
    embedder = Embedder(en_folder)
    embedder.embed_queries(QUERIES)
    before = settled(embedder)
    embedder.close()
    assert embedder.stats() == before
    with pytest.raises(ClosedError):
        embedder.embed_queries(QUERIES)
    with pytest.raises(ClosedError):
        embedder.embed_documents([])
    assert embedder.stats() == before


def test_a_signal_s_handler_may_close_and_read_whatever_its_thread_was_at(en_folder):
    embedder = Embedder(en_folder)

    def interrupted():
        with embedder._model.counters._lock:  # here the signal comes
            embedder.close()
            embedder.stats()

    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_what_is_refused_is_not_counted(en_folder, reranker_folder):
    with Embedder(en_folder) as embedder, Reranker(reranker_folder) as reranker:
        for wrong in (
            lambda: embedder.embed_queries("bare"),
            lambda: embedder.embed_documents([1]),
            lambda: reranker.rank(1, ["a"]),
        ):
            with pytest.raises(InputTypeError):
                wrong()
        assert embedder.stats() == reranker.stats() == ModelStats()


def test_copies_and_pickles_start_at_zero(en_folder):
    with Embedder(en_folder) as embedder, fake_embedder("BAAI/bge-m3") as fake:
        for owner in (embedder, fake):
            owner.embed_queries(QUERIES)
            for made in (copy.copy(owner), copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
                assert made.stats() == ModelStats()
            assert owner.stats().texts == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_starts_at_zero(en_folder):
    with Embedder(en_folder) as embedder:
        embedder.embed_queries(QUERIES)
        child = os.fork()
        if not child:
            os._exit(0 if embedder.stats() == ModelStats() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert embedder.stats().requests == 1


def test_no_thread_s_count_is_lost(en_folder):
    with Embedder(en_folder) as embedder:

        def ask():
            for _ in range(25):
                embedder.embed_queries(["a cat"])
                embedder.stats()

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = embedder.stats()
    assert stats.requests == stats.texts == stats.sequences == 200
    assert stats.tokens == 200 * lengths(en_folder, [INSTRUCTION + "a cat"])


class Gate:
    """A runner that waits until it may go on."""

    padded = False
    threads = 1
    default_budget = 4

    def __init__(self):
        self.begun, self.open = threading.Event(), threading.Event()

    def run(self, sequences):
        self.begun.set()
        assert self.open.wait(10)
        return [[0.0]] * len(sequences)


def test_the_queue_by_priority():
    gate, counters = Gate(), Counters()
    engine = Engine({"interactive": [gate], "background": [gate]}, tokenizer=None, name="gate")

    def submit(count, priority, caller=None):
        some = [TokenSequence([7, 7], 2)] * count
        return engine.submit(some, priority=priority, caller=caller, counters=counters)

    futures = [submit(2, "interactive")]
    assert gate.begun.wait(10)
    futures += [submit(3, "interactive", "one"), submit(1, "interactive", "one")]
    futures += [submit(5, "interactive", "two")]
    assert engine.waiting()["interactive"] == Waiting(callers=2, sequences=9)
    futures[-1].cancel()
    assert engine.waiting()["interactive"] == Waiting(callers=1, sequences=4)
    assert counters.stats(engine.waiting()).interactive == Waiting(callers=1, sequences=4)
    began = time.perf_counter()
    time.sleep(0.02)
    gate.open.set()
    for future in futures[:-1]:
        future.result(10)
    waited = time.perf_counter() - began
    stats = counters.stats(engine.waiting())
    assert stats.interactive == stats.background == Waiting()
    assert (stats.sequences, stats.tokens, stats.packs) == (11, 22, 3)
    # Both jobs that waited did so for 0.02 s at least, and so did the first pass.
    assert stats.seconds.wait >= 0.04
    assert stats.seconds.compute >= 0.02
    assert waited > 0.02


def test_what_is_known_of_a_server(server, en_folder, reranker_folder):
    with RemoteEmbedder("BAAI/bge-small-en-v1.5", endpoint=server.address) as embedder:
        server.embed = lambda texts: [[1.0] * 384] * len(texts)
        embedder.embed_queries(QUERIES)
        embedder.embed_documents([f"text {i}" for i in range(70)])
        stats = embedder.stats()
    assert (stats.requests, stats.texts, stats.sequences, stats.tokens) == (2, 73, 72, 0)
    assert stats.packs == len(server.asked) == 4
    assert stats.seconds.compute > 0
    assert stats.seconds.wait == stats.seconds.tokenize == 0
    server.asked.clear()
    with RemoteReranker("BAAI/bge-reranker-base", endpoint=server.address) as reranker:
        reranker.rank("a cat", DOCUMENTS)
    assert (reranker.stats().requests, reranker.stats().texts) == (1, 4)
    assert reranker.stats().packs == len(server.asked) - 2  # it asks twice which server it is


def test_the_hosts_adapters_give_them(en_folder, m3_folder, reranker_folder):
    queries = lengths(en_folder, [INSTRUCTION + "a cat"])
    for adapter, ask in (
        (BGEEmbeddings(model=en_folder), "embed_query"),
        (BGEEmbedding(model_name=str(en_folder)), "get_query_embedding"),
    ):
        getattr(adapter, ask)("a cat")
        assert (adapter.stats().requests, adapter.stats().tokens) == (1, queries)
        adapter.close()
        assert adapter.stats().requests == 1
    with BGEReranker(model=reranker_folder) as reranker:
        reranker.rerank(["a", "b"], "a cat")
    with BGECrossEncoder(model=reranker_folder) as scorer:
        scorer.score([("a", "b"), ("a", "c")])
    with BGESparseEmbeddings(model=m3_folder) as sparse:
        sparse.embed_documents(["a", "b"])
    for owner in (reranker, scorer, sparse):
        assert (owner.stats().requests, owner.stats().texts) == (1, 2)


def test_fakes_count_what_they_are_asked():
    embedder, reranker = fake_embedder("BAAI/bge-m3"), fake_reranker("BAAI/bge-reranker-base")
    embedder.embed_documents(DOCUMENTS)
    reranker.rank("a cat", DOCUMENTS)
    for owner in (embedder, reranker):
        stats = owner.stats()
        assert (stats.requests, stats.texts, stats.sequences) == (1, 4, 3)
