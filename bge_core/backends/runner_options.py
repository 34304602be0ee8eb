"""How a checkpoint is to be run, for every backend alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bge_core.backends.output_cache import OutputCache
    from bge_core.checkpoints.metadata import Kind
    from bge_core.layers import Depth

__all__ = ["RunnerOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """How a checkpoint is to be run.

    Attributes:
        kind: `"embedder"` or `"reranker"`.
        pooling: The hidden states that make the vector; None for a reranker.
        dtype: `"float32"`, `"float16"`, `"bfloat16"` or `"int8"`.
        trust_remote_code: Run Python code that the checkpoint carries.
        cache_folder: Where a converted model is kept; None for the user's cache.
        answer: The token whose logit is the score, of a reranker that is a language model.
        depth: How much is computed of a reranker with a score after each layer.
        tail: Tokens behind each passage that a reranker which is a language model is given.
        output_cache: Where bge-m3's passes look first and leave the output that was not asked
            for; None for nowhere.
    """

    kind: Kind
    pooling: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    cache_folder: str | None = None
    answer: int | None = None
    depth: Depth | None = None
    tail: int = 0
    output_cache: OutputCache | None = None
