"""The examples: the demo on a small folder, its reranker, its measure, hybrid search, shards."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from bge_core import Embedder, Reranker

EXAMPLES = Path(__file__).parent.parent / "examples"
INSTRUCTION = "Represent this sentence for searching relevant passages: "


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.NOTSET, logger="bge_core")  # as it was, once an example has run
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_demo_answers_from_a_folder_in_both_frameworks(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "cats.md").write_text("Cats purr when they are content.")
    (folder / "paris.txt").write_text("Paris is the capital of France.")
    (folder / "skipped.py").write_text("print('no document')")
    command = [sys.executable, EXAMPLES / "demo.py", "--docs", folder]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    asked = [*command, "--question", "Which city is the capital of France?"]
    for _ in range(2):  # the second run finds the index of the first
        done = subprocess.run(asked, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        langchain, _, llamaindex = done.stdout.partition("LlamaIndex:")
        for shown in (langchain.partition("LangChain: Which")[2], llamaindex):
            best = next(line for line in shown.splitlines() if "paris.txt" in line)
            assert best.split()[1] == "1", shown
            assert best.count("paris.txt") == 2, shown  # first on both sides
            assert re.search(r"search \d+ ms, reranking 2 passages \d+ ms", shown), shown
        assert "skipped.py" not in done.stdout
    assert "indexing" not in done.stderr


def test_the_demo_takes_the_stand_in_where_the_hub_gives_no_bge(tmp_path):
    (tmp_path / "cats.md").write_text("Cats purr when they are content.")
    command = [sys.executable, EXAMPLES / "demo.py", "--docs", tmp_path]
    command += ["--models", "bge", "--host", "langchain", "--question", "Why do cats purr?"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(EXAMPLES.parent),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "empty"),
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "BAAI/bge-small-en-v1.5 (135 MB), BAAI/bge-reranker-base (1.1 GB)" in said
    assert "The stand-in searches and reranks instead: model='BAAI/bge-small-en-v1.5'" in said
    assert "HF_HUB_OFFLINE=1 forbids a download" in said
    assert "Traceback" not in done.stderr
    assert "cats.md" in said.partition("found by the embedder")[2]


def test_the_page_marks_moves_and_shows_whole_sentences():
    from hosts import Hit
    from page import excerpt, moved, side_by_side
    from rich.console import Console

    text = (
        "and so the first one ends. Cats sleep all day, e.g. on a sofa. A dog barks at strangers. "
        "Nobody knows why the cat from next door purrs. It is content."
    )
    assert (
        excerpt(text, "why does a cat purr from time to time", 60)
        == ("Nobody knows why the cat from next door purrs. It is content."[:46])
    )
    assert excerpt(text, "what do cats do", 200).startswith(
        "Cats sleep all day, e.g. on a sofa. A dog"
    )
    assert excerpt("Cats\n****\n\nThey **purr**.", "cats") == "Cats. They purr."
    endless = excerpt("word " * 200, "word")
    assert len(endless) < 350
    assert endless.endswith("word …")
    assert [moved(2, before) for before in (2, 9, 1)] == [
        "[dim]=[/]", "[bold green]▲ from 9[/]", "[red]▼ from 1[/]",
    ]  # fmt: skip
    hits = [Hit(place, 0.5, f"topic{place}", f"Text {place}.") for place in (1, 2, 3)]
    table = side_by_side("A title", "q?", hits, hits[::-1], search_ms=12.4, rerank_ms=345.0)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    first = next(line for line in lines if line.startswith("│ 1"))
    assert first.index("topic1") < first.index("▲ from 3") < first.index("topic3")
    assert any("search 12 ms, reranking 3 passages 345 ms" in line for line in lines)


def test_near_duplicates_are_one_passage_with_all_its_topics():
    from corpora import near_duplicates
    from hosts import Hit, distinct

    from bge_core.evaluate import documents

    long = (
        "the quick brown fox jumps over the lazy dog and then it sleeps in the warm afternoon sun"
    )
    changed = long.replace("warm afternoon", "cold evening")
    texts = [long, "Something else altogether, at length.", long.upper() + "!", changed, long[:40]]
    assert near_duplicates(texts) == [0, 1, 0, 0, 0]
    assert near_duplicates(["Yes.", "No.", "yes"]) == [0, 1, 0]
    stands_in = zip("abca", texts[:4], strict=True)
    hits = [Hit(place, 0.5, name, text) for place, (name, text) in enumerate(stands_in, start=1)]
    merged = distinct(hits)
    assert [(hit.place, hit.names, hit.text) for hit in merged] == [
        (1, ("a", "c"), long), (2, ("b",), texts[1]),
    ]  # fmt: skip
    # A passage counts for each topic that answers; one that answers nothing takes one place.
    assert documents([("x", "y"), ("a", "b", "c"), ("y",), ("c", "z")], {"a", "c"}) == [
        "x", "a", "c", "z",
    ]  # fmt: skip


def test_the_demo_s_reranker_is_an_ordinary_checkpoint():
    import stand_in

    folder = stand_in.reranker_folder()
    assert stand_in.reranker_folder() == folder
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    passages = ["Cats purr when content.", "Paris is the capital of France.", "Water boils."]
    with Reranker(folder) as reranker:
        assert reranker.rank("which city is the capital of france", passages)[0].index == 1


def test_the_questions_name_topics_of_this_python():
    from quality import read_questions

    questions = read_questions()
    assert len(questions.texts) >= 60
    assert all(names and names.keys() <= topics.keys() for names in questions.relevant.values())


def test_the_encyclopaedia_s_questions_name_its_sentences():
    from corpora import encyclopaedia
    from quality import encyclopaedia_questions

    texts = {text.name: text.text for text in encyclopaedia().texts}
    assert len(texts) == len(encyclopaedia().texts) > 1000
    questions = encyclopaedia_questions()
    assert len(questions.texts) == 330
    asked = dict(zip(questions.texts.values(), questions.relevant.values(), strict=True))
    (name,) = asked["where is the capital city of alabama located"]
    assert texts[name].startswith(name.partition(", sentence")[0] + "\n")
    assert "Montgomery" in texts[name]


def test_the_demo_measures_a_configuration_once():
    import demo
    from hosts import Hit
    from quality import read_questions

    class Counting:
        searches = 0

        def search(self, question, first):
            self.searches += 1
            return [Hit(place, 0.0, name, name) for place, name in enumerate(topics, start=1)]

        def rerank(self, question, hits):
            return hits[::-1]

    host = Counting()
    rows = demo._measured(host, read_questions(), "one", "the reference", "")
    assert [(row.questions, row.reranked) for row in rows] == [(host.searches, 0), (124, 20)]
    assert rows[0].figures != rows[1].figures
    assert demo._measured(host, read_questions(), "one", "the reference", "") == rows
    assert host.searches == 124


def test_the_figures_that_the_demo_ships_are_of_its_corpus_and_reranker():
    import demo
    import stand_in
    from corpora import encyclopaedia

    models = demo.Models(str(stand_in.embedder_folder()), str(stand_in.reranker_folder()), "")
    rows = demo._known().get(demo._key(encyclopaedia(), models))
    assert rows, "run make demo ARGS=--measure, and copy its row of quality.json to measured.json"
    assert [(row["questions"], row["reranked"]) for row in rows] == [(330, 0), (330, 20)]
    page = (EXAMPLES.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for row in rows:
        assert " | ".join(f"{figure:.1f}" for figure in row["figures"].values()) in page


def test_a_document_ranks_where_its_best_passage_does():
    from hosts import Hit
    from quality import measure

    from bge_core.beir import Questions

    class Fixed:
        def search(self, question, first):
            names = ["a", "a", "b", "c"]
            return [Hit(place, 0.0, name, name) for place, name in enumerate(names, start=1)]

        def rerank(self, question, hits):
            return hits[::-1]

    def measured(relevant):
        rows = measure(Questions({"1": "?"}, {"1": relevant}), Fixed(), data="three documents")
        assert [row.reranked for row in rows] == [0, 20]
        return [list(row.figures.values()) for row in rows]

    # b is second of a, b, c before and of c, b, a after: 1 / log2(3), and 1 / 2.
    second = pytest.approx([63.09, 50.0, 100.0], abs=0.01)
    assert measured({"b": 1}) == [second, second]
    # c is last, then first.
    third, first = pytest.approx([50.0, 33.33, 100.0], abs=0.01), pytest.approx([100.0] * 3)
    assert measured({"c": 1}) == [third, first]
    # Grades count in nDCG, and what is not found counts in recall.
    graded = [100 * (1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)), 100.0, 100.0]
    assert measured({"a": 1, "b": 2})[0] == pytest.approx(graded)
    assert measured({"a": 1, "elsewhere": 1})[0][2] == pytest.approx(50.0)


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
def test_hybrid_search_in_both_frameworks_on_an_untrained_stand_in(monkeypatch, capsys):
    question = "Error E1042"
    example = str(EXAMPLES / "hybrid_search.py")
    monkeypatch.setattr(sys, "argv", [example, "--question", question])
    runpy.run_path(example, run_name="__main__")
    said = capsys.readouterr().out
    assert "untrained stand-in" in said
    assert "--model BAAI/bge-m3" in said
    for host in ("LangChain", "LlamaIndex"):
        own = said.partition(host)[2].partition("LlamaIndex")[0]
        found, reranked = own.partition(question)[2].split("reranked")
        assert "E1042" in found
        assert "E1042" in reranked.splitlines()[0]


def test_embedded_shards_are_loaded_and_searched(tmp_path, stand_in_folder):
    import embed_on_ray
    import pyarrow as pa
    import pyarrow.parquet as pq
    from qdrant_client import QdrantClient

    from bge_core.scale.steps import Embed

    embedder = Embedder(stand_in_folder, query_instruction="")
    for shard, texts in enumerate((["Cats purr.", "Water boils."], ["Paris is in France."])):
        table = Embed(embedder=embedder)(pa.table({"text": texts, "shard": [shard] * len(texts)}))
        pq.write_table(table, tmp_path / f"{shard}.parquet")
    client = QdrantClient(":memory:")
    for _ in range(2):  # the second time in the place of the first
        assert embed_on_ray.load(client, str(tmp_path), embedder.dimension) == 3
    (score, passage), *others = embed_on_ray.ask(client, embedder, "Where is Paris?")
    assert passage == {"text": "Paris is in France.", "shard": 1}
    assert len(others) == 2
    dot = (
        embedder.embed_queries(["Where is Paris?"]) @ embedder.embed_documents([passage["text"]]).T
    )
    assert score == pytest.approx(float(dot[0, 0]), abs=1e-5)


def test_long_passages_end_with_what_is_asked_for():
    import corpora
    from long_passages import asked, long_passages

    passages = long_passages(words=2000)
    texts = {text.name: text.text.split() for text in corpora.python_reference().texts}
    for name, passage in passages.items():
        words = passage.split()
        assert len(words) == 2000
        assert words[-len(texts[name]) :] == texts[name]
    questions = asked(passages)
    assert len(questions.texts) > 30
    assert all(names.keys() <= passages.keys() for names in questions.relevant.values())
