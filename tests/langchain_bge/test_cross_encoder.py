"""BGECrossEncoder: plain scores, for those who have a CrossEncoderReranker."""

from __future__ import annotations

import copy
import pickle

import pytest
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import Document

from bge_core import ArgumentError, ClosedError, InputTypeError
from langchain_bge import BGECrossEncoder, BGEReranker

QUERY = "what is the capital of France?"
TEXTS = [
    "The giant panda is a bear of China.",
    "Paris is the capital and the largest city of France.",
    "Berlin is the capital of Germany.",
    "Water boils at 100 degrees Celsius.",
]
PAIRS = [(QUERY, text) for text in TEXTS] + [("panda", TEXTS[0])]


@pytest.mark.parametrize("folder", ["reranker_folder", "bert_reranker_folder"])
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_are_those_of_transformers(request, reference_score, folder, normalize):
    folder = request.getfixturevalue(folder)
    scores = BGECrossEncoder(model=folder, normalize=normalize).score(PAIRS)
    assert type(scores) is list
    assert {type(score) for score in scores} == {float}
    expected = reference_score(folder, PAIRS, normalize=normalize)
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)


def test_nothing_one_and_lists(reranker_folder):
    encoder = BGECrossEncoder(model=reranker_folder)
    assert isinstance(encoder, BaseCrossEncoder)
    assert encoder.score([]) == []
    lists = [list(pair) for pair in PAIRS]
    assert encoder.score(lists) == encoder.score(PAIRS)
    (score,) = encoder.score(PAIRS[:1])
    assert score == pytest.approx(encoder.score(PAIRS)[0], abs=1e-6)


@pytest.mark.parametrize("wrong", ["abc", ["abc"], [("a",)], [("a", None)], None])
def test_no_pairs(reranker_folder, wrong):
    with pytest.raises(InputTypeError, match="pairs"):
        BGECrossEncoder(model=reranker_folder).score(wrong)


async def test_in_cross_encoder_reranker(call, reranker_folder):
    documents = [Document(page_content=text, id=text[:5]) for text in TEXTS]
    host = CrossEncoderReranker(model=BGECrossEncoder(model=reranker_folder), top_n=2)
    kept = await call(host, "compress_documents", documents, QUERY)
    ours = BGEReranker(model=reranker_folder, top_n=2).compress_documents(documents, QUERY)
    assert [document.id for document in kept] == [document.id for document in ours]


def test_hugging_face_style(reranker_folder, reference_score):
    encoder = BGECrossEncoder(
        model_name=str(reranker_folder), model_kwargs={"device": "cpu", "max_length": 16}
    )
    assert (encoder.device, encoder.max_length) == ("cpu", 16)
    expected = reference_score(reranker_folder, PAIRS, normalize=True, max_length=16)
    assert encoder.score(PAIRS) == pytest.approx(expected.tolist(), abs=1e-5)
    with pytest.raises(ArgumentError, match="normalize=False"):
        BGECrossEncoder(model=reranker_folder, model_kwargs={"activation_fn": None})
    with pytest.raises(ArgumentError, match="num_labels"):
        BGECrossEncoder(model=reranker_folder, num_labels=1)


@pytest.mark.parametrize(
    "again", [lambda encoder: pickle.loads(pickle.dumps(encoder)), copy.copy, copy.deepcopy]
)
def test_copies(reranker_folder, again):
    with BGECrossEncoder(model=reranker_folder, normalize=False) as encoder:
        scores = encoder.score(PAIRS)
        twin = again(encoder)
    assert twin.score(PAIRS) == scores
    with pytest.raises(ClosedError):
        encoder.score(PAIRS)
