"""Embeddings and reranking on Ray Data; the code is in `bge_core.scale`."""

from bge_core.scale.ray import add_columns, write_shards
from bge_core.scale.shards import ShardReport
from bge_core.scale.steps import Embed, Rerank

__all__ = ["Embed", "Rerank", "ShardReport", "add_columns", "write_shards"]
