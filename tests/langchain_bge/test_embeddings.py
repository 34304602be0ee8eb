"""BGEEmbeddings: the right vector, whatever words the settings come in."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import shutil

import numpy as np
import pytest
import torch
from langchain_core.embeddings import Embeddings
from pydantic import SecretStr, ValidationError

from bge_core import (
    ArgumentError,
    BGEError,
    CheckpointError,
    ClosedError,
    InputTypeError,
    TruncationError,
)
from langchain_bge import BGEEmbeddings

EN = "Represent this sentence for searching relevant passages: "
ZH = "为这个句子生成表示以用于检索相关文章："
TEXTS = [
    "Paris is the capital of France.",
    "The giant panda is a bear of China.",
    "",
    "巴黎是法国的首都。",
    "The with statement wraps a block, " * 40,
]
QUERY = "what is the capital of France?"


def close_to(actual, expected):
    np.testing.assert_allclose(np.array(actual), np.array(expected), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def line_folder(unknown_folder, tmp_path_factory):
    """A checkpoint whose tokenizer sees newlines, as BERT's own doesn't."""
    folder = tmp_path_factory.mktemp("lines") / "acme-lines"
    shutil.copytree(unknown_folder, folder)
    for name, changes in (
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        (
            "tokenizer.json",
            {
                "normalizer": None,
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"String": " "},
                    "behavior": "Removed",
                    "invert": False,
                },
            },
        ),
    ):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return folder


class TestVectors:
    @pytest.mark.parametrize(
        ("folder", "pooling"),
        [
            ("en_folder", "cls"),
            ("zh_folder", "cls"),
            ("m3_folder", "cls"),
            ("bare_en_folder", "cls"),
            ("unknown_folder", "mean"),
        ],
    )
    async def test_documents_are_those_of_transformers(
        self, request, call, reference_embed, folder, pooling
    ):
        folder = request.getfixturevalue(folder)
        embeddings = BGEEmbeddings(model=folder, query_instruction="")
        vectors = await call(embeddings, "embed_documents", TEXTS)
        close_to(vectors, reference_embed(folder, TEXTS, pooling=pooling))

    @pytest.mark.parametrize(
        ("folder", "given", "instruction"),
        [
            ("en_folder", None, EN),
            ("en_folder", "", ""),
            ("en_folder", "find: ", "find: "),
            ("zh_folder", None, ZH),
            ("zh_folder", "", ""),
            ("bare_en_folder", None, EN),
            ("m3_folder", None, ""),
            ("m3_folder", "find: ", "find: "),
        ],
    )
    async def test_queries_get_the_instruction_and_nothing_else_does(
        self, request, call, reference_embed, folder, given, instruction
    ):
        folder = request.getfixturevalue(folder)
        embeddings = BGEEmbeddings(model=folder, query_instruction=given)
        close_to(
            await call(embeddings, "embed_query", QUERY),
            reference_embed(folder, [instruction + QUERY])[0],
        )
        close_to(
            await call(embeddings, "embed_documents", [QUERY]), reference_embed(folder, [QUERY])
        )

    async def test_same_as_sentence_transformers(self, call, en_folder, stand_in_folder):
        from sentence_transformers import SentenceTransformer

        for folder, instruction in ((en_folder, EN), (stand_in_folder, "")):
            peer = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
            embeddings = BGEEmbeddings(
                model=folder, query_instruction=instruction, device="cpu", on_truncation="ignore"
            )
            close_to(
                await call(embeddings, "embed_documents", TEXTS),
                peer.encode(TEXTS, normalize_embeddings=True),
            )
            close_to(
                await call(embeddings, "embed_query", QUERY),
                peer.encode([QUERY], prompt=instruction or None, normalize_embeddings=True)[0],
            )

    async def test_newlines_are_left_alone(self, call, line_folder, reference_embed):
        broken, joined = "the cat\nthe dog\n", "the cat the dog "
        embeddings = BGEEmbeddings(model=line_folder, query_instruction="")
        expected = reference_embed(line_folder, [broken, joined], pooling="mean")
        assert np.abs(expected[0] - expected[1]).max() > 1e-3
        close_to(await call(embeddings, "embed_documents", [broken, joined]), expected)
        close_to(await call(embeddings, "embed_query", broken), expected[0])

    @pytest.mark.parametrize("texts", [[], ["one"], ["one", "two", "one"]])
    async def test_python_lists_of_python_floats(self, call, en_folder, texts):
        embeddings = BGEEmbeddings(model=en_folder)
        vectors = await call(embeddings, "embed_documents", texts)
        query = await call(embeddings, "embed_query", "one")
        assert type(vectors) is list
        assert len(vectors) == len(texts)
        for vector in [*vectors, query]:
            assert type(vector) is list
            assert len(vector) == embeddings.dimension == 32
            assert {type(value) for value in vector} == {float}
        if len(texts) == 3:
            assert vectors[0] == vectors[2] != vectors[1]

    async def test_normalize_embeddings_off(self, call, en_folder, reference_embed):
        embeddings = BGEEmbeddings(
            model=en_folder, normalize_embeddings=False, query_instruction=""
        )
        expected = reference_embed(en_folder, TEXTS, normalize=False)
        close_to(await call(embeddings, "embed_documents", TEXTS), expected)
        close_to(await call(embeddings, "embed_query", TEXTS[0]), expected[0])

    async def test_pooling_wins_over_the_checkpoint(self, call, en_folder, reference_embed):
        embeddings = BGEEmbeddings(model=en_folder, pooling="mean")
        close_to(
            await call(embeddings, "embed_documents", TEXTS),
            reference_embed(en_folder, TEXTS, pooling="mean"),
        )

    async def test_max_length_and_what_is_said_about_it(
        self, call, caplog, en_folder, reference_embed
    ):
        embeddings = BGEEmbeddings(model=en_folder, max_length=8)
        with caplog.at_level(logging.WARNING, logger="bge_core"):
            vectors = await call(embeddings, "embed_documents", TEXTS)
        close_to(vectors, reference_embed(en_folder, TEXTS, max_length=8))
        assert len([record for record in caplog.records if "8" in record.getMessage()]) == 1
        strict = embeddings.model_copy(update={"on_truncation": "error"})
        with pytest.raises(TruncationError):
            await call(strict, "embed_documents", TEXTS)

    async def test_llm_embedder_has_tasks(self, call, llm_embedder_folder, reference_embed):
        embeddings = BGEEmbeddings(model=llm_embedder_folder, task="convsearch")
        query, document = (
            "Encode this query and context for searching relevant passages: ",
            "Encode this passage for retrieval: ",
        )
        close_to(
            await call(embeddings, "embed_query", QUERY),
            reference_embed(llm_embedder_folder, [query + QUERY])[0],
        )
        close_to(
            await call(embeddings, "embed_documents", [QUERY]),
            reference_embed(llm_embedder_folder, [document + QUERY]),
        )

    async def test_many_queries_at_once(self, en_folder):
        embeddings = BGEEmbeddings(model=en_folder)
        queries = [f"where is number {number}?" for number in range(40)]
        vectors = await asyncio.gather(*map(embeddings.aembed_query, queries))
        close_to(vectors, [embeddings.embed_query(query) for query in queries])

    async def test_progress_bar(self, call, capsys, en_folder):
        embeddings = BGEEmbeddings(model=en_folder)
        await call(embeddings, "embed_documents", TEXTS)
        assert "text/s" not in capsys.readouterr().err
        embeddings.show_progress = True
        await call(embeddings, "embed_documents", TEXTS)
        assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err


class TestRefusals:
    @pytest.mark.parametrize("texts", ["abc", None, 3, ["a", None], ["a", 3], [["a"]]])
    async def test_no_list_of_str(self, call, en_folder, texts):
        with pytest.raises(InputTypeError, match="texts"):
            await call(BGEEmbeddings(model=en_folder), "embed_documents", texts)

    @pytest.mark.parametrize("text", [None, 3, ["a"]])
    async def test_no_query(self, call, en_folder, text):
        with pytest.raises(TypeError):
            await call(BGEEmbeddings(model=en_folder), "embed_query", text)

    def test_an_instruction_for_documents(self, en_folder):
        with pytest.raises(ArgumentError, match="in front of queries only"):
            BGEEmbeddings(model=en_folder, embed_instruction="Represent this document: ")
        assert BGEEmbeddings(model=en_folder, embed_instruction="").embed_instruction == ""

    def test_an_unknown_argument(self, en_folder):
        with pytest.raises(ArgumentError, match="did you mean 'normalize_embeddings'"):
            BGEEmbeddings(model=en_folder, normalise_embeddings=False)

    def test_another_class_s_default_that_is_spelt_out_is_no_matter(self, en_folder):
        BGEEmbeddings(model=en_folder, multi_process=False, query_encode_kwargs={}, client=None)

    def test_no_model(self):
        with pytest.raises(ArgumentError, match="model is missing"):
            BGEEmbeddings()

    def test_positional(self, en_folder):
        with pytest.raises(InputTypeError, match=r"write BGEEmbeddings\(model="):
            BGEEmbeddings(str(en_folder))

    @pytest.mark.parametrize(
        ("name", "value", "instead"),
        [
            ("query_encode_kwargs", {"prompt": "query: "}, "query_instruction="),
            ("multi_process", True, "device="),
            ("batch_size", 32, "batch_tokens="),
            ("client", "mine", "model="),
        ],
    )
    def test_a_relative_s_argument_has_its_replacement_named(self, en_folder, name, value, instead):
        with pytest.raises(ArgumentError, match=name) as caught:
            BGEEmbeddings(model=en_folder, **{name: value})
        assert instead in str(caught.value)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_length": 513},
            {"max_length": 0},
            {"batch_tokens": 0},
            {"dtype": "int4"},
            {"device": "the fast one"},
            {"use_fp16": True, "dtype": "float32"},
            {"task": "qa"},
        ],
    )
    def test_the_core_s_refusals_arrive_at_construction_as_one_sentence(self, en_folder, wrong):
        with pytest.raises(ArgumentError, match=next(iter(wrong))) as caught:
            BGEEmbeddings(model=en_folder, **wrong)
        assert isinstance(caught.value, ValueError)
        assert not isinstance(caught.value, ValidationError)
        assert "\n" not in str(caught.value)

    def test_a_reranker_is_no_embedding_model(self, reranker_folder):
        with pytest.raises(CheckpointError, match="rerank"):
            BGEEmbeddings(model=reranker_folder)

    def test_a_folder_that_is_none(self, tmp_path):
        with pytest.raises(CheckpointError, match="nowhere"):
            BGEEmbeddings(model=tmp_path / "nowhere")

    @pytest.mark.parametrize("wrong", [{"pooling": "max"}, {"on_truncation": "maybe"}])
    def test_a_word_of_a_closed_list(self, en_folder, wrong):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            BGEEmbeddings(model=en_folder, **wrong)


class TestHuggingFaceWords:
    def test_bge_style(self, en_folder, reference_embed):
        model_kwargs = {"device": "cpu", "torch_dtype": torch.float32, "trust_remote_code": False}
        encode_kwargs = {"normalize_embeddings": False, "batch_size": 32}
        given = copy.deepcopy((model_kwargs, encode_kwargs))
        embeddings = BGEEmbeddings(
            model_name=str(en_folder),
            model_kwargs=model_kwargs,
            encode_kwargs=encode_kwargs,
            query_instruction="find: ",
            embed_instruction="",
            cache_folder="./models",
            show_progress=False,
        )
        close_to(
            embeddings.embed_query(QUERY),
            reference_embed(en_folder, ["find: " + QUERY], normalize=False)[0],
        )
        assert (embeddings.device, embeddings.dtype) == ("cpu", "float32")
        assert embeddings.normalize_embeddings is False
        assert (model_kwargs, encode_kwargs) == given
        assert embeddings.model_kwargs == given[0]
        assert embeddings.encode_kwargs == given[1]

    def test_every_key(self, en_folder):
        embeddings = BGEEmbeddings(
            model=en_folder,
            model_kwargs={
                "device": torch.device("cpu"),
                "trust_remote_code": True,
                "revision": "main",
                "local_files_only": True,
                "cache_folder": "cache",
                "token": "hf_secret",
                "model_kwargs": {"dtype": "float16"},
            },
            encode_kwargs={
                "normalize_embeddings": True,
                "show_progress_bar": True,
                "device": "cpu",
                "batch_size": 8,
                "convert_to_numpy": True,
                "convert_to_tensor": True,
            },
        )
        same = BGEEmbeddings(
            model=en_folder,
            device="cpu",
            trust_remote_code=True,
            revision="main",
            local_files_only=True,
            cache_folder="cache",
            token="hf_secret",
            dtype="float16",
            normalize_embeddings=True,
            show_progress=True,
        )
        assert embeddings.model_dump() == same.model_dump()
        assert embeddings.token == SecretStr("hf_secret")
        assert "hf_secret" not in repr(embeddings)

    @pytest.mark.parametrize("kwargs", [{"model_kwargs": {"device": None}}, {"encode_kwargs": {}}])
    def test_nothing_given_is_nothing_said(self, en_folder, kwargs):
        assert BGEEmbeddings(model=en_folder, device="cpu", **kwargs).device == "cpu"

    @pytest.mark.parametrize(
        ("arguments", "named", "instead"),
        [
            ({"model_kwargs": {"devise": "cpu"}}, "model_kwargs['devise']", "device"),
            ({"model_kwargs": {"prompts": {}}}, "model_kwargs['prompts']", "query_instruction="),
            (
                {"model_kwargs": {"model_kwargs": {"attn_implementation": "sdpa"}}},
                "model_kwargs['model_kwargs']['attn_implementation']",
                "leave it out",
            ),
            ({"encode_kwargs": {"prompt": "q: "}}, "encode_kwargs['prompt']", "query_instruction="),
            ({"encode_kwargs": {"precision": "int8"}}, "encode_kwargs['precision']", "float32"),
            ({"encode_kwargs": {"batch_size": 0}}, "encode_kwargs['batch_size']", "1 or more"),
            ({"encode_kwargs": {"batch_size": "8"}}, "encode_kwargs['batch_size']", "whole number"),
            (
                {"model_kwargs": {"device": "cpu"}, "device": "cuda"},
                "model_kwargs['device']",
                "device=...",
            ),
            (
                {"model_kwargs": {"torch_dtype": torch.float16}, "dtype": "float32"},
                "model_kwargs['torch_dtype']",
                "dtype=...",
            ),
            (
                {"model_kwargs": {"torch_dtype": "float16", "dtype": "float32"}},
                "model_kwargs['dtype']",
                "dtype=...",
            ),
            (
                {"encode_kwargs": {"normalize_embeddings": True}, "normalize_embeddings": False},
                "encode_kwargs['normalize_embeddings']",
                "normalize_embeddings=...",
            ),
            (
                {"model_kwargs": {"device": "cpu"}, "encode_kwargs": {"device": "cuda"}},
                "encode_kwargs['device']",
                "device=...",
            ),
        ],
    )
    def test_unknown_or_in_conflict(self, en_folder, arguments, named, instead):
        with pytest.raises(ArgumentError) as caught:
            BGEEmbeddings(model=en_folder, **arguments)
        assert named in str(caught.value)
        assert instead in str(caught.value)

    def test_a_conflict_does_not_show_tokens(self, en_folder):
        with pytest.raises(ArgumentError) as caught:
            BGEEmbeddings(model=en_folder, token="hf_one", model_kwargs={"token": "hf_two"})
        assert "hf_" not in str(caught.value)

    def test_saying_the_same_twice_is_no_conflict(self, en_folder):
        embeddings = BGEEmbeddings(
            model=en_folder, dtype=torch.float16, model_kwargs={"torch_dtype": "float16"}
        )
        assert embeddings.dtype == "float16"

    def test_batch_size_is_said_to_have_no_effect(self, caplog, en_folder):
        with caplog.at_level(logging.DEBUG, logger="langchain_bge"):
            BGEEmbeddings(model=en_folder, encode_kwargs={"batch_size": 8})
        assert "batch_tokens" in caplog.text


class TestConfiguration:
    def test_is_a_langchain_embedding_model(self, en_folder):
        assert isinstance(BGEEmbeddings(model=en_folder), Embeddings)

    @pytest.mark.parametrize("name", ["model", "model_name"])
    @pytest.mark.parametrize("kind", [str, lambda folder: folder])
    def test_both_names_of_the_model(self, en_folder, name, kind):
        embeddings = BGEEmbeddings(**{name: kind(en_folder)})
        assert str(embeddings.model) == embeddings.model_name == str(en_folder)

    def test_both_names_at_once(self, en_folder):
        with pytest.raises(ArgumentError, match="one of them"):
            BGEEmbeddings(model=en_folder, model_name=en_folder)

    @pytest.mark.parametrize(
        "again",
        [
            lambda embeddings: pickle.loads(pickle.dumps(embeddings)),
            copy.copy,
            copy.deepcopy,
            lambda embeddings: embeddings.model_copy(),
            lambda embeddings: embeddings.model_copy(deep=True),
            lambda embeddings: BGEEmbeddings(**embeddings.model_dump()),
            lambda embeddings: BGEEmbeddings.model_validate(embeddings.model_dump()),
            lambda embeddings: BGEEmbeddings.model_validate_json(embeddings.model_dump_json()),
        ],
        ids=["pickle", "copy", "deepcopy", "model_copy", "deep", "dump", "validate", "json"],
    )
    def test_copies_have_the_configuration_and_a_life_of_their_own(self, en_folder, again):
        embeddings = BGEEmbeddings(
            model=en_folder, query_instruction="find: ", model_kwargs={"device": "cpu"}
        )
        vector = embeddings.embed_query(QUERY)
        twin = again(embeddings)
        embeddings.close()
        assert json.loads(twin.model_dump_json()) == json.loads(embeddings.model_dump_json())
        assert twin.embed_query(QUERY) == vector

    def test_a_pickle_has_no_weights(self, stand_in_folder):
        embeddings = BGEEmbeddings(model=stand_in_folder, query_instruction="")
        embeddings.embed_query(QUERY)
        assert len(pickle.dumps(embeddings)) < 4_000

    def test_model_copy_updates_what_is_computed(self, en_folder, reference_embed):
        embeddings = BGEEmbeddings(model=en_folder, model_kwargs={"device": "cpu"})
        embeddings.embed_query(QUERY)
        raw = embeddings.model_copy(update={"normalize_embeddings": False, "device": ["cpu"]})
        close_to(
            raw.embed_query(QUERY), reference_embed(en_folder, [EN + QUERY], normalize=False)[0]
        )
        close_to(embeddings.embed_query(QUERY), reference_embed(en_folder, [EN + QUERY])[0])
        assert raw.fingerprint != embeddings.fingerprint

    @pytest.mark.parametrize(
        ("update", "error"),
        [
            ({"normalise": False}, ArgumentError),
            ({"max_length": 9999}, ArgumentError),
            ({"encode_kwargs": {"prompt": "query: "}}, ArgumentError),
        ],
    )
    def test_model_copy_checks_what_it_is_given(self, en_folder, update, error):
        with pytest.raises(error):
            BGEEmbeddings(model=en_folder).model_copy(update=update)

    @pytest.mark.parametrize("field", ["model", "device", "normalize_embeddings", "encode_kwargs"])
    def test_what_a_model_is_made_of_stays(self, en_folder, field):
        embeddings = BGEEmbeddings(model=en_folder)
        with pytest.raises(ArgumentError, match="can't be changed"):
            setattr(embeddings, field, getattr(embeddings, field))

    def test_the_token_stays_secret(self, en_folder):
        embeddings = BGEEmbeddings(model=en_folder, token="hf_secret")
        shown = [repr(embeddings), str(embeddings), embeddings.model_dump_json()]
        with pytest.raises(ArgumentError) as caught:
            BGEEmbeddings(token="hf_secret")
        assert not any("hf_secret" in text for text in [*shown, str(caught.value)])

    def test_close(self, en_folder):
        with BGEEmbeddings(model=en_folder) as embeddings:
            embeddings.embed_query(QUERY)
        with pytest.raises(ClosedError, match="closed"):
            embeddings.embed_query(QUERY)
        with pytest.raises(BGEError):
            embeddings.embed_documents(TEXTS)
        embeddings.close()

    def test_fingerprint(self, en_folder, zh_folder):
        prints = [
            BGEEmbeddings(model=en_folder).fingerprint,
            BGEEmbeddings(model=en_folder, query_instruction="").fingerprint,
            BGEEmbeddings(model=en_folder, max_length=64).fingerprint,
            BGEEmbeddings(model=zh_folder).fingerprint,
        ]
        assert len(set(prints)) == len(prints)
        assert BGEEmbeddings(model=en_folder, batch_tokens=64).fingerprint == prints[0]
