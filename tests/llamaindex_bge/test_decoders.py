"""Decoders behind LlamaIndex: tasks, examples, and a reranker that is a language model."""

import copy
import json
import pickle

import numpy as np
import pytest
from llama_index.core.schema import NodeWithScore, TextNode

from bge_core import ArgumentError, InputTypeError, QueryExample, Reranker
from llamaindex_bge import BGEEmbedding, BGEReranker

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


def test_a_query_gets_examples_and_task_and_a_document_none(icl_folder, reference_embed):
    with BGEEmbedding(model_name=icl_folder, task_description=TASK, examples=EXAMPLES) as model:
        vectors = [
            model.get_query_embedding("Where is Paris?"),
            model.get_text_embedding("Where is Paris?"),
        ]
    expected = reference_embed(icl_folder, [ASKED, "Where is Paris?"], pooling="last")
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def again(model):
    """Every way to a second one of the same configuration."""
    yield pickle.loads(pickle.dumps(model))
    yield copy.deepcopy(model)
    yield model.model_copy()
    yield BGEEmbedding.from_dict(model.to_dict())
    yield BGEEmbedding.from_dict(json.loads(json.dumps(model.to_dict())))


@pytest.mark.parametrize("kind", [dict, QueryExample])
def test_copies_keep_task_and_examples(icl_folder, kind):
    examples = [kind(**example) for example in EXAMPLES]
    model = BGEEmbedding(model_name=icl_folder, task_description=TASK, examples=examples)
    assert model.examples == QueryExample.all_of(EXAMPLES)
    plain = BGEEmbedding(model_name=icl_folder, task_description=TASK)
    for other in again(model):
        assert other.fingerprint == model.fingerprint != plain.fingerprint
        # The key of the ingestion cache.
        assert str(other.to_dict()) == str(model.to_dict()) != str(plain.to_dict())
    with pytest.raises(ArgumentError, match="can't be changed"):
        model.examples = None


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"examples": "who?"}, InputTypeError, "examples must be a list of dicts"),
        ({"examples": [{"query": "x"}]}, ArgumentError, r"examples\[0\] has the keys query: it"),
        ({"examples": [{"query": "x", "response": 1}]}, InputTypeError, "response must be a str"),
        ({"task_description": "a", "query_instruction": "b"}, ArgumentError, "one setting"),
    ],
)
def test_wrong_words_are_refused_in_a_sentence(icl_folder, arguments, error, said):
    with pytest.raises(error, match=said):
        BGEEmbedding(model_name=icl_folder, **arguments)


def test_an_encoder_takes_no_task(en_folder):
    with pytest.raises(ArgumentError, match=r"takes query_instruction='\.\.\.'"):
        BGEEmbedding(model_name=en_folder, task_description=TASK)


def test_a_language_model_reranks(gemma_reranker_folder):
    texts = ["Paris is in France.", "Cats purr.", "one two three"]
    with Reranker(gemma_reranker_folder) as core:
        expected = core.rank("Where is Paris?", texts, top_n=2)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    with BGEReranker(model=gemma_reranker_folder, top_n=2) as reranker:
        kept = reranker.postprocess_nodes(nodes, query_str="Where is Paris?")
    assert [node.text for node in kept] == [texts[found.index] for found in expected]
    np.testing.assert_allclose(
        [node.score for node in kept], [found.score for found in expected], atol=1e-6
    )


async def test_a_reranker_stops_at_a_layer_and_shortens_passages(lightweight_folder):
    depth = {"cutoff_layers": 5, "compress_layers": [2, 3], "compress_ratio": 4}
    texts = ["Paris is in France.", "Cats purr.", "one two three " * 20]
    with Reranker(lightweight_folder, **depth) as core:
        expected = core.rank("Where is Paris?", texts, top_n=2)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    with BGEReranker(model=lightweight_folder, top_n=2, **depth) as reranker:
        kept = await reranker.apostprocess_nodes(nodes, query_str="Where is Paris?")
        again = BGEReranker.from_dict(reranker.to_dict())
        assert again.fingerprint == reranker.fingerprint == core.fingerprint
    assert [node.text for node in kept] == [texts[found.index] for found in expected]
    np.testing.assert_allclose(
        [node.score for node in kept], [found.score for found in expected], atol=1e-6
    )


@pytest.mark.parametrize("name", ["cutoff_layers", "compress_layers", "compress_ratio"])
def test_layers_are_for_two_models(reranker_folder, name):
    with pytest.raises(ArgumentError, match=rf"{name} is for BAAI/bge-reranker-v2.*leave it out"):
        BGEReranker(model=reranker_folder, **{name: 2})
    with pytest.raises(ArgumentError, match=rf"{name} can't be set with endpoint"):
        BGEReranker(model=reranker_folder, endpoint="http://localhost:1", **{name: 2})
