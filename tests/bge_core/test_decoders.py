"""Decoders: their formats, byte for byte, and their numbers, against plain transformers."""

from __future__ import annotations

import json
import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import bge_core.backends.stock
from bge_core import (
    ArgumentError,
    CheckpointError,
    Embedder,
    InputTypeError,
    QueryExample,
    Reranker,
    TruncationError,
    make_scorer,
)
from bge_core.devices import Placement

WEB = "Given a web search query, retrieve relevant passages that answer the query."
SQL = (
    "Given a question in text, retrieve SQL queries that are appropriate responses to the question."
)
TASK = "Given a question, retrieve passages that answer the question."
QUESTION = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the "
    "query by providing a prediction of either 'Yes' or 'No'."
)
TEXTS = [
    "Where is Paris?",
    "   ",
    "line one\nline two\r\n\tthree",
    "大熊猫是中国特有的一种熊科动物。 \U0001f43c",
    "a",
    "with </s> and <eos> and <|endoftext|> and <query> inside",
    "Where is Paris?",
    "one two three " * 40,
]
FRAMES = {
    "gemma2_folder": ("<instruct>{}\n<query>", ""),
    "icl_folder": ("<instruct>{}\n<query>", "\n<response>"),
    "code_folder": ("<instruct>{}\n<query>", ""),
    "reasoner_folder": ("Instruct: {}\nQuery: ", ""),
}
CARDS = {"gemma2_folder": WEB, "icl_folder": WEB, "code_folder": SQL, "reasoner_folder": None}
EXAMPLES = [
    {"instruct": WEB, "query": "who wrote Emma?", "response": "Jane Austen wrote Emma."},
    {"query": "how hot is boiling water?", "response": "Water boils at 100 degrees."},
]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def spelt(folder, text, most=None):
    """Give a text as bge-en-icl's card reads it: tokenised, cut and spelt out again."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.decode(ids[:most])


def queries_of(name, folder, texts, task, examples=""):
    """Write queries as the model card says."""
    before, after = FRAMES[name]
    before = before.format(task) if task else ""
    asked = [before + text for text in texts]
    if name == "icl_folder":
        asked = [spelt(folder, text) for text in asked]
    return [f"{examples}{text}{after}" for text in asked]


# The right vector.


@pytest.mark.parametrize("name", FRAMES)
async def test_vectors_are_those_of_plain_transformers(request, call, reference_embed, name):
    folder = request.getfixturevalue(name)
    with Embedder(folder) as embedder:
        queries = await call(embedder, "embed_queries", TEXTS)
        documents = await call(embedder, "embed_documents", TEXTS)
    asked = queries_of(name, folder, TEXTS, CARDS[name])
    for vectors, texts in ((queries, asked), (documents, TEXTS)):
        expected = reference_embed(folder, texts, pooling="last")
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert (vectors.shape, vectors.dtype) == ((len(TEXTS), 32), np.float32)


@pytest.mark.parametrize("word", ["task_description", "query_instruction"])
@pytest.mark.parametrize("given", [TASK, ""])
@pytest.mark.parametrize("name", FRAMES)
def test_a_task_goes_into_the_frame_and_none_leaves_the_query_bare(
    request, reference_embed, name, given, word
):
    folder = request.getfixturevalue(name)
    with Embedder(folder, **{word: given}) as embedder:
        vectors = embedder.embed_queries(TEXTS)
        assert embedder.query_instruction == given
    asked = queries_of(name, folder, TEXTS, given)
    np.testing.assert_allclose(vectors, reference_embed(folder, asked, pooling="last"), atol=1e-5)


@pytest.mark.parametrize("name", FRAMES)
def test_a_bare_folder_is_pooled_by_the_last_token(request, name, copy_of, reference_embed):
    folder = copy_of(request.getfixturevalue(name))
    for file in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / file).unlink(missing_ok=True)
    with Embedder(folder, normalize=False) as embedder:
        vectors = embedder.embed_documents(TEXTS)
    expected = reference_embed(folder, TEXTS, pooling="last", normalize=False)
    np.testing.assert_allclose(vectors, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["gemma2_folder", "code_folder", "reasoner_folder"])
def test_a_long_text_is_cut_before_its_last_special_token(request, name, reference_embed):
    folder = request.getfixturevalue(name)
    with Embedder(folder, max_length=64) as embedder:
        vectors = embedder.embed_queries(TEXTS), embedder.embed_documents(TEXTS)
    asked = queries_of(name, folder, TEXTS, CARDS[name])
    for found, texts in zip(vectors, (asked, TEXTS), strict=True):
        expected = reference_embed(folder, texts, pooling="last", max_length=64)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", FRAMES)
def test_all_but_gemma_2_run_without_padding(request, name, caplog):
    caplog.set_level(logging.DEBUG, logger="bge_core")
    with Embedder(request.getfixturevalue(name)) as embedder:
        embedder.embed_documents(["a"])
    if name != "gemma2_folder":
        assert "runs padded" not in caplog.text


def test_sentence_transformers_agrees_on_documents(gemma2_folder, code_folder):
    from sentence_transformers import SentenceTransformer

    # Version 5.0 takes the spaces around a text away.
    texts = [text.strip() for text in TEXTS if text.strip()]
    for folder in (gemma2_folder, code_folder):
        model = SentenceTransformer(str(folder), device="cpu")
        with Embedder(folder) as embedder:
            np.testing.assert_allclose(
                embedder.embed_documents(texts), model.encode(texts), atol=1e-5
            )


@pytest.mark.parametrize("name", FRAMES)
def test_bfloat16_is_near(request, name, reference_embed):
    folder = request.getfixturevalue(name)
    with Embedder(folder, dtype="bfloat16") as embedder:
        vectors = embedder.embed_documents(TEXTS)
    expected = reference_embed(folder, TEXTS, pooling="last")
    assert ((vectors * expected).sum(1) > 0.99).all()


# bge-en-icl: examples, and a suffix that is never cut.


@pytest.mark.parametrize("kind", [dict, QueryExample])
async def test_examples_stand_before_queries_only(icl_folder, call, reference_embed, kind):
    given = [kind(**example) for example in EXAMPLES]
    with Embedder(icl_folder, task_description=TASK, examples=given) as embedder:
        queries = await call(embedder, "embed_queries", TEXTS)
        documents = await call(embedder, "embed_documents", TEXTS)
    before = (
        f"<instruct>{WEB}\n<query>who wrote Emma?\n<response>Jane Austen wrote Emma.\n\n"
        f"<instruct>{TASK}\n<query>how hot is boiling water?"
        "\n<response>Water boils at 100 degrees.\n\n"
    )
    asked = queries_of("icl_folder", icl_folder, TEXTS, TASK, before)
    for vectors, texts in ((queries, asked), (documents, TEXTS)):
        expected = reference_embed(icl_folder, texts, pooling="last")
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("examples", [[], EXAMPLES[:1]])
@pytest.mark.parametrize("task", ["Find it.", ""])
def test_a_query_that_is_cut_keeps_its_suffix_and_examples_don_t_count(
    icl_folder, reference_embed, examples, task
):
    most = 40
    tokenizer = transformers.AutoTokenizer.from_pretrained(icl_folder)
    around = 1 + len(tokenizer("\n<response></s>", add_special_tokens=False)["input_ids"])
    texts = [*TEXTS, "熊猫\U0001f43c" * 30]
    with Embedder(
        icl_folder, task_description=task, examples=examples, max_length=most
    ) as embedder:
        vectors = embedder.embed_queries(texts)
    before = f"<instruct>{task}\n<query>" if task else ""
    ahead = (
        f"<instruct>{WEB}\n<query>who wrote Emma?\n<response>Jane Austen wrote Emma.\n\n"
        if examples
        else ""
    )
    asked = [
        f"{ahead}{spelt(icl_folder, before + text, most - around)}\n<response>" for text in texts
    ]
    assert len(set(asked)) == len(set(texts))
    expected = reference_embed(icl_folder, asked, pooling="last")
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_cut_queries_are_counted_or_refused(icl_folder, caplog):
    caplog.set_level(logging.WARNING, logger="bge_core.tokenizer")
    long = "one two three " * 40
    with Embedder(icl_folder, task_description="", max_length=40) as embedder:
        embedder.embed_queries([long, "short", long])
    assert "2 of 3" in caplog.text
    with (
        Embedder(icl_folder, task_description="", max_length=40, on_truncation="error") as embedder,
        pytest.raises(TruncationError, match="1 of 1"),
    ):
        embedder.embed_queries([long])


def test_examples_that_leave_no_room_are_refused_in_a_sentence(icl_folder, copy_of):
    folder = copy_of(icl_folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 60}))
    with Embedder(folder, examples=[*EXAMPLES, *EXAMPLES]) as embedder:
        assert embedder.embed_documents(["fine"]).shape == (1, 32)
        with pytest.raises(ArgumentError, match=r"No max_length .* fewer or shorter examples"):
            embedder.embed_queries(["where?"])


@pytest.mark.parametrize(
    ("examples", "error", "said"),
    [
        ("who?", InputTypeError, "examples must be a list"),
        (EXAMPLES[0], InputTypeError, "examples must be a list"),
        (["who?"], InputTypeError, r"examples\[0\] must be a dict"),
        ([EXAMPLES[0], {"query": "who?"}], ArgumentError, r"examples\[1\] has the keys query:"),
        ([{**EXAMPLES[0], "answer": "x"}], ArgumentError, "it takes query and response"),
        ([{"query": "who?", "response": 3}], InputTypeError, "response must be a str"),
        ([{"query": None, "response": ""}], InputTypeError, "query must be a str"),
        ([{"query": "\ud800", "response": ""}], ArgumentError, "surrogate"),
    ],
)
def test_wrong_examples_are_refused_in_a_sentence(icl_folder, examples, error, said):
    with pytest.raises(error, match=said):
        Embedder(icl_folder, examples=examples)


def test_an_example_needs_a_task_from_somewhere(icl_folder):
    with pytest.raises(ArgumentError, match=r"examples\[1\] has no task"):
        Embedder(icl_folder, query_instruction="", examples=EXAMPLES)


# What a model doesn't take.


@pytest.mark.parametrize("name", ["en_folder", "unknown_folder", "m3_folder"])
def test_an_encoder_has_no_place_for_a_task(request, name):
    with pytest.raises(ArgumentError, match=r"takes query_instruction='\.\.\.'"):
        Embedder(request.getfixturevalue(name), task_description=TASK)


@pytest.mark.parametrize("name", ["en_folder", "unknown_folder", "gemma2_folder", "code_folder"])
def test_examples_are_for_one_model(request, name):
    with pytest.raises(ArgumentError, match="examples are for BAAI/bge-en-icl"):
        Embedder(request.getfixturevalue(name), examples=EXAMPLES)


@pytest.mark.parametrize("model", ["BAAI/bge-small-en-v1.5", "BAAI/bge-code-v1"])
def test_a_hub_id_s_arguments_are_checked_without_its_files(model):
    with pytest.raises(ArgumentError, match="examples are for"):
        Embedder(model, examples=EXAMPLES)


def test_one_task_in_two_words_must_agree(gemma2_folder):
    Embedder(gemma2_folder, task_description=TASK, query_instruction=TASK)
    with pytest.raises(ArgumentError, match="one setting"):
        Embedder(gemma2_folder, task_description=TASK, query_instruction="")


@pytest.mark.parametrize("name", FRAMES)
def test_a_task_with_its_frame_around_it_is_refused(request, name):
    framed = FRAMES[name][0].format(TASK)
    with pytest.raises(ArgumentError, match="pass the task alone"):
        Embedder(request.getfixturevalue(name), query_instruction=framed)


def test_a_task_is_a_str(gemma2_folder):
    with pytest.raises(InputTypeError, match="task_description must be a str"):
        Embedder(gemma2_folder, task_description=["a"])


def test_a_missing_task_is_said_once(reasoner_folder, copy_of, caplog):
    caplog.set_level(logging.WARNING, logger="bge_core.embedder")
    with Embedder(copy_of(reasoner_folder)) as embedder:
        embedder.embed_queries(["a"])
        assert embedder.query_instruction == ""
    assert caplog.text.count("leaves the wording to you") == 1


def test_openvino_is_refused(icl_folder, gemma_reranker_folder):
    with (
        pytest.raises(CheckpointError, match=r"is a decoder.*backend='torch'"),
        Embedder(icl_folder, backend="openvino") as embedder,
    ):
        embedder.embed_documents(["a"])
    with (
        pytest.raises(CheckpointError, match=r"is a decoder.*backend='torch'"),
        Reranker(gemma_reranker_folder, backend="openvino") as reranker,
    ):
        reranker.score("a", ["b"])


# Ends, number format, identity.


@pytest.mark.parametrize("name", ["icl_folder", "gemma2_folder"])
@pytest.mark.parametrize("first", [True, None])
def test_the_ends_that_tokenizer_config_asks_for_are_there(
    request, name, first, copy_of, reference_embed
):
    """transformers 5 goes by tokenizer.json alone, and loses them; 4 goes by the settings."""
    whole = request.getfixturevalue(name)
    folder = copy_of(whole)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    template = tokenizer["post_processor"]
    kept = 2 if first else 1  # with and without the first token
    template["single"] = template["single"][2 - kept : 2]
    template["pair"] = template["single"]
    file.write_text(json.dumps(tokenizer))
    file = folder / "tokenizer_config.json"
    settings = {**json.loads(file.read_text()), "add_eos_token": True}
    settings.pop("add_bos_token", None)
    if first:
        settings["add_bos_token"] = True
    file.write_text(json.dumps(settings))
    plain = transformers.AutoTokenizer.from_pretrained(folder)
    ended = plain("a")["input_ids"][-1] == plain.eos_token_id
    assert ended == transformers.__version__.startswith("4.")
    with Embedder(folder) as embedder:
        vectors = embedder.embed_documents(TEXTS)
    np.testing.assert_allclose(vectors, reference_embed(whole, TEXTS, pooling="last"), atol=1e-5)


def test_auto_is_bfloat16_on_cuda_for_decoders(
    monkeypatch, icl_folder, en_folder, gemma_reranker_folder, reranker_folder
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert Embedder(icl_folder).dtype == "bfloat16"
    assert Embedder("BAAI/bge-code-v1").dtype == "bfloat16"
    assert Embedder(icl_folder, use_fp16=True).dtype == "float16"
    assert Reranker(gemma_reranker_folder).dtype == "bfloat16"
    assert Embedder(en_folder).dtype == "float16"
    assert Reranker(reranker_folder).dtype == "float16"
    assert Placement.of(device=None).resolve()[1] == "float16"


def test_a_decoder_computes_in_float32_on_a_cpu_by_default(icl_folder):
    assert Embedder(icl_folder, device="cpu").dtype == "float32"


def test_tasks_and_examples_change_the_fingerprint(icl_folder, copy_of):
    arguments: tuple[dict[str, Any], ...] = (
        {},
        {"task_description": TASK},
        {"task_description": ""},
        {"examples": EXAMPLES},
        {"examples": EXAMPLES[:1]},
        {"examples": EXAMPLES, "task_description": TASK},
    )
    prints = [Embedder(icl_folder, **words).fingerprint for words in arguments]
    assert len(set(prints)) == len(arguments)
    assert Embedder(icl_folder, query_instruction=TASK).fingerprint == prints[1]
    assert Embedder(icl_folder, examples=[]).fingerprint == prints[0]
    # The same files under a name that says nothing: no suffix stands behind its queries.
    assert Embedder(copy_of(icl_folder, "mine"), query_instruction="").fingerprint != prints[2]


def test_a_pickle_keeps_task_and_examples(icl_folder):
    with Embedder(icl_folder, task_description=TASK, examples=EXAMPLES) as embedder:
        other = pickle.loads(pickle.dumps(embedder))
        assert other.fingerprint == embedder.fingerprint
        np.testing.assert_array_equal(
            other.embed_queries(["where?"]), embedder.embed_queries(["where?"])
        )


def test_a_caller_s_examples_may_change_afterwards(icl_folder):
    examples = [dict(example) for example in EXAMPLES]
    embedder = Embedder(icl_folder, examples=examples)
    before = embedder.fingerprint
    examples[0]["query"] = "something else"
    examples.clear()
    assert embedder.fingerprint == before


def test_a_folder_of_another_name_is_known_by_its_config(code_folder, copy_of, reference_embed):
    folder = copy_of(code_folder, "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "BAAI/bge-code-v1"}))
    with Embedder(folder) as embedder:
        vectors = embedder.embed_queries(TEXTS)
    asked = queries_of("code_folder", code_folder, TEXTS, SQL)
    expected = reference_embed(code_folder, asked, pooling="last")
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


# bge-reranker-v2-gemma.

LONG = "one two three four " * 60
PAIRS = [
    ("Where is Paris?", "Paris is in France."),
    ("Where is Paris?", ""),
    ("", "a"),
    ("大熊猫", "大熊猫是中国特有的一种熊科动物。\n\U0001f43c"),
    ("Where is Paris?", LONG),
    (LONG, "Paris is in France."),
    (LONG, LONG),
    ("Where is Paris?", "Paris is in France."),
]


@pytest.fixture(scope="module")
def logits_of_yes(gemma_reranker_folder):
    """Score pairs with transformers alone, built as FlagEmbedding builds them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gemma_reranker_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(gemma_reranker_folder).eval()

    def ids(text):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def logit(query, passage, max_length):
        sep, prompt = ids("\n"), ids(QUESTION)
        first = [tokenizer.bos_token_id, *ids(f"A: {query}")[: max_length * 3 // 4]]
        second = [*sep, *ids(f"B: {passage}")[:max_length]]
        pair = [*first, *second][: max_length + len(sep) + len(prompt)]
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([[*pair, *sep, *prompt]])).logits[0, -1]
        return float(out[ids("Yes")[0]])

    return lambda pairs, max_length=8000: np.array(
        [logit(query, passage, max_length) for query, passage in pairs]
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("max_length", [None, 24, 64])
async def test_scores_are_the_logits_of_yes(
    gemma_reranker_folder, logits_of_yes, call, max_length, padded, monkeypatch, caplog
):
    caplog.set_level(logging.DEBUG, logger="bge_core")
    if padded:
        monkeypatch.setattr(bge_core.backends.stock, "transformers_encoder", lambda *_: None)
    with Reranker(
        gemma_reranker_folder, normalize=False, max_length=max_length, on_truncation="ignore"
    ) as reranker:
        scores = await call(reranker, "score_pairs", PAIRS)
    assert ("runs padded" in caplog.text) == padded
    expected = logits_of_yes(PAIRS, max_length or 8000)
    assert expected.std() > 0.1
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-5)


async def test_ranks_and_thresholds_are_those_of_every_reranker(
    gemma_reranker_folder, logits_of_yes, call
):
    passages = [passage for _, passage in PAIRS]
    expected = 1 / (1 + np.exp(-logits_of_yes([("Where is Paris?", text) for text in passages])))
    middle = float(np.median(expected))
    scorer: Any = make_scorer(gemma_reranker_folder)
    with scorer as reranker:
        ranked = await call(
            reranker, "rank", "Where is Paris?", passages, score_threshold=middle - 1e-6
        )
        best = await call(reranker, "rank", "Where is Paris?", passages, top_n=1)
    np.testing.assert_allclose(
        [found.score for found in ranked],
        sorted(expected[expected >= middle - 1e-6])[::-1],
        atol=1e-5,
    )
    assert best == ranked[:1]
    assert {type(found.score) for found in ranked} == {float}


def test_a_pair_never_is_longer_than_the_model(gemma_reranker_folder, copy_of, caplog):
    caplog.set_level(logging.WARNING, logger="bge_core.tokenizer")
    folder = copy_of(gemma_reranker_folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    with Reranker(folder, normalize=False) as reranker:
        tokenizer = reranker.local.tokenizer()
        (sequence, short), _ = tokenizer.encode_pairs(
            [(LONG * 9, LONG * 9), ("a", "b")],
            reranker.checkpoint.pair_prompt,
            max_length=reranker.max_length,
            limit=reranker.checkpoint.max_length,
        )
        assert reranker.score(LONG * 9, [LONG * 9]).shape == (1,)
    assert len(sequence) == 1024
    question = tokenizer.encode([f"\n{QUESTION}"], max_length=1000)[0][0].ids[-10:]
    assert sequence.ids[-10:] == short.ids[-10:] == question
    assert "1 of 1 pairs is longer than max_length=1024" in caplog.text


def test_the_two_kinds_of_decoder_are_not_mixed_up(gemma_reranker_folder, icl_folder):
    with pytest.raises(CheckpointError, match="is a reranker"):
        Embedder(gemma_reranker_folder)
    with pytest.raises(CheckpointError, match="is an embedding model"):
        Reranker(icl_folder)
