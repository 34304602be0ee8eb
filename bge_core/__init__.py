"""BGE embedding models and rerankers on your own machine, behind no framework's interface."""

from typing import TYPE_CHECKING

from bge_core.checkpoints.catalog import PairPrompt, Profile, register, supported_models
from bge_core.embedder import Embedder
from bge_core.engine.stats import ModelStats
from bge_core.errors import (
    ArgumentError,
    BGEError,
    CheckpointError,
    ClosedError,
    ComputationError,
    EndpointError,
    InputTypeError,
    MissingExtraError,
    TruncationError,
)
from bge_core.factory import make_embedder, make_reranker, make_scorer
from bge_core.m3 import M3Embedder, M3Outputs, M3Reranker, M3Weights
from bge_core.prompts import QueryExample
from bge_core.reranker import Ranked, Reranker, Scorer
from bge_core.servers.models import RemoteEmbedder, RemoteReranker

if TYPE_CHECKING:
    __version__: str
else:  # type checkers would take any name for one of this package's

    def __getattr__(name: str) -> str:
        # What reads it takes a third as long to import as all the rest.
        if name == "__version__":
            from importlib.metadata import PackageNotFoundError, version

            try:
                return version("bge-adapters")
            except PackageNotFoundError:  # a checkout that was put on the path by hand
                return "0+unknown"
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)


__all__ = [
    "ArgumentError",
    "BGEError",
    "CheckpointError",
    "ClosedError",
    "ComputationError",
    "Embedder",
    "EndpointError",
    "InputTypeError",
    "M3Embedder",
    "M3Outputs",
    "M3Reranker",
    "M3Weights",
    "MissingExtraError",
    "ModelStats",
    "PairPrompt",
    "Profile",
    "QueryExample",
    "Ranked",
    "RemoteEmbedder",
    "RemoteReranker",
    "Reranker",
    "Scorer",
    "TruncationError",
    "make_embedder",
    "make_reranker",
    "make_scorer",
    "register",
    "supported_models",
]
