"""Columns by Ray Data: steps and shards here, pools of actors on a cluster in a process apart."""

import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from bge_core import (
    ArgumentError,
    Embedder,
    InputTypeError,
    MissingExtraError,
    Reranker,
    make_scorer,
)
from bge_core.scale.ray import _pool, add_columns, write_shards
from bge_core.scale.shards import ShardWorker
from bge_core.scale.steps import Embed, Rerank

PASSAGES = 120
SHARDS = 4
FATAL = "passage 47: cats purr 47 times"


def vectors(table, column="embedding"):
    return table[column].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)


def write_passages(folder):
    folder.mkdir()
    for shard in np.array_split(np.arange(PASSAGES), SHARDS):
        texts = [f"passage {number}: cats purr {number} times" for number in shard]
        table = pa.table({"id": shard, "text": texts})
        pq.write_table(table, folder / f"{shard[0]:03}.parquet")
    return folder


def work(step, source, target):
    """Do what one actor does with all shards."""
    names = sorted(path.name for path in source.glob("*.parquet"))
    return ShardWorker(step, str(source), str(target))(pa.table({"shard": names}))


# Steps


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), "str")])
def test_embed_adds_the_vectors_of_plain_transformers(kind, en_folder, corpus, reference_embed):
    texts = [*corpus, "", corpus[3]]
    table = pa.table({"n": range(len(texts)), "text": pa.array(texts).cast(kind)})
    done = Embed(embedder=Embedder(en_folder))(table)
    assert done.column_names == ["n", "text", "embedding"]
    assert done["embedding"].type == pa.list_(pa.float32(), 32)
    assert done.drop_columns("embedding") == table
    np.testing.assert_allclose(vectors(done), reference_embed(en_folder, texts), atol=1e-5)


def test_a_query_gets_its_instruction_and_a_document_none(prompt_folder, corpus, reference_embed):
    embedder = Embedder(prompt_folder, device="cpu", normalize=False)
    table = pa.table({"q": corpus[:5]})
    for role, prompt in (("query", "query: "), ("document", "passage: ")):
        step = Embed(embedder=embedder, text_column="q", vector_column="v", role=role)
        expected = reference_embed(
            prompt_folder, [prompt + text for text in corpus[:5]], pooling="mean", normalize=False
        )
        np.testing.assert_allclose(vectors(step(table), "v"), expected, atol=1e-5)


@pytest.mark.parametrize("limits", [{}, {"top_n": 2}, {"score_threshold": 0.5}])
def test_rerank_ranks_each_row_as_plain_transformers_score(
    limits, bert_reranker_folder, corpus, reference_score
):
    lists = [corpus[:7], [], corpus[4:6], [corpus[1], corpus[1]]]
    table = pa.table({"query": corpus[9:13], "passages": lists})
    step = Rerank(reranker=Reranker(bert_reranker_folder), **limits)
    done = step(table)
    assert done.schema.types[2:] == [pa.list_(pa.int32()), pa.list_(pa.float32())]
    for row in done.to_pylist():
        pairs = [(row["query"], passage) for passage in row["passages"]]
        scores = reference_score(bert_reranker_folder, pairs, normalize=True) if pairs else []
        order = sorted(range(len(pairs)), key=lambda place: -scores[place])
        order = [at for at in order if scores[at] >= limits.get("score_threshold", 0)]
        assert row["order"] == order[: limits.get("top_n")]
        np.testing.assert_allclose(row["scores"], [scores[at] for at in row["order"]], atol=1e-5)


def test_bge_m3_reranks_a_column_too(m3_folder, corpus):
    scorer = make_scorer(m3_folder, m3_weights={"dense": 0.4, "sparse": 0.2, "multi_vector": 0.4})
    row = Rerank(reranker=scorer)(pa.table({"query": corpus[:1], "passages": [corpus[1:6]]}))
    ranked = scorer.rank(corpus[0], corpus[1:6])
    assert row["order"].to_pylist() == [[found.index for found in ranked]]
    np.testing.assert_allclose(
        row["scores"][0].as_py(), [found.score for found in ranked], atol=1e-6
    )


def test_a_table_without_rows_gets_its_columns(en_folder, bert_reranker_folder):
    texts = pa.schema({"text": pa.string()}).empty_table()
    assert Embed(embedder=Embedder(en_folder))(texts).schema.field("embedding").type.list_size == 32
    rows = pa.schema({"query": pa.string(), "passages": pa.list_(pa.string())}).empty_table()
    assert Rerank(reranker=Reranker(bert_reranker_folder))(rows).num_columns == 4


def test_a_step_travels_as_configuration(en_folder, bert_reranker_folder):
    embed, rerank = (
        Embed(embedder=Embedder(en_folder)),
        Rerank(reranker=Reranker(bert_reranker_folder)),
    )
    table = pa.table({"text": ["a cat"], "query": ["a cat"], "passages": [["a cat", "a dog"]]})
    for step in (embed, rerank):
        done = step(table)
        sent = pickle.dumps(step)
        assert len(sent) < 10_000
        assert pickle.loads(sent)(table) == done


# What is wrong is a sentence


@pytest.mark.parametrize(
    ("columns", "error", "said"),
    [
        ({"body": ["a"]}, ArgumentError, r"no column 'text' but \['body'\]: pass text_column="),
        ({"text": [1]}, ArgumentError, "'text' must have strings, and has int64"),
        ({"text": [["a"]]}, ArgumentError, "'text' must have strings, and has list"),
        ({"text": ["a"], "embedding": [1]}, ArgumentError, "a column 'embedding' already"),
        ({"text": ["a", None, None]}, InputTypeError, "2 nulls in a batch of 3 rows.* in row 1"),
        ({"text": ["a", None]}, InputTypeError, "1 null in a batch of 2 rows.* in row 1"),
    ],
)
def test_embed_refuses(columns, error, said, en_folder):
    with pytest.raises(error, match=said):
        Embed(embedder=Embedder(en_folder))(pa.table(columns))


@pytest.mark.parametrize(
    ("passages", "error", "said"),
    [
        (["a"], ArgumentError, "'passages' must have lists of strings, and has string"),
        ([[1]], ArgumentError, "'passages' must have lists of strings, and has list<item: int64>"),
        ([["a", None]], InputTypeError, "a null at place 1 of the list in row 0"),
    ],
)
def test_rerank_refuses(passages, error, said, bert_reranker_folder):
    with pytest.raises(error, match=said):
        Rerank(reranker=Reranker(bert_reranker_folder))(
            pa.table({"query": ["a"], "passages": passages})
        )


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"embedder": "BAAI/bge-m3"}, InputTypeError, "must be a bge_core.Embedder, got str"),
        ({"role": "passage"}, ArgumentError, "role='passage' is none: write 'document' or 'query'"),
        ({"text_column": "embedding"}, ArgumentError, "Two columns have one name"),
        ({"text_column": 3}, InputTypeError, "text_column must be a column's name, got 3"),
        ({"batch_size": 0}, ArgumentError, "batch_size must be 1 or more, got 0"),
    ],
)
def test_a_step_checks_its_values(options, error, said, en_folder):
    with pytest.raises(error, match=said):
        Embed(**{"embedder": Embedder(en_folder), **options})


def test_a_reranker_in_the_wrong_place_and_a_limit_out_of_reach(en_folder, bert_reranker_folder):
    with pytest.raises(InputTypeError, match=r"must be a bge_core\.Reranker, .* got Embedder"):
        Rerank(reranker=Embedder(en_folder))
    with pytest.raises(ArgumentError, match="can't be reached"):
        Rerank(reranker=Reranker(bert_reranker_folder), score_threshold=2.0)


def test_what_is_no_step_or_no_dataset_is_refused_before_ray_starts(en_folder, tmp_path):
    step = Embed(embedder=Embedder(en_folder))
    with pytest.raises(InputTypeError, match=r"step must be an Embed\(\.\.\.\) or a Rerank"):
        write_shards(tmp_path, tmp_path / "new", Embedder(en_folder))
    with pytest.raises(InputTypeError, match=r"must be a ray\.data\.Dataset, got Table"):
        add_columns(pa.table({"text": ["a"]}), step)
    with pytest.raises(ArgumentError, match=r"has no \.parquet files"):
        write_shards(tmp_path / "nowhere", tmp_path / "new", step)
    source = write_passages(tmp_path / "passages")
    with pytest.raises(ArgumentError, match="source and target are both"):
        write_shards(source, f"{tmp_path}/x/../passages", step)
    with pytest.raises(ArgumentError, match="no column 'body'"):
        write_shards(source, tmp_path / "new", Embed(embedder=step.embedder, text_column="body"))
    assert not ray.is_initialized()
    assert not (tmp_path / "new").exists()


def test_without_ray_the_extra_is_named(monkeypatch):
    for name in ("ray", "scale.ray", "scale.shards", "scale.steps"):
        monkeypatch.delitem(sys.modules, f"bge_core.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bge-adapters\[ray\]'"):
        importlib.import_module("bge_core.ray")


# Where an engine runs


@pytest.mark.parametrize(
    ("device", "cluster", "size", "each"),
    [
        (None, {"CPU": 8.0}, 7, {"num_cpus": 1}),
        (None, {"CPU": 1.0}, 1, {"num_cpus": 1}),
        (None, {"CPU": 64.0, "GPU": 8.0}, 8, {"num_gpus": 1}),
        ("cuda", {"CPU": 8.0}, 1, {"num_gpus": 1}),
        (["cuda:0"], {"CPU": 8.0, "GPU": 2.0}, 2, {"num_gpus": 1}),
        ("cpu", {"CPU": 64.0, "GPU": 8.0}, 63, {"num_cpus": 1}),
    ],
)
def test_an_engine_takes_a_gpu_or_cpus(device, cluster, size, each, en_folder, monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: cluster)
    step = Embed(embedder=Embedder(en_folder, device=device))
    pool = _pool(step, None, 1)
    assert pool.pop("compute").max_size == size
    assert pool == each
    assert _pool(step, 5, 1, limit=3)["compute"].max_size == 3
    if "num_cpus" in each:
        assert _pool(step, None, 4)["compute"].max_size == max(1, (int(cluster["CPU"]) - 1) // 4)
    else:
        assert _pool(step, None, 4)["num_gpus"] == 1


def test_openvino_takes_no_gpu(en_folder):
    assert Embedder(en_folder, backend="openvino").devices == ("cpu",)


@pytest.mark.parametrize("device", ["cuda:1", "cuda:10", ["cuda", "cuda"], ["cuda:0", "cuda:1"]])
def test_an_actor_has_one_device(device, en_folder):
    with pytest.raises(ArgumentError, match="one engine and sees one GPU"):
        _pool(Embed(embedder=Embedder(en_folder, device=device)), None, 1)


@pytest.mark.parametrize(("actors", "cpus"), [(0, 1), (None, 0)])
def test_numbers_of_actors_and_cpus_are_1_or_more(actors, cpus, en_folder):
    with pytest.raises(ArgumentError, match="must be 1 or more, got 0"):
        _pool(Embed(embedder=Embedder(en_folder)), actors, cpus)


# Shards


def test_shards_that_are_there_are_kept_and_what_is_half_written_is_done_again(en_folder, tmp_path):
    source, target = write_passages(tmp_path / "passages"), tmp_path / "embedded"
    target.mkdir()
    step = Embed(embedder=Embedder(en_folder), batch_size=7)
    assert work(step, source, target)["rows"].to_pylist() == [30] * SHARDS
    first, second, *_ = sorted(target.iterdir())
    (target / f".{second.name}.0.part").write_bytes(second.read_bytes()[:500])
    whole = pq.read_table(second)
    second.unlink()
    kept = first.stat().st_mtime_ns
    assert work(step, source, target)["rows"].to_pylist() == [None, 30, None, None]
    assert first.stat().st_mtime_ns == kept
    assert pq.read_table(second) == whole
    at_once = step(pq.read_table(source / second.name))
    np.testing.assert_allclose(vectors(whole), vectors(at_once), atol=1e-6)


def test_a_shard_has_its_name_only_when_it_is_whole(en_folder, tmp_path):
    source, target = tmp_path / "passages", tmp_path / "embedded"
    source.mkdir()
    target.mkdir()
    pq.write_table(pa.table({"text": list("abcdef")}), source / "0.parquet")
    seen = []

    class Watching(Embed):
        def __call__(self, table):
            seen.append([path.suffix for path in target.iterdir()])
            return super().__call__(table)

    work(Watching(embedder=Embedder(en_folder), batch_size=2), source, target)
    assert seen == [[], [".part"], [".part"], [".part"]]
    assert [path.name for path in target.iterdir()] == ["0.parquet"]


def test_an_error_leaves_nothing_half_written(en_folder, tmp_path):
    source, target = tmp_path / "passages", tmp_path / "embedded"
    source.mkdir()
    target.mkdir()
    pq.write_table(pa.table({"text": ["a", "b", "c", None]}), source / "0.parquet")
    with pytest.raises(InputTypeError, match="first in row 1"):
        work(Embed(embedder=Embedder(en_folder), batch_size=2), source, target)
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("how", ["model", "role", "foreign"])
def test_a_target_of_another_model_is_refused(how, en_folder, zh_folder, tmp_path):
    source, target = write_passages(tmp_path / "passages"), tmp_path / "embedded"
    target.mkdir()
    step = Embed(embedder=Embedder(zh_folder if how == "model" else en_folder))
    if how == "foreign":
        shutil.copy(source / "000.parquet", target)
    else:
        work(step, source, target)
    other = Embed(embedder=Embedder(en_folder), role="query" if how == "role" else "document")
    with pytest.raises(ArgumentError, match=r"was written with .*, and this job is .*delete that"):
        work(other, source, target)


def test_a_shard_without_rows_and_one_that_is_a_column_short(en_folder, tmp_path):
    source, target = tmp_path / "passages", tmp_path / "embedded"
    source.mkdir()
    target.mkdir()
    schema = pa.schema({"text": pa.string()}, metadata={"author": "me"})
    pq.write_table(schema.empty_table(), source / "0.parquet")
    step = Embed(embedder=Embedder(en_folder))
    assert work(step, source, target)["rows"].to_pylist() == [0]
    written = pq.read_schema(target / "0.parquet")
    assert written.names == ["text", "embedding"]
    assert written.metadata[b"author"] == b"me"
    pq.write_table(pa.table({"body": ["a"]}), source / "1.parquet")
    with pytest.raises(ArgumentError, match="no column 'text'"):
        work(step, source, target)


# A cluster


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, en_folder):
    """Run all jobs on one cluster; starting one takes longer than what they compute."""
    folder = tmp_path_factory.mktemp("ray")
    source, target = write_passages(folder / "passages"), folder / "embedded"
    repo = folder / "hub" / f"models--BAAI--{en_folder.name}"
    shutil.copytree(en_folder, repo / "snapshots" / "0123456789abcdef")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123456789abcdef")
    # What a job that was stopped has left: one shard, and half of another one.
    target.mkdir()
    work(Embed(embedder=Embedder(en_folder)), source, target)
    first, second, *rest = sorted(target.iterdir())
    (target / f".{second.name}.0.part").write_bytes(second.read_bytes()[:500])
    for path in (second, *rest):
        path.unlink()
    kept = first.stat().st_mtime_ns
    root = Path(__file__).parents[3]
    # A short path: Ray's sockets are in it, and theirs are limited to about a hundred characters.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as scratch:
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    "-W",
                    "error",
                    "-W",
                    "ignore::DeprecationWarning:ray.data.context",
                ),
                *(root / "tests" / "bge_core" / "scale" / "ray_jobs.py", en_folder, FATAL),
            ],
            cwd=folder,
            env={
                **os.environ,
                "HF_HUB_CACHE": str(folder / "hub"),
                "PYTHONPATH": str(root),
                "RAY_AUTH_MODE": "disabled",
                "RAY_TMPDIR": scratch,
                "RAY_USAGE_STATS_ENABLED": "0",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == kept
    return folder


def check_all(table, model):
    table = table.sort_by("id")
    assert table["id"].to_pylist() == list(range(PASSAGES))
    assert table["embedding"].type == pa.list_(pa.float32(), 32)
    expected = Embedder(model).embed_documents(table["text"].to_pylist())
    np.testing.assert_allclose(vectors(table), expected, atol=1e-6)


def test_no_row_is_lost_or_doubled_when_one_of_two_actors_is_killed(jobs, en_folder):
    killed = (jobs / "notes" / "killed").read_text()
    lived = {path.name for path in (jobs / "notes").glob("pid-*")}
    assert f"pid-{killed}" in lived
    assert len(lived) == 3
    check_all(pq.read_table(jobs / "survived.parquet"), en_folder)


def test_a_wrong_column_of_a_dataset_is_refused_before_anything_runs(jobs):
    said = json.loads((jobs / "refused.json").read_text())
    assert [message.partition(" but ")[0] for message in said] == ["There is no column 'body'"] * 2


def test_the_readme_goes_on_with_a_job_that_was_stopped(jobs, en_folder):
    names = sorted(path.name for path in (jobs / "embedded").iterdir())
    assert names == ["000.parquet", "030.parquet", "060.parquet", "090.parquet"]
    check_all(pq.read_table(jobs / "embedded"), en_folder)
