"""What the playground's page does: it indexes a corpus in a host, and answers questions from it.

One thread does all the work, one step after another: loading, a batch of passages, an answer. A
question that comes while a corpus is being indexed is answered after the batch that is at work,
from what has been indexed by then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import corpora
import stand_in
from hosts import HOSTS, Hit, Host, Passages, distinct
from qdrant_client import QdrantClient

from bge_core import BGEError, CheckpointError, Embedder, M3Embedder
from bge_core.checkpoints.catalog import find_profile

logger = logging.getLogger(__name__)

ENCYCLOPAEDIA, PYTHON, FILES = "encyclopaedia", "python", "files"
CORPORA = {
    ENCYCLOPAEDIA: "An encyclopaedia",
    PYTHON: "The Python reference",
    FILES: "Your files",
}
# Some long passages, and windows that are short enough to be read when they are marked.
PASSAGES = Passages(characters=2400, tokens=600, window=160)
DEPTH, FIRST = 40, 20
BATCH = 32  # under a second's work, which a question may have to wait for


class Refusal(Exception):  # noqa: N818 -- it is a sentence for the page, not a fault
    """What the page says in place of an answer."""


@dataclass(frozen=True)
class Models:
    """What searches and reranks.

    Attributes:
        embedder: A hub id or folder.
        reranker: A hub id or folder.
        instruction: What the switch puts in front of questions.
        instructed: Whether the switch is on at first.
        instruction_note: A sentence about the instruction.
        no_hybrid: Why there is no hybrid search; empty where there is one.
    """

    embedder: str
    reranker: str
    instruction: str
    instructed: bool
    instruction_note: str
    no_hybrid: str


@dataclass(frozen=True)
class Switches:
    """How a question is answered.

    Attributes:
        host: A key of `HOSTS`.
        instruction: Whether the instruction is put in front of the question.
        reranker: Whether the passages that were found are reranked.
        hybrid: Whether bge-m3's token weights search, too.
    """

    host: str = "langchain"
    instruction: bool = False
    reranker: bool = True
    hybrid: bool = False


@dataclass(frozen=True)
class Stage:
    """What one step of an answer took."""

    name: str
    milliseconds: float


@dataclass(frozen=True)
class Answer:
    """What was found for a question.

    Attributes:
        question: What was asked.
        switches: How.
        host: The host's name.
        found: Passages by the embedder, best first.
        reranked: The same by the reranker; None where it is switched off.
        stages: What took how long.
        indexed: How many passages were searched.
        total: How many the corpus has.
    """

    question: str
    switches: Switches
    host: str
    found: Sequence[Hit]
    reranked: Sequence[Hit] | None
    stages: Sequence[Stage]
    indexed: int
    total: int


def choose_models(embedder: str | None, reranker: str | None) -> Models:
    """Choose what searches and reranks, and find out what it can do.

    Args:
        embedder: A hub id or folder; None for the stand-in.
        reranker: A hub id or folder; None for bge-m3 itself where that searches, else for the
            stand-in's.

    Raises:
        CheckpointError: The embedder isn't there.
    """
    if embedder is None:
        folder = str(stand_in.embedder_folder())
        profile = find_profile("BAAI/bge-small-en-v1.5", "embedder")
        assert profile is not None  # noqa: S101 -- a row of the table
        assert profile.query_instruction is not None  # noqa: S101
        return Models(
            folder,
            reranker or str(stand_in.reranker_folder()),
            profile.query_instruction,
            instructed=False,
            instruction_note="Instruction: that of bge-small-en-v1.5. The stand-in was trained "
            "without one.",
            no_hybrid=_why_not("the stand-in"),
        )
    instruction = Embedder(embedder).query_instruction
    no_hybrid = ""
    try:
        M3Embedder(embedder).require("sparse")
    except CheckpointError:
        no_hybrid = _why_not(Path(embedder).name)
    if reranker is None:
        reranker = str(stand_in.reranker_folder()) if no_hybrid else embedder
    return Models(
        embedder,
        reranker,
        instruction,
        instructed=bool(instruction),
        instruction_note=f"Instruction: {instruction}"
        if instruction
        else f"{Path(embedder).name} wants no instruction.",
        no_hybrid=no_hybrid,
    )


def _why_not(name: str) -> str:
    return f"Hybrid search needs bge-m3 (--embedder BAAI/bge-m3): {name} gives dense vectors alone."


@dataclass
class _Index:
    """A corpus in a host, on the way to being indexed."""

    corpus: str
    host: Host
    steps: Iterator[int]
    twins: dict[bool, Host] = field(default_factory=dict)
    done: int = 0
    current: bool = True


class Workbench:
    """Indexes and answers, on a thread of its own.

    Args:
        load: Chooses the models; called on the thread.
        folder: Where the index of the demo's corpora is kept; None for memory alone.
        passages: How documents are cut and read.
        batch: Passages that are indexed in one step.
    """

    def __init__(
        self,
        load: Callable[[], Models],
        *,
        folder: Path | None,
        passages: Passages = PASSAGES,
        batch: int = BATCH,
    ) -> None:
        self._load, self._folder, self._passages, self._batch = load, folder, passages, batch
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="playground")
        self._indexes: dict[tuple[str, str], _Index] = {}
        self._files: dict[str, corpora.Text] = {}
        self._kept: QdrantClient | None = None
        self._memory: QdrantClient | None = None
        self._models: Models | None = None
        self.failure = ""

    @property
    def models(self) -> Models | None:
        """What searches and reranks; None before it is known."""
        return self._models

    @property
    def files(self) -> list[str]:
        """The names of the dropped files that are searched."""
        return list(self._files)

    def prepare(self, corpus: str = ENCYCLOPAEDIA, host: str = "langchain") -> Future[None]:
        """Load the models, and begin to index a corpus."""
        return self._worker.submit(self._prepare, corpus, host)

    def ask(self, question: str, corpus: str, switches: Switches) -> Future[Answer]:
        """Answer a question.

        Returns:
            The answer, or a `Refusal` with a sentence for the page.
        """
        return self._worker.submit(self._ask, question, corpus, switches)

    def drop(self, files: Sequence[tuple[str, bytes]]) -> list[str]:
        """Take files into the corpus of one's own.

        Args:
            files: Names and contents; a name that is there already is replaced.

        Returns:
            A sentence for each that can't be read.
        """
        refused, read = [], dict(self._files)
        for name, content in files:
            try:
                read[name] = corpora.read_file(name, content)
            except ValueError as exc:
                refused.append(str(exc))
        if read != self._files:
            self._files = read
            for key in [key for key in self._indexes if key[0] == FILES]:
                self._indexes.pop(key).current = False
        return refused

    def progress(self, corpus: str, host: str) -> tuple[int, int]:
        """Count a corpus's passages that are indexed in a host, and all; 0, 0 if not known."""
        index = self._indexes.get((corpus, host))
        return (index.done, index.host.total) if index else (0, 0)

    def close(self) -> None:
        """Stop after the step at work."""
        for index in list(self._indexes.values()):
            index.current = False
        self._worker.submit(self._close).result()
        self._worker.shutdown()

    def _close(self) -> None:
        for client in (self._kept, self._memory):
            if client is not None:
                client.close()

    def _prepare(self, corpus: str, host: str) -> None:
        try:
            index = self._index(corpus, host)
            index.host.rerank("warm up", index.host.search("warm up", 1))
        except (BGEError, Refusal) as exc:
            self.failure = str(exc)
        except Exception as exc:
            logger.exception("The playground's models can't be loaded")
            self.failure = f"The models can't be loaded: {exc}"

    def _chosen(self) -> Models:
        if self._models is None:
            self._models = self._load()
        return self._models

    def _index(self, corpus: str, host: str) -> _Index:
        """Give a corpus in a host, with a first batch of its passages."""
        if corpus == FILES and not self._files:
            msg = "There are no files yet: drop some into the field above, or take another corpus."
            raise Refusal(msg)
        index = self._indexes.get((corpus, host))
        if index is None:
            models = self._chosen()
            made: Host = HOSTS[host](
                self._texts(corpus),
                self._client(corpus),
                embedder=models.embedder,
                reranker=models.reranker,
                instruction="",
                sparse=not models.no_hybrid,
                passages=self._passages,
            )
            index = _Index(corpus, made, made.index(self._batch))
            index.twins[False] = made
            index.done = next(index.steps)
            self._indexes[corpus, host] = index
            self._advance(index)
        return index

    def _advance(self, index: _Index) -> None:
        """Index a batch, and the next one after what waits by then."""
        if not index.current:
            return
        try:
            index.done = next(index.steps, index.host.total)
        except Exception as exc:
            logger.exception("The playground's corpus can't be indexed")
            self.failure = f"The corpus can't be indexed any further: {exc}"
            return
        if index.done < index.host.total:
            self._worker.submit(self._advance, index)

    def _texts(self, corpus: str) -> corpora.Corpus:
        if corpus == ENCYCLOPAEDIA:
            return corpora.encyclopaedia()
        if corpus == PYTHON:
            return corpora.python_reference()
        return corpora.Corpus(CORPORA[FILES], list(self._files.values()))

    def _client(self, corpus: str) -> QdrantClient:
        if corpus == FILES or self._folder is None:
            if self._memory is None:
                self._memory = QdrantClient(":memory:")
            return self._memory
        if self._kept is None:
            try:
                self._kept = QdrantClient(path=str(self._folder))
            except RuntimeError:
                logger.warning("%s is in use: this playground keeps no index.", self._folder)
                self._folder = None
                return self._client(corpus)
        return self._kept

    def _ask(self, question: str, corpus: str, switches: Switches) -> Answer:
        question = question.strip()
        if not question:
            msg = "Type a question first."
            raise Refusal(msg)
        try:
            index = self._index(corpus, switches.host)
            return self._answer(question, index, switches)
        except BGEError as exc:
            raise Refusal(str(exc)) from exc
        except Refusal:
            raise
        except Exception as exc:
            logger.exception("The playground can't answer %r", question)
            msg = f"No answer, because something failed: {type(exc).__name__}: {exc}"
            raise Refusal(msg) from exc

    def _answer(self, question: str, index: _Index, switches: Switches) -> Answer:
        models = self._chosen()
        if switches.instruction not in index.twins:
            index.twins[True] = index.host.instructed(models.instruction)
        host = index.twins[switches.instruction]
        if switches.hybrid and models.no_hybrid:
            raise Refusal(models.no_hybrid)
        stages = []
        started = time.perf_counter()

        def stage(name: str) -> None:
            nonlocal started
            ended = time.perf_counter()
            stages.append(Stage(name, 1000 * (ended - started)))
            started = time.perf_counter()

        vector = None
        if not switches.hybrid:
            vector = host.embed(question)
            stage("embed the question")
        found = host.search(question, DEPTH, vector=vector, hybrid=switches.hybrid)
        stage("embed and search, dense and sparse" if switches.hybrid else "search")
        hits = distinct(found)[:FIRST]
        reranked = None
        if switches.reranker:
            started = time.perf_counter()
            reranked = host.rerank(question, hits)
            stage(f"rerank {len(hits)} passages")
        return Answer(question, switches, host.name, hits, reranked, stages, index.done, host.total)
