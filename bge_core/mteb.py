"""A configuration as a model of mteb: queries and documents in their roles, pairs by a reranker.

Importing this module imports mteb, from the extra `[mteb]`; nothing else here does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_core.embedder import Embedder
from bge_core.errors import ArgumentError, InputTypeError, needs_extra
from bge_core.progress import progress_bar
from bge_core.reranker import Scorer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import BatchedInput, EncodeKwargs
    from numpy.typing import NDArray
    from torch.utils.data import DataLoader
    from typing_extensions import Unpack

__all__ = ["MTEBCrossEncoder", "MTEBEncoder"]


try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType
except ImportError as exc:
    raise needs_extra(
        exc, "bge_core.mteb", packages=("mteb",), install="'bge-adapters[mteb]'"
    ) from exc

if TYPE_CHECKING:
    # mteb's protocols ask for the constructor of its command line, which it never calls with an
    # object at hand: type checkers would refuse these classes if they didn't name them.
    from mteb.models import CrossEncoderProtocol, EncoderProtocol

    class _Encoder(AbsEncoder, EncoderProtocol):
        mteb_model_meta: ModelMeta

    class _CrossEncoder(CrossEncoderProtocol):
        mteb_model_meta: ModelMeta
else:
    _Encoder, _CrossEncoder = AbsEncoder, object

# Enough for full packs on a GPU; a reranking task has millions of pairs.
_PAIRS = 8192


class MTEBEncoder(_Encoder):
    """An `Embedder` as mteb's encoder.

    What mteb calls a query goes through `embed_queries`, with the instruction; documents, and
    the texts of tasks without roles (clustering, STS and the like), through `embed_documents`, as
    the model cards of BGE say. The prompts that mteb has for instruction models are not used.

    mteb keeps results by name and revision. The name is the hub id, or `local/` and the folder's
    name; the revision is the embedder's fingerprint, so that two configurations never share one.

    Args:
        embedder: The configuration; it stays open.

    Raises:
        CheckpointError: The checkpoint can't be found, or it is damaged.
        InputTypeError: `embedder` is none.

    Example:
        >>> from bge_core import Embedder
        >>> model = MTEBEncoder(Embedder("BAAI/bge-small-en-v1.5"))
        >>> model.mteb_model_meta.name, model.mteb_model_meta.use_instructions
        ('BAAI/bge-small-en-v1.5', True)
    """

    model: Embedder
    mteb_model_meta: ModelMeta

    def __init__(self, embedder: Embedder) -> None:
        if not isinstance(embedder, Embedder) or not embedder.is_local:
            msg = (
                "MTEBEncoder takes a bge_core.Embedder on this machine, of bge-m3 as well, got "
                f"{type(embedder).__name__}: a reranker goes into MTEBCrossEncoder."
            )
            raise InputTypeError(msg)
        self.model = embedder
        facts = {
            "model_type": ["dense"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "embed_dim": embedder.dimension,
            "max_tokens": embedder.max_length,
            "use_instructions": bool(embedder.query_instruction),
        }
        self.mteb_model_meta = _meta(embedder, facts)

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,  # noqa: ARG002
        hf_split: str,  # noqa: ARG002
        hf_subset: str,  # noqa: ARG002
        prompt_type: PromptType | None = None,
        **kwargs: Unpack[EncodeKwargs],
    ) -> NDArray[np.float32]:
        """Embed what mteb's loader gives.

        Args:
            inputs: Batches with a `text` column.
            task_metadata: Not used.
            hf_split: Not used.
            hf_subset: Not used.
            prompt_type: The texts' role; None for no role.
            **kwargs: mteb's `show_progress_bar`; its `batch_size` has no effect, since packs are
                filled by tokens.

        Returns:
            [n, dimension] float32, in order.

        Raises:
            ArgumentError: Another argument, such as `precision`.
            BGEError: As `Embedder.embed_documents` says.
        """
        show_progress = _show_progress(kwargs)
        texts = list(_texts(inputs))
        if prompt_type == PromptType.query:
            return self.model.embed_queries(texts, priority="background")
        return self.model.embed_documents(texts, show_progress=show_progress)


class MTEBCrossEncoder(_CrossEncoder):
    """A reranker as mteb's cross-encoder, for tasks that have candidates to rerank.

    A retrieval task gets them from an encoder's predictions: evaluate that one with
    `prediction_folder=...`, and then this one on `task.convert_to_reranking(...)`.

    Args:
        reranker: A `Reranker` or what `make_reranker` gives, best with `normalize=False`: mteb
            sorts by the score, and in float32 the sigmoids of high logits are equal. It stays
            open.

    Raises:
        CheckpointError: The checkpoint can't be found, or it is damaged.
        InputTypeError: `reranker` is none.

    Example:
        >>> from bge_core import Reranker
        >>> model = MTEBCrossEncoder(Reranker("BAAI/bge-reranker-base", normalize=False))
        >>> model.mteb_model_meta.name, model.mteb_model_meta.is_cross_encoder
        ('BAAI/bge-reranker-base', True)
    """

    def __init__(self, reranker: Scorer) -> None:
        if not isinstance(reranker, Scorer):
            msg = (
                "MTEBCrossEncoder takes a bge_core.Reranker or M3Reranker, got "
                f"{type(reranker).__name__}: an embedder goes into MTEBEncoder."
            )
            raise InputTypeError(msg)
        self.model = reranker
        self.mteb_model_meta = _meta(reranker, {"model_type": ["cross-encoder"]})

    def predict(
        self,
        inputs1: DataLoader[BatchedInput],
        inputs2: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,  # noqa: ARG002
        hf_split: str,  # noqa: ARG002
        hf_subset: str,  # noqa: ARG002
        prompt_type: PromptType | None = None,  # noqa: ARG002
        **kwargs: Unpack[EncodeKwargs],
    ) -> NDArray[np.float32]:
        """Score the pairs that mteb's two loaders give.

        Args:
            inputs1: Batches of queries, with a `text` column.
            inputs2: Batches of as many passages.
            task_metadata: Not used.
            hf_split: Not used.
            hf_subset: Not used.
            prompt_type: Not used: the first of a pair is the query.
            **kwargs: As `MTEBEncoder.encode` takes them.

        Returns:
            [n] float32, in order.

        Raises:
            ArgumentError: Another argument, such as `precision`.
            BGEError: As `Reranker.score_pairs` says.
        """
        pairs = zip(_texts(inputs1), _texts(inputs2), strict=True)
        scores = [np.empty(0, dtype=np.float32)]
        with progress_bar(len(inputs1.dataset), show=_show_progress(kwargs)) as move:  # type: ignore[arg-type]
            while chunk := list(islice(pairs, _PAIRS)):
                scores.append(self.model.score_pairs(chunk))
                if move is not None:
                    move(len(chunk))
        return np.concatenate(scores)


def _meta(model: Embedder | Scorer, facts: Mapping[str, Any]) -> ModelMeta:
    # A folder's path says nothing to others; mteb wants an organisation in front.
    name = (
        f"local/{Path(model.model).resolve().name}" if Path(model.model).is_dir() else model.model
    )
    return ModelMeta.create_empty(
        overwrites={
            "name": name,
            "revision": model.fingerprint,
            "framework": ["PyTorch", "Transformers"],
            **facts,
        }
    )


def _texts(inputs: DataLoader[BatchedInput]) -> Iterator[str]:
    for batch in inputs:
        yield from batch["text"]


def _show_progress(options: Mapping[str, Any]) -> bool:
    if unknown := options.keys() - {"batch_size", "show_progress_bar"}:
        msg = (
            f"encode_kwargs has {sorted(unknown)}, and bge_core takes batch_size and "
            "show_progress_bar only: the rest is said where the Embedder or Reranker is made."
        )
        raise ArgumentError(msg)
    return bool(options.get("show_progress_bar", True))
