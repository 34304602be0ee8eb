"""`python -m bge_core.evaluate` and the folders that it reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ir_measures
import pytest
from ir_measures import RR, R, nDCG

from bge_core import ArgumentError, Embedder, Reranker, evaluate
from bge_core.beir import json_lines, read_beir

ROOT = Path(__file__).parents[2]
INSTRUCTION = "Represent this sentence for searching relevant passages: "


def test_beir_folders_in_both_layouts(beir, queries, read):
    questions, passages = read_beir(beir)
    assert questions.texts == {key: text for key, (text, _) in queries.items()}
    assert questions.relevant == {key: grades for key, (_, grades) in queries.items()}
    assert passages == list(read.items())
    (beir / "qrels").mkdir()
    (beir / "qrels.tsv").rename(beir / "qrels" / "test.tsv")
    assert read_beir(beir) == (questions, passages)


def test_a_line_ends_at_its_newline_alone(beir, queries, read):
    corpus = list(json_lines(beir / "corpus.jsonl", texts=("text",)))
    inside = "one\u2028two\u0085three"
    corpus.append({"_id": "d\u2028x", "title": "", "text": inside})
    lines = [json.dumps(row, ensure_ascii=False) for row in corpus]
    # Windows' newlines, and the mark that its programs begin a file with.
    for name, text in (
        ("corpus.jsonl", "\r\n".join(lines)),
        ("queries.jsonl", (beir / "queries.jsonl").read_text(encoding="utf-8")),
        ("qrels.tsv", (beir / "qrels.tsv").read_text(encoding="utf-8") + "\nq0\td\u2028x\t1\n\n"),
    ):
        (beir / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    questions, passages = read_beir(beir)
    assert passages == [*read.items(), ("d\u2028x", inside)]
    assert questions.relevant == {
        key: grades | ({"d\u2028x": 1} if key == "q0" else {})
        for key, (_, grades) in queries.items()
    }


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels.tsv"])
def test_a_beir_file_that_is_no_text_is_refused(beir, name):
    (beir / name).write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ArgumentError, match="can't be read"):
        read_beir(beir)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_a_text_that_is_no_string_is_refused(beir, name):
    with (beir / name).open("a", encoding="utf-8") as file:
        file.write('\n{"_id": "x", "text": null}')
    with pytest.raises(ArgumentError, match='a "text" that is no string'):
        read_beir(beir)


@pytest.mark.parametrize("name", ["none/figures.json", "."])
def test_figures_that_cant_be_written_are_refused_before_the_work(beir, name, capsys):
    command = ["--data", str(beir), "--model", "BAAI/bge-m3", "--json", str(beir / name)]
    assert evaluate.main(command) == 1
    assert "can't be written" in capsys.readouterr().err


def test_a_beir_folder_that_lacks_something_is_refused(beir):
    (beir / "queries.jsonl").write_text('{"_id": "q1", "text": "alone"}\n')
    with pytest.raises(ArgumentError, match=r"judges 4 questions that queries\.jsonl lacks"):
        read_beir(beir)
    (beir / "qrels.tsv").write_text("q1 0 d2 1\nq1 0 d2 1\n")
    with pytest.raises(ArgumentError, match="expected query-id, corpus-id and score"):
        read_beir(beir)
    (beir / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t0\n")
    with pytest.raises(ArgumentError, match="no score above 0"):
        read_beir(beir)
    (beir / "qrels.tsv").unlink()
    with pytest.raises(ArgumentError, match=r"has no qrels\.tsv"):
        read_beir(beir)


def test_evaluate_gives_what_transformers_and_ir_measures_give(
    beir, en_folder, reranker_folder, queries, read, searched, reference_score, retrieval_task,
    capsys,
):  # fmt: skip
    written = beir / "figures.json"
    arguments = ["--data", beir, "--model", en_folder, "--reranker", reranker_folder]
    arguments += ["--first", 6, "--json", written]
    assert evaluate.main([str(argument) for argument in arguments]) == 0

    expected: list[Any] = []
    for reranked in (0, 6):
        for instruction in ("", INSTRUCTION):
            asked = [instruction + text for text, _ in queries.values()]
            run = searched(en_folder, asked, list(read.values()))
            for key, found in run.items() if reranked else ():
                best = sorted(found, key=found.get, reverse=True)[:6]
                pairs = [(queries[key][0], read[name]) for name in best]
                scores = reference_score(reranker_folder, pairs) + 1000  # before all the others
                found.update(zip(best, scores.tolist(), strict=True))
            figures = ir_measures.calc_aggregate(
                [nDCG @ 10, RR @ 10, R @ 100], {key: has for key, (_, has) in queries.items()}, run
            )
            percent = [100 * figures[metric] for metric in (nDCG @ 10, RR @ 10, R @ 100)]
            expected.append((instruction, reranked, pytest.approx(percent)))
    rows = json.loads(written.read_text())["rows"]
    assert [
        (row["instruction"], row["reranked"], list(row["figures"].values())) for row in rows
    ] == expected
    shown = capsys.readouterr().out
    assert "notes" in shown
    assert str(beir) not in shown + written.read_text()

    # The same by mteb, which drops what isn't reranked.
    with (
        Embedder(en_folder, query_instruction="") as plain,
        Embedder(en_folder) as instructed,
        Reranker(reranker_folder, normalize=False) as reranker,
    ):
        by_mteb = evaluate.on_task(
            retrieval_task("Local"),
            embedders={"": plain, INSTRUCTION: instructed},
            reranker=reranker,
            first=6,
        )
    for row, same in zip(rows, by_mteb, strict=True):
        assert (same.questions, same.instruction, same.reranked) == (
            *(5, row["instruction"]),
            row["reranked"],
        )
        if same.reranked:
            assert "recall@100" not in same.figures
        else:
            assert same.figures == pytest.approx(row["figures"], abs=1e-3)


@pytest.mark.parametrize(
    ("missing", "asked", "said"),
    [
        ("ir_measures", "--data", "pip install 'bge-adapters[evaluate]'"),
        ("rich", "--data", "pip install 'bge-adapters[evaluate]'"),
        ("mteb", "--tasks", "--tasks needs mteb, which is not installed: pip install"),
        (None, "--data", "has no corpus.jsonl: a folder in BEIR format has"),
    ],
)
def test_what_is_missing_is_one_sentence(missing, asked, said, tmp_path):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from bge_core.evaluate import main\n"
        f"sys.exit(main([{asked!r}, {str(tmp_path)!r}, '--model', 'BAAI/bge-m3']))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
