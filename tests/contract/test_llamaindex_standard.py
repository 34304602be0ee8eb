"""The contract suite on tiny checkpoints and on a real model, and on classes that break it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from llamaindex_bge import BGEEmbedding, BGEReranker
from tests.contract.llamaindex_suite import (
    EmbeddingContract,
    Recorder,
    RerankerContract,
    recorded,
)

__all__ = ["recorded"]


@pytest.fixture(scope="module")
def held() -> Iterator[dict[Path, BGEEmbedding | BGEReranker]]:
    """Hold one component a folder, so that its weights stay loaded from test to test."""
    components: dict[Path, BGEEmbedding | BGEReranker] = {}
    yield components
    for component in components.values():
        component.close()


Held = dict[Path, BGEEmbedding | BGEReranker]


class OfEmbedding(EmbeddingContract):
    """`BGEEmbedding` under the contract, on the folder of a fixture."""

    folder: str

    other_arguments = {  # noqa: RUF012
        "query_instruction": "another instruction: ",
        "normalize": False,
        "max_length": 24,
        "pooling": "last",
    }
    idle_arguments = {  # noqa: RUF012
        "batch_tokens": 64,
        "device": "cpu",
        "dtype": "float32",
        "on_truncation": "ignore",
        "local_files_only": True,
        "cache_folder": "somewhere",
    }
    secret_arguments = {"token": "hf_do_not_show"}  # noqa: RUF012
    arguments: dict[str, Any] = {"on_truncation": "ignore"}  # noqa: RUF012

    @pytest.fixture
    def embedding(
        self, request: pytest.FixtureRequest, held: Held
    ) -> tuple[type[BaseEmbedding], dict[str, Any]]:
        folder = request.getfixturevalue(self.folder)
        if folder not in held:
            held[folder] = BGEEmbedding(model_name=folder)
            held[folder].get_text_embedding("")
        return BGEEmbedding, {"model_name": folder, **self.arguments}


class TestEnglish(OfEmbedding):
    """BERT with CLS pooling and an instruction."""

    folder = "en_folder"


class TestM3(OfEmbedding):
    """XLM-RoBERTa, which wants no instruction."""

    folder = "m3_folder"
    instructs_queries = False


class TestStandIn(OfEmbedding):
    """A real model."""

    folder = "stand_in_folder"
    many = 100
    arguments = {"on_truncation": "ignore", "query_instruction": "query: "}  # noqa: RUF012


class OfReranker(RerankerContract):
    """`BGEReranker` under the contract, on the folder of a fixture."""

    folder: str

    idle_arguments = {  # noqa: RUF012
        "batch_tokens": 64,
        "device": "cpu",
        "max_length": 20,
        "normalize": False,
        "on_truncation": "ignore",
        "score_threshold": -100.0,
    }
    secret_arguments = {"token": "hf_do_not_show"}  # noqa: RUF012

    @pytest.fixture
    def reranker(
        self, request: pytest.FixtureRequest, held: Held
    ) -> tuple[type[BaseNodePostprocessor], dict[str, Any]]:
        folder = request.getfixturevalue(self.folder)
        if folder not in held:
            held[folder] = BGEReranker(model=folder)
            node = NodeWithScore(node=TextNode(text="a"))
            held[folder].postprocess_nodes([node], query_str="b")
        return BGEReranker, {"model": folder}


class TestXLMRobertaReranker(OfReranker):
    """XLM-RoBERTa with one label."""

    folder = "reranker_folder"


class TestBertReranker(OfReranker):
    """BERT with one label."""

    folder = "bert_reranker_folder"


class LeakyEmbedding(BaseEmbedding):
    """Written as many are: the host's defaults, and a query instruction."""

    def _get_text_embedding(self, text: str) -> list[float]:
        return [1.0, len(text) / 10]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(f"query: {query}")

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


class CarelessReranker(BaseNodePostprocessor):
    """Written as many are: it scores the nodes that came in."""

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        for node in nodes:
            node.score = float(len(node.text))
        return sorted(nodes, key=lambda node: -(node.score or 0))[:2]


async def sync(target: Any, method: str, *args: Any, **options: Any) -> Any:
    return getattr(target, method)(*args, **options)


class TestTheSuiteItself:
    """A suite that nothing fails would be worth nothing."""

    embeddings = EmbeddingContract()
    rerankers = RerankerContract()

    def make_leaky(self, **arguments: Any) -> LeakyEmbedding:
        return LeakyEmbedding(**arguments)

    async def test_sees_what_is_right(self) -> None:
        await self.embeddings.test_roles(self.make_leaky, sync)
        await self.embeddings.test_order_and_batches(self.make_leaky, sync, 3)

    async def test_sees_a_cache_that_mixes_roles(self) -> None:
        for document_first in (True, False):
            with pytest.raises(AssertionError):
                await self.embeddings.test_the_cache_keeps_roles_apart(
                    self.make_leaky, sync, document_first
                )

    def test_sees_a_pickle_that_takes_a_limiter_away(self) -> None:
        with pytest.raises((AssertionError, AttributeError)):
            self.embeddings.test_pickling_leaves_the_original_alone(self.make_leaky)

    async def test_sees_changed_nodes_and_missing_events(self, recorded: Recorder) -> None:
        nodes = RerankerContract.nodes.__wrapped__(self.rerankers)  # type: ignore[attr-defined]

        def make(**arguments: Any) -> CarelessReranker:
            return CarelessReranker()

        with pytest.raises(AssertionError):
            await self.rerankers.test_input_is_untouched(make, sync, nodes, keep=False)
        with pytest.raises(ValueError, match="not enough values"):
            await self.rerankers.test_events_come_in_pairs(make, sync, nodes, recorded, 1)
