"""BGEReranker: the right score and order, on copies of what came in."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle

import numpy as np
import pytest
from langchain_core.documents import BaseDocumentCompressor, Document

from bge_core import ArgumentError, CheckpointError, ClosedError, Embedder, InputTypeError, Reranker
from langchain_bge import BGECrossEncoder, BGEEmbeddings, BGEReranker

QUERY = "what is the capital of France?"
TEXTS = [
    "The giant panda is a bear of China.",
    "Paris is the capital and the largest city of France.",
    "",
    "Berlin is the capital of Germany.",
    "大熊猫是中国特有的一种熊科动物。",
    "The with statement wraps a block, " * 60,
]


class Passage(Document):
    """A document type of a user's own."""

    page: int = 0


@pytest.fixture
def documents():
    return [
        Document(
            id=str(index), page_content=text, metadata={"source": f"{index}.md", "tags": ["a"]}
        )
        for index, text in enumerate(TEXTS)
    ]


def scores_of(documents):
    return [document.metadata["relevance_score"] for document in documents]


async def test_documents_of_a_generator(call, reranker_folder, documents):
    reranker = BGEReranker(model=reranker_folder)
    kept = await call(reranker, "compress_documents", (item for item in documents), QUERY)
    assert kept == await call(reranker, "compress_documents", documents, QUERY)
    assert len(kept) == 3


class TestScores:
    @pytest.mark.parametrize("folder", ["reranker_folder", "bert_reranker_folder"])
    @pytest.mark.parametrize("normalize", [True, False])
    async def test_are_those_of_transformers(
        self, request, call, documents, reference_score, folder, normalize
    ):
        folder = request.getfixturevalue(folder)
        reranker = BGEReranker(model=folder, top_n=None, normalize=normalize)
        expected = reference_score(folder, [(QUERY, text) for text in TEXTS], normalize=normalize)
        order = np.argsort(-expected, kind="stable")

        kept = await call(reranker, "compress_documents", documents, QUERY)
        assert [int(document.id) for document in kept] == order.tolist()
        np.testing.assert_allclose(scores_of(kept), expected[order], atol=1e-5, rtol=0)

        ranked = await call(reranker, "rerank", documents, QUERY)
        assert [result["index"] for result in ranked] == order.tolist()
        assert [result["relevance_score"] for result in ranked] == scores_of(kept)
        assert await call(reranker, "rerank", TEXTS, QUERY) == ranked

    async def test_same_as_sentence_transformers(self, call, bert_reranker_folder):
        from sentence_transformers import CrossEncoder

        peer = CrossEncoder(str(bert_reranker_folder), device="cpu", local_files_only=True)
        expected = peer.predict([(QUERY, text) for text in TEXTS])
        reranker = BGEReranker(model=bert_reranker_folder, top_n=None)
        ranked = await call(reranker, "rerank", TEXTS, QUERY)
        for result in ranked:
            assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-5)

    async def test_python_numbers(self, call, reranker_folder, documents):
        reranker = BGEReranker(model=reranker_folder)
        kept = await call(reranker, "compress_documents", documents, QUERY)
        assert type(kept) is list
        assert {type(score) for score in scores_of(kept)} == {float}
        assert json.dumps([document.metadata for document in kept])
        for result in await call(reranker, "rerank", documents, QUERY):
            assert set(result) == {"index", "relevance_score"}
            assert type(result["index"]) is int
            assert type(result["relevance_score"]) is float

    async def test_equal_scores_keep_the_order(self, call, reranker_folder):
        reranker = BGEReranker(model=reranker_folder, top_n=None)
        ranked = await call(reranker, "rerank", [TEXTS[1]] * 3 + [TEXTS[0]] * 2, QUERY)
        order = [result["index"] for result in ranked]
        assert order in ([0, 1, 2, 3, 4], [3, 4, 0, 1, 2])

    async def test_max_length(self, call, reranker_folder, reference_score):
        reranker = BGEReranker(
            model=reranker_folder, top_n=None, max_length=16, on_truncation="ignore"
        )
        expected = reference_score(
            reranker_folder, [(QUERY, text) for text in TEXTS], normalize=True, max_length=16
        )
        for result in await call(reranker, "rerank", TEXTS, QUERY):
            assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-5)

    async def test_many_at_once(self, reranker_folder, documents):
        reranker = BGEReranker(model=reranker_folder)
        queries = [f"where is number {number}?" for number in range(20)]
        together = await asyncio.gather(
            *(reranker.acompress_documents(documents, query) for query in queries)
        )
        for query, kept in zip(queries, together, strict=True):
            alone = reranker.compress_documents(documents, query)
            assert [document.id for document in kept] == [document.id for document in alone]
            assert scores_of(kept) == pytest.approx(scores_of(alone), abs=1e-5)


class TestSelection:
    @pytest.mark.parametrize(("top_n", "count"), [(1, 1), (3, 3), (6, 6), (99, 6), (None, 6)])
    async def test_top_n(self, call, reranker_folder, documents, top_n, count):
        best = BGEReranker(model=reranker_folder, top_n=None).rerank(documents, QUERY)[:count]
        reranker = BGEReranker(model=reranker_folder, top_n=top_n)
        assert await call(reranker, "rerank", documents, QUERY) == best
        kept = await call(reranker, "compress_documents", documents, QUERY)
        assert [int(document.id) for document in kept] == [result["index"] for result in best]
        one = BGEReranker(model=reranker_folder, top_n=1)
        assert await call(one, "rerank", documents, QUERY, top_n=top_n) == best

    def test_three_is_the_default_and_it_can_be_changed(self, reranker_folder):
        reranker = BGEReranker(model=reranker_folder)
        assert len(reranker.rerank(TEXTS, QUERY)) == reranker.top_n == 3
        reranker.top_n = 2
        assert len(reranker.rerank(TEXTS, QUERY)) == 2
        with pytest.raises(ArgumentError, match="top_n"):
            reranker.top_n = 0

    @pytest.mark.parametrize("normalize", [True, False])
    async def test_the_threshold_itself_is_kept(self, call, reranker_folder, documents, normalize):
        reranker = BGEReranker(model=reranker_folder, top_n=None, normalize=normalize)
        scores = scores_of(reranker.compress_documents(documents, QUERY))
        reranker.score_threshold = scores[2]
        kept = await call(reranker, "compress_documents", documents, QUERY)
        assert scores_of(kept) == scores[:3]
        assert len(await call(reranker, "rerank", documents, QUERY)) == 3
        reranker.score_threshold = np.nextafter(scores[2], 1e9)
        assert len(await call(reranker, "compress_documents", documents, QUERY)) == 2
        reranker.score_threshold = np.nextafter(scores[0], 1e9)
        assert await call(reranker, "compress_documents", documents, QUERY) == []

    async def test_nothing_in_nothing_out(self, call, reranker_folder):
        reranker = BGEReranker(model=reranker_folder)
        assert await call(reranker, "compress_documents", [], QUERY) == []
        assert await call(reranker, "rerank", [], QUERY) == []

    async def test_one(self, call, reranker_folder, documents):
        reranker = BGEReranker(model=reranker_folder)
        (kept,) = await call(reranker, "compress_documents", documents[:1], QUERY)
        assert kept.id == "0"


class TestDocuments:
    async def test_inputs_are_never_changed(self, call, reranker_folder, documents):
        before = copy.deepcopy(documents)
        kept = await call(
            BGEReranker(model=reranker_folder), "compress_documents", documents, QUERY
        )
        for document in kept:
            document.metadata["mine"] = True
        assert documents == before
        assert all("mine" not in document.metadata for document in documents)

    async def test_id_type_and_metadata_are_kept(self, call, reranker_folder):
        given = [
            Passage(id="a", page_content=TEXTS[0], metadata={"n": {"x": 1}}, page=7),
            Passage(page_content=TEXTS[1], page=8),
        ]
        reranker = BGEReranker(model=reranker_folder)
        kept = await call(reranker, "compress_documents", given, QUERY)
        assert {type(document) for document in kept} == {Passage}
        by_page = {document.page: document for document in kept}
        assert by_page[7].id == "a"
        assert by_page[7].metadata["n"] == {"x": 1}
        assert by_page[8].id is None
        assert by_page[8].page_content == TEXTS[1]

    async def test_a_stale_score_is_overwritten(self, call, reranker_folder, documents):
        reranker = BGEReranker(model=reranker_folder)
        once = await call(reranker, "compress_documents", documents, QUERY)
        stale = [
            document.model_copy(update={"metadata": {"relevance_score": 99.0}})
            for document in documents
        ]
        twice = await call(reranker, "compress_documents", stale, QUERY)
        assert scores_of(twice) == scores_of(once)
        assert {document.metadata["relevance_score"] for document in stale} == {99.0}


class TestRefusals:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"top_n": 0},
            {"top_n": -1},
            {"score_threshold": float("nan")},
            {"top": 3},
            {"score_threshold": 5.0},
        ],
    )
    def test_a_field(self, reranker_folder, wrong):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            BGEReranker(model=reranker_folder, **wrong)

    async def test_top_n_of_a_call(self, call, reranker_folder):
        with pytest.raises(ArgumentError, match="top_n"):
            await call(BGEReranker(model=reranker_folder), "rerank", TEXTS, QUERY, top_n=0)

    @pytest.mark.parametrize(
        "wrong", ["abc", Document(page_content="abc"), None, 3, [None], ["a", 3]]
    )
    async def test_no_list_of_documents(self, call, reranker_folder, wrong):
        with pytest.raises(InputTypeError):
            await call(BGEReranker(model=reranker_folder), "rerank", wrong, QUERY)

    async def test_texts_are_for_rerank(self, call, reranker_folder):
        with pytest.raises(InputTypeError, match=r"documents\[0\].*rerank\(\)"):
            await call(BGEReranker(model=reranker_folder), "compress_documents", TEXTS, QUERY)

    async def test_no_query(self, call, reranker_folder, documents):
        with pytest.raises(InputTypeError, match="query"):
            await call(BGEReranker(model=reranker_folder), "compress_documents", documents, None)

    def test_no_reranker(self, en_folder, two_label_folder):
        for folder in (en_folder, two_label_folder):
            with pytest.raises(CheckpointError):
                BGEReranker(model=folder)


class TestConfiguration:
    def test_is_a_compressor(self, reranker_folder):
        assert isinstance(BGEReranker(model=reranker_folder), BaseDocumentCompressor)

    def test_both_names_of_the_model(self, reranker_folder):
        reranker = BGEReranker(model_name=str(reranker_folder))
        assert reranker.model == reranker.model_name == str(reranker_folder)

    @pytest.mark.parametrize(
        "again",
        [
            lambda reranker: pickle.loads(pickle.dumps(reranker)),
            copy.deepcopy,
            lambda reranker: reranker.model_copy(),
        ],
    )
    def test_copies(self, reranker_folder, again):
        reranker = BGEReranker(model=reranker_folder, top_n=2, normalize=False)
        ranked = reranker.rerank(TEXTS, QUERY)
        twin = again(reranker)
        reranker.close()
        assert twin.rerank(TEXTS, QUERY) == ranked
        with pytest.raises(ClosedError):
            reranker.rerank(TEXTS, QUERY)

    def test_model_copy_is_computed_anew(self, reranker_folder):
        reranker = BGEReranker(model=reranker_folder)
        raw = reranker.model_copy(update={"normalize": False, "top_n": 1})
        (best,) = raw.rerank(TEXTS, QUERY)
        score = reranker.rerank(TEXTS, QUERY, top_n=1)[0]["relevance_score"]
        assert score == pytest.approx(1 / (1 + np.exp(-best["relevance_score"])), abs=1e-6)
        assert raw.fingerprint != reranker.fingerprint


LONG = " ".join(
    f"Room {number} is {number} steps away from the capital of France." for number in range(12)
)


class TestLongPassages:
    async def test_the_best_window_s_characters_are_in_the_metadata(
        self, call, documents, bert_reranker_folder
    ):
        given = [*documents, Document(id="long", page_content=LONG, metadata={"source": "long.md"})]
        options = {"model": bert_reranker_folder, "top_n": None, "max_length": 32}
        with (
            BGEReranker(long_passages="window", **options) as reranker,
            Reranker(bert_reranker_folder, max_length=32, long_passages="window") as core,
        ):
            expected = core.rank(QUERY, [document.page_content for document in given])
            kept = await call(reranker, "compress_documents", given, QUERY)
            results = await call(reranker, "rerank", given, QUERY)
        assert [
            (
                result["index"],
                result["relevance_score"],
                (result["relevance_start"], result["relevance_end"]),
            )
            for result in json.loads(json.dumps(results))
        ] == [(found.index, pytest.approx(found.score), found.span) for found in expected]
        spans = {
            document.id: (document.metadata["relevance_start"], document.metadata["relevance_end"])
            for document in kept
        }
        assert spans["0"] == (0, len(TEXTS[0]))
        assert spans["2"] == (0, 0)
        start, end = spans["long"]
        assert 0 < end - start < len(LONG)
        assert given[-1].metadata == {"source": "long.md"}

    async def test_nothing_is_said_of_places_without_windows(
        self, call, documents, bert_reranker_folder
    ):
        reranker = BGEReranker(model=bert_reranker_folder, max_length=32, on_truncation="ignore")
        for document in await call(reranker, "compress_documents", documents, QUERY):
            assert "relevance_start" not in document.metadata
        (result, *_) = await call(reranker, "rerank", documents, QUERY)
        assert result.keys() == {"index", "relevance_score"}

    def test_a_cross_encoder_and_embeddings_have_the_core_s_numbers(
        self, bert_reranker_folder, en_folder
    ):
        options = {"max_length": 32, "long_passages": "window"}
        with (
            BGECrossEncoder(model=bert_reranker_folder, **options) as encoder,
            Reranker(bert_reranker_folder, **options) as core,
        ):
            scores = encoder.score([(QUERY, LONG)])
            np.testing.assert_allclose(scores, core.score(QUERY, [LONG]), atol=1e-6)
        with (
            BGEEmbeddings(model=en_folder, **options) as ours,
            Embedder(en_folder, **options) as own,
        ):
            np.testing.assert_allclose(
                ours.embed_documents([LONG]), own.embed_documents([LONG]), atol=1e-6
            )
            assert ours.fingerprint == own.fingerprint

    def test_another_word_is_refused(self, bert_reranker_folder):
        with pytest.raises(ArgumentError, match="long_passages"):
            BGEReranker(model=bert_reranker_folder, long_passages="windows")

    async def test_bge_m3_reads_windows_too(self, m3_folder, call):
        options = {"model": m3_folder, "max_length": 20, "long_passages": "window"}
        chapter = Document(page_content="Cats purr. " * 40 + "Paris is in France.")
        with BGEReranker(**options) as reranker:
            (best,) = await call(reranker, "compress_documents", [chapter], "Where is Paris?")
        start, end = best.metadata["relevance_start"], best.metadata["relevance_end"]
        assert 0 <= start < end <= len(chapter.page_content)
        assert end - start < len(chapter.page_content)
