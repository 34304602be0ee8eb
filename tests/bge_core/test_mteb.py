"""mteb's own evaluation of our models, against numbers from transformers, ir-measures and scipy."""

import json

import ir_measures
import mteb
import pytest
from datasets import Dataset
from ir_measures import RR, R, nDCG
from mteb.abstasks import AbsTaskSTS
from scipy.stats import spearmanr

from bge_core import ArgumentError, Embedder, InputTypeError, M3Embedder, M3Reranker, Reranker
from bge_core.mteb import MTEBCrossEncoder, MTEBEncoder

INSTRUCTION = "Represent this sentence for searching relevant passages: "
QUIET = {"co2_tracker": False, "show_progress_bar": False, "encode_kwargs": {"batch_size": 4}}


@pytest.fixture
def task(retrieval_task):
    return retrieval_task("LocalRetrieval")


def scores_of(result):
    return result.task_results[0].scores["test"][0]


def predicted(folder):
    found = json.loads((folder / "LocalRetrieval_predictions.json").read_text())
    return found["default"]["test"]


def check(scores, run, queries):
    """Compare mteb's figures with those that ir-measures gives for a run."""
    relevant = {name: grades for name, (_, grades) in queries.items()}
    expected = ir_measures.calc_aggregate([nDCG @ 10, RR @ 10, R @ 3], relevant, run)
    assert scores["ndcg_at_10"] == pytest.approx(expected[nDCG @ 10], abs=1e-5)
    assert scores["mrr_at_10"] == pytest.approx(expected[RR @ 10], abs=1e-5)
    assert scores["recall_at_3"] == pytest.approx(expected[R @ 3], abs=1e-5)
    assert 0 < expected[nDCG @ 10] < 1


def close(one, other):
    assert one.keys() == other.keys()
    for query, expected in other.items():
        assert one[query] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "instruction"), [(None, INSTRUCTION), ("", ""), ("ask: ", "ask: ")]
)
def test_queries_get_the_instruction_and_documents_never(
    given, instruction, en_folder, task, queries, read, searched, tmp_path
):
    with Embedder(en_folder, query_instruction=given) as embedder:
        model = MTEBEncoder(embedder)
        result = mteb.evaluate(model, task, cache=None, prediction_folder=tmp_path, **QUIET)
    asked = [instruction + text for text, _ in queries.values()]
    run = searched(en_folder, asked, list(read.values()))
    close(predicted(tmp_path), run)
    check(scores_of(result), run, queries)


def test_llm_embedder_s_documents_get_theirs(
    llm_embedder_folder, task, queries, read, searched, tmp_path
):
    with Embedder(llm_embedder_folder) as embedder:
        model = MTEBEncoder(embedder)
        mteb.evaluate(model, task, cache=None, prediction_folder=tmp_path, **QUIET)
    before = "Represent this query for retrieving relevant documents: "
    asked = [before + text for text, _ in queries.values()]
    given = [f"Represent this document for retrieval: {text}" for text in read.values()]
    close(predicted(tmp_path), searched(llm_embedder_folder, asked, given))


def test_texts_without_roles_get_no_instruction(en_folder, corpus, task_metadata, reference_embed):
    ones, twos, gold = corpus[:8], corpus[8:16], [0.0, 3.0, 1.0, 5.0, 2.0, 4.0, 3.5, 0.5]

    class Similarity(AbsTaskSTS):
        metadata = task_metadata("LocalSTS", "STS", "cosine_spearman")
        min_score, max_score = 0, 5

        def load_data(self, num_proc=None, **kwargs):
            rows = {"sentence1": ones, "sentence2": twos, "score": gold}
            self.dataset = {"test": Dataset.from_dict(rows)}
            self.data_loaded = True

    with Embedder(en_folder) as embedder:
        result = mteb.evaluate(MTEBEncoder(embedder), Similarity(), cache=None, **QUIET)
    cosines = (reference_embed(en_folder, ones) * reference_embed(en_folder, twos)).sum(axis=1)
    assert scores_of(result)["cosine_spearman"] == pytest.approx(
        spearmanr(cosines, gold).statistic, abs=1e-5
    )


def test_a_reranker_scores_what_an_encoder_found(
    en_folder, reranker_folder, task, queries, read, reference_score, tmp_path
):
    first, second = tmp_path / "first", tmp_path / "second"
    with Embedder(en_folder) as embedder:
        mteb.evaluate(MTEBEncoder(embedder), task, cache=None, prediction_folder=first, **QUIET)
    found = {
        query: sorted(scores, key=scores.get, reverse=True)[:6]
        for query, scores in predicted(first).items()
    }
    reranking = task.convert_to_reranking(first, top_k=6)
    with Reranker(reranker_folder, normalize=False) as reranker:
        model = MTEBCrossEncoder(reranker)
        result = mteb.evaluate(model, reranking, cache=None, prediction_folder=second, **QUIET)
    run = {}
    for query, names in found.items():
        pairs = [(queries[query][0], read[name]) for name in names]
        run[query] = dict(zip(names, reference_score(reranker_folder, pairs).tolist(), strict=True))
    close(predicted(second), run)
    check(scores_of(result), run, queries)


def test_m3_reranks_by_its_three_scores(m3_folder, task, queries, read, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    with Embedder(m3_folder) as embedder:
        mteb.evaluate(MTEBEncoder(embedder), task, cache=None, prediction_folder=first, **QUIET)
    with M3Embedder(m3_folder) as m3:
        model = MTEBCrossEncoder(M3Reranker(m3))
        reranking = task.convert_to_reranking(first, top_k=14)
        mteb.evaluate(model, reranking, cache=None, prediction_folder=second, **QUIET)
        run = {}
        for query, (text, _) in queries.items():
            scores = m3.score([(text, document) for document in read.values()]).tolist()
            run[query] = dict(zip(read, scores, strict=True))
    close(predicted(second), run)


def test_two_configurations_never_share_a_kept_result(en_folder, task, tmp_path):
    kept = mteb.ResultCache(tmp_path)
    reached = []
    for instruction in (None, "", None):
        with Embedder(en_folder, query_instruction=instruction) as embedder:
            model = MTEBEncoder(embedder)
            assert model.mteb_model_meta.name == "local/bge-small-en-v1.5"
            reached.append(scores_of(mteb.evaluate(model, task, cache=kept, **QUIET))["main_score"])
    assert reached[0] == reached[2] != reached[1]
    assert len(list(tmp_path.rglob("LocalRetrieval.json"))) == 2
    assert not [file for file in tmp_path.rglob("*.json") if str(en_folder) in file.read_text()]


def test_what_mteb_could_ask_for_and_nobody_would_get_is_refused(en_folder, task):
    options = {**QUIET, "encode_kwargs": {"precision": "int8"}}
    with Embedder(en_folder) as embedder, pytest.raises(ArgumentError, match="precision"):
        mteb.evaluate(MTEBEncoder(embedder), task, cache=None, **options)


def test_the_wrong_kind_of_model_is_sent_to_the_right_class(en_folder, reranker_folder):
    with Embedder(en_folder) as embedder, pytest.raises(InputTypeError, match="MTEBEncoder"):
        MTEBCrossEncoder(embedder)
    with Reranker(reranker_folder) as reranker, pytest.raises(InputTypeError, match="CrossEncoder"):
        MTEBEncoder(reranker)
