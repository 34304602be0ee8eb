import asyncio
import copy
import gc
import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bge_core import (
    ArgumentError,
    ClosedError,
    ComputationError,
    Embedder,
    TruncationError,
)
from bge_core.backends import loading, select

EN = "Represent this sentence for searching relevant passages: "
ZH = "为这个句子生成表示以用于检索相关文章："
QA = "Represent this query for retrieving relevant documents: "
QA_DOCUMENT = "Represent this document for retrieval: "

TEXTS = [
    "Where is Paris?",
    "",
    "   ",
    "\n\t ",
    "panda " * 600,
    "巴黎是法国的首都，也是法国最大的城市。",
    "القطة نائمة على الأريكة",
    "a",
    "Where is Paris?",
    "line one\nline two\r\nline three",
    "with [SEP] and </s> and <s> and [CLS] inside",
    "\U0001f43c\u200d\u0000 odd",
    "The with statement wraps the execution of a block with methods of a context manager.",
    "one two three " * 40,
]
"""Mixed lengths, an empty and blank texts, a double, one that is cut."""

# Fixture, pooling, query instruction, document prompt.
MODELS = [
    ("en_folder", "cls", EN, ""),
    ("zh_folder", "cls", ZH, ""),
    ("m3_folder", "cls", "", ""),
    ("bare_en_folder", "cls", EN, ""),
    ("unknown_folder", "mean", "", ""),
    ("prompt_folder", "mean", "query: ", "passage: "),
    ("llm_embedder_folder", "cls", QA, QA_DOCUMENT),
]


@pytest.fixture(autouse=True)
def quiet(caplog):
    """Keep expected warnings out of the report; files about logging have their own tests."""
    caplog.set_level(logging.ERROR)


@pytest.fixture
def embedder(en_folder):
    with Embedder(en_folder) as embedder:
        yield embedder


# The right vector.


@pytest.mark.parametrize(("model", "pooling", "instruction", "prompt"), MODELS)
async def test_vectors_are_those_of_plain_transformers(
    request, call, reference_embed, model, pooling, instruction, prompt
):
    folder = request.getfixturevalue(model)
    with Embedder(folder) as embedder:
        queries = await call(embedder, "embed_queries", TEXTS)
        documents = await call(embedder, "embed_documents", TEXTS)
    for vectors, before in ((queries, instruction), (documents, prompt)):
        expected = reference_embed(folder, [before + text for text in TEXTS], pooling=pooling)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert vectors.dtype == np.float32
        assert vectors.shape == (len(TEXTS), 32)


@pytest.mark.parametrize(("model", "pooling", "_instruction", "prompt"), MODELS)
@pytest.mark.parametrize("given", ["", "find: ", "找"])
async def test_a_given_instruction_is_put_before_queries_only(
    request, call, reference_embed, model, pooling, _instruction, prompt, given
):
    folder = request.getfixturevalue(model)
    texts = TEXTS[:2] + TEXTS[5:8]
    with Embedder(folder, query_instruction=given) as embedder:
        queries = await call(embedder, "embed_queries", texts)
        documents = await call(embedder, "embed_documents", texts)
    for vectors, before in ((queries, given), (documents, prompt)):
        expected = reference_embed(folder, [before + text for text in texts], pooling=pooling)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


async def test_a_real_model_s_vectors_are_those_of_plain_transformers(
    stand_in_folder, call, reference_embed
):
    texts = TEXTS[:4] + TEXTS[5:]
    with Embedder(stand_in_folder) as embedder:
        vectors = await call(embedder, "embed_documents", texts)
        assert embedder.dimension == 384
    expected = reference_embed(stand_in_folder, texts, pooling="mean", max_length=256)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("model", ["en_folder", "m3_folder"])
@pytest.mark.parametrize("text", ["a <pad> b", "[PAD][PAD] b", "<pad>", "a <mask> b", "[MASK]"])
def test_special_tokens_that_a_text_spells_out_are_what_they_are_to_the_model(
    request, reference_embed, model, text
):
    folder = request.getfixturevalue(model)
    with Embedder(folder) as embedder:
        vectors = embedder.embed_documents([text])
    np.testing.assert_allclose(vectors, reference_embed(folder, [text]), atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("model", ["en_folder", "m3_folder", "unknown_folder"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_and_normalisation_are_as_asked_for(
    request, reference_embed, model, pooling, normalize
):
    folder = request.getfixturevalue(model)
    with Embedder(folder, pooling=pooling, normalize=normalize) as embedder:
        vectors = embedder.embed_documents(TEXTS)
    expected = reference_embed(folder, TEXTS, pooling=pooling, normalize=normalize)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    lengths = np.linalg.norm(vectors, axis=1)
    if normalize:
        np.testing.assert_allclose(lengths, 1, atol=1e-6)
    else:
        assert abs(lengths - 1).min() > 0.1


def test_a_query_and_an_equal_document_differ_where_there_is_an_instruction(embedder):
    assert embedder.query_instruction == EN
    assert not np.allclose(embedder.embed_queries(["panda"]), embedder.embed_documents(["panda"]))


@pytest.mark.parametrize(
    ("task", "query", "document"),
    [
        (None, QA, QA_DOCUMENT),
        ("qa", QA, QA_DOCUMENT),
        (
            "icl",
            "Convert this example into vector to look for useful examples: ",
            "Convert this example into vector for retrieval: ",
        ),
        (
            "chat",
            "Embed this dialogue to find useful historical dialogues: ",
            "Embed this historical dialogue for retrieval: ",
        ),
        (
            "lrlm",
            "Embed this text chunk for finding useful historical chunks: ",
            "Embed this historical text chunk for retrieval: ",
        ),
        (
            "tool",
            "Transform this user request for fetching helpful tool descriptions: ",
            "Transform this tool description for retrieval: ",
        ),
        (
            "convsearch",
            "Encode this query and context for searching relevant passages: ",
            "Encode this passage for retrieval: ",
        ),
    ],
)
async def test_llm_embedder_s_tasks_have_an_instruction_on_both_sides(
    llm_embedder_folder, call, reference_embed, task, query, document
):
    with Embedder(llm_embedder_folder, task=task) as embedder:
        queries = await call(embedder, "embed_queries", ["panda", ""])
        documents = await call(embedder, "embed_documents", ["panda", ""])
        assert embedder.query_instruction == query
    for vectors, before in ((queries, query), (documents, document)):
        expected = reference_embed(llm_embedder_folder, [before + "panda", before])
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("task", ["QA", "", "search"])
def test_an_unknown_task_is_refused_with_the_known_ones(llm_embedder_folder, task):
    with pytest.raises(ArgumentError, match=r"task=.*convsearch.*qa"):
        Embedder(llm_embedder_folder, task=task)


@pytest.mark.parametrize("model", ["en_folder", "m3_folder", "unknown_folder", "prompt_folder"])
def test_a_task_is_refused_where_the_model_has_none(request, model):
    with pytest.raises(ArgumentError, match="llm-embedder"):
        Embedder(request.getfixturevalue(model), task="qa")


def test_a_task_is_refused_for_a_hub_id_that_has_none():
    with pytest.raises(ArgumentError, match="llm-embedder"):
        Embedder("BAAI/bge-m3", task="qa")


# Any number of texts, in order.


@pytest.mark.parametrize("method", ["embed_queries", "embed_documents"])
async def test_none_one_and_many_texts_take_the_same_path(embedder, call, method):
    none = await call(embedder, method, [])
    one = await call(embedder, method, ["panda"])
    many = await call(embedder, method, ["a", "panda", "cat"])
    assert (none.shape, one.shape, many.shape) == ((0, 32), (1, 32), (3, 32))
    assert {vectors.dtype for vectors in (none, one, many)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(one[0], many[1], atol=1e-6)


async def test_no_text_means_no_model_work(embedder, call, computed):
    await call(embedder, "embed_documents", [])
    await call(embedder, "embed_queries", [])
    assert computed.tokens == 0


@pytest.mark.parametrize("batch_tokens", [None, 1, 40, 100_000])
async def test_order_is_kept_whatever_the_lengths_and_the_batches(
    en_folder, call, reference_embed, batch_tokens
):
    texts = [("panda " * (7 * number % 31)) + str(number) for number in range(60)]
    random.Random(1).shuffle(texts)
    with Embedder(en_folder, batch_tokens=batch_tokens) as embedder:
        vectors = await call(embedder, "embed_documents", texts)
    np.testing.assert_allclose(vectors, reference_embed(en_folder, texts), atol=1e-5)


async def test_more_texts_than_are_tokenised_at_once_keep_their_order(embedder, call):
    texts = [f"{number} cats" for number in range(1300)]
    vectors = await call(embedder, "embed_documents", texts)
    places = [0, 511, 512, 1023, 1024, 1299]
    alone = embedder.embed_documents([texts[place] for place in places])
    np.testing.assert_allclose(vectors[places], alone, atol=1e-5)


@pytest.mark.parametrize("method", ["embed_queries", "embed_documents"])
async def test_equal_texts_are_computed_once(en_folder, call, computed, method):
    texts = ["panda", "cat", "panda", "panda", "dog", "cat"]
    with Embedder(en_folder, query_instruction="") as embedder:
        vectors = await call(embedder, method, texts)
    assert computed.tokens == 3 * 3
    for place, first in ((2, 0), (3, 0), (5, 1)):
        np.testing.assert_array_equal(vectors[place], vectors[first])
    assert len(np.unique(vectors, axis=0)) == 3


async def test_no_padding_is_computed(en_folder, call, computed):
    with Embedder(en_folder) as embedder:
        await call(embedder, "embed_documents", ["panda " * length for length in (1, 2, 50, 100)])
    assert computed.tokens == 153 + 4 * 2


@pytest.mark.parametrize(("batch_tokens", "passes"), [(1, 4), (6, 2), (12, 1)])
async def test_batch_tokens_bounds_a_pass(en_folder, call, computed, batch_tokens, passes):
    with Embedder(en_folder, batch_tokens=batch_tokens) as embedder:
        await call(embedder, "embed_documents", ["panda", "cat", "dog", "bear"])
    assert (len(computed.passes), computed.tokens) == (passes, 12)


async def test_truncation_is_refused_before_any_model_work(en_folder, call, computed):
    texts = ["short"] + [f"{number} text" for number in range(600)] + ["panda " * 600]
    with Embedder(en_folder, on_truncation="error") as embedder, pytest.raises(TruncationError):
        await call(embedder, "embed_documents", texts)
    assert computed.tokens == 0


def test_a_result_is_the_caller_s_own(embedder):
    first = embedder.embed_documents(["panda", "panda"])
    before = first.copy()
    first[0] = 0
    np.testing.assert_array_equal(first[1], before[1])
    np.testing.assert_array_equal(embedder.embed_documents(["panda"])[0], before[0])


def test_weights_that_give_nan_are_an_error_that_names_the_text(en_folder, copy_of):
    from safetensors.numpy import load_file, save_file

    folder = copy_of(en_folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    panda = tokenizer["model"]["vocab"]["panda"]
    tensors["embeddings.word_embeddings.weight"][panda] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with Embedder(folder) as embedder:
        assert np.isfinite(embedder.embed_documents(["cat", "dog"])).all()
        with pytest.raises(ComputationError, match=r"NaN.*texts\[2\]"):
            embedder.embed_documents(["cat", "dog", "panda"])


# Facts.


@pytest.mark.parametrize(
    ("model", "length"), [("en_folder", 512), ("m3_folder", 8192), ("bare_en_folder", 512)]
)
def test_dimension_and_length_are_known_without_loading(request, computed, model, length):
    embedder = Embedder(request.getfixturevalue(model))
    assert (embedder.dimension, embedder.max_length) == (32, length)
    assert Embedder(request.getfixturevalue(model), max_length=77).max_length == 77
    assert computed.tokens == 0


def test_nothing_is_printed_and_a_progress_bar_only_on_request(en_folder, capfd):
    with Embedder(en_folder) as embedder:
        embedder.embed_documents(["panda", "cat"])
        assert capfd.readouterr() == ("", "")
        embedder.embed_documents(["panda", "cat", "panda"], show_progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err


# Fingerprints.

CHANGES = {
    "instruction": {"query_instruction": "find: "},
    "no instruction": {"query_instruction": ""},
    "pooling": {"pooling": "mean"},
    "normalize": {"normalize": False},
    "max_length": {"max_length": 100},
    "dtype": {"dtype": "bfloat16"},
}


def test_a_fingerprint_is_16_hexadecimal_digits(en_folder):
    fingerprint = Embedder(en_folder).fingerprint
    assert len(fingerprint) == 16
    assert int(fingerprint, 16)


def test_a_fingerprint_changes_with_each_option_that_changes_vectors(en_folder):
    found = {name: Embedder(en_folder, **options).fingerprint for name, options in CHANGES.items()}
    found["as it is"] = Embedder(en_folder).fingerprint
    assert len(set(found.values())) == len(CHANGES) + 1


def test_a_fingerprint_changes_with_the_task(llm_embedder_folder):
    tasks = ("qa", "icl", "chat", "lrlm", "tool", "convsearch")
    assert len({Embedder(llm_embedder_folder, task=task).fingerprint for task in tasks}) == 6
    same = Embedder(llm_embedder_folder).fingerprint
    assert same == Embedder(llm_embedder_folder, task="qa").fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cpu"},
        {"device": "cpu:0"},
        {"device": ["cpu", "cpu"]},
        {"batch_tokens": 10},
        {"on_truncation": "error"},
        {"query_instruction": EN},
        {"pooling": "cls"},
        {"max_length": 512},
        {"dtype": "float32"},
        {"dtype": "float16", "device": "cpu"},
        {"use_fp16": False},
        {"local_files_only": True},
        {"cache_folder": "/elsewhere"},
    ],
    ids=str,
)
def test_a_fingerprint_stays_where_the_vectors_stay(en_folder, options):
    plain = Embedder(en_folder, device="cpu").fingerprint
    assert Embedder(en_folder, **options).fingerprint == plain


def test_a_fingerprint_stays_in_another_place_copy_and_process(en_folder, copy_of):
    embedder = Embedder(en_folder)
    moved = copy_of(en_folder)
    code = f"from bge_core import Embedder; print(Embedder({str(moved)!r}).fingerprint)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    pickled = pickle.loads(pickle.dumps(embedder))
    assert done.stdout.strip() == embedder.fingerprint == pickled.fingerprint


def _one_weight(folder):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.output.dense.bias"][7] += 0.001
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tokenizer(folder):
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    assert '"lowercase": true' in text
    changed = text.replace('"lowercase": true', '"lowercase": false')
    (folder / "tokenizer.json").write_text(changed, encoding="utf-8")


def _pooling(folder):
    text = json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    (folder / "1_Pooling" / "config.json").write_text(text)


def _length(folder):
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 100}')


def _activation(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"gelu"', '"relu"'))


@pytest.mark.parametrize("change", [_one_weight, _tokenizer, _pooling, _length, _activation])
def test_a_fingerprint_changes_with_each_file_that_changes_vectors(en_folder, copy_of, change):
    folder = copy_of(en_folder)
    change(folder)
    assert Embedder(folder).fingerprint != Embedder(en_folder).fingerprint


def test_a_fingerprint_changes_with_a_name_that_changes_the_instruction(en_folder, copy_of):
    named = {name: Embedder(copy_of(en_folder, name)) for name in ("bge-m3", "bge-small-en", "x")}
    assert named["bge-small-en"].fingerprint == Embedder(en_folder).fingerprint
    assert named["bge-m3"].fingerprint != named["bge-small-en"].fingerprint
    assert named["x"].fingerprint != named["bge-small-en"].fingerprint


# Copies, sharing, closing.


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    "copied", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy, copy.copy]
)
def test_a_copy_has_the_configuration_and_the_same_vectors(zh_folder, used, copied):
    options = {"query_instruction": "找", "normalize": False, "max_length": 50, "pooling": "mean"}
    with Embedder(zh_folder, **options) as embedder:
        if used:
            embedder.embed_queries(["panda"])
        twin = copied(embedder)
        expected = embedder.embed_queries(TEXTS)
    assert (twin.query_instruction, twin.max_length) == ("找", 50)
    assert twin.fingerprint == embedder.fingerprint
    with twin:
        np.testing.assert_allclose(twin.embed_queries(TEXTS), expected, atol=1e-6)


def test_a_pickle_carries_no_weights(m3_folder):
    with Embedder(m3_folder) as embedder:
        fresh = pickle.dumps(embedder)
        embedder.embed_documents(["panda"])
        assert len(pickle.dumps(embedder)) < 10_000
        assert len(fresh) < 10_000


def test_embedders_of_one_model_share_its_weights(en_folder, computed):
    made = [
        Embedder(en_folder),
        Embedder(str(en_folder), query_instruction="find: ", max_length=64),
        Embedder(f"{en_folder}/", normalize=False, batch_tokens=10, dtype="float32"),
        copy.deepcopy(Embedder(en_folder, on_truncation="ignore")),
    ]
    for embedder in made:
        embedder.embed_queries(["panda"])
    assert len(computed.embeddings) == 1
    Embedder(en_folder, dtype="bfloat16").embed_queries(["panda"])
    assert len(computed.embeddings) == 2


def test_weights_are_loaded_once_however_many_threads_come_first(en_folder, copy_of, computed):
    folder = copy_of(en_folder)
    embedders = [Embedder(folder) for _ in range(4)] * 2
    start = threading.Barrier(len(embedders))

    def work(embedder):
        start.wait()
        return embedder.embed_queries(["panda"])

    with ThreadPoolExecutor(len(embedders)) as pool:
        vectors = list(pool.map(work, embedders))
    assert len(computed.embeddings) == 1
    for vector in vectors:
        np.testing.assert_allclose(vector, vectors[0], atol=1e-6)


def test_weights_are_freed_when_the_last_embedder_is_closed(en_folder, copy_of, computed):
    folder = copy_of(en_folder)
    one, two = Embedder(folder), Embedder(folder, normalize=False)
    one.embed_queries(["panda"])
    two.embed_queries(["panda"])
    (weights,) = computed.embeddings
    one.close()
    gc.collect()
    assert weights() is not None
    assert two.embed_documents(["panda"]).shape == (1, 32)
    two.close()
    assert _dies(weights)


def test_weights_are_freed_with_an_embedder_that_nobody_closed(en_folder, copy_of, computed):
    embedder = Embedder(copy_of(en_folder))
    embedder.embed_queries(["panda"])
    (weights,) = computed.embeddings
    del embedder
    assert _dies(weights)


def _dies(reference):
    for _ in range(50):
        gc.collect()
        if reference() is None:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("method", ["embed_queries", "embed_documents"])
@pytest.mark.parametrize("used", [False, True])
async def test_a_closed_embedder_says_so(en_folder, call, method, used):
    embedder = Embedder(en_folder)
    if used:
        await call(embedder, method, ["panda"])
    embedder.close()
    embedder.close()
    with pytest.raises(ClosedError, match="closed"):
        await call(embedder, method, ["panda"])


async def test_leaving_the_context_closes(en_folder, call):
    with Embedder(en_folder) as embedder:
        await call(embedder, "embed_queries", ["panda"])
    with pytest.raises(ClosedError):
        await call(embedder, "embed_queries", ["panda"])


async def test_closing_wakes_who_waits_and_leaves_others_alone(en_folder, call):
    texts = [f"{number} {'cat ' * 60}" for number in range(1500)]
    with Embedder(en_folder, batch_tokens=1) as other, Embedder(en_folder, batch_tokens=1) as ours:
        await call(ours, "embed_queries", ["warm"])
        threading.Timer(0.2, ours.close).start()
        with pytest.raises(ClosedError):
            await call(ours, "embed_documents", texts)
        assert other.embed_documents(["panda"]).shape == (1, 32)


def test_a_folder_may_be_gone_once_the_model_is_loaded(en_folder, copy_of):
    folder = copy_of(en_folder)
    with Embedder(folder) as embedder:
        before = embedder.embed_queries(["panda"])
        shutil.rmtree(folder)
        np.testing.assert_array_equal(embedder.embed_queries(["panda"]), before)


# Threads and event loops.


async def test_many_queries_at_a_time_get_their_own_vectors(embedder, reference_embed):
    texts = [f"{number} {'panda ' * (number % 13)}" for number in range(60)]
    found = await asyncio.gather(*(embedder.aembed_queries([text]) for text in texts))
    expected = reference_embed(embedder.model, [EN + text for text in texts])
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)


def test_many_threads_and_loops_share_one_embedder(embedder, reference_embed):
    texts = [f"{number} {'panda ' * (number % 13)}" for number in range(40)]
    expected = reference_embed(embedder.model, texts)

    def work(number):
        part = texts[number % 20 : number % 20 + 20]
        if number % 2:
            return number, asyncio.run(embedder.aembed_documents(part))
        return number, embedder.embed_documents(part)

    with ThreadPoolExecutor(6) as pool:
        for number, vectors in pool.map(work, range(24)):
            start = number % 20
            np.testing.assert_allclose(vectors, expected[start : start + 20], atol=1e-5)


async def test_queries_and_documents_run_side_by_side(embedder):
    texts = [f"{number} {'cat ' * 30}" for number in range(300)]
    bulk = asyncio.create_task(embedder.aembed_documents(texts))
    queries = [await embedder.aembed_queries([f"panda {number}"]) for number in range(5)]
    assert (await bulk).shape == (300, 32)
    assert np.concatenate(queries).shape == (5, 32)


@pytest.mark.parametrize("method", ["aembed_queries", "aembed_documents"])
async def test_the_event_loop_s_thread_neither_loads_nor_computes(
    en_folder, copy_of, monkeypatch, computed, method
):
    threads = []
    for module, name in ((loading, "load_tokenizer"), (select, "load_runner")):
        load = getattr(module, name)

        def remember(*args, _load=load, **options):
            threads.append(threading.current_thread())
            return _load(*args, **options)

        monkeypatch.setattr(module, name, remember)
    with Embedder(copy_of(en_folder)) as embedder:
        await getattr(embedder, method)(["panda"])
    assert len(threads) >= 2
    assert computed.threads
    assert threading.main_thread() not in {*threads, *computed.threads}


@pytest.mark.parametrize("method", ["aembed_queries", "aembed_documents"])
async def test_the_event_loop_goes_on_while_long_texts_are_tokenised(en_folder, method):
    texts = [f"{number} {'cat panda ' * 800}" for number in range(400)]
    gaps, done = [], asyncio.Event()

    async def tick():
        last = time.perf_counter()
        while not done.is_set():
            await asyncio.sleep(0.002)
            gaps.append(time.perf_counter() - last)
            last += gaps[-1]

    with Embedder(en_folder, max_length=16) as embedder:
        await embedder.aembed_queries(["warm"])
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.01)
        begin = time.perf_counter()
        await getattr(embedder, method)(texts)
        took = time.perf_counter() - begin
        done.set()
        await ticking
    # Nearly all of it is tokenising, which would be one gap on the loop's own thread.
    assert max(gaps) < took / 2


async def test_a_cancelled_call_leaves_the_model_usable(embedder, reference_embed):
    texts = [f"{number} {'cat ' * 60}" for number in range(1500)]
    await embedder.aembed_queries(["warm"])
    task = asyncio.create_task(embedder.aembed_documents(texts))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    vectors = await asyncio.wait_for(embedder.aembed_documents(["panda"]), timeout=5)
    np.testing.assert_allclose(vectors, reference_embed(embedder.model, ["panda"]), atol=1e-5)


def test_a_forked_child_computes_too(m3_folder):
    # Long enough for torch to use both threads, which a fork leaves behind.
    code = f"""
import os
from bge_core import Embedder
embedder = Embedder({str(m3_folder)!r}, device="cpu")
texts = ["panda " * 4000]
before = embedder.embed_documents(texts)
child = os.fork()
if not child:
    same = abs(embedder.embed_documents(texts) - before).max() < 1e-5
    os._exit(0 if same else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.stdout.strip() == "0"


def test_a_folder_that_was_trained_further_is_another_model(en_folder, copy_of):
    folder = copy_of(en_folder)
    with Embedder(folder) as before:
        old, old_print = before.embed_documents(["a text"]), before.fingerprint
        weights = load_file(folder / "model.safetensors")
        save_file(
            {name: tensor + 0.01 for name, tensor in weights.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        with Embedder(folder) as after:
            assert after.fingerprint != old_print
            assert np.abs(after.embed_documents(["a text"]) - old).max() > 1e-3
        assert before.fingerprint == old_print
        np.testing.assert_array_equal(before.embed_documents(["a text"]), old)


def test_a_length_without_room_is_refused_every_time(en_folder):
    with Embedder(en_folder, max_length=2) as embedder:
        for _ in range(2):
            with pytest.raises(ArgumentError, match="the special tokens alone take 2"):
                embedder.embed_documents(["x"])


def test_a_string_s_own_text_counts_whatever_it_prints(en_folder):
    class Place(str):
        __slots__ = ()

        def __str__(self):
            return "a place"

    with Embedder(en_folder) as embedder:
        named, plain = embedder.embed_documents([Place("Paris"), "Paris"])
    np.testing.assert_array_equal(named, plain)


def test_two_spellings_of_a_device_share_the_weights(en_folder):
    with Embedder(en_folder, device="cpu") as one, Embedder(en_folder, device="cpu:0") as two:
        assert one.local.loaded() is two.local.loaded()


@pytest.mark.parametrize("device", ["meta", "cuda:99"])
def test_a_device_that_can_t_compute_is_a_sentence(en_folder, device):
    with (
        Embedder(en_folder, device=device) as embedder,
        pytest.raises(ArgumentError, match=f"device='{device}' can't compute here"),
    ):
        embedder.embed_documents(["x"])
