"""A server in a model's place, and the choice between it and a model on this machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bge_core.embedder import DenseEmbedder
from bge_core.errors import CheckpointError
from bge_core.lifecycle import fingerprint_of
from bge_core.reranker import PairScorer
from bge_core.servers.base import (
    RemoteModel,
    batches,
    by_index,
    gather_limited,
    is_number,
    to_float32,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.prompts import QueryExample
    from bge_core.servers.base import Progress

__all__ = ["RemoteEmbedder", "RemoteReranker"]

_EMBEDDINGS, _RERANK = "/embeddings", "/rerank"


class RemoteEmbedder(RemoteModel[str], DenseEmbedder):
    """An embedding model that a server runs: text-embeddings-inference, Infinity, or alike.

    Instructions, order, and the length of vectors are those of `Embedder`. How long a text may
    be, whether it is cut, and the pooling are the server's: nothing is said of what it cuts.

    Args:
        model: The published id of the model that is served (`"BAAI/bge-small-en-v1.5"`), or a
            folder on this machine with the same. Infinity knows a model by this name.
        endpoint: The server's address (`"http://localhost:8080"`); it answers `/embeddings`.
        api_key: A bearer token; None for a server without one.
        timeout: Seconds to wait for one answer, 32 texts at most; None for 60.
        query_instruction: Put in front of queries, never of documents. None for the one that
            the model card gives, `""` for none.
        task_description: A decoder's word for the same, as `Embedder` takes it.
        examples: What bge-en-icl sees in front of each query, as `Embedder` takes it.
        task: llm-embedder's task; None for every other model.
        normalize: Scale vectors to unit length. False gives them as the server does, which
            with text-embeddings-inference are of unit length in any case.

    Raises:
        ArgumentError: A value that can't be served.
        CheckpointError: A model that is none, or a reranker.
        InputTypeError: A value of the wrong type.

    Example:
        >>> embedder = RemoteEmbedder("BAAI/bge-small-en-v1.5", endpoint="http://localhost:8080")
        >>> embedder.query_instruction, embedder.dimension
        ('Represent this sentence for searching relevant passages: ', 384)
        >>> embedder.embed_documents(["Paris is in France."]).shape  # doctest: +SKIP
        (1, 384)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        endpoint: str,
        api_key: str | None = None,
        timeout: float | None = None,
        query_instruction: str | None = None,
        task_description: str | None = None,
        examples: Iterable[QueryExample | Mapping[str, str]] | None = None,
        task: str | None = None,
        normalize: bool = True,
    ) -> None:
        DenseEmbedder.__init__(
            self,
            query_instruction=query_instruction,
            task_description=task_description,
            examples=examples,
            task=task,
            normalize=normalize,
        )
        RemoteModel.__init__(
            self,
            kind="embedder",
            model=model,
            endpoint=endpoint,
            api_key=api_key,
            timeout=timeout,
        )
        self._width = self._expected()
        _ = self._template  # making it is the check

    @property
    def dimension(self) -> int:
        """Length of a vector; the server is asked where the model's name doesn't say it."""
        if self._width is None:
            return int(self.embed_documents(["a"]).shape[1])
        return self._width

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the model's name, instructions and scale.

        What the server runs under that name, its number format and its limits can't be known.
        """
        frame = self._template
        asked = (frame.examples, frame.before, frame.after, frame.document)
        parts = ("served", self._content(), asked, self._normalize)
        return fingerprint_of(*parts)

    def _expected(self) -> int | None:
        if folder := self._folder():
            return folder.hidden_size if folder.plain else None
        profile = self._profile()
        return profile.dimension if profile else None

    def _prompts(self) -> Mapping[str, str]:
        folder = self._folder()
        return folder.prompts if folder else {}

    def _queries(self, texts: Iterable[str]) -> list[str]:
        # On this machine these parts are tokens that nothing is cut of; a server takes text.
        frame = self._template
        return [f"{frame.examples}{text}{frame.after}" for text in super()._queries(texts)]

    async def _rows(self, items: Sequence[str], progress: Progress) -> list[NDArray[np.float32]]:
        async def ask(part: slice) -> NDArray[np.float32]:
            texts = items[part]
            body = {"model": self._served_name(), "input": texts, "encoding_format": "float"}
            answer = await self._endpoint.post(_EMBEDDINGS, body)
            vectors = self._vectors_of(answer, len(texts))
            if progress is not None:
                progress(len(texts))
            return vectors

        parts = await gather_limited(list(batches(items)), ask)
        return [row for part in parts for row in part]

    def _vectors_of(self, answer: object, count: int) -> NDArray[np.float32]:
        data = answer.get("data") if isinstance(answer, dict) else None
        found = by_index(self._endpoint, _EMBEDDINGS, data, "embedding", count)
        for index, vector in enumerate(found):
            if not isinstance(vector, list) or not all(map(is_number, vector)):
                wrong = f"embedding {index} is no list of numbers but {vector!r:.60}"
                raise self._endpoint.malformed(_EMBEDDINGS, wrong)
            if self._width is None and vector:
                self._width = len(vector)
            if not vector or len(vector) != self._width:
                said = (
                    f"gave a vector of {len(vector)} numbers, and those of {self.model!r} have "
                    f"{self._width or 'some'}"
                )
                hint = "Write the model that the server runs as model='...'."
                raise self._endpoint.failed(_EMBEDDINGS, said, hint)
        return to_float32(found)


class RemoteReranker(RemoteModel[tuple[str, str]], PairScorer):
    """A cross-encoder that a server runs: text-embeddings-inference, Infinity, or alike.

    The server is asked for raw logits, and scale, order, ties and limits are those of `Reranker`.
    A first request for one short pair on both of the server's scales makes sure that it knows
    the difference. How a long pair is cut is the server's: the longer of the two first, where
    `Reranker` leaves a quarter to the passage.

    Args:
        model: The published id of the model that is served (`"BAAI/bge-reranker-base"`), or a
            folder on this machine with the same. Infinity knows a model by this name.
        endpoint: The server's address (`"http://localhost:8080"`); it answers `/rerank`.
        api_key: A bearer token; None for a server without one.
        timeout: Seconds to wait for one answer, 32 passages at most; None for 60.
        normalize: Give the sigmoid of the logit, from 0 to 1; False gives the raw logit.

    Raises:
        ArgumentError: A value that can't be served.
        CheckpointError: A model that is none, or no reranker of one label.
        InputTypeError: A value of the wrong type.

    Example:
        >>> reranker = RemoteReranker("BAAI/bge-reranker-base", endpoint="http://localhost:8080")
        >>> reranker.rank("what is a panda?", [])
        []
        >>> reranker.rank("what is a panda?", ["A panda is a bear."])  # doctest: +SKIP
        [(0, 0.9979)]
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        endpoint: str,
        api_key: str | None = None,
        timeout: float | None = None,
        normalize: bool = True,
    ) -> None:
        PairScorer.__init__(self, normalize=normalize)
        # The name of the passages in a request, once it is known.
        self._word: str | None = None
        RemoteModel.__init__(
            self,
            kind="reranker",
            model=model,
            endpoint=endpoint,
            api_key=api_key,
            timeout=timeout,
        )
        known = self._folder() or self._profile()
        if known is not None and known.pair_prompt is not None:
            msg = (
                f"{self.model!r} is a language model that is asked a question, and a server's "
                "/rerank runs cross-encoders: leave endpoint=... out, or use "
                "'BAAI/bge-reranker-v2-m3'."
            )
            raise CheckpointError(msg)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the model's name and the scale."""
        parts = ("served", self._content(), self._normalize)
        return fingerprint_of(*parts)

    async def _rows(
        self, items: Sequence[tuple[str, str]], progress: Progress
    ) -> list[NDArray[np.float32]]:
        word = self._word = self._word or await self._learn()
        by_query: dict[str, list[int]] = {}
        for place, (query, _) in enumerate(items):
            by_query.setdefault(query, []).append(place)
        requests = [
            places[part]
            for places in by_query.values()
            for part in batches([items[place][1] for place in places])
        ]

        async def ask(places: list[int]) -> NDArray[np.float32]:
            passages = [items[place][1] for place in places]
            query = items[places[0]][0]
            _, logits = await self._ask(query, {word: passages}, len(passages), raw=True)
            if progress is not None:
                progress(len(passages))
            return logits

        rows = np.empty((len(items), 1), dtype=np.float32)
        for places, logits in zip(requests, await gather_limited(requests, ask), strict=True):
            rows[places, 0] = logits
        return list(rows)

    async def _learn(self) -> str:
        """Ask for one pair in both servers' words on both scales.

        Returns:
            What this server calls passages.

        Raises:
            EndpointError: The two scales are not a logit and its sigmoid.
        """
        both = {"texts": ["b"], "documents": ["b"]}
        word, raw = await self._ask("a", both, 1, raw=True)
        _, shown = await self._ask("a", both, 1, raw=False)
        logit, score = float(raw[0]), float(shown[0])
        if math.isfinite(logit):
            sigmoid = math.exp(min(logit, 0.0)) / (1.0 + math.exp(-abs(logit)))
            # As far as two passes in bfloat16 may be apart.
            if not math.isclose(sigmoid, score, abs_tol=0.02):
                said = (
                    f"gave {logit:.4g} with raw_scores and {score:.4g} without, which are no logit "
                    "and its sigmoid, so its scores can't be brought to a known scale"
                )
                hint = "Use text-embeddings-inference, or a newer Infinity."
                raise self._endpoint.failed(_RERANK, said, hint)
        return word

    async def _ask(
        self, query: str, passages: Mapping[str, list[str]], count: int, *, raw: bool
    ) -> tuple[str, NDArray[np.float32]]:
        body = {
            "model": self._served_name(),
            "query": query,
            **passages,
            "raw_scores": raw,
            # text-embeddings-inference's word; Infinity cuts in any case.
            "truncate": True,
        }
        answer = await self._endpoint.post(_RERANK, body)
        word, name, ranks = "texts", "score", answer
        if isinstance(answer, dict):
            word, name, ranks = "documents", "relevance_score", answer.get("results")
        found = by_index(self._endpoint, _RERANK, ranks, name, count)
        for index, score in enumerate(found):
            if not is_number(score):
                wrong = f"the score of passage {index} is no number but {score!r:.60}"
                raise self._endpoint.malformed(_RERANK, wrong)
        return word, to_float32(found)
