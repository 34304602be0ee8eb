"""What the playground computes and shows, without its page; `make test-browser` tries that."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bge_core import M3Embedder, make_reranker

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXTS = {
    "paris.txt": "Paris is the capital and the largest city of France, on the river Seine.",
    "cat.txt": "A cat sat on the mat, and the dog slept in the garden all day long.",
    "water.md": "Water boils at 100 degrees Celsius at sea level, and freezes at 0 degrees.",
    "python.txt": "The with statement wraps the execution of a block with methods.",
    "panda.txt": "The giant panda is a bear species endemic to China.",
}
QUESTION = "where is the capital of France?"
INSTRUCTION = "Represent this sentence for searching relevant passages: "
HOSTS = ("langchain", "llamaindex")

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def make_bench():
    from hosts import Passages
    from playground_search import Models, Workbench

    made = []

    def make(embedder, reranker, *, no_hybrid="no", batch=32, texts=TEXTS):
        models = Models(str(embedder), str(reranker), INSTRUCTION, False, "", no_hybrid)
        made.append(Workbench(lambda: models, folder=None, passages=Passages(2400, 600, 60)))
        made[-1]._batch = batch
        assert made[-1].drop([(name, text.encode()) for name, text in texts.items()]) == []
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture(scope="module")
def bench(make_bench, en_folder, bert_reranker_folder):
    return make_bench(en_folder, bert_reranker_folder)


def ask(bench, question=QUESTION, **switches):
    from playground_search import Switches

    return bench.ask(question, "files", Switches(**switches)).result(60)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("instructed", [False, True])
def test_an_answer_has_the_scores_of_plain_transformers(
    host, instructed, bench, en_folder, bert_reranker_folder, reference_embed, reference_score
):
    answer = ask(bench, host=host, instruction=instructed)
    query = reference_embed(en_folder, [INSTRUCTION * instructed + QUESTION])[0]
    cosines = dict(
        zip(TEXTS, reference_embed(en_folder, list(TEXTS.values())) @ query, strict=True)
    )
    assert [hit.name for hit in answer.found] == sorted(TEXTS, key=lambda name: -cosines[name])
    for hit in answer.found:
        assert hit.similarity == pytest.approx(cosines[hit.name], abs=1e-5)
    pairs = [(QUESTION, text) for text in TEXTS.values()]
    scores = dict(zip(TEXTS, reference_score(bert_reranker_folder, pairs, True), strict=True))
    assert [hit.name for hit in answer.reranked] == sorted(TEXTS, key=lambda name: -scores[name])
    for hit in answer.reranked:
        assert hit.relevance == pytest.approx(scores[hit.name], abs=1e-5)
        assert answer.found[hit.place - 1].name == hit.name
    names = [stage.name for stage in answer.stages]
    assert names == ["embed the question", "search", "rerank 5 passages"]
    assert all(stage.milliseconds > 0 for stage in answer.stages)
    assert (answer.indexed, answer.total) == (5, 5)


def test_without_the_reranker_nothing_is_reranked(bench):
    answer = ask(bench, reranker=False)
    assert answer.reranked is None
    assert [stage.name for stage in answer.stages] == ["embed the question", "search"]


@pytest.mark.parametrize("host", HOSTS)
def test_the_marked_window_is_what_the_score_is_of(
    host, make_bench, en_folder, bert_reranker_folder, reference_score
):
    from playground_view import answer_html

    long = " ".join(list(TEXTS.values()) * 3)
    bench = make_bench(en_folder, bert_reranker_folder, texts={"long.txt": long})
    answer = ask(bench, host=host)
    (hit,) = answer.reranked
    start, end = hit.span
    assert 0 < end - start < len(hit.text)
    pair = (QUESTION, hit.text[start:end])
    assert hit.relevance == pytest.approx(
        reference_score(bert_reranker_folder, [pair], True)[0], abs=1e-5
    )
    page = answer_html(answer)
    assert re.findall("<mark>(.*?)</mark>", page) == [hit.text[start:end]] * 2  # and in the whole
    assert len(answer.found) == 1


@pytest.mark.parametrize("host", HOSTS)
def test_hybrid_search_joins_dense_and_sparse(host, make_bench, m3_folder):
    bench = make_bench(m3_folder, m3_folder, no_hybrid="")
    dense, answer = ask(bench, host=host), ask(bench, host=host, hybrid=True)
    assert answer.stages[0].name == "embed and search, dense and sparse"
    outputs = M3Embedder(m3_folder).encode([QUESTION, *TEXTS.values()])
    assert outputs.dense is not None
    assert outputs.sparse is not None
    query, *rows = outputs.dense
    asked, *weights = outputs.sparse
    cosines = np.array([row @ query for row in rows])
    sparse = np.array([sum(asked.get(key, 0) * row[key] for key in row) for row in weights])
    assert [hit.similarity for hit in dense.found] == pytest.approx(sorted(cosines)[::-1], abs=1e-5)
    if host == "langchain":
        places = [(-values).argsort().argsort() for values in (cosines, sparse)]
        fused = 1 / (2 + places[0]) + (sparse > 0) / (2 + places[1])  # as Qdrant fuses ranks
    else:
        spread = [(values - values.min()) / np.ptp(values) for values in (cosines, sparse)]
        fused = (spread[0] + spread[1]) / 2  # as LlamaIndex fuses scores
    assert [hit.similarity for hit in answer.found] == pytest.approx(sorted(fused)[::-1], abs=1e-4)
    best = max(hit.relevance for hit in answer.reranked)
    with make_reranker(m3_folder) as reranker:
        expected = max(reranker.score(QUESTION, list(TEXTS.values())))
    assert best == pytest.approx(float(expected), abs=1e-5)


def test_a_question_is_answered_from_what_is_indexed_by_then(
    make_bench, en_folder, bert_reranker_folder
):
    from playground_view import answer_html

    bench = make_bench(en_folder, bert_reranker_folder, batch=2)
    early = ask(bench)
    assert (early.indexed, early.total, len(early.found)) == (2, 5, 2)
    assert "the first 2 of 5 passages" in answer_html(early)
    while bench.progress("files", "langchain") != (5, 5):
        time.sleep(0.01)
    late = ask(bench)
    assert (late.indexed, len(late.found)) == (5, 5)
    assert "the first" not in answer_html(late)
    assert bench.drop([("cat.txt", b"A cat purrs."), ("new.txt", b"Something new.")]) == []
    assert {hit.text for hit in ask(bench).found} < {*TEXTS.values(), "A cat purrs."}
    while bench.progress("files", "langchain") != (6, 6):
        time.sleep(0.01)
    assert "A cat purrs." in {hit.text for hit in ask(bench).found}
    assert TEXTS["cat.txt"] not in {hit.text for hit in ask(bench).found}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("photo.png", b"\x89PNG", "photo.png is none of the kinds"),
        ("noise.txt", bytes(range(256)), "noise.txt is no text file"),
        ("blank.md", b" \n\t", "blank.md has no text in it."),
        ("empty.html", b"<title></title><script>1</script>", "empty.html has no text in it."),
        ("broken.pdf", b"%PDF-1.7 nothing", "broken.pdf can't be read"),
    ],
)
def test_a_file_that_cannot_be_read_gets_a_sentence(bench, name, content, said):
    before = bench.files
    (sentence,) = bench.drop([(name, content)])
    assert sentence.startswith(said)
    assert sentence.endswith(".")
    assert bench.files == before


def test_texts_are_read_in_their_encodings_and_without_markup():
    import corpora

    read = {
        "plain.txt": "Ça va".encode(),
        "bom.md": b"\xef\xbb\xbf" + "Ça va".encode(),
        "wide.txt": "Ça va".encode("utf-16"),
        "old.rst": "Ça va".encode("cp1252"),
        "page.HTML": "<style>p {}</style><p>Ça  <b>va</b><script>x()</script></p>".encode(),
    }
    for name, content in read.items():
        assert corpora.read_file(name, content).text == "Ça va"
    two = corpora.read_file("two.htm", b"<h1>One</h1>\n<p>T&amp;wo<br>three")
    assert two.text == "One\nT&wo\nthree"


def test_what_cannot_be_answered_gets_a_sentence(make_bench, tmp_path, bench, en_folder):
    from playground_search import Refusal

    with pytest.raises(Refusal, match=r"^Type a question first\.$"):
        ask(bench, " \n")
    with pytest.raises(Refusal, match=r"^no$"):
        ask(bench, hybrid=True)
    nothing = make_bench(en_folder, tmp_path / "none")
    with pytest.raises(Refusal, match="none"):
        ask(nothing)
    nothing.prepare("files").result(60)
    assert "none" in nothing.failure
    empty = make_bench(en_folder, en_folder, texts={})
    with pytest.raises(Refusal, match="There are no files yet"):
        ask(empty)


def test_the_models_say_what_they_can_do(en_folder, m3_folder):
    from playground_search import choose_models

    small = choose_models(str(en_folder), "a reranker")
    assert (small.instruction, small.instructed, small.reranker) == (
        INSTRUCTION,
        True,
        "a reranker",
    )
    assert "bge-small-en-v1.5 gives dense vectors alone" in small.no_hybrid
    m3 = choose_models(str(m3_folder), None)
    assert (m3.no_hybrid, m3.reranker, m3.instructed) == ("", str(m3_folder), False)
    assert choose_models(None, "a reranker").instruction == INSTRUCTION


def test_the_page_escapes_and_draws_to_scale():
    from hosts import Hit
    from playground_search import Answer, Stage, Switches
    from playground_view import answer_html

    found = [Hit(1, 0.5, "<b>.txt", "a < b & <script>"), Hit(2, 0.25, "c.txt", "c")]
    reranked = [
        Hit(2, 0.25, "c.txt", "c", relevance=0.9), Hit(1, 0.5, "b.txt", "b", relevance=0.1),
    ]  # fmt: skip
    stages = [Stage("search", 3.21), Stage("rerank 2 passages", 1234.5)]
    answer = Answer("q", Switches(), "LangChain", found, reranked, stages, 2, 2)
    page = answer_html(answer)
    assert "<script>" not in page
    assert "a &lt; b &amp; &lt;script&gt;" in page
    assert re.findall(r"width:([\d.]+)%", page) == ["50.0", "25.0", "90.0", "10.0"]
    assert re.findall(r'<span class="move \w+">(.*?)<', page) == ["▲ from 2", "▼ from 1"]
    assert re.findall(r"<b>([^<]+)</b>", page) == ["3.2 ms", "1,234 ms"]
    hybrid = Answer("q", Switches(hybrid=True), "LangChain", found, None, stages, 2, 2)
    page = answer_html(hybrid)
    assert re.findall(r"width:([\d.]+)%", page) == ["100.0", "50.0"]
    assert "After reranking" not in page
