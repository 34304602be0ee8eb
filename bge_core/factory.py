"""The right class for a model name: on this machine or on a server, a reranker or bge-m3."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Unpack

from bge_core import arguments
from bge_core.checkpoints.metadata import HEADS, read
from bge_core.checkpoints.source import Source, locate
from bge_core.embedder import Embedder
from bge_core.errors import ArgumentError
from bge_core.layers import LayerOptions
from bge_core.m3 import M3Embedder, M3Reranker
from bge_core.options import (
    EmbedderArguments,
    RerankerArguments,
    ServerArguments,
    ServerOptions,
    given_options,
    with_options_of,
)
from bge_core.reranker import Reranker
from bge_core.servers.models import (
    RemoteEmbedder,
    RemoteReranker,
    find_served_profile,
    served_source,
)

if TYPE_CHECKING:
    from bge_core.m3 import M3Weights
    from bge_core.reranker import Scorer

__all__ = ["make_embedder", "make_reranker", "make_scorer"]


@with_options_of(ServerOptions, Embedder)
def make_embedder(
    model: str | os.PathLike[str],
    *,
    endpoint: str | None = None,
    **options: Unpack[EmbedderArguments],
) -> Embedder:
    """Make an embedder on this machine, or one that asks a server.

    Args:
        model: A hub id or a folder.
        endpoint: A server's address; None for this machine.
        **options: As `Embedder` takes them, and with an endpoint as `RemoteEmbedder` does: what
            says how a model is loaded and run is the server's then, and refused; `max_length` says
            how much the server reads, for `long_passages="window"`.

    Returns:
        A `RemoteEmbedder` where there is an endpoint, else an `Embedder`.

    Raises:
        ArgumentError: A value that is not supported, or one for a local model with an endpoint.
        CheckpointError: A model that can't be found, is damaged, or is no embedding model.
        InputTypeError: A value of the wrong type.

    Example:
        >>> type(make_embedder("BAAI/bge-small-en-v1.5")).__name__
        'Embedder'
        >>> served = make_embedder("BAAI/bge-small-en-v1.5", endpoint="http://localhost:8080")
        >>> type(served).__name__
        'RemoteEmbedder'
    """
    own, server = _split(options)
    if endpoint is None:
        _check_no_server(server)
        return Embedder(model, **own)
    served = _served(own, local=Embedder, served=RemoteEmbedder)
    return RemoteEmbedder(model, endpoint=endpoint, **server, **served)


@with_options_of(ServerOptions, Reranker)
def make_reranker(
    model: str | os.PathLike[str],
    *,
    endpoint: str | None = None,
    m3_weights: M3Weights | Mapping[str, float] | None = None,
    **options: Unpack[RerankerArguments],
) -> Scorer:
    """Make the reranker that a checkpoint is for: a cross-encoder, or bge-m3.

    Args:
        model: A reranker, `"BAAI/bge-m3"`, or a folder of either.
        endpoint: A server's address; None for this machine. bge-m3 scores on this machine only.
        m3_weights: How much each score of bge-m3 counts; None for 1, 0.3 and 1, and for a
            reranker.
        **options: As `Reranker` takes them, and with an endpoint as `RemoteReranker` does: what
            says how a model is loaded and run is the server's then, and refused; `max_length` says
            how much the server reads, for `long_passages="window"`. bge-m3's scores are what they
            are, whatever `normalize`.

    Returns:
        An `M3Reranker` for bge-m3 and what was trained from it; for the rest a `Reranker`, or a
        `RemoteReranker` where there is an endpoint.

    Raises:
        ArgumentError: A value that is not supported, or weights for a reranker.
        CheckpointError: A model that can't be found, is damaged, or scores no pairs.
        InputTypeError: A value of the wrong type.

    Example:
        >>> type(make_reranker("BAAI/bge-m3")).__name__
        'M3Reranker'
        >>> type(make_reranker("BAAI/bge-reranker-base")).__name__
        'Reranker'
    """
    own, server = _split(options)
    if _is_m3(
        Source.of(model, revision=options.get("revision"), cache_folder=options.get("cache_folder"))
        if endpoint is None
        else served_source(model)
    ):
        if endpoint is not None:
            msg = (
                f"{os.fspath(model)!r} reranks by three scores that no server's /rerank gives: "
                "leave endpoint=... out, or use a cross-encoder such as 'BAAI/bge-reranker-v2-m3'."
            )
            raise ArgumentError(msg)
        _check_no_server(server)
        own.pop("normalize", None)
        long_passages = own.pop("long_passages", "truncate")
        layers = LayerOptions.of(
            cutoff_layers=own.pop("cutoff_layers", None),
            compress_layers=own.pop("compress_layers", None),
            compress_ratio=own.pop("compress_ratio", 1),
        )
        layers.resolve(os.fspath(model), None)
        embedder = M3Embedder(model, **own)
        return M3Reranker(embedder, weights=m3_weights, long_passages=long_passages)
    if endpoint is None:
        _check_no_server(server)
        reranker: Scorer = Reranker(model, **own)
    else:
        served = _served(own, local=Reranker, served=RemoteReranker)
        reranker = RemoteReranker(model, endpoint=endpoint, **server, **served)
    if m3_weights is not None:
        msg = (
            f"m3_weights is for the three scores of bge-m3, and {os.fspath(model)!r} gives one: "
            "leave it out, or use model='BAAI/bge-m3'."
        )
        raise ArgumentError(msg)
    return reranker


make_scorer = make_reranker
"""The former name of `make_reranker`."""


def _is_m3(source: Source) -> bool:
    if not source.is_local:
        # Another hub id is a reranker or will be refused: nothing is downloaded to see.
        profile = find_served_profile(source.model)
        return profile is not None and "multi_vector" in profile.outputs
    found = read(source, locate(source))
    profile = found.profile
    known = profile is not None and "multi_vector" in profile.outputs
    return not found.labels and (known or found.m3_heads == HEADS.keys())


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of a model, and those of a server."""
    server = {name: options[name] for name in ServerArguments.__annotations__ if name in options}
    return {name: value for name, value in options.items() if name not in server}, server


def _check_no_server(served: Mapping[str, object]) -> None:
    given = [name for name, value in served.items() if value is not None]
    if given:
        msg = (
            f"{', '.join(given)} is for a server: pass endpoint='http://...', too, or leave "
            "it out. A token for private models on the hub is token='...'."
        )
        raise ArgumentError(msg)


def _served(
    options: Mapping[str, Any], *, local: Callable[..., object], served: Callable[..., object]
) -> dict[str, Any]:
    """Return the options that apply on a server; refuse the others where they are set."""
    known, own = inspect.signature(served).parameters, inspect.signature(local).parameters
    refused = {name: value for name, value in options.items() if name in own and name not in known}
    long_passages = arguments.one_of(
        "long_passages", options.get("long_passages", "truncate"), arguments.LONG_PASSAGES
    )
    if long_passages == "truncate" and "max_length" in options:
        refused["max_length"] = options["max_length"]
    given = given_options(refused, of=local)
    if given:
        msg = (
            f"{', '.join(given)} can't be set with endpoint=..., since the server loads and runs "
            "the model: leave it out here and say it to the server. (api_key='...' is the "
            "server's token; instructions and normalize apply as ever.)"
        )
        raise ArgumentError(msg)
    return {name: value for name, value in options.items() if name not in refused}
