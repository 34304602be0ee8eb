"""Fakes for the tests of your own indexes: no weights, no torch, no network.

They are the real classes over a fake model: the same arguments, refused for the same reasons, the
same copies of nodes and the same events. Their numbers are the same on every machine and follow the
words that texts share. See `bge_core.testing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bge_core.host_fields import ModelName
from bge_core.testing import fake_embedder, fake_reranker
from llamaindex_bge.embedding import BGEEmbedding
from llamaindex_bge.reranker import BGEReranker

__all__ = ["FakeBGEEmbedding", "FakeBGEReranker"]


class FakeBGEEmbedding(BGEEmbedding):
    """`BGEEmbedding` without a model: vectors are hashes of words.

    Example:
        >>> embed_model = FakeBGEEmbedding()
        >>> len(embed_model.get_query_embedding("Where is Paris?"))
        384
    """

    _factory = staticmethod(fake_embedder)
    if not TYPE_CHECKING:
        model_name: ModelName = Field(default="BAAI/bge-small-en-v1.5", frozen=True)
        """The model to stand for: its name gives instruction and dimension."""

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex writes beside a configuration."""
        return "FakeBGEEmbedding"


class FakeBGEReranker(BGEReranker):
    """`BGEReranker` without a model: scores count shared words.

    Example:
        >>> from llama_index.core.schema import NodeWithScore, TextNode
        >>> texts = ["hi", "The giant panda is a bear."]
        >>> nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
        >>> best = FakeBGEReranker(top_n=1).postprocess_nodes(nodes, query_str="what is a panda?")
        >>> best[0].text
        'The giant panda is a bear.'
    """

    _factory = staticmethod(fake_reranker)
    if not TYPE_CHECKING:
        model: ModelName = Field(default="BAAI/bge-reranker-base", frozen=True)
        """The model to stand for."""

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex writes beside a configuration."""
        return "FakeBGEReranker"
