"""The right class for a model name: on this machine or on a server, a reranker or bge-m3."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bge_core import arguments
from bge_core.checkpoints.metadata import HEADS, read
from bge_core.checkpoints.source import Source, locate
from bge_core.embedder import Embedder
from bge_core.errors import ArgumentError
from bge_core.m3 import M3Embedder, M3Reranker
from bge_core.reranker import Reranker
from bge_core.servers.models import (
    RemoteEmbedder,
    RemoteReranker,
    find_served_profile,
    served_source,
)

if TYPE_CHECKING:
    import torch

    from bge_core.checkpoints.catalog import Profile
    from bge_core.embedder import DenseEmbedder
    from bge_core.m3 import M3Weights
    from bge_core.prompts import QueryExample
    from bge_core.reranker import PairScorer, Scorer

__all__ = ["make_embedder", "make_reranker", "make_scorer", "reject_local_options"]


def make_scorer(
    model: str | os.PathLike[str],
    *,
    endpoint: str | None = None,
    api_key: str | None = None,
    timeout: float | None = None,
    served_model_name: str | None = None,
    endpoint_batch_size: int | None = None,
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
        served_model_name: The server's name of the model, where it is another than `model`.
        endpoint_batch_size: Texts that one request to the server carries, at most; None for 32.
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
    served: dict[str, Any] = {
        "api_key": api_key,
        "timeout": timeout,
        "served_model_name": served_model_name,
        "endpoint_batch_size": endpoint_batch_size,
    }
    if _is_m3(
        Source.of(model, revision=revision, cache_folder=cache_folder)
        if endpoint is None
        else served_source(model)
    ):
        if endpoint is not None:
            msg = (
                f"{os.fspath(model)!r} reranks by three scores that no server's /rerank gives: "
                "leave endpoint=... out, or use a cross-encoder such as 'BAAI/bge-reranker-v2-m3'."
            )
            raise ArgumentError(msg)
        reject_local_options(None, served=served, local=shared)
        if arguments.one_of("long_passages", long_passages, arguments.LONG_PASSAGES) == "window":
            msg = (
                f"long_passages='window' is for rerankers, and {os.fspath(model)!r} scores whole "
                "texts by its three outputs: leave it out, or use a reranker."
            )
            raise ArgumentError(msg)
        return M3Reranker(M3Embedder(model, **shared), weights=m3_weights)
    reranker = make_reranker(
        model,
        normalize=normalize,
        long_passages=long_passages,
        endpoint=endpoint,
        **served,
        **shared,
    )
    if m3_weights is not None:
        msg = (
            f"m3_weights is for the three scores of bge-m3, and {os.fspath(model)!r} gives one: "
            "leave it out, or use model='BAAI/bge-m3'."
        )
        raise ArgumentError(msg)
    return reranker


def _is_m3(source: Source) -> bool:
    if not source.is_local:
        # Another hub id is a reranker or will be refused: nothing is downloaded to see.
        return _all_outputs(find_served_profile(source.model))
    found = read(source, locate(source))
    return not found.labels and (_all_outputs(found.profile) or found.heads == HEADS.keys())


def _all_outputs(profile: Profile | None) -> bool:
    return profile is not None and "multi_vector" in profile.outputs


_DEFAULTS: Mapping[str, object] = MappingProxyType(
    {
        "backend": "torch",
        "dtype": "auto",
        "local_files_only": False,
        "long_passages": "truncate",
        "on_truncation": "warn",
        "trust_remote_code": False,
    }
)


def make_embedder(
    model: str | os.PathLike[str],
    *,
    endpoint: str | None = None,
    api_key: str | None = None,
    timeout: float | None = None,
    served_model_name: str | None = None,
    endpoint_batch_size: int | None = None,
    query_instruction: str | None = None,
    task_description: str | None = None,
    examples: Iterable[QueryExample | Mapping[str, str]] | None = None,
    task: str | None = None,
    pooling: str | None = None,
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
) -> DenseEmbedder:
    """Make an embedder on this machine, or one that asks a server.

    Args:
        model: A hub id or a folder.
        endpoint: A server's address; None for this machine.
        api_key: The server's token, as `RemoteEmbedder` takes it.
        timeout: Seconds to wait for one answer of the server.
        served_model_name: The server's name of the model, where it is another than `model`.
        endpoint_batch_size: Texts that one request to the server carries, at most; None for 32.
        query_instruction: As `Embedder` takes it, and so all that follow.
        task_description: A decoder's word for the same.
        examples: What bge-en-icl sees in front of each query.
        task: llm-embedder's task.
        pooling: Which rows make the vector.
        normalize: Scale vectors to unit length.
        device: Where it runs.
        dtype: A number format.
        use_fp16: FlagEmbedding's word for it.
        max_length: Tokens that are read of a text.
        batch_tokens: Tokens computed in one pass.
        on_truncation: What happens when a text is longer.
        long_passages: What happens with a document that doesn't fit.
        backend: What executes the model.
        cache_folder: The hub's cache.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never go to the network.
        trust_remote_code: Run Python code that the checkpoint carries.
        token: A hub token for private models.

    Returns:
        A `RemoteEmbedder` where there is an endpoint, else an `Embedder`.

    Raises:
        ArgumentError: A value that can't be served, or one for a local model with an endpoint.
        CheckpointError: A model that can't be found, is damaged, or is no embedding model.
        InputTypeError: A value of the wrong type.

    Example:
        >>> type(make_embedder("BAAI/bge-small-en-v1.5")).__name__
        'Embedder'
        >>> served = make_embedder("BAAI/bge-small-en-v1.5", endpoint="http://localhost:8080")
        >>> type(served).__name__
        'RemoteEmbedder'
    """
    local: dict[str, Any] = {
        "pooling": pooling,
        "device": device,
        "dtype": dtype,
        "use_fp16": use_fp16,
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "on_truncation": on_truncation,
        "long_passages": long_passages,
        "backend": backend,
        "cache_folder": cache_folder,
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
        "token": token,
    }
    common: dict[str, Any] = {
        "query_instruction": query_instruction,
        "task_description": task_description,
        "examples": examples,
        "task": task,
        "normalize": normalize,
    }
    served: dict[str, Any] = {
        "api_key": api_key,
        "timeout": timeout,
        "served_model_name": served_model_name,
        "endpoint_batch_size": endpoint_batch_size,
    }
    reject_local_options(endpoint, served=served, local=local)
    if endpoint is None:
        return Embedder(model, **common, **local)
    return RemoteEmbedder(model, endpoint=endpoint, **served, **common)


def make_reranker(
    model: str | os.PathLike[str],
    *,
    endpoint: str | None = None,
    api_key: str | None = None,
    timeout: float | None = None,
    served_model_name: str | None = None,
    endpoint_batch_size: int | None = None,
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
) -> PairScorer:
    """Make a cross-encoder on this machine, or one that asks a server.

    Args:
        model: A hub id or a folder.
        endpoint: A server's address; None for this machine.
        api_key: The server's token, as `RemoteReranker` takes it.
        timeout: Seconds to wait for one answer of the server.
        served_model_name: The server's name of the model, where it is another than `model`.
        endpoint_batch_size: Texts that one request to the server carries, at most; None for 32.
        normalize: As `Reranker` takes it, and so all that follow.
        device: Where it runs.
        dtype: A number format.
        use_fp16: FlagEmbedding's word for it.
        max_length: Tokens that are read of a pair.
        batch_tokens: Tokens computed in one pass.
        on_truncation: What happens when a pair is longer.
        long_passages: What happens with a passage that doesn't fit.
        backend: What executes the model.
        cache_folder: The hub's cache.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never go to the network.
        trust_remote_code: Run Python code that the checkpoint carries.
        token: A hub token for private models.

    Returns:
        A `RemoteReranker` where there is an endpoint, else a `Reranker`.

    Raises:
        ArgumentError: A value that can't be served, or one for a local model with an endpoint.
        CheckpointError: A model that can't be found, is damaged, or is no reranker of one label.
        InputTypeError: A value of the wrong type.
    """
    local: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "use_fp16": use_fp16,
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "on_truncation": on_truncation,
        "long_passages": long_passages,
        "backend": backend,
        "cache_folder": cache_folder,
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
        "token": token,
    }
    served: dict[str, Any] = {
        "api_key": api_key,
        "timeout": timeout,
        "served_model_name": served_model_name,
        "endpoint_batch_size": endpoint_batch_size,
    }
    reject_local_options(endpoint, served=served, local=local)
    if endpoint is None:
        return Reranker(model, normalize=normalize, **local)
    return RemoteReranker(model, endpoint=endpoint, normalize=normalize, **served)


def reject_local_options(
    endpoint: str | None,
    *,
    served: Mapping[str, object],
    local: Mapping[str, object],
) -> None:
    """Refuse arguments of a local model beside an endpoint, and a server's without one.

    Raises:
        ArgumentError: Names what to leave out.
    """
    if endpoint is None:
        given = [name for name, value in served.items() if value is not None]
        if given:
            msg = (
                f"{', '.join(given)} is for a server: pass endpoint='http://...', too, or leave "
                "it out. A token for private models on the hub is token='...'."
            )
            raise ArgumentError(msg)
        return
    given = sorted(name for name, value in local.items() if value != _DEFAULTS.get(name))
    if given:
        msg = (
            f"{', '.join(given)} can't be set with endpoint=..., since the server loads and runs "
            "the model: leave it out here and say it to the server. (api_key='...' is the "
            "server's token; instructions and normalize apply as ever.)"
        )
        raise ArgumentError(msg)
