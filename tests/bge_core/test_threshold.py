"""`python -m bge_core.threshold`: its scores, its thresholds, and what the hosts make of them."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from bge_core import ArgumentError, Embedder, Reranker, threshold
from bge_core.threshold import Scores, from_folder, from_pairs, propose

INSTRUCTION = "Represent this sentence for searching relevant passages: "


def counted(scores, limit):
    """Count what reaches a threshold, one score at a time."""
    return [sum(1 for score in kind if score >= limit) for kind in (scores.relevant, scores.other)]


def f1(scores, limit):
    kept, wrong = counted(scores, limit)
    precision, recall = kept / max(1, kept + wrong), kept / len(scores.relevant)
    return 2 * precision * recall / (precision + recall) if kept else 0.0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kept", [50.0, 95.0, 100.0])
def test_the_thresholds_are_those_of_trying_every_score(seed, kept):
    draw = np.random.default_rng(seed)
    scores = Scores(
        # Rounded, so that scores are equal; near 1 and near 0, as those of rerankers are.
        np.round(1 / (1 + np.exp(-draw.normal(4, 3, 37))), seed % 7 + 1),
        np.round(1 / (1 + np.exp(-draw.normal(-4, 3, 211))), seed % 7 + 1),
    )
    every = sorted({*scores.relevant, *scores.other}, reverse=True)
    best, most = propose(scores, kept=kept)
    assert best.f1 == pytest.approx(max(f1(scores, limit) for limit in every))
    enough = [limit for limit in every if counted(scores, limit)[0] >= kept / 100 * 37 - 1e-9]
    assert counted(scores, most.threshold) == counted(scores, max(enough))
    for proposal in (best, most):
        kept_here, wrong = counted(scores, proposal.threshold)
        assert (proposal.relevant, proposal.other) == (kept_here, wrong)
        assert proposal.recall == pytest.approx(kept_here / 37)
        assert proposal.precision == pytest.approx(kept_here / (kept_here + wrong))
        assert proposal.f1 == pytest.approx(f1(scores, proposal.threshold))
        assert float(f"{proposal.threshold:.10g}") == proposal.threshold  # what is printed


def test_scores_that_are_next_to_each_other_are_told_apart():
    high = np.nextafter(1.0, 0.0)
    best, _ = propose(Scores(np.array([1.0, high]), np.array([np.nextafter(high, 0.0)])))
    assert (best.relevant, best.other) == (2, 0)


@pytest.mark.parametrize("reranked", [False, True])
def test_the_scores_of_a_folder_are_those_of_transformers(
    reranked, beir, en_folder, reranker_folder, queries, read, searched, reference_score
):
    asked = [INSTRUCTION + text for text, _ in queries.values()]
    cosines = searched(en_folder, asked, list(read.values()))
    relevant: list[float] = []
    other: list[float] = []
    for key, (text, has) in queries.items():
        found = sorted(cosines[key], key=cosines[key].get, reverse=True)[:6]
        for name in {*found, *has}:
            score = cosines[key][name]
            if reranked:
                score = reference_score(reranker_folder, [(text, read[name])], normalize=True)[0]
            (relevant if name in has else other).append(score)
    with Embedder(en_folder) as embedder, Reranker(reranker_folder) as reranker:
        scores = from_folder(beir, embedder, reranker=reranker if reranked else None, first=6)
    np.testing.assert_allclose(np.sort(scores.relevant), np.sort(relevant), atol=1e-5)
    np.testing.assert_allclose(np.sort(scores.other), np.sort(other), atol=1e-5)


@pytest.fixture
def pairs(tmp_path, queries, read):
    """Every pair of the retrieval set, and those that are relevant."""
    every = [
        (text, passage, int(name in has))
        for text, has in queries.values()
        for name, passage in read.items()
    ]
    file = tmp_path / "pairs.jsonl"
    rows = [dict(zip(("query", "passage", "label"), one, strict=True)) for one in every]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file, every


def test_both_hosts_keep_what_the_command_says_of_a_file_of_pairs(
    pairs, reranker_folder, reference_score, capsys
):
    from langchain_core.documents import Document
    from llama_index.core.schema import NodeWithScore, TextNode

    from langchain_bge import BGEReranker
    from llamaindex_bge import BGEReranker as BGEPostprocessor

    file, every = pairs
    command = ["--data", str(file), "--reranker", str(reranker_folder), "--kept", "60"]
    assert threshold.main(command) == 0
    shown = capsys.readouterr().out
    assert str(file) not in shown
    assert str(reranker_folder) not in shown
    rows = re.findall(
        r"^(best F1|60 % of relevant kept) +(\S+) +(\d+) of 8 .*?(\d+) of", shown, re.MULTILINE
    )
    scores = reference_score(reranker_folder, [pair[:2] for pair in every], normalize=True)
    bins = re.findall(r"^ *-?\d\.\d{3} +-?\d\.\d{3} +(\d+) +█* +(\d+)", shown, re.MULTILINE)
    assert np.array(bins, int).sum(axis=0).tolist() == [8, len(every) - 8]
    assert [name for name, *_ in rows] == ["best F1", "60 % of relevant kept"]
    for _, limit, relevant, other in rows:
        reach = [label for score, (*_, label) in zip(scores, every, strict=True)
                 if score >= float(limit) - 1e-6]  # fmt: skip
        assert (sum(reach), len(reach) - sum(reach)) == (int(relevant), int(other))
        lang = BGEReranker(model=str(reranker_folder), top_n=None, score_threshold=float(limit))
        llama = BGEPostprocessor(
            model=str(reranker_folder), top_n=None, score_threshold=float(limit)
        )
        kept = [0, 0]
        for query in dict.fromkeys(query for query, *_ in every):
            texts = [passage for asked, passage, _ in every if asked == query]
            documents = lang.compress_documents([Document(text) for text in texts], query)
            nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
            kept[0] += len(documents)
            kept[1] += len(llama.postprocess_nodes(nodes, query_str=query))
        assert kept == [int(relevant) + int(other)] * 2


def test_the_scores_of_a_file_of_pairs_by_an_embedder(pairs, en_folder, reference_embed):
    file, every = pairs
    with Embedder(en_folder) as embedder:
        scores = from_pairs(file, embedder=embedder)
    asked = reference_embed(en_folder, [INSTRUCTION + query for query, *_ in every])
    given = reference_embed(en_folder, [passage for _, passage, _ in every])
    expected = (asked * given).sum(axis=1)
    labels = np.array([label for *_, label in every])
    np.testing.assert_allclose(np.sort(scores.relevant), np.sort(expected[labels == 1]), atol=1e-5)
    np.testing.assert_allclose(np.sort(scores.other), np.sort(expected[labels == 0]), atol=1e-5)


def test_a_plot_is_drawn(pairs, reranker_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, _ = pairs
    command = ["--data", str(file), "--reranker", str(reranker_folder)]
    picture = tmp_path / "scores.svg"
    assert threshold.main([*command, "--plot", str(picture)]) == 0
    assert "best F1" in capsys.readouterr().out
    assert picture.read_text().startswith("<?xml")


def test_without_matplotlib_a_plot_is_a_sentence(
    pairs, reranker_folder, tmp_path, monkeypatch, capsys
):
    file, _ = pairs
    command = ["--data", str(file), "--reranker", str(reranker_folder)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert threshold.main([*command, "--plot", str(tmp_path / "scores.png")]) == 1
    assert "--plot needs matplotlib, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scores.docx", "has an ending that matplotlib can't write"),
        ("scores", "has an ending that matplotlib can't write"),
        ("none/scores.png", "there is no folder"),
        (".", "it is a folder"),
    ],
)
def test_a_plot_that_cant_be_written_is_refused_before_the_work(name, said, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text("read after the plot is checked")
    command = ["--data", str(file), "--model", "BAAI/bge-m3", "--plot", str(tmp_path / name)]
    assert threshold.main(command) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"query": "a", "passage": "b"}'], 'has in line 1 no JSON object with "query"'),
        (["nonsense"], "has in line 1 no JSON object"),
        (['{"query": "a", "passage": "b", "label": "yes"}'], "has the label 'yes'"),
        (['{"query": "a", "passage": "b", "label": NaN}'], "has the label nan"),
        (['{"query": "a", "passage": null, "label": 1}'], 'a "passage" that is no string'),
        (['{"query": ["a"], "passage": "b", "label": 1}'], 'a "query" that is no string'),
        (["[" * 100_000], "has in line 1 no JSON object"),
        (['{"query": "a", "passage": "b", "label": 1}'], "The data has no other pair"),
        (['{"query": "a", "passage": "b", "label": 0}'], "The data has no relevant pair"),
    ],
)
def test_data_without_a_threshold_is_a_sentence(lines, said, tmp_path, reranker_folder, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines))
    assert threshold.main(["--data", str(file), "--reranker", str(reranker_folder)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0.0, 101.0, float("nan")])
def test_a_share_that_is_none_is_refused(kept):
    with pytest.raises(ArgumentError, match="must be above 0 and at most 100"):
        propose(Scores(np.array([1.0]), np.array([0.0])), kept=kept)


def test_what_scores_is_asked_for(tmp_path, capsys):
    for command in (
        ["--data", str(tmp_path)],
        ["--data", str(tmp_path / "pairs.jsonl")],
        ["--data", str(tmp_path / "pairs.jsonl"), "--model", "a", "--reranker", "b"],
    ):
        with pytest.raises(SystemExit):
            threshold.main(command)
    said = capsys.readouterr().err
    assert "a folder needs --model MODEL" in said
    assert said.count("needs one of --model and --reranker") == 2
