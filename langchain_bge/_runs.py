"""A rerank as a run of its own in LangChain's traces: LangSmith, callbacks, `astream_events`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import (
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
)

from bge_core import ArgumentError, InputTypeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.callbacks import Callbacks

__all__ = ["RerankRunnable", "arerank_run", "config_of", "rerank_run"]

Inputs = dict[str, Any]


class Compressor(Protocol):
    """What a step of a chain needs of a reranker: to rerank as one run."""

    def _compress(
        self, documents: Sequence[Document], query: str, config: RunnableConfig, name: str
    ) -> list[Document]: ...

    async def _acompress(
        self, documents: Sequence[Document], query: str, config: RunnableConfig, name: str
    ) -> list[Document]: ...


def config_of(callbacks: Callbacks | None) -> RunnableConfig:
    """Return the surrounding run's configuration, with the callbacks of a call in their place."""
    config = ensure_config()
    if callbacks is not None:
        config["callbacks"] = callbacks
    return config


@contextmanager
def rerank_run(config: RunnableConfig, name: str, inputs: Inputs) -> Iterator[list[Document]]:
    """Report one rerank, from its start to its end or error; the body fills the list."""
    run = get_callback_manager_for_config(config).on_chain_start(
        None, inputs, name=name, run_id=config.get("run_id")
    )
    result: list[Document] = []
    try:
        yield result
    except BaseException as exc:
        run.on_chain_error(exc)
        raise
    run.on_chain_end(_outputs(result))


@asynccontextmanager
async def arerank_run(
    config: RunnableConfig, name: str, inputs: Inputs
) -> AsyncIterator[list[Document]]:
    """Report one rerank to handlers of both kinds; see `rerank_run`."""
    run = await get_async_callback_manager_for_config(config).on_chain_start(
        None, inputs, name=name, run_id=config.get("run_id")
    )
    result: list[Document] = []
    try:
        yield result
    except BaseException as exc:
        await run.on_chain_error(exc)
        raise
    await run.on_chain_end(_outputs(result))


def _outputs(documents: Sequence[Document]) -> dict[str, Any]:
    scores = [document.metadata["relevance_score"] for document in documents]
    return {"documents": list(documents), "count": len(documents), "scores": scores}


class RerankRunnable(Runnable[dict[str, Any], list[Document]]):
    """A reranker as a step of a chain: a query and documents -> the best documents.

    Args:
        reranker: The reranker.
        name: The step's name in traces.
        query_key: The key of the query in what comes in.
        documents_key: The key of the documents.
    """

    def __init__(
        self, reranker: Compressor, *, name: str, query_key: str, documents_key: str
    ) -> None:
        self.name = name
        self._reranker = reranker
        self._query_key = query_key
        self._documents_key = documents_key

    def invoke(
        self,
        input: dict[str, Any],  # noqa: A002 -- the host's signature
        config: RunnableConfig | None = None,
        **_: Any,
    ) -> list[Document]:
        """Rerank what comes in.

        Args:
            input: A dict with the query and the documents.
            config: LangChain's, with callbacks, tags and the like.

        Raises:
            BGEError: As `BGEReranker.compress_documents` says.
        """
        documents, query = self._parts(input)
        config = ensure_config(config)
        return self._reranker._compress(documents, query, config, self._run_name(config))

    async def ainvoke(
        self,
        input: dict[str, Any],  # noqa: A002 -- the host's signature
        config: RunnableConfig | None = None,
        **_: Any,
    ) -> list[Document]:
        """Rerank what comes in without blocking the event loop; see `invoke`."""
        documents, query = self._parts(input)
        config = ensure_config(config)
        return await self._reranker._acompress(documents, query, config, self._run_name(config))

    def _run_name(self, config: RunnableConfig) -> str:
        return config.get("run_name") or self.get_name()

    def _parts(self, given: object) -> tuple[Sequence[Document], str]:
        wanted = (self._documents_key, self._query_key)
        shape = "{" + f"{wanted[1]!r}: RunnablePassthrough(), {wanted[0]!r}: retriever" + "}"
        if not isinstance(given, Mapping):
            msg = (
                f"{self.get_name()} takes a dict of {wanted[1]!r} and {wanted[0]!r}, got "
                f"{type(given).__name__}: documents alone don't say the query. Write "
                f"{shape} | reranker.as_runnable(), or reranker.as_runnable(retriever)."
            )
            raise InputTypeError(msg)
        for key in wanted:
            if key not in given:
                msg = (
                    f"{self.get_name()} takes a dict of {wanted[1]!r} and {wanted[0]!r}, got the "
                    f"keys {', '.join(map(repr, given)) or '(none)'}: write {shape} in front of "
                    "it, or name your keys with query_key=... and documents_key=...."
                )
                raise ArgumentError(msg)
        return given[wanted[0]], given[wanted[1]]
