"""Decoders behind LangChain: tasks, examples, and a reranker that is a language model."""

import copy
import json
import pickle

import numpy as np
import pytest
from langchain_core.documents import Document

from bge_core import ArgumentError, InputTypeError, QueryExample, Reranker
from langchain_bge import BGECrossEncoder, BGEEmbeddings, BGEReranker

TASK = "Given a question, retrieve passages that answer the question."
EXAMPLES = [
    {"query": "who wrote Emma?", "response": "Jane Austen wrote Emma.", "instruct": "Find it."},
    {"query": "how hot?", "response": "Water boils at 100 degrees."},
]
BEFORE = (
    "<instruct>Find it.\n<query>who wrote Emma?\n<response>Jane Austen wrote Emma.\n\n"
    f"<instruct>{TASK}\n<query>how hot?\n<response>Water boils at 100 degrees.\n\n"
)
# As bge-en-icl's tokenizer spells it out again, with a space after a special token.
ASKED = f"{BEFORE}<instruct> {TASK}\n<query> Where is Paris?\n<response>"


async def test_a_query_gets_examples_and_task_and_a_document_none(
    icl_folder, call, reference_embed
):
    with BGEEmbeddings(model=icl_folder, task_description=TASK, examples=EXAMPLES) as embeddings:
        query = await call(embeddings, "embed_query", "Where is Paris?")
        (document,) = await call(embeddings, "embed_documents", ["Where is Paris?"])
    expected = reference_embed(icl_folder, [ASKED, "Where is Paris?"], pooling="last")
    np.testing.assert_allclose([query, document], expected, atol=1e-5)
    assert {type(value) for value in query} == {float}


def again(embeddings):
    """Every way to a second one of the same configuration."""
    yield pickle.loads(pickle.dumps(embeddings))
    yield copy.deepcopy(embeddings)
    yield embeddings.model_copy()
    yield BGEEmbeddings(**embeddings.model_dump())
    yield BGEEmbeddings(**json.loads(embeddings.model_dump_json()))


@pytest.mark.parametrize("kind", [dict, QueryExample])
def test_copies_keep_task_and_examples(icl_folder, kind):
    examples = [kind(**example) for example in EXAMPLES]
    embeddings = BGEEmbeddings(model=icl_folder, task_description=TASK, examples=examples)
    assert embeddings.examples == QueryExample.all_of(EXAMPLES)
    plain = BGEEmbeddings(model=icl_folder, task_description=TASK)
    for other in again(embeddings):
        assert other.fingerprint == embeddings.fingerprint != plain.fingerprint
    with pytest.raises(ArgumentError, match="can't be changed"):
        embeddings.examples = None


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"examples": "who?"}, InputTypeError, "examples must be a list of dicts"),
        ({"examples": [{"query": "x"}]}, ArgumentError, r"^examples\[0\] has the keys query: it"),
        ({"examples": [{"query": "x", "response": 1}]}, InputTypeError, "response must be a str"),
        ({"task_description": "a", "query_instruction": "b"}, ArgumentError, "one setting"),
    ],
)
def test_wrong_words_are_refused_in_a_sentence(icl_folder, arguments, error, said):
    with pytest.raises(error, match=said):
        BGEEmbeddings(model=icl_folder, **arguments)


def test_an_encoder_takes_no_task(en_folder):
    with pytest.raises(ArgumentError, match=r"takes query_instruction='\.\.\.'"):
        BGEEmbeddings(model=en_folder, task_description=TASK)


async def test_a_language_model_reranks_and_scores(gemma_reranker_folder, call):
    texts = ["Paris is in France.", "Cats purr.", "one two three"]
    with Reranker(gemma_reranker_folder) as core:
        expected = core.rank("Where is Paris?", texts)
    documents = [Document(page_content=text) for text in texts]
    with BGEReranker(model=gemma_reranker_folder, top_n=2) as reranker:
        kept = await call(reranker, "compress_documents", documents, "Where is Paris?")
    assert [document.page_content for document in kept] == [
        texts[found.index] for found in expected[:2]
    ]
    scores = [document.metadata["relevance_score"] for document in kept]
    np.testing.assert_allclose(scores, [found.score for found in expected[:2]], atol=1e-6)
    with BGECrossEncoder(model=gemma_reranker_folder) as encoder:
        scores = encoder.score([("Where is Paris?", text) for text in texts])
    in_order = sorted(expected, key=lambda found: found.index)
    np.testing.assert_allclose(scores, [found.score for found in in_order], atol=1e-6)


async def test_a_reranker_stops_at_a_layer_and_shortens_passages(lightweight_folder, call):
    depth = {"cutoff_layers": [5], "compress_layers": [2, 3], "compress_ratio": 4}
    texts = ["Paris is in France.", "Cats purr.", "one two three " * 20]
    with Reranker(lightweight_folder, **depth) as core, Reranker(lightweight_folder) as whole:
        expected = core.rank("Where is Paris?", texts)
        assert core.fingerprint != whole.fingerprint
    documents = [Document(page_content=text) for text in texts]
    with BGEReranker(model=lightweight_folder, top_n=2, **depth) as reranker:
        kept = await call(reranker, "compress_documents", documents, "Where is Paris?")
        again = BGEReranker(**reranker.model_dump())
        assert again == reranker == pickle.loads(pickle.dumps(reranker))
        assert again.fingerprint == reranker.fingerprint == core.fingerprint
    scores = [document.metadata["relevance_score"] for document in kept]
    np.testing.assert_allclose(scores, [found.score for found in expected[:2]], atol=1e-6)
    with BGECrossEncoder(model=lightweight_folder, **depth) as encoder:
        scores = encoder.score([("Where is Paris?", text) for text in texts])
    in_order = sorted(expected, key=lambda found: found.index)
    np.testing.assert_allclose(scores, [found.score for found in in_order], atol=1e-6)


@pytest.mark.parametrize("kind", [BGEReranker, BGECrossEncoder])
@pytest.mark.parametrize("name", ["cutoff_layers", "compress_layers", "compress_ratio"])
def test_layers_are_for_two_models(reranker_folder, kind, name):
    with pytest.raises(ArgumentError, match=rf"{name} is for BAAI/bge-reranker-v2.*leave it out"):
        kind(model=reranker_folder, **{name: 2})
    with pytest.raises(ArgumentError, match=rf"{name} can't be set with endpoint"):
        kind(model=reranker_folder, endpoint="http://localhost:1", **{name: 2})


@pytest.mark.parametrize("kind", [BGEReranker, BGECrossEncoder])
@pytest.mark.parametrize("given", [{"cutoff_layers": "last"}, {"compress_ratio": 3}])
def test_a_wrong_layer_is_refused_on_one_line(lightweight_folder, kind, given):
    with pytest.raises(ArgumentError, match=f"^[^\n]*{next(iter(given))}[^\n]*$"):
        kind(model=lightweight_folder, **given)
