"""The examples: the demo on a small folder, its reranker, its measure, hybrid search, shards."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from bge_core import Reranker

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_demo_answers_from_a_folder_in_both_frameworks(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "cats.md").write_text("Cats purr when they are content.")
    (folder / "paris.txt").write_text("Paris is the capital of France.")
    (folder / "skipped.py").write_text("print('no document')")
    command = [sys.executable, EXAMPLES / "ask_python_docs.py", "--docs", folder]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    asked = [*command, "--question", "Which city is the capital of France?"]
    for _ in range(2):  # the second run finds the index of the first
        done = subprocess.run(asked, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        langchain, _, llamaindex = done.stdout.partition("LlamaIndex:")
        for shown in (langchain.partition("LangChain:")[2], llamaindex):
            best = next(line for line in shown.splitlines() if "paris.txt" in line)
            assert best.split()[1] == "1", shown
        assert "skipped.py" not in done.stdout
    assert "indexing" not in done.stderr


def test_the_demo_s_reranker_is_an_ordinary_checkpoint():
    import stand_in

    folder = stand_in.reranker_folder()
    assert stand_in.reranker_folder() == folder
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    passages = ["Cats purr when content.", "Paris is the capital of France.", "Water boils."]
    with Reranker(folder) as reranker:
        assert reranker.rank("which city is the capital of france", passages)[0][0] == 1


def test_the_questions_name_topics_of_this_python():
    from rerank_quality import read_questions

    questions = read_questions()
    assert len(questions.texts) >= 60
    assert all(names and names <= topics.keys() for names in questions.relevant.values())


def test_quality_is_ndcg_of_documents_by_their_best_passage():
    from hosts import Hit
    from rerank_quality import Questions, measure

    class Fixed:
        def search(self, question, first):
            names = ["a", "a", "b", "c"]
            return [Hit(place, 0.0, name, name) for place, name in enumerate(names, start=1)]

        def rerank(self, question, hits):
            return hits[::-1]

    quality = measure(Questions({"1": "?"}, {"1": frozenset({"b"})}), Fixed())
    # b is second of a, b, c before and of c, b, a after: 1 / log2(3).
    assert (quality.before, quality.after) == pytest.approx((63.09, 63.09), abs=0.01)
    quality = measure(Questions({"1": "?"}, {"1": frozenset({"c"})}), Fixed())
    assert (quality.before, quality.after) == pytest.approx((50.0, 100.0))


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

    from bge_core import Embedder
    from bge_core.ray import Embed

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
