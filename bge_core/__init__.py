"""BGE embedding models and rerankers on your own machine, behind no framework's interface."""

from importlib.metadata import PackageNotFoundError, version

from bge_core.checkpoints.catalog import Profile, register, supported_models
from bge_core.embedder import Embedder
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

try:
    __version__ = version("bge-adapters")
except PackageNotFoundError:  # a checkout that was put on the path by hand
    __version__ = "0+unknown"

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
