"""Fakes for the tests of your own chains: no weights, no torch, no network.

They are the real classes over a fake model: the same arguments, refused for the same reasons, the
same copies of documents and the same runs in traces. Their numbers are the same on every machine
and follow the words that texts share. See `bge_core.testing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bge_core.host_fields import ModelName
from bge_core.testing import fake_embedder, fake_reranker
from langchain_bge.cross_encoder import BGECrossEncoder
from langchain_bge.embeddings import BGEEmbeddings
from langchain_bge.reranker import BGEReranker

__all__ = ["FakeBGECrossEncoder", "FakeBGEEmbeddings", "FakeBGEReranker"]


class FakeBGEEmbeddings(BGEEmbeddings):
    """`BGEEmbeddings` without a model: vectors are hashes of words.

    Example:
        >>> embeddings = FakeBGEEmbeddings()
        >>> len(embeddings.embed_query("Where is Paris?"))
        384
    """

    _factory = staticmethod(fake_embedder)
    if not TYPE_CHECKING:
        model: ModelName = Field(default="BAAI/bge-small-en-v1.5", frozen=True)
        """The model to stand for: its name gives instruction and dimension."""


class FakeBGEReranker(BGEReranker):
    """`BGEReranker` without a model: scores count shared words.

    Example:
        >>> reranker = FakeBGEReranker(top_n=1)
        >>> reranker.rerank(["hi", "The giant panda is a bear."], "What is a panda?")[0]["index"]
        1
    """

    _factory = staticmethod(fake_reranker)
    if not TYPE_CHECKING:
        model: ModelName = Field(default="BAAI/bge-reranker-base", frozen=True)
        """The model to stand for."""


class FakeBGECrossEncoder(BGECrossEncoder):
    """`BGECrossEncoder` without a model: scores count shared words."""

    _factory = staticmethod(fake_reranker)
    if not TYPE_CHECKING:
        model: ModelName = Field(default="BAAI/bge-reranker-base", frozen=True)
        """The model to stand for."""
