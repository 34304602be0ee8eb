"""`BGEReranker`: its numbers and its configuration. See also tests/contract."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.schema import (
    Document,
    ImageNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)

from bge_core import (
    ArgumentError,
    CheckpointError,
    ClosedError,
    Embedder,
    InputTypeError,
    Reranker,
    TruncationError,
)
from bge_core.tokenizer import Tokenizer
from llamaindex_bge import BGEEmbedding, BGEReranker

QUERY = "what is the capital of France?"
TEXTS = ["A cat sat on the mat.", "Paris is the capital of France.", "大熊猫是中国特有的。"]


def nodes_of(*texts: str) -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(id_=str(index), text=text), score=0.5)
        for index, text in enumerate(texts)
    ]


@pytest.mark.parametrize("fixture", ["reranker_folder", "bert_reranker_folder"])
@pytest.mark.parametrize("normalize", [True, False])
async def test_scores_are_those_of_transformers(
    request: pytest.FixtureRequest, call: Any, reference_score: Any, fixture: str, normalize: bool
):
    folder = request.getfixturevalue(fixture)
    model = BGEReranker(model=folder, normalize=normalize, top_n=None)
    result = await call(model, "postprocess_nodes", nodes_of(*TEXTS), query_str=QUERY)
    expected = reference_score(folder, [(QUERY, text) for text in TEXTS], normalize=normalize)
    scores = {int(node.node_id): node.score for node in result}
    np.testing.assert_allclose([scores[n] for n in range(3)], expected, rtol=0, atol=1e-5)
    assert [int(node.node_id) for node in result] == np.argsort(-expected, kind="stable").tolist()


async def test_what_is_scored_is_the_embed_text(reranker_folder: Path, call: Any):
    node = TextNode(
        text=TEXTS[0],
        metadata={"title": "Felines", "page": 3},
        excluded_embed_metadata_keys=["page"],
    )
    given = [NodeWithScore(node=node)]
    core = Reranker(reranker_folder)
    for mode, text in {
        MetadataMode.EMBED: f"title: Felines\n\n{TEXTS[0]}",
        MetadataMode.NONE: TEXTS[0],
    }.items():
        model = BGEReranker(model=reranker_folder, metadata_mode=mode)
        (result,) = await call(model, "postprocess_nodes", given, query_str=QUERY)
        assert result.score == pytest.approx(core.score(QUERY, [text])[0], abs=1e-6)


async def test_all_nodes_are_one_batch(reranker_folder: Path, call: Any, monkeypatch: Any):
    batches = []
    real = Tokenizer.encode_pairs

    def watched(self: Tokenizer, pairs: Any, *given: Any, **options: Any) -> Any:
        batches.append(list(pairs))
        return real(self, pairs, *given, **options)

    monkeypatch.setattr(Tokenizer, "encode_pairs", watched)
    model = BGEReranker(model=reranker_folder)
    await call(model, "postprocess_nodes", nodes_of(*TEXTS, TEXTS[0]), query_str=QUERY)
    assert batches == [[(QUERY, text) for text in TEXTS]]


async def test_a_long_query_never_raises(reranker_folder: Path, call: Any, reference_score: Any):
    model = BGEReranker(model=reranker_folder, max_length=32, on_truncation="ignore")
    query = QUERY * 50
    (result,) = await call(model, "postprocess_nodes", nodes_of(TEXTS[0]), query_str=query)
    (expected,) = reference_score(
        reranker_folder, [(query, TEXTS[0])], normalize=True, max_length=32
    )
    assert result.score == pytest.approx(expected, abs=1e-5)


def test_truncation_is_said(reranker_folder: Path, caplog: Any):
    model = BGEReranker(model=reranker_folder, max_length=20)
    with caplog.at_level(logging.WARNING, logger="bge_core.tokenizer"):
        model.postprocess_nodes(nodes_of(*TEXTS), query_str=QUERY)
    assert len(caplog.records) == 1
    strict = BGEReranker(model=reranker_folder, max_length=20, on_truncation="error")
    with pytest.raises(TruncationError):
        strict.postprocess_nodes(nodes_of(*TEXTS), query_str=QUERY)


# Nodes of other kinds


def test_nodes_without_text_are_noted_once(reranker_folder: Path, caplog: Any):
    image = NodeWithScore(node=ImageNode(image_path="a.png"), score=0.7)
    nodes = [image, *nodes_of("", TEXTS[0])]
    with caplog.at_level(logging.WARNING, logger="llamaindex_bge.reranker"):
        BGEReranker(model=reranker_folder).postprocess_nodes(nodes, query_str=QUERY)
        BGEReranker(model=reranker_folder).postprocess_nodes(nodes[2:], query_str=QUERY)
        strict = BGEReranker(model=reranker_folder, score_threshold=0.0)
        strict.postprocess_nodes(nodes, query_str=QUERY)
        strict.postprocess_nodes(nodes[1:], query_str=QUERY)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 nodes have no text to score (images, or empty): they come last.",
        "2 of 3 nodes have no text to score (images, or empty): they can't reach score_threshold.",
        "1 of 2 nodes has no text to score (images, or empty): it can't reach score_threshold.",
    ]


def test_an_image_with_a_caption_is_scored(reranker_folder: Path):
    image = NodeWithScore(node=ImageNode(text=TEXTS[1], image_path="a.png"))
    both = [image, *nodes_of(TEXTS[1])]
    result = BGEReranker(model=reranker_folder).postprocess_nodes(both, query_str=QUERY)
    assert result[0].score == result[1].score
    assert isinstance(result[0].node, ImageNode)


def test_every_kind_of_node(reranker_folder: Path):
    kinds = [
        Document(text=TEXTS[0], id_="document"),
        Node(text_resource=MediaResource(text=TEXTS[0]), id_="node"),
        TextNode(text=TEXTS[0], id_="text"),
        Node(image_resource=MediaResource(data=b"no picture"), id_="picture"),
    ]
    given = [NodeWithScore(node=node) for node in kinds]
    model = BGEReranker(model=reranker_folder, top_n=None)
    result = model.postprocess_nodes(given, query_str=QUERY)
    assert [node.node_id for node in result] == ["document", "node", "text", "picture"]
    assert [type(node.node) for node in result] == [Document, Node, TextNode, Node]
    assert [node.score is None for node in result] == [False, False, False, True]


def test_subclasses_of_node_with_score_are_kept(reranker_folder: Path):
    class Hit(NodeWithScore):
        shard: int = 0

    given = [Hit(node=TextNode(text=TEXTS[0]), shard=7)]
    (result,) = BGEReranker(model=reranker_folder).postprocess_nodes(given, query_str=QUERY)
    assert isinstance(result, Hit)
    assert result.shard == 7


def test_scores_suit_the_hosts_own_cutoff(reranker_folder: Path):
    model = BGEReranker(model=reranker_folder, top_n=None)
    ranked = model.postprocess_nodes(nodes_of(*TEXTS, ""), query_str=QUERY)
    cutoff = ranked[1].score
    assert cutoff is not None
    ours = BGEReranker(model=reranker_folder, top_n=None, score_threshold=cutoff)
    kept = SimilarityPostprocessor(similarity_cutoff=cutoff).postprocess_nodes(ranked)
    assert ours.postprocess_nodes(nodes_of(*TEXTS, ""), query_str=QUERY) == kept == ranked[:2]


# Arguments


async def test_wrong_calls_are_sentences(reranker_folder: Path, call: Any):
    model = BGEReranker(model=reranker_folder)
    with pytest.raises(ArgumentError, match=r"pass query_str='...' or query_bundle="):
        await call(model, "postprocess_nodes", nodes_of(*TEXTS))
    with pytest.raises(InputTypeError, match="pass a str as query_str"):
        await call(model, "postprocess_nodes", nodes_of(*TEXTS), QUERY)
    with pytest.raises(InputTypeError, match=r"nodes\[0\] must be a NodeWithScore, got TextNode"):
        await call(model, "postprocess_nodes", [TextNode(text="a")], QueryBundle(QUERY))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"topn": 3}, "did you mean 'top_n'?"),
        ({"model_name": "x"}, "model and model_name are one argument with two names"),
        ({"cross_encoder_kwargs": {"max_length": 1}}, "max_length=..."),
        ({"top_n": 0}, "top_n: input should be greater than or equal to 1, got 0"),
        ({"top_n": 2.5}, "top_n: input should be a valid integer"),
        ({"top_n": True}, "top_n: input should be a valid integer"),
        ({"score_threshold": float("nan")}, "score_threshold: input should be a finite number"),
        ({"score_threshold": 5.0}, "score_threshold=5.0"),
        ({"metadata_mode": "some"}, "metadata_mode: input should be 'all', 'embed', 'llm'"),
        ({"max_length": 513}, "max_length=513 is more than the 512"),
    ],
)
def test_refusals_are_sentences(reranker_folder: Path, arguments: dict[str, Any], said: str):
    with pytest.raises(ArgumentError) as refused:
        BGEReranker(model=reranker_folder, **arguments)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_may_stand_first_and_nothing_else(reranker_folder: Path):
    assert BGEReranker(reranker_folder, top_n=3).model == str(reranker_folder)
    with pytest.raises(InputTypeError, match=r"but for its model: write BGEReranker\(model="):
        BGEReranker(reranker_folder, 3)
    with pytest.raises(InputTypeError, match=r"^model must be a hub id .* got int"):
        BGEReranker(3)
    with pytest.raises(ArgumentError, match="given twice"):
        BGEReranker(reranker_folder, model_name=reranker_folder)


def test_wrong_models_are_refused(en_folder: Path, two_label_folder: Path):
    with pytest.raises(CheckpointError, match="embedding"):
        BGEReranker(model=en_folder)
    with pytest.raises(CheckpointError, match="2 labels"):
        BGEReranker(model=two_label_folder)
    with pytest.raises(CheckpointError, match="BGEEmbedding"):
        BGEReranker(model="BAAI/bge-small-en-v1.5")


def test_what_can_be_changed(reranker_folder: Path):
    model = BGEReranker(model=reranker_folder)
    model.top_n = 1
    model.keep_retrieval_score = True
    model.score_threshold = 0.0
    (result,) = model.postprocess_nodes(nodes_of(*TEXTS), query_str=QUERY)
    assert result.metadata == {"retrieval_score": 0.5}
    with pytest.raises(ArgumentError, match="top_n: input should be greater"):
        model.top_n = -1
    with pytest.raises(ArgumentError, match="normalize of a BGEReranker can't be changed"):
        model.normalize = False


def test_defaults(reranker_folder: Path):
    model = BGEReranker(model=reranker_folder)
    assert (model.top_n, model.score_threshold, model.normalize) == (2, None, True)
    assert (model.keep_retrieval_score, model.metadata_mode) == (False, MetadataMode.EMBED)
    assert len(model.postprocess_nodes(nodes_of(*TEXTS), query_str=QUERY)) == 2


def test_closed(reranker_folder: Path):
    with BGEReranker(model=reranker_folder) as model:
        model.postprocess_nodes(nodes_of("a"), query_str="b")
    with pytest.raises(ClosedError):
        model.postprocess_nodes(nodes_of("a"), query_str="b")
    assert len(model.fingerprint) == 16


LONG = " ".join(
    f"Room {number} is {number} steps away from the capital of France." for number in range(12)
)


@pytest.mark.parametrize("mode", [MetadataMode.EMBED, MetadataMode.NONE])
async def test_the_best_window_s_characters_are_those_of_the_node_s_text(
    bert_reranker_folder: Path, call: Any, mode: MetadataMode
):
    texts = [f"  \n{LONG} ", "Paris is in France.", LONG]
    given = [
        NodeWithScore(node=TextNode(id_=str(index), text=text, metadata={"title": "Of Rome"}))
        for index, text in enumerate(texts)
    ]
    options = {"max_length": 32, "long_passages": "window"}
    model = BGEReranker(
        model=bert_reranker_folder,
        top_n=None,
        metadata_mode=mode,
        keep_retrieval_score=True,
        **options,
    )
    contents = [node.get_content(mode) for node in given]
    expected = Reranker(bert_reranker_folder, **options).rank(QUERY, contents)
    result = await call(model, "postprocess_nodes", given, query_str=QUERY)
    assert [int(node.node_id) for node in result] == [found.index for found in expected]
    for node, found in zip(result, expected, strict=True):
        text = texts[found.index]
        start, end = (node.node.metadata[f"relevance_{edge}"] for edge in ("start", "end"))
        assert found.span is not None
        read = contents[found.index][slice(*found.span)]
        quote = text[start:end].strip()
        assert 0 <= start < end <= len(text)
        assert quote == (text.strip() if len(text) < 30 else read.rpartition("\n\n")[2].strip())
        for keys in (
            node.node.excluded_embed_metadata_keys,
            node.node.excluded_llm_metadata_keys,
        ):
            assert {"relevance_start", "relevance_end", "retrieval_score"} <= set(keys)
        assert node.get_content(MetadataMode.EMBED) == given[found.index].get_content(
            MetadataMode.EMBED
        )
    assert all(node.node.metadata == {"title": "Of Rome"} for node in given)
    # What was reranked can be reranked.
    again = await call(model, "postprocess_nodes", result, query_str=QUERY)
    assert [node.score for node in again] == pytest.approx([node.score for node in result])


async def test_without_windows_or_a_score_nothing_is_said_of_places(
    bert_reranker_folder: Path, call: Any
):
    image = NodeWithScore(node=ImageNode(image_path="cat.png"))
    model = BGEReranker(model=bert_reranker_folder, top_n=None, long_passages="window")
    result = await call(model, "postprocess_nodes", [image, *nodes_of("a")], query_str=QUERY)
    assert ["relevance_start" in node.node.metadata for node in result] == [True, False]
    plain = BGEReranker(model=bert_reranker_folder, top_n=None)
    for node in await call(plain, "postprocess_nodes", nodes_of(*TEXTS), query_str=QUERY):
        assert "relevance_start" not in node.node.metadata


def test_embeddings_have_the_core_s_vectors(en_folder: Path):
    options = {"max_length": 32, "long_passages": "window"}
    model = BGEEmbedding(model_name=en_folder, **options)
    with Embedder(en_folder, **options) as core:
        np.testing.assert_allclose(
            model.get_text_embedding_batch([LONG]), core.embed_documents([LONG]), atol=1e-6
        )
        np.testing.assert_allclose(
            model.get_query_embedding(LONG), core.embed_queries([LONG])[0], atol=1e-6
        )
        assert (
            model.fingerprint == core.fingerprint != BGEEmbedding(model_name=en_folder).fingerprint
        )
    assert BGEEmbedding.from_dict(model.to_dict()).long_passages == "window"


async def test_two_stages_keep_every_score(
    reranker_folder: Path, bert_reranker_folder: Path, call: Any
):
    first = BGEReranker(model=bert_reranker_folder, top_n=None, keep_retrieval_score=True)
    second = BGEReranker(model=reranker_folder, top_n=2, keep_retrieval_score=True)
    once = await call(first, "postprocess_nodes", nodes_of(*TEXTS), query_str=QUERY)
    twice = await call(second, "postprocess_nodes", once, query_str=QUERY)
    thrice = await call(first, "postprocess_nodes", twice, query_str=QUERY)
    scores = {node.node_id: node.score for node in once}
    later = {node.node_id: node.score for node in twice}
    assert [len(found) for found in (once, twice, thrice)] == [3, 2, 2]
    for node in thrice:
        assert node.metadata == {
            "retrieval_score": 0.5,
            "relevance_score_1": scores[node.node_id],
            "relevance_score_2": later[node.node_id],
        }
        assert node.get_content(MetadataMode.LLM) == node.text
        assert node.get_content(MetadataMode.EMBED) == node.text
        assert node.score == pytest.approx(scores[node.node_id], abs=1e-6)


async def test_a_store_that_demands_flat_metadata_takes_what_was_reranked(
    bert_reranker_folder: Path, call: Any
):
    from llama_index.core.vector_stores.utils import node_to_metadata_dict

    model = BGEReranker(
        model=bert_reranker_folder,
        top_n=None,
        max_length=32,
        long_passages="window",
        keep_retrieval_score=True,
    )
    given = nodes_of(LONG, TEXTS[1])
    once = await call(model, "postprocess_nodes", given, query_str=QUERY)
    for node in await call(model, "postprocess_nodes", once, query_str=QUERY):
        assert type(node.metadata["relevance_start"]) is type(node.metadata["relevance_end"]) is int
        flat = node_to_metadata_dict(node.node, flat_metadata=True)
        assert flat["relevance_end"] == node.metadata["relevance_end"]
        plain = {"relevance_start", "relevance_end", "retrieval_score", "relevance_score_1"}
        assert node.metadata.keys() == plain
        assert node.text == given[int(node.node_id)].text
