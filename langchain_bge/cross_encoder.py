"""A BGE reranker behind LangChain's `BaseCrossEncoder`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from langchain_core.cross_encoders import BaseCrossEncoder
from pydantic import Field, PrivateAttr

from bge_core import Scorer, make_reranker
from bge_core.host_fields import RerankerFields
from langchain_bge._fields import ServedModelFields
from langchain_bge._kwargs import MODEL_KEYS, fold

__all__ = ["BGECrossEncoder"]


class BGECrossEncoder(RerankerFields, ServedModelFields, BaseCrossEncoder):
    """A BGE reranker that scores pairs of texts, for `CrossEncoderReranker` and the like.

    `BGEReranker` does more with less: it puts scores into the documents' metadata and knows a
    threshold. Arguments are checked at once; weights load at first use and are shared by all
    adapters on the same model, revision, device and dtype.

    Raises:
        ArgumentError: An unknown argument, or a value that is not supported.
        CheckpointError: A model that can't be found, is damaged, or is neither bge-m3 nor a
            reranker of one label.

    Example:
        >>> encoder = BGECrossEncoder(model="BAAI/bge-reranker-base")
        >>> encoder.score([("What is a panda?", "The giant panda is a bear.")])  # doctest: +SKIP
        [0.9979]
    """

    model_kwargs: dict[str, Any] = Field(
        default_factory=dict, frozen=True, exclude=True, repr=False
    )
    """`device`, `max_length` and the like, as `HuggingFaceCrossEncoder` takes them; they become
    the arguments of the same meaning."""

    _factory: ClassVar[Callable[..., Scorer]] = staticmethod(make_reranker)
    if TYPE_CHECKING:
        _core: Scorer = PrivateAttr()

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Score (query, passage) pairs, each for itself.

        Args:
            text_pairs: Pairs of texts.

        Returns:
            One Python float a pair, in order; higher is more relevant.

        Raises:
            BGEError: As `bge_core.Reranker.score_pairs` says.
        """
        scores: list[float] = self._core.score_pairs(text_pairs, priority=self.priority).tolist()
        return scores

    @classmethod
    def _normalize_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        keys = {**MODEL_KEYS, "max_length": "max_length"}
        return fold(super()._normalize_arguments(arguments), of="model_kwargs", keys=keys)

    def _make_core(self) -> Scorer:
        return self._factory(self.model, normalize=self.normalize, **self._options())
