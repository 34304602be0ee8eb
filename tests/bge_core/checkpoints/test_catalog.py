import dataclasses

import pytest

from bge_core.checkpoints.catalog import PROFILES, find_profile

EN = "Represent this sentence for searching relevant passages: "
ZH = "为这个句子生成表示以用于检索相关文章："
WEB = "Given a web search query, retrieve relevant passages that answer the query."
SQL = (
    "Given a question in text, retrieve SQL queries that are appropriate responses to the question."
)
QA = "Represent this query for retrieving relevant documents: "

EMBEDDERS = {
    "bge-large-en-v1.5": (EN, 1024, 512, "cls"),
    "bge-base-en-v1.5": (EN, 768, 512, "cls"),
    "bge-small-en-v1.5": (EN, 384, 512, "cls"),
    "bge-large-zh-v1.5": (ZH, 1024, 512, "cls"),
    "bge-base-zh-v1.5": (ZH, 768, 512, "cls"),
    "bge-small-zh-v1.5": (ZH, 512, 512, "cls"),
    "bge-large-en": (EN, 1024, 512, "cls"),
    "bge-base-en": (EN, 768, 512, "cls"),
    "bge-small-en": (EN, 384, 512, "cls"),
    "bge-large-zh": (ZH, 1024, 512, "cls"),
    "bge-base-zh": (ZH, 768, 512, "cls"),
    "bge-small-zh": (ZH, 512, 512, "cls"),
    "bge-large-zh-noinstruct": ("", 1024, 512, "cls"),
    "llm-embedder": (QA, 768, 512, "cls"),
    "bge-m3": ("", 1024, 8192, "cls"),
    "bge-m3-unsupervised": ("", 1024, 8192, "cls"),
    "bge-m3-retromae": ("", 1024, 8192, "cls"),
    "bge-multilingual-gemma2": (WEB, 3584, 8192, "last"),
    "bge-en-icl": (WEB, 4096, 32768, "last"),
    "bge-code-v1": (SQL, 1536, 32768, "last"),
    "bge-reasoner-embed-qwen3-8b-0923": (None, 4096, 32768, "last"),
}
RERANKERS = {
    "bge-reranker-base": ("xlm-roberta", 512),
    "bge-reranker-large": ("xlm-roberta", 512),
    "bge-reranker-v2-m3": ("xlm-roberta", 8192),
    "bge-reranker-v2-gemma": ("gemma", 8192),
    "bge-reranker-v2-minicpm-layerwise": ("minicpm", 2048),
    "bge-reranker-v2.5-gemma2-lightweight": ("gemma2", 8192),
}
TASKS = {
    "qa": (QA, "Represent this document for retrieval: "),
    "icl": (
        "Convert this example into vector to look for useful examples: ",
        "Convert this example into vector for retrieval: ",
    ),
    "chat": (
        "Embed this dialogue to find useful historical dialogues: ",
        "Embed this historical dialogue for retrieval: ",
    ),
    "lrlm": (
        "Embed this text chunk for finding useful historical chunks: ",
        "Embed this historical text chunk for retrieval: ",
    ),
    "tool": (
        "Transform this user request for fetching helpful tool descriptions: ",
        "Transform this tool description for retrieval: ",
    ),
    "convsearch": (
        "Encode this query and context for searching relevant passages: ",
        "Encode this passage for retrieval: ",
    ),
}


def test_the_table_has_every_published_text_model_and_no_other():
    assert set(PROFILES) == {f"BAAI/{name}" for name in (*EMBEDDERS, *RERANKERS)}


@pytest.mark.parametrize("name", EMBEDDERS)
def test_an_embedder_has_its_card_s_instruction_dimension_length_and_pooling(name):
    row = PROFILES[f"BAAI/{name}"]
    found = (row.query_instruction, row.dimension, row.max_length, row.pooling)
    assert (row.kind, found) == ("embedder", EMBEDDERS[name])


@pytest.mark.parametrize("name", RERANKERS)
def test_a_reranker_has_its_family_and_length_and_no_instruction(name):
    row = PROFILES[f"BAAI/{name}"]
    assert (row.kind, row.query_instruction) == ("reranker", "")
    assert (row.family, row.max_length) == RERANKERS[name]


def test_llm_embedder_has_six_tasks_with_an_instruction_on_both_sides():
    tasks = PROFILES["BAAI/llm-embedder"].tasks
    assert {name: (task.query, task.document) for name, task in tasks.items()} == TASKS


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "BAAI/llm-embedder"])
def test_no_other_model_has_tasks(name):
    assert not PROFILES[name].tasks


@pytest.mark.parametrize(
    ("name", "joined"),
    [
        ("bge-small-en-v1.5", "iq"),
        ("bge-multilingual-gemma2", "<instruct>i\n<query>q"),
        ("bge-en-icl", "<instruct>i\n<query>q\n<response>"),
        ("bge-code-v1", "<instruct>i\n<query>q"),
        ("bge-reasoner-embed-qwen3-8b-0923", "Instruct: i\nQuery: q"),
    ],
)
def test_instruction_and_query_are_joined_as_the_card_says(name, joined):
    row = PROFILES[f"BAAI/{name}"]
    assert row.query_format.format(instruction="i", query="q") + row.query_suffix == joined
    assert row.has_task_template == (joined != "iq")


def test_bge_en_icl_alone_takes_examples():
    (row,) = (row for row in PROFILES.values() if row.example_format)
    assert row.id == "BAAI/bge-en-icl"
    written = row.example_format.format(instruct="i", query="q", response="r")
    assert written == "<instruct>i\n<query>q\n<response>r"


def test_three_rerankers_are_asked_a_question():
    given = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the "
        "query by providing a prediction of either 'Yes' or 'No'."
    )
    predict = "Predict whether passage B contains an answer to query A."
    asked = {row.id: row.pair_prompt for row in PROFILES.values() if row.pair_prompt}
    assert {name: (prompt.question, prompt.answer) for name, prompt in asked.items()} == {
        "BAAI/bge-reranker-v2-gemma": (given, "Yes"),
        "BAAI/bge-reranker-v2-minicpm-layerwise": (given, None),
        "BAAI/bge-reranker-v2.5-gemma2-lightweight": (predict, None),
    }
    for prompt in asked.values():
        assert (prompt.query, prompt.passage, prompt.separator) == ("A: ", "B: ", "\n")


def test_two_rerankers_have_a_score_after_each_layer():
    found = {row.id: row.layer_heads for row in PROFILES.values() if row.layer_heads}
    assert {name: (heads.cutoffs, heads.compresses) for name, heads in found.items()} == {
        "BAAI/bge-reranker-v2-minicpm-layerwise": (range(8, 41), False),
        "BAAI/bge-reranker-v2.5-gemma2-lightweight": (range(8, 43), True),
    }


def test_the_bare_backbone_alone_is_refused():
    assert [row.id for row in PROFILES.values() if row.refusal] == ["BAAI/bge-m3-retromae"]


def test_decoders_compute_in_bfloat16_on_cuda():
    decoders = {
        row.id for row in PROFILES.values() if row.pooling == "last" or row.pair_prompt is not None
    }
    assert {row.id for row in PROFILES.values() if row.half == "bfloat16"} == decoders


def test_gemma_s_terms_are_noted():
    for name in ("bge-multilingual-gemma2", "bge-reranker-v2.5-gemma2-lightweight"):
        assert "Gemma" in PROFILES[f"BAAI/{name}"].licence_note


def test_the_table_can_t_be_changed():
    row = PROFILES["BAAI/bge-m3"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.pooling = "mean"  # type: ignore[misc]
    with pytest.raises(TypeError):
        PROFILES["BAAI/bge-m3"] = row
    with pytest.raises(TypeError):
        PROFILES["BAAI/llm-embedder"].tasks["qa"] = None


@pytest.mark.parametrize("name", PROFILES)
def test_every_model_is_found_by_id_and_by_folder(name):
    short = name.partition("/")[2]
    row = PROFILES[name]
    for spelling in (name, short, f"/models/{short}", f"models/{short}/", f"C:\\models\\{short}"):
        assert find_profile(spelling) is row


@pytest.mark.parametrize(
    "name",
    [
        "BAAI/BGE-Small-EN-v1.5",
        "mirror/bge-small-en-v1.5",
        "/runs/bge-small-en-v1.5/checkpoint-500",
        "/runs/bge-small-en-v1.5/checkpoint-500/",
        "/hub/models--BAAI--bge-small-en-v1.5/snapshots/5c38ec7c405ec4b44b94cc5a9bb96e735b38267a",
        "C:\\hub\\models--BAAI--bge-small-en-v1.5\\snapshots\\5c38ec7",
        "/cache/sentence_transformers/BAAI_bge-small-en-v1.5",
    ],
)
def test_other_spellings_of_a_name_are_found(name):
    assert find_profile(name) is PROFILES["BAAI/bge-small-en-v1.5"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "my-bge-small-en-v1.5",
        "bge-small-en-v1.5-finetuned",
        "bge-small-en-v1.6",
        "bge",
        "BAAI",
        "/models/bge-small-en-v1.5/onnx",
        "/data/bge-small-en-v1.5/other-model",
        "/runs/bge-small-en-v1.5-tuned/checkpoint-500",
        "/hub/models--BAAI--bge-small-en-v1.5/blobs/5c38ec7",
        "/hub/models--acme--my-bge-small-en-v1.5/snapshots/5c38ec7",
    ],
)
def test_a_part_of_a_name_is_not_enough(name):
    assert find_profile(name) is None


def test_only_m3_gives_more_than_a_dense_vector():
    rich = {name for name, row in PROFILES.items() if len(row.outputs) > 1}
    assert rich == {"BAAI/bge-m3"}
    assert PROFILES["BAAI/bge-m3"].outputs == ("dense", "sparse", "multi_vector")
    for row in PROFILES.values():
        assert ("dense" in row.outputs) == (row.kind == "embedder")
