"""bge-m3's outputs in the words of vector stores; nothing here imports or calls a store."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bge_core import arguments
from bge_core.arguments import shown
from bge_core.errors import ArgumentError, InputTypeError

if TYPE_CHECKING:
    from bge_core.m3 import M3Outputs

__all__ = ["qdrant_vectors", "rank_features", "rank_features_query", "sparsevec"]

# Tokens of bge-m3's vocabulary.
_DIMENSIONS = 250_002
# pgvector's limit of elements in one sparsevec.
_MOST_ELEMENTS = 16_000
# Lucene takes no subnormal number as a feature.
_LEAST_FEATURE = 2.0**-126


def rank_features(weights: Mapping[int, float]) -> dict[str, float]:
    """Write a sparse output as Elasticsearch's and OpenSearch's field types take it.

    For `sparse_vector` and `rank_features` of Elasticsearch and `rank_features` of OpenSearch, and
    for their queries: `{"sparse_vector": {"field": ..., "query_vector": ...}}` of Elasticsearch
    and `{"neural_sparse": {field: {"query_tokens": ...}}}` of OpenSearch. They keep 9 significant
    bits of a weight.

    Args:
        weights: Token id -> weight, one of `M3Outputs.sparse`.

    Returns:
        Token id as a string, which has no dot, -> weight. What Lucene can't hold (0, or less than
        2**-126) is left out.

    Raises:
        ArgumentError: A weight is negative or not finite, or a token id is negative.
        InputTypeError: `weights` is no mapping of int to numbers.

    Example:
        >>> rank_features({6: 0.25, 901: 0.5})
        {'6': 0.25, '901': 0.5}
    """
    checked = _checked(weights)
    return {str(token): weight for token, weight in checked if weight >= _LEAST_FEATURE}


def rank_features_query(field: str, weights: Mapping[int, float]) -> dict[str, Any]:
    """Write a query for a `rank_features` field, whose score is bge-m3's own lexical score.

    It runs in Elasticsearch and, without the neural plugin, in OpenSearch.

    Args:
        field: Name of the `rank_features` field.
        weights: Token id -> weight of the query.

    Returns:
        A `bool` query of one linear `rank_feature` clause a token; the score of a document is the
        sum, over the tokens that it shares with the query, of the product of both weights.

    Raises:
        ArgumentError: As `rank_features` says.
        InputTypeError: As `rank_features` says.

    Example:
        >>> rank_features_query("tokens", {6: 0.25})["bool"]["should"]
        [{'rank_feature': {'field': 'tokens.6', 'boost': 0.25, 'linear': {}}}]
    """
    clauses = [
        {"rank_feature": {"field": f"{field}.{token}", "boost": weight, "linear": {}}}
        for token, weight in rank_features(weights).items()
    ]
    return {"bool": {"should": clauses}}


def sparsevec(
    weights: Mapping[int, float],
    *,
    dimensions: int = _DIMENSIONS,
    heaviest: int | None = None,
) -> str:
    """Write a sparse output as a literal of pgvector's type `sparsevec`.

    Args:
        weights: Token id -> weight, one of `M3Outputs.sparse`.
        dimensions: Tokens of the vocabulary, which is the column's `sparsevec(dimensions)`.
        heaviest: Keep so many weights at the most, the heaviest; None for all. An hnsw index
            takes 1,000 a vector; without an index there may be 16,000.

    Returns:
        `{index:value,...}/dimensions`, where an index is a token id plus 1.

    Raises:
        ArgumentError: A weight is negative or not finite; a token id is none of `dimensions`; or
            more than 16,000 weights are left.
        InputTypeError: `weights` is no mapping of int to numbers, or an argument no whole number.

    Example:
        >>> sparsevec({0: 0.25, 6: 0.5, 9: 0.125}, dimensions=10, heaviest=2)
        '{1:0.25,7:0.5}/10'
    """
    dimensions = arguments.whole_number("dimensions", dimensions, unit=" of tokens")
    if heaviest is not None:
        heaviest = arguments.whole_number("heaviest", heaviest, instead=" or None for all")
    kept = [(token, weight) for token, weight in _checked(weights) if weight]
    for token, _ in kept:
        if token >= dimensions:
            msg = f"Token {token} is none of {dimensions}: pass the vocabulary's size, dimensions=."
            raise ArgumentError(msg)
    if heaviest is not None:
        kept = sorted(kept, key=lambda item: (-item[1], item[0]))[:heaviest]
    if len(kept) > _MOST_ELEMENTS:
        msg = (
            f"A sparsevec holds {_MOST_ELEMENTS:,} weights, got {len(kept):,}: "
            f"pass heaviest={_MOST_ELEMENTS} or less."
        )
        raise ArgumentError(msg)
    elements = ",".join(f"{token + 1}:{weight!r}" for token, weight in sorted(kept))
    return f"{{{elements}}}/{dimensions}"


def qdrant_vectors(outputs: M3Outputs) -> list[dict[str, Any]]:
    """Write outputs as named vectors of Qdrant's points.

    Args:
        outputs: What `M3Embedder.encode` gave.

    Returns:
        For each text the outputs that were asked for, as `PointStruct(vector=...)` takes them:
        `"dense"` a list, `"sparse"` a dict of `indices` and `values`, and `"multi_vector"` a list
        of lists, whose MaxSim is bge-m3's multi-vector score times the query's vectors.

    Example:
        >>> from bge_core import M3Embedder
        >>> encoded = M3Embedder("BAAI/bge-m3").encode(["A panda is a bear."], multi_vector=True)
        >>> [sorted(vectors) for vectors in qdrant_vectors(encoded)]
        [['dense', 'multi_vector', 'sparse']]
    """
    columns: dict[str, list[Any]] = {}
    if outputs.dense is not None:
        columns["dense"] = outputs.dense.tolist()
    if outputs.sparse is not None:
        columns["sparse"] = [
            {"indices": list(weights), "values": list(weights.values())}
            for weights in outputs.sparse
        ]
    if outputs.multi_vector is not None:
        columns["multi_vector"] = [vectors.tolist() for vectors in outputs.multi_vector]
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _checked(weights: Mapping[int, float]) -> list[tuple[int, float]]:
    """Return token ids, ascending, and weights as Python numbers."""
    if not isinstance(weights, Mapping):
        msg = (
            f"weights must be a mapping of token ids to weights, got {shown(weights)}: "
            "pass one of M3Outputs.sparse."
        )
        raise InputTypeError(msg)
    found = []
    for token, weight in weights.items():
        try:
            whole, number = int(token), float(weight)
        except (TypeError, ValueError):
            whole, number = -1, math.nan
        if isinstance(token, str) or whole != token:
            msg = (
                f"weights must be a mapping of token ids to weights, got {shown(token)}: "
                f"{shown(weight)}. Pass one of M3Outputs.sparse."
            )
            raise InputTypeError(msg)
        if whole < 0 or not math.isfinite(number) or number < 0:
            msg = (
                f"Token ids and weights must be 0 or more and finite, got {whole}: {number}. "
                "Pass one of M3Outputs.sparse."
            )
            raise ArgumentError(msg)
        found.append((whole, number))
    return sorted(found)
