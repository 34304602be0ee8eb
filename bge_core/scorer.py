"""The right scorer for a checkpoint: a reranker, or bge-m3's three outputs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from bge_core.checkpoint import HEADS, Source, locate, read
from bge_core.errors import ArgumentError
from bge_core.local_model import off_loop
from bge_core.m3 import M3Embedder, M3Weights
from bge_core.profiles import Profile, find_profile
from bge_core.remote import make_reranker, not_local
from bge_core.reranker import Ranked, Ranking, check_limits, rank_scores
from bge_core.tokens import check_long_passages, check_text, check_texts, is_few

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["M3Reranker", "Scorer", "make_scorer"]


class Scorer(Ranking, Protocol):
    """What scores passages against a query, on this machine or by a server."""

    @property
    def model(self) -> str:
        """The hub id or folder."""
        ...

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the scores."""
        ...

    def score_pairs(
        self, pairs: Iterable[tuple[str, str]], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Score (query, passage) pairs, each for itself; see `Reranker.score_pairs`."""
        ...

    def check_limits(self, *, top_n: int | None, score_threshold: float | None) -> None:
        """Refuse a `top_n` or a threshold that can't be meant; see `Reranker.check_limits`."""
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...


class M3Reranker(Ranking):
    """bge-m3 in a reranker's place: dense, sparse and multi-vector scores in one.

    Query and passages are encoded apart, the query once, so that a user of bge-m3 reranks with
    the model that is loaded already.

    Args:
        embedder: The model; closing the reranker closes it.
        weights: How much each of the three scores counts; None for 1, 0.3 and 1.

    Raises:
        CheckpointError: The checkpoint lacks the file of an output that counts.

    Example:
        >>> reranker = M3Reranker(M3Embedder("BAAI/bge-m3"), weights=M3Weights(sparse=0.5))
        >>> ranked = reranker.rank("what is a panda?", ["hi", "A panda is a bear."], top_n=1)
        >>> len(ranked), isinstance(ranked[0][1], float)
        (1, True)
    """

    def __init__(
        self, embedder: M3Embedder, *, weights: M3Weights | Mapping[str, float] | None = None
    ) -> None:
        self._embedder = embedder
        self._weights = M3Weights.of(weights)
        embedder.require(*sorted(self._weights.outputs))

    @property
    def model(self) -> str:
        """The hub id or folder."""
        return self._embedder.model

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the scores."""
        parts = (self._embedder.fingerprint, sorted(self._weights.named().items()))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that were asked for; see `LocalModel.devices`."""
        return self._embedder.devices

    def score(self, query: str, passages: Iterable[str]) -> NDArray[np.float32]:
        """Score passages against one query, which is encoded once.

        Args:
            query: The query.
            passages: The passages.

        Returns:
            [n] float32, in order, as `M3Embedder.score` says: about 0 to 1, not a probability.

        Raises:
            BGEError: As `M3Embedder.score` says.
        """
        return self._embedder.score(_pairs(query, passages), weights=self._weights)

    async def ascore(self, query: str, passages: Iterable[str]) -> NDArray[np.float32]:
        """Score passages without blocking the event loop; see `score`."""
        pairs = await off_loop(_pairs, query, passages, inline=is_few(passages))
        return await self._embedder.ascore(pairs, weights=self._weights)

    def score_pairs(
        self, pairs: Iterable[tuple[str, str]], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Score (query, passage) pairs, each distinct text encoded once.

        Args:
            pairs: Pairs of str.
            show_progress: Show a progress bar.

        Returns:
            [n] float32, in order, as `M3Embedder.score` says.

        Raises:
            BGEError: As `M3Embedder.score` says.
        """
        return self._embedder.score(pairs, weights=self._weights, show_progress=show_progress)

    async def ascore_pairs(
        self, pairs: Iterable[tuple[str, str]], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Score pairs without blocking the event loop; see `score_pairs`."""
        return await self._embedder.ascore(
            pairs, weights=self._weights, show_progress=show_progress
        )

    def rank_spans(
        self,
        query: str,
        passages: Iterable[str],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[Ranked]:
        """Rank passages as `rank` does; a score is of what was read, so no span is given."""
        self.check_limits(top_n=top_n, score_threshold=score_threshold)
        return _ranked(self.score(query, passages), top_n, score_threshold)

    async def arank_spans(
        self,
        query: str,
        passages: Iterable[str],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
    ) -> list[Ranked]:
        """Rank passages without blocking the event loop; see `rank_spans`."""
        self.check_limits(top_n=top_n, score_threshold=score_threshold)
        return _ranked(await self.ascore(query, passages), top_n, score_threshold)

    def check_limits(self, *, top_n: int | None, score_threshold: float | None) -> None:
        """Refuse a `top_n` or a threshold that can't be meant.

        Raises:
            ArgumentError: `top_n` is below 1, or the threshold is NaN.
            InputTypeError: One of them is no number.
        """
        check_limits(top_n=top_n, score_threshold=score_threshold)

    def close(self) -> None:
        """Let go of the model; see `LocalModel.close`."""
        self._embedder.close()


def make_scorer(
    model: str | os.PathLike[str],
    *,
    endpoint: str | None = None,
    api_key: str | None = None,
    timeout: float | None = None,
    m3_weights: M3Weights | Mapping[str, float] | None = None,
    normalize: bool = True,
    device: str | Sequence[str] | None = None,
    dtype: str | torch.dtype = "auto",
    use_fp16: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    on_truncation: str = "warn",
    long_passages: str = "truncate",
    backend: str = "torch",
    cache_folder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    token: str | None = None,
) -> Scorer:
    """Make the scorer that a checkpoint is for.

    Args:
        model: A reranker, `"BAAI/bge-m3"`, or a folder of either.
        endpoint: A server's address; None for this machine. bge-m3 scores on this machine only.
        api_key: The server's token, as `RemoteReranker` takes it.
        timeout: Seconds to wait for one answer of the server.
        m3_weights: How much each score of bge-m3 counts; None for 1, 0.3 and 1, and for a
            reranker.
        normalize: As `Reranker` takes it; bge-m3's scores are what they are.
        device: As `Reranker` takes it, and so all that follow.
        dtype: A number format.
        use_fp16: FlagEmbedding's word for it.
        max_length: Tokens that are read: of a pair, or of each text with bge-m3.
        batch_tokens: Tokens computed in one pass.
        on_truncation: What happens when a text is longer.
        long_passages: `"window"` to score windows of a passage that doesn't fit; with bge-m3,
            which reads 8,192 tokens, only `"truncate"`.
        backend: What executes the model.
        cache_folder: The hub's cache.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never go to the network.
        trust_remote_code: Run Python code that the checkpoint carries.
        token: A hub token for private models.

    Returns:
        An `M3Reranker` for bge-m3 and what was trained from it; for the rest a `Reranker`, or a
        `RemoteReranker` where there is an endpoint.

    Raises:
        ArgumentError: A value that can't be served, or weights for a reranker.
        CheckpointError: A model that can't be found, is damaged, or scores no pairs.
        InputTypeError: A value of the wrong type.

    Example:
        >>> type(make_scorer("BAAI/bge-m3")).__name__
        'M3Reranker'
        >>> type(make_scorer("BAAI/bge-reranker-base")).__name__
        'Reranker'
    """
    shared: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "use_fp16": use_fp16,
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "on_truncation": on_truncation,
        "backend": backend,
        "cache_folder": cache_folder,
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
        "token": token,
    }
    if _is_m3(Source.of(model, revision=revision, cache_folder=cache_folder)):
        if endpoint is not None:
            msg = (
                f"{os.fspath(model)!r} reranks by three scores that no server's /rerank gives: "
                "leave endpoint=... out, or use a cross-encoder such as 'BAAI/bge-reranker-v2-m3'."
            )
            raise ArgumentError(msg)
        not_local(None, api_key=api_key, timeout=timeout, local=shared)
        if check_long_passages(long_passages) == "window":
            msg = (
                f"long_passages='window' is for rerankers, and {os.fspath(model)!r} scores whole "
                "texts by its three outputs: leave it out, or use a reranker."
            )
            raise ArgumentError(msg)
        return M3Reranker(M3Embedder(model, **shared), weights=m3_weights)
    served: dict[str, Any] = {"endpoint": endpoint, "api_key": api_key, "timeout": timeout}
    reranker = make_reranker(
        model, normalize=normalize, long_passages=long_passages, **served, **shared
    )
    if m3_weights is not None:
        msg = (
            f"m3_weights is for the three scores of bge-m3, and {os.fspath(model)!r} gives one: "
            "leave it out, or use model='BAAI/bge-m3'."
        )
        raise ArgumentError(msg)
    return reranker


def _ranked(
    scores: NDArray[np.float32], top_n: int | None, score_threshold: float | None
) -> list[Ranked]:
    ranked = rank_scores(scores, scores, top_n=top_n, score_threshold=score_threshold)
    return [Ranked(index, score) for index, score in ranked]


def _is_m3(source: Source) -> bool:
    if not source.is_local:
        # Another hub id is a reranker or will be refused: nothing is downloaded to see.
        return _all_outputs(find_profile(source.model))
    found = read(source, locate(source))
    return not found.labels and (_all_outputs(found.profile) or found.heads == HEADS.keys())


def _all_outputs(profile: Profile | None) -> bool:
    return profile is not None and "multi_vector" in profile.outputs


def _pairs(query: str, passages: Iterable[str]) -> list[tuple[str, str]]:
    query = check_text(query, "query")
    return [(query, passage) for passage in check_texts(passages, "passages")]
