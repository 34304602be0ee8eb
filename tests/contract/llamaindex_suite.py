"""A contract suite for LlamaIndex embeddings and rerankers, which the host itself has none of.

Subclass `EmbeddingContract` or `RerankerContract` in a test module, override the fixture that
gives the class and its arguments, and set the flags that differ. Everything goes through the
host's public methods, sync and async, so that any integration can be held to it.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import pickle
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from llama_index.core import Settings
from llama_index.core.base.embeddings.base import BaseEmbedding, SimilarityMode
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.instrumentation import (  # type: ignore[attr-defined]
    get_dispatcher,
)
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.embedding import (
    EmbeddingEndEvent,
    EmbeddingStartEvent,
)
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.rate_limiter import BaseRateLimiter
from llama_index.core.schema import (
    ImageNode,
    IndexNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.storage.kvstore import SimpleKVStore

__all__ = ["EmbeddingContract", "Recorder", "RerankerContract", "recorded"]

Call = Callable[..., Awaitable[Any]]


class Recorder(BaseEventHandler):
    """Keeps every event that is dispatched."""

    seen: list[Any] = []  # noqa: RUF012 - pydantic copies it

    @classmethod
    def class_name(cls) -> str:
        return "Recorder"

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.seen.append(event)

    def of(self, *kinds: type) -> list[Any]:
        return [event for event in self.seen if isinstance(event, kinds)]


class LegacyRecorder(BaseCallbackHandler):
    """Keeps every event of the older callback system; it can't be pickled, as many can't."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.started: list[tuple[CBEventType, Any, str]] = []
        self.ended: list[tuple[CBEventType, Any, str]] = []
        self.lock = threading.Lock()

    def on_event_start(
        self,
        event_type: CBEventType,
        payload: Any = None,
        event_id: str = "",
        parent_id: str = "",
        **kwargs: Any,
    ) -> str:
        self.started.append((event_type, payload, event_id))
        return event_id

    def on_event_end(
        self,
        event_type: CBEventType,
        payload: Any = None,
        event_id: str = "",
        parent_id: str = "",
        **kwargs: Any,
    ) -> None:
        self.ended.append((event_type, payload, event_id))

    def start_trace(self, trace_id: str | None = None) -> None: ...

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None: ...


class CountingLimiter(BaseRateLimiter):
    """Counts how often it was asked; it can't be pickled, as the host's own can't."""

    def __init__(self) -> None:
        self.asked = 0
        self.lock = threading.Lock()

    def acquire(self, num_tokens: int = 0) -> None:
        self.asked += 1

    async def async_acquire(self, num_tokens: int = 0) -> None:
        self.asked += 1


@pytest.fixture
def recorded() -> Iterator[Recorder]:
    """Record the host's events; a test module imports it beside the contract."""
    recorder = Recorder()
    root = get_dispatcher()
    root.add_event_handler(recorder)
    yield recorder
    root.event_handlers.remove(recorder)


def assert_close(one: Any, two: Any, tolerance: float) -> None:
    np.testing.assert_allclose(np.array(one), np.array(two), rtol=0, atol=tolerance)


def assert_floats(vector: Any) -> None:
    assert isinstance(vector, list), f"a vector must be a list, got {type(vector)}"
    assert vector, "a vector must not be empty"
    assert all(type(value) is float for value in vector), f"{type(vector[0])} is no Python float"


class EmbeddingContract:
    """What every `BaseEmbedding` must do."""

    texts: tuple[str, ...] = (
        "Paris is the capital and the largest city of France.",
        "A cat sat on the mat, and the dog slept in the garden all day long.",
        "Water boils at 100 degrees Celsius at sea level.",
        "北京是中国的首都，今天天气很好。",
        "",
        "one two three four five six seven eight nine ten " * 20,
        "Paris is the capital and the largest city of France.",
    )
    """Some texts, one of them empty and two of them equal."""

    queries: tuple[str, ...] = ("where is Paris?", "who sat on the mat?", "when does it boil?")

    tolerance: float = 1e-5
    """By how much a number may differ between batches of different shapes."""

    many: int = 1500
    """So many short texts take long enough to see whether the event loop goes on meanwhile."""

    instructs_queries: bool = True
    """Whether a query's vector differs from that of an equal document."""

    other_arguments: dict[str, Any] = {}  # noqa: RUF012 - overridden, never changed
    """Arguments, each of which changes the vectors."""

    idle_arguments: dict[str, Any] = {}  # noqa: RUF012
    """Arguments, none of which changes a vector."""

    secret_arguments: dict[str, str] = {}  # noqa: RUF012
    """Arguments that must never be shown."""

    pickle_bytes: int = 10_000
    """How large a pickle may be: a configuration, and no weights."""

    @pytest.fixture
    def embedding(self) -> tuple[type[BaseEmbedding], dict[str, Any]]:
        """Give the class and its arguments."""
        pytest.fail("a subclass must give this fixture")

    @pytest.fixture
    def make(self, embedding: tuple[type[BaseEmbedding], dict[str, Any]]) -> Any:
        """Make an embedding, with some arguments given anew."""
        kind, arguments = embedding

        def make(**changed: Any) -> BaseEmbedding:
            return kind(**{**arguments, **changed})

        return make

    # Types and order

    def test_names_itself(self, make: Any) -> None:
        model = make()
        assert isinstance(model, BaseEmbedding)
        assert model.class_name() == type(model).__name__
        assert model.to_dict()["class_name"] == type(model).__name__

    async def test_one_text_is_a_list_of_python_floats(self, make: Any, call: Call) -> None:
        model = make()
        text = await call(model, "get_text_embedding", self.texts[0])
        query = await call(model, "get_query_embedding", self.texts[0])
        assert_floats(text)
        assert_floats(query)
        assert len(text) == len(query)

    @pytest.mark.parametrize("count", [0, 1, 7])
    async def test_any_number_of_texts(self, make: Any, call: Call, count: int) -> None:
        vectors = await call(make(), "get_text_embedding_batch", list(self.texts[:count]))
        assert len(vectors) == count
        for vector in vectors:
            assert_floats(vector)

    @pytest.mark.parametrize("wrong", ["one text", b"bytes", {"a": 1}, {"a", "b"}, None, 3])
    async def test_what_is_no_list_of_texts_is_refused(
        self, make: Any, call: Call, wrong: Any
    ) -> None:
        """Not embedded letter by letter, or key by key."""
        with pytest.raises(TypeError, match="texts must be a list of str"):
            await call(make(), "get_text_embedding_batch", wrong)

    @pytest.mark.parametrize("size", [1, 3, 2048])
    async def test_order_and_batches(self, make: Any, call: Call, size: int) -> None:
        model = make(embed_batch_size=size)
        vectors = await call(model, "get_text_embedding_batch", list(self.texts))
        singles = [model.get_text_embedding(text) for text in self.texts]
        assert_close(vectors, singles, self.tolerance)

    async def test_workers_keep_the_order(self, make: Any) -> None:
        model = make(embed_batch_size=2, num_workers=2)
        vectors = await model.aget_text_embedding_batch(list(self.texts))
        assert_close(vectors, model.get_text_embedding_batch(list(self.texts)), self.tolerance)

    async def test_sync_is_async(self, make: Any) -> None:
        model = make()
        text, query = self.texts[0], self.queries[0]
        assert_close(
            model.get_text_embedding(text), await model.aget_text_embedding(text), self.tolerance
        )
        assert_close(
            model.get_query_embedding(query),
            await model.aget_query_embedding(query),
            self.tolerance,
        )

    def test_texts_are_not_changed(self, make: Any) -> None:
        given = list(self.texts)
        make().get_text_embedding_batch(given)
        make().get_agg_embedding_from_queries(given)
        assert given == list(self.texts)

    # Roles

    async def test_roles(self, make: Any, call: Call) -> None:
        model = make()
        text = await call(model, "get_text_embedding", self.texts[0])
        query = await call(model, "get_query_embedding", self.texts[0])
        assert np.allclose(text, query, atol=1e-3) is not self.instructs_queries

    async def test_many_queries_are_their_mean(self, make: Any, call: Call) -> None:
        model = make()
        singles = [model.get_query_embedding(query) for query in self.queries]
        mean = await call(model, "get_agg_embedding_from_queries", list(self.queries))
        assert_floats(mean)
        assert_close(mean, np.mean(singles, axis=0), self.tolerance)

    async def test_many_queries_with_a_function(self, make: Any, call: Call) -> None:
        model = make()
        queries = [*self.queries, self.queries[0]]
        last = await call(
            model, "get_agg_embedding_from_queries", queries, lambda vectors: vectors[-1]
        )
        assert_close(last, model.get_query_embedding(self.queries[0]), self.tolerance)

    async def test_no_queries(self, make: Any, call: Call) -> None:
        with pytest.raises(ValueError, match="No embeddings to aggregate"):
            await call(make(), "get_agg_embedding_from_queries", [])

    # Nodes

    async def test_nodes_get_the_vector_of_their_embed_text(self, make: Any) -> None:
        model = make()
        nodes = [
            TextNode(
                text=text,
                metadata={"file": "a.txt", "page": 3},
                excluded_embed_metadata_keys=["page"],
            )
            for text in self.texts[:3]
        ]
        texts = [node.get_content(MetadataMode.EMBED) for node in nodes]
        assert [node.embedding for node in model(nodes)] == [node.embedding for node in nodes]
        assert_close(
            [node.embedding for node in nodes],
            model.get_text_embedding_batch(texts),
            self.tolerance,
        )
        assert [node.text for node in nodes] == list(self.texts[:3])
        again = [node.model_copy(update={"embedding": None}) for node in nodes]
        await model.acall(again)
        assert_close(
            [node.embedding for node in again],
            [node.embedding for node in nodes],
            self.tolerance,
        )

    # The cache

    async def test_texts_are_cached_where_the_host_keeps_them(self, make: Any, call: Call) -> None:
        cache = SimpleKVStore()
        model = make(embeddings_cache=cache)
        vector = await call(model, "get_text_embedding", self.texts[0])
        entry = cache.get(key=self.texts[0], collection="embeddings")
        assert entry is not None
        assert next(iter(entry.values())) == vector
        mark = [0.25] * len(vector)
        cache.put(key=self.texts[0], val={"any": mark}, collection="embeddings")
        assert await call(model, "get_text_embedding", self.texts[0]) == mark
        batch = await call(model, "get_text_embedding_batch", list(self.texts))
        assert [vector == mark for vector in batch] == [
            text == self.texts[0] for text in self.texts
        ]

    async def test_queries_are_cached(self, make: Any, call: Call) -> None:
        limiter = CountingLimiter()
        model = make(embeddings_cache=SimpleKVStore(), rate_limiter=limiter)
        first = await call(model, "get_query_embedding", self.queries[0])
        assert limiter.asked == 1
        assert await call(model, "get_query_embedding", self.queries[0]) == first
        assert limiter.asked == 1, "a cached query was computed again"
        await call(model, "get_agg_embedding_from_queries", [self.queries[0]] * 2)
        assert limiter.asked == 1

    @pytest.mark.parametrize("document_first", [True, False])
    async def test_the_cache_keeps_roles_apart(
        self, make: Any, call: Call, document_first: bool
    ) -> None:
        plain, cached = make(), make(embeddings_cache=SimpleKVStore())
        text = self.texts[0]
        roles = ["get_text_embedding", "get_query_embedding"]
        for _ in range(2):
            for role in roles if document_first else roles[::-1]:
                assert_close(
                    await call(cached, role, text), getattr(plain, role)(text), self.tolerance
                )
        batch = await call(cached, "get_text_embedding_batch", [text])
        assert_close(batch[0], plain.get_text_embedding(text), self.tolerance)
        mean = await call(cached, "get_agg_embedding_from_queries", [text])
        assert_close(mean, plain.get_query_embedding(text), self.tolerance)

    def test_the_cache_must_be_one(self, make: Any) -> None:
        with pytest.raises(TypeError, match="BaseKVStore"):
            make(embeddings_cache={})

    # Events, callbacks and limits

    async def test_events_come_in_pairs(self, make: Any, call: Call, recorded: Recorder) -> None:
        legacy = LegacyRecorder()
        model = make(callback_manager=CallbackManager([legacy]), embed_batch_size=3)
        await call(model, "get_text_embedding", self.texts[0])
        await call(model, "get_query_embedding", self.queries[0])
        await call(model, "get_text_embedding_batch", list(self.texts))
        await call(model, "get_agg_embedding_from_queries", list(self.queries))
        starts, ends = recorded.of(EmbeddingStartEvent), recorded.of(EmbeddingEndEvent)
        assert len(starts) == len(ends)
        assert [event[2] for event in legacy.started] == [event[2] for event in legacy.ended]
        assert {event[0] for event in legacy.started} == {CBEventType.EMBEDDING}
        chunks = [chunk for event in ends for chunk in event.chunks]
        expected = [self.texts[0], self.queries[0], *self.texts, *self.queries]
        assert sorted(chunks) == sorted(expected), "events must show the texts as they were given"
        told = [chunk for event in legacy.ended for chunk in event[1][EventPayload.CHUNKS]]
        assert sorted(told) == sorted(expected)
        for event in ends:
            assert len(event.chunks) == len(event.embeddings)
        for event in starts:
            assert event.model_dict["model_name"] == model.model_name

    async def test_an_error_ends_the_legacy_event(self, make: Any, call: Call) -> None:
        legacy = LegacyRecorder()
        model = make(callback_manager=CallbackManager([legacy]))
        for role in ("get_text_embedding", "get_query_embedding"):
            with pytest.raises(TypeError):
                await call(model, role, None)
        assert [event[2] for event in legacy.started] == [event[2] for event in legacy.ended]

    async def test_limiter_is_asked_once_a_batch(self, make: Any, call: Call) -> None:
        limiter = CountingLimiter()
        model = make(rate_limiter=limiter, embed_batch_size=4)
        await call(model, "get_text_embedding", self.texts[0])
        await call(model, "get_query_embedding", self.queries[0])
        assert limiter.asked == 2
        await call(model, "get_text_embedding_batch", list(self.texts))
        assert limiter.asked == 2 + 2

    def test_callback_manager_can_be_set(self, make: Any) -> None:
        legacy = LegacyRecorder()
        model = make()
        model.callback_manager = CallbackManager([legacy])
        model.get_text_embedding(self.texts[0])
        assert len(legacy.ended) == 1

    def test_settings_take_it(self, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Settings, "_embed_model", None)
        model = make()
        Settings.embed_model = model
        assert Settings.embed_model is model

    async def test_the_loop_goes_on(self, make: Any) -> None:
        model = make(embed_batch_size=2048)
        model.get_text_embedding(self.texts[0])
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        texts = [f"{index} {self.texts[0]}" for index in range(self.many)]
        await model.aget_text_embedding_batch(texts)
        during = ticks
        await asyncio.gather(*(model.aget_query_embedding(query) for query in self.queries))
        ticking.cancel()
        assert during > 5, f"the event loop was blocked: it went round {during} times"
        assert ticks > during

    async def test_many_at_once(self, make: Any) -> None:
        model = make()
        expected = [model.get_query_embedding(query) for query in self.queries]
        vectors = await asyncio.gather(
            *(model.aget_query_embedding(query) for query in self.queries * 8)
        )
        assert_close(vectors, expected * 8, self.tolerance)

    # Configuration

    def test_every_field_is_an_argument(self, make: Any) -> None:
        model = make()
        fields = {name: getattr(model, name) for name in type(model).model_fields}
        assert type(model)(**fields).to_dict() == model.to_dict()

    def test_unknown_arguments_are_refused(self, make: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="no_such_argument"):
            make(no_such_argument=1)

    def test_dict_and_back(self, make: Any) -> None:
        for model in (make(), make(**self.other_arguments), make(**self.idle_arguments)):
            data = model.to_dict()
            before = copy.deepcopy(data)
            again = type(model).from_dict(data)
            assert data == before
            assert again.to_dict() == data
            for name in type(model).model_fields.keys() & data.keys():
                assert getattr(again, name) == getattr(model, name), name
            assert_close(
                again.get_query_embedding(self.queries[0]),
                model.get_query_embedding(self.queries[0]),
                self.tolerance,
            )

    def test_json_and_back(self, make: Any) -> None:
        model = make(embeddings_cache=SimpleKVStore(), rate_limiter=CountingLimiter())
        text = model.to_json()
        assert json.loads(text)["class_name"] == model.class_name()
        assert type(model).from_json(text).to_dict() == model.to_dict()

    def test_ingestion_key_has_what_changes_a_vector(self, make: Any) -> None:
        nodes = [TextNode(text=self.texts[0])]
        base = get_transformation_hash(nodes, make())
        assert get_transformation_hash(nodes, make()) == base
        for name, value in self.other_arguments.items():
            changed = make(**{name: value})
            assert get_transformation_hash(nodes, changed) != base, name

    def test_ingestion_key_has_nothing_else(self, make: Any) -> None:
        nodes = [TextNode(text=self.texts[0])]
        base = get_transformation_hash(nodes, make())
        idle = {
            **self.idle_arguments,
            "embed_batch_size": 7,
            "num_workers": 3,
            "embeddings_cache": SimpleKVStore(),
            "rate_limiter": CountingLimiter(),
        }
        for name, value in idle.items():
            assert get_transformation_hash(nodes, make(**{name: value})) == base, name

    def test_secrets_are_never_shown(self, make: Any, recorded: Recorder) -> None:
        model = make(**self.secret_arguments)
        model.get_query_embedding(self.queries[0])
        shown = [
            repr(model),
            str(model),
            repr(model.to_dict()),
            model.to_json(),
            repr(model.to_payload()),
            repr(model.model_dump()),
            repr([event.model_dump() for event in recorded.seen]),
        ]
        with pytest.raises((TypeError, ValueError)) as refused:
            make(**self.secret_arguments, embed_batch_size=0)
        shown += [str(refused.value), repr(refused.value), repr(refused.value.__cause__)]
        for secret in self.secret_arguments.values():
            assert not [text for text in shown if secret in text]

    def test_pickle(self, make: Any) -> None:
        model = make(**self.other_arguments)
        vector = model.get_query_embedding(self.queries[0])
        data = pickle.dumps(model)
        assert len(data) < self.pickle_bytes, "a pickle must not carry weights"
        again = pickle.loads(data)
        assert again.to_dict() == model.to_dict()
        assert_close(again.get_query_embedding(self.queries[0]), vector, self.tolerance)

    def test_pickling_leaves_the_original_alone(self, make: Any) -> None:
        limiter, manager = CountingLimiter(), CallbackManager([LegacyRecorder()])
        model = make(rate_limiter=limiter, callback_manager=manager)
        again = pickle.loads(pickle.dumps(model))
        assert model.rate_limiter is limiter
        assert model.callback_manager is manager
        assert_floats(model.get_text_embedding(self.texts[0]))
        assert again.callback_manager.handlers == []
        assert_floats(again.get_text_embedding(self.texts[0]))

    def test_a_used_model_pickles_no_larger(self, make: Any) -> None:
        model = make()
        model.get_query_embedding(self.queries[0])
        for _ in range(500):
            with model.callback_manager.event(CBEventType.EMBEDDING):
                pass
        assert len(pickle.dumps(model)) < self.pickle_bytes

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
    def test_copies(self, make: Any, copied: Any) -> None:
        limiter = CountingLimiter()
        model = make(rate_limiter=limiter, embeddings_cache=SimpleKVStore())
        again = copied(model)
        assert again is not model
        assert again.to_dict() == model.to_dict()
        assert again.rate_limiter is limiter
        assert_close(
            again.get_text_embedding(self.texts[0]),
            model.get_text_embedding(self.texts[0]),
            self.tolerance,
        )

    # Similarity

    def test_similarity(self, make: Any) -> None:
        model = make()
        one, two = (model.get_text_embedding(text) for text in self.texts[:2])
        assert model.similarity(one, one) == pytest.approx(1)
        assert model.similarity(one, two) < 1
        assert model.similarity(one, one, mode=SimilarityMode.EUCLIDEAN) == pytest.approx(0)
        product = model.similarity(one, two, mode=SimilarityMode.DOT_PRODUCT)
        assert product == pytest.approx(float(np.dot(one, two)))


class RerankerContract:
    """What every reranking `BaseNodePostprocessor` must do."""

    query: str = "what is the capital of France?"

    texts: tuple[str, ...] = (
        "A cat sat on the mat.",
        "Paris is the capital of France.",
        "Water boils at 100 degrees.",
        "北京是中国的首都。",
        "A cat sat on the mat.",
        "one two three four five six seven eight nine ten " * 10,
    )
    """Some texts, two of them equal."""

    tolerance: float = 1e-5

    idle_arguments: dict[str, Any] = {}  # noqa: RUF012 - overridden, never changed
    """Further arguments, to be carried by dicts, pickles and copies."""

    secret_arguments: dict[str, str] = {}  # noqa: RUF012
    """Arguments that must never be shown."""

    pickle_bytes: int = 10_000

    @pytest.fixture
    def reranker(self) -> tuple[type[BaseNodePostprocessor], dict[str, Any]]:
        """Give the class and its arguments."""
        pytest.fail("a subclass must give this fixture")

    @pytest.fixture
    def make(self, reranker: tuple[type[BaseNodePostprocessor], dict[str, Any]]) -> Any:
        """Make a reranker, with some arguments given anew."""
        kind, arguments = reranker

        def make(**changed: Any) -> BaseNodePostprocessor:
            return kind(**{**arguments, **changed})

        return make

    @pytest.fixture
    def nodes(self) -> list[NodeWithScore]:
        """Give nodes as a retriever does, worse and worse."""
        source = RelatedNodeInfo(node_id="document", metadata={"title": "t"})
        return [
            NodeWithScore(
                node=TextNode(
                    id_=f"node-{index}",
                    text=text,
                    metadata={"file": f"{index}.txt"},
                    relationships={NodeRelationship.SOURCE: source},
                    embedding=[0.5, 0.5],
                ),
                score=0.9 - index / 10,
            )
            for index, text in enumerate(self.texts)
        ]

    def rank(self, model: Any, nodes: list[NodeWithScore]) -> list[NodeWithScore]:
        result: list[NodeWithScore] = model.postprocess_nodes(nodes, query_str=self.query)
        return result

    # Scores and order

    def test_names_itself(self, make: Any) -> None:
        model = make()
        assert isinstance(model, BaseNodePostprocessor)
        assert model.class_name() == type(model).__name__
        assert model.to_dict()["class_name"] == type(model).__name__

    async def test_best_first(self, make: Any, call: Call, nodes: list[NodeWithScore]) -> None:
        result = await call(make(top_n=None), "postprocess_nodes", nodes, query_str=self.query)
        scores = [node.score for node in result]
        assert all(type(score) is float for score in scores)
        assert scores == sorted(scores, reverse=True)
        assert {node.node_id for node in result} == {node.node_id for node in nodes}

    async def test_sync_is_async(self, make: Any, nodes: list[NodeWithScore]) -> None:
        model = make(top_n=None)
        result = await model.apostprocess_nodes(nodes, query_str=self.query)
        assert result == self.rank(model, nodes)

    def test_each_score_is_its_own(self, make: Any, nodes: list[NodeWithScore]) -> None:
        model = make(top_n=None)
        together = {node.node_id: node.score for node in self.rank(model, nodes)}
        for node in nodes:
            (alone,) = self.rank(model, [node])
            assert alone.score == pytest.approx(together[node.node_id], abs=self.tolerance)

    def test_ties_keep_their_order(self, make: Any, nodes: list[NodeWithScore]) -> None:
        same = [
            NodeWithScore(node=TextNode(id_=str(index), text=self.texts[0])) for index in range(5)
        ]
        assert [node.node_id for node in self.rank(make(top_n=None), same)] == list("01234")
        assert [node.node_id for node in self.rank(make(top_n=2), same)] == list("01")

    async def test_query_bundle(self, make: Any, call: Call, nodes: list[NodeWithScore]) -> None:
        model = make()
        bundle = QueryBundle(self.query)
        result = await call(model, "postprocess_nodes", nodes, query_bundle=bundle)
        assert result == self.rank(model, nodes)

    @pytest.mark.parametrize("count", [0, 1])
    async def test_a_query_is_needed(
        self, make: Any, call: Call, nodes: list[NodeWithScore], count: int
    ) -> None:
        with pytest.raises(ValueError, match="query"):
            await call(make(), "postprocess_nodes", nodes[:count])

    async def test_two_queries_are_refused(self, make: Any, call: Call) -> None:
        with pytest.raises(ValueError, match="both"):
            await call(
                make(), "postprocess_nodes", [], query_str="a", query_bundle=QueryBundle("b")
            )

    @pytest.mark.parametrize("top_n", [1, 2, 6, 100, None])
    async def test_top_n(
        self, make: Any, call: Call, nodes: list[NodeWithScore], top_n: int | None
    ) -> None:
        every = self.rank(make(top_n=None), nodes)
        result = await call(make(top_n=top_n), "postprocess_nodes", nodes, query_str=self.query)
        assert result == every[:top_n]

    @pytest.mark.parametrize("top_n", [0, -1])
    def test_top_n_that_can_not_be_meant(self, make: Any, top_n: int) -> None:
        with pytest.raises(ValueError, match="top_n"):
            make(top_n=top_n)

    async def test_threshold_is_inclusive(
        self, make: Any, call: Call, nodes: list[NodeWithScore]
    ) -> None:
        every = self.rank(make(top_n=None), nodes)
        third = every[2].score
        assert third is not None
        model = make(top_n=None, score_threshold=third)
        result = await call(model, "postprocess_nodes", nodes, query_str=self.query)
        assert result == [node for node in every if (node.score or 0.0) >= third]
        above = make(top_n=None, score_threshold=math.nextafter(every[0].score, math.inf))
        assert self.rank(above, nodes) == []

    # What comes in stays as it is

    @pytest.mark.parametrize("keep", [False, True])
    async def test_input_is_untouched(
        self, make: Any, call: Call, nodes: list[NodeWithScore], keep: bool
    ) -> None:
        before, given = copy.deepcopy(nodes), list(nodes)
        model = make(top_n=2, keep_retrieval_score=keep)
        result = await call(model, "postprocess_nodes", nodes, query_str=self.query)
        for node in result:
            node.score = -5.0
            node.node.metadata["new"] = 1
            node.node.relationships.clear()
            node.node.excluded_llm_metadata_keys.append("file")
            node.node.excluded_embed_metadata_keys.append("file")
            node.node.embedding = None
        assert nodes == before
        assert all(one is two for one, two in zip(nodes, given, strict=True))

    def test_copies_keep_everything(self, make: Any, nodes: list[NodeWithScore]) -> None:
        by_id = {node.node_id: node for node in nodes}
        for node in self.rank(make(top_n=None), nodes):
            original = by_id[node.node_id]
            assert node is not original
            assert node.node is not original.node
            assert type(node.node) is type(original.node)
            assert node.node == original.node
            assert node.node.hash == original.node.hash

    def test_node_types_are_kept(self, make: Any) -> None:
        class Unique:
            def __deepcopy__(self, memo: Any) -> Any:
                msg = "a node's object must not be copied"
                raise AssertionError(msg)

        held = Unique()
        nodes = [
            NodeWithScore(node=IndexNode(text=self.texts[0], index_id="i", obj=held), score=0.1),
            NodeWithScore(node=TextNode(text=self.texts[1]), score=0.2),
        ]
        found = {type(node.node): node.node for node in self.rank(make(top_n=None), nodes)}
        assert found.keys() == {IndexNode, TextNode}
        index: Any = found[IndexNode]
        assert index.obj is held

    # Metadata

    def test_retrieval_score(self, make: Any, nodes: list[NodeWithScore]) -> None:
        by_id = {node.node_id: node for node in nodes}
        plain = self.rank(make(top_n=None), nodes)
        assert all("retrieval_score" not in node.metadata for node in plain)
        model = make(top_n=None, keep_retrieval_score=True)
        kept = self.rank(model, nodes)
        for one, two in zip(kept, plain, strict=True):
            assert one.metadata["retrieval_score"] == by_id[one.node_id].score
            for mode in (MetadataMode.EMBED, MetadataMode.LLM):
                assert one.get_content(mode) == two.get_content(mode)
        again = self.rank(model, kept)
        for one, two in zip(again, kept, strict=True):
            assert one.score == pytest.approx(two.score, abs=self.tolerance)
            assert one.metadata["retrieval_score"] == by_id[one.node_id].score
            assert one.metadata["relevance_score_1"] == two.score
            assert one.get_content(MetadataMode.LLM) == two.get_content(MetadataMode.LLM)
            assert one.node.excluded_llm_metadata_keys.count("retrieval_score") == 1

    @pytest.mark.parametrize("mode", list(MetadataMode))
    def test_metadata_mode(self, make: Any, nodes: list[NodeWithScore], mode: MetadataMode) -> None:
        scored = {
            node.node_id: node.score
            for node in self.rank(make(top_n=None, metadata_mode=mode), nodes)
        }
        as_text = [
            NodeWithScore(node=TextNode(id_=node.node_id, text=node.get_content(mode)))
            for node in nodes
        ]
        for node in self.rank(make(top_n=None), as_text):
            assert node.score == pytest.approx(scored[node.node_id], abs=self.tolerance)

    # Nodes that can't be scored

    async def test_nodes_without_text_come_last(
        self, make: Any, call: Call, nodes: list[NodeWithScore]
    ) -> None:
        image = NodeWithScore(
            node=ImageNode(id_="image", image_path="a.png", metadata={"file": "a.png"}), score=0.99
        )
        blank = NodeWithScore(node=TextNode(id_="blank", text=" \n"), score=0.98)
        mixed = [image, *nodes[:2], blank, *nodes[2:]]
        every = self.rank(make(top_n=None), nodes)
        model = make(top_n=None, keep_retrieval_score=True)
        result = await call(model, "postprocess_nodes", mixed, query_str=self.query)
        assert [node.node_id for node in result] == [
            *(node.node_id for node in every),
            "image",
            "blank",
        ]
        assert [node.score for node in result[-2:]] == [None, None]
        assert result[-2].metadata["retrieval_score"] == 0.99
        assert (image.score, image.metadata) == (0.99, {"file": "a.png"})
        assert [node.node_id for node in self.rank(make(top_n=7), mixed)][-1] == "image"
        least = make(top_n=None, score_threshold=every[-1].score)
        assert len(self.rank(least, mixed)) == len(nodes)

    def test_only_nodes_without_text(self, make: Any) -> None:
        nodes = [NodeWithScore(node=TextNode(id_=str(index)), score=0.5) for index in range(3)]
        assert [node.node_id for node in self.rank(make(top_n=2), nodes)] == ["0", "1"]

    # Events

    @pytest.mark.parametrize("count", [0, 1, 6])
    async def test_events_come_in_pairs(
        self, make: Any, call: Call, nodes: list[NodeWithScore], recorded: Recorder, count: int
    ) -> None:
        legacy = LegacyRecorder()
        model = make(top_n=2, callback_manager=CallbackManager([legacy]))
        result = await call(model, "postprocess_nodes", nodes[:count], query_str=self.query)
        start, end = recorded.of(ReRankStartEvent, ReRankEndEvent)
        assert isinstance(start, ReRankStartEvent)
        assert (start.nodes, start.top_n) == (nodes[:count], 2)
        assert start.query == QueryBundle(self.query)
        assert isinstance(end, ReRankEndEvent)
        assert end.nodes == result
        ((kind, opened, first),) = legacy.started
        ((_, closed, second),) = legacy.ended
        assert (kind, first) == (CBEventType.RERANKING, second)
        assert opened[EventPayload.QUERY_STR] == self.query
        assert opened[EventPayload.MODEL_NAME] == start.model_name
        assert opened[EventPayload.NODES] == nodes[:count]
        assert opened[EventPayload.TOP_K] == 2
        assert closed[EventPayload.NODES] == result

    def test_events_of_all_nodes(
        self, make: Any, nodes: list[NodeWithScore], recorded: Recorder
    ) -> None:
        self.rank(make(top_n=None), nodes)
        (start,) = recorded.of(ReRankStartEvent)
        assert start.top_n == len(nodes)

    async def test_an_error_ends_the_events(
        self, make: Any, call: Call, nodes: list[NodeWithScore], recorded: Recorder
    ) -> None:
        legacy = LegacyRecorder()
        model = make(callback_manager=CallbackManager([legacy]))
        broken = NodeWithScore(node=TextNode(text="a lone surrogate: \ud800"))
        with pytest.raises(ValueError, match="surrogate"):
            await call(model, "postprocess_nodes", [*nodes, broken], query_str=self.query)
        assert len(recorded.of(ReRankStartEvent)) == len(recorded.of(ReRankEndEvent)) == 1
        assert len(legacy.started) == len(legacy.ended) == 1
        assert EventPayload.EXCEPTION in legacy.ended[0][1]

    async def test_nothing_in_nothing_out(self, make: Any, call: Call) -> None:
        assert await call(make(), "postprocess_nodes", [], query_str=self.query) == []

    # Configuration

    def test_every_field_is_an_argument(self, make: Any) -> None:
        model = make()
        fields = {name: getattr(model, name) for name in type(model).model_fields}
        assert type(model)(**fields).to_dict() == model.to_dict()

    def test_unknown_arguments_are_refused(self, make: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="no_such_argument"):
            make(no_such_argument=1)

    def test_dict_and_json_and_back(self, make: Any, nodes: list[NodeWithScore]) -> None:
        model = make(top_n=3, keep_retrieval_score=True, **self.idle_arguments)
        for again in (
            type(model).from_dict(model.to_dict()),
            type(model).from_json(model.to_json()),
        ):
            assert again.to_dict() == model.to_dict()
            for name in type(model).model_fields.keys() & model.to_dict().keys():
                assert getattr(again, name) == getattr(model, name), name
            assert self.rank(again, nodes) == self.rank(model, nodes)

    def test_pickle_and_copies(self, make: Any, nodes: list[NodeWithScore]) -> None:
        model = make(
            top_n=3, callback_manager=CallbackManager([LegacyRecorder()]), **self.idle_arguments
        )
        expected = self.rank(model, nodes)
        data = pickle.dumps(model)
        assert len(data) < self.pickle_bytes, "a pickle must not carry weights"
        assert len(model.callback_manager.handlers) == 1
        for again in (pickle.loads(data), copy.copy(model), copy.deepcopy(model)):
            assert again.to_dict() == model.to_dict()
            assert self.rank(again, nodes) == expected

    def test_secrets_are_never_shown(
        self, make: Any, nodes: list[NodeWithScore], recorded: Recorder
    ) -> None:
        model = make(**self.secret_arguments)
        self.rank(model, nodes)
        shown = [
            repr(model),
            repr(model.to_dict()),
            model.to_json(),
            repr([event.model_dump() for event in recorded.seen]),
        ]
        with pytest.raises((TypeError, ValueError)) as refused:
            make(**self.secret_arguments, top_n=0)
        shown += [str(refused.value), repr(refused.value.__cause__)]
        for secret in self.secret_arguments.values():
            assert not [text for text in shown if secret in text]
