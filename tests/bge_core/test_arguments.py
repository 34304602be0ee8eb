"""The checks of arguments: what each takes, and the sentence for the rest."""

import inspect
from typing import Any

import numpy as np
import pytest

from bge_core import (
    ArgumentError,
    BGEError,
    Embedder,
    InputTypeError,
    M3Embedder,
    M3Reranker,
    M3Weights,
    QueryExample,
    RemoteEmbedder,
    RemoteReranker,
    Reranker,
    arguments,
    make_embedder,
    make_reranker,
)
from bge_core.errors import MissingExtraError, needs_extra

URL = "http://127.0.0.1:9"


@pytest.mark.parametrize("wrong", ["false", "True", "", 0, 1, None, [], np.True_])
def test_a_flag_is_a_bool_and_nothing_else(wrong):
    with pytest.raises(InputTypeError, match=r"^loud must be True or False, got "):
        arguments.flag("loud", wrong)
    assert arguments.flag("loud", False) is False


FLAGS = [
    ("Embedder", "normalize"),
    ("Embedder", "local_files_only"),
    ("Embedder", "trust_remote_code"),
    ("Embedder", "use_fp16"),
    ("Reranker", "normalize"),
    ("Reranker", "local_files_only"),
    ("Reranker", "trust_remote_code"),
    ("M3Embedder", "trust_remote_code"),
    ("M3Embedder", "local_files_only"),
    ("RemoteEmbedder", "normalize"),
    ("RemoteReranker", "normalize"),
]
CLASSES = {
    "Embedder": lambda **given: Embedder("BAAI/bge-small-en-v1.5", **given),
    "Reranker": lambda **given: Reranker("BAAI/bge-reranker-base", **given),
    "M3Embedder": lambda **given: M3Embedder("BAAI/bge-m3", **given),
    "RemoteEmbedder": lambda **given: RemoteEmbedder(
        "BAAI/bge-small-en-v1.5", endpoint=URL, **given
    ),
    "RemoteReranker": lambda **given: RemoteReranker(
        "BAAI/bge-reranker-base", endpoint=URL, **given
    ),
}


@pytest.mark.parametrize(("cls", "name"), FLAGS)
def test_every_flag_refuses_the_text_of_an_environment_variable(cls, name):
    with pytest.raises(InputTypeError, match=rf"^{name} must be True"):
        CLASSES[cls](**{name: "false"})


@pytest.mark.parametrize("name", ["dense", "sparse", "multi_vector", "return_tokens"])
def test_outputs_are_asked_for_by_a_bool(m3_folder, name):
    asked: dict[str, Any] = {name: "false"}
    with M3Embedder(m3_folder) as m3, pytest.raises(InputTypeError, match=name):
        m3.encode(["a"], **asked)


async def test_show_progress_is_a_bool(call, en_folder, reranker_folder, m3_folder):
    with (
        Embedder(en_folder) as embedder,
        Reranker(reranker_folder) as reranker,
        M3Embedder(m3_folder) as m3,
    ):
        for model, verb, given in (
            (embedder, "embed_documents", (["a"],)),
            (reranker, "score", ("a", ["b"])),
            (reranker, "score_pairs", ([("a", "b")],)),
            (m3, "encode", (["a"],)),
            (m3, "score", ([("a", "b")],)),
        ):
            with pytest.raises(InputTypeError, match="show_progress must be True or False"):
                await call(model, verb, *given, show_progress="no")


@pytest.mark.parametrize("wrong", [True, "3", 3.0, None])
def test_a_whole_number(wrong):
    with pytest.raises(InputTypeError, match="n must be a whole number of rows, got"):
        arguments.whole_number("n", wrong, unit=" of rows")
    assert type(arguments.whole_number("n", np.int64(3))) is int
    with pytest.raises(ArgumentError, match="n must be 1 or more, got 0"):
        arguments.whole_number("n", 0)
    assert arguments.whole_number("n", 0, least=0) == 0


@pytest.mark.parametrize("wrong", [True, "3", None, 1j])
def test_a_number(wrong):
    with pytest.raises(InputTypeError, match="n must be a number, got"):
        arguments.number("n", wrong)
    assert arguments.number("n", np.float32(0.5)) == 0.5
    with pytest.raises(ArgumentError, match="too large"):
        M3Weights(dense=10**400)


@pytest.mark.parametrize("wrong", ["b", "", None, ["a"], np.array(["a"])])
def test_one_of_some_words(wrong):
    with pytest.raises(
        ArgumentError, match=r"is not supported: use 'a', 'aa' or 'aaa', or None\.$"
    ):
        arguments.one_of("word", wrong, ("a", "aa", "aaa"), instead=", or None")
    assert arguments.one_of("word", "aa", ("a", "aa")) == "aa"


class Unwritable:
    """A value whose class fails when it is written."""

    def __repr__(self):
        msg = "no"
        raise RuntimeError(msg)


@pytest.mark.parametrize(
    "wrong",
    [10**5000, -(10**5000), Unwritable(), [Unwritable()], np.array("a"), {"a"}, b"a"],
    ids=["large", "small", "unwritable", "in-a-list", "array", "set", "bytes"],
)
@pytest.mark.parametrize("cls", sorted(CLASSES))
def test_no_value_of_any_argument_escapes_the_sentence(cls, wrong):
    kind = {"Embedder": Embedder, "Reranker": Reranker, "M3Embedder": M3Embedder}.get(
        cls, RemoteEmbedder if cls == "RemoteEmbedder" else RemoteReranker
    )
    names = set(inspect.signature(kind).parameters) - {"model", "endpoint"}
    # Any number above 0 is a number of tokens, of texts or of seconds.
    whole = {"batch_tokens", "endpoint_batch_size", "max_length"} if wrong == 10**5000 else set()
    for name in sorted(names - whole):
        with pytest.raises(BGEError, match=r"^[^\n]{1,400}$"):
            CLASSES[cls](**{name: wrong})


def test_a_message_is_no_longer_than_a_reader():
    for name in ("dtype", "use_fp16", "task", "device", "pooling", "on_truncation"):
        with pytest.raises(BGEError) as caught:
            Embedder("BAAI/bge-small-en-v1.5", **{name: "y y" * 300_000})
        assert len(str(caught.value)) < 400
        assert "y…" in str(caught.value)  # so that nobody takes the part for the whole
    with pytest.raises(BGEError, match=r"^model='y/y/y") as caught:
        Embedder("y/" * 500_000)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("wrong", [np.array("a"), np.array(3), {"a"}, {"a": 1}, b"ab", None])
def test_a_list_has_an_order_and_a_length(wrong):
    for check in (arguments.texts, arguments.pairs):
        with pytest.raises(InputTypeError, match=r"^these must be a list of "):
            check("these", wrong)
    with pytest.raises(InputTypeError, match=r"^examples must be a list of "):
        QueryExample.all_of(np.array(3))


class OwnEmbedder(Embedder):
    """A user's."""


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (Embedder, {}),
        (OwnEmbedder, {}),
        (M3Embedder, {}),
        (Reranker, {}),
        (RemoteEmbedder, {"endpoint": URL}),
        (RemoteReranker, {"endpoint": URL}),
        (make_embedder, {}),
        (make_embedder, {"endpoint": URL}),
        (make_reranker, {}),
        (make_reranker, {"endpoint": URL}),
    ],
)
def test_an_unknown_keyword_is_one_of_what_was_called(make, given):
    hints = {"max_lengths": r"did you mean 'max_length'\?$", "rank_dim": r"it takes .*, model, "}
    for wrong, hint in hints.items():
        said = rf"^{make.__name__}\(\) got an unexpected keyword argument '{wrong}': {hint}"
        with pytest.raises(TypeError, match=said):
            make("BAAI/bge-m3", **given, **{wrong: 1})


def test_a_missing_argument_is_one_of_what_was_called():
    with pytest.raises(TypeError, match=r"^RemoteReranker\(\) missing .*'endpoint'"):
        RemoteReranker("BAAI/bge-reranker-base")
    with pytest.raises(TypeError, match=r"^Embedder\(\) got too many positional arguments"):
        Embedder("BAAI/bge-m3", "cls")
    with pytest.raises(TypeError, match=r"^Embedder\(\) got multiple values for argument 'model'"):
        Embedder("BAAI/bge-m3", model="BAAI/bge-m3")  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"^make_reranker\(\) .*'truncate_dim'"):
        make_reranker("BAAI/bge-m3", truncate_dim=8)


@pytest.mark.parametrize("name", ["max_length", "batch_tokens", "truncate_dim"])
def test_a_whole_number_may_be_numpy_s(name):
    for kind in (int, np.int64, np.uint8):
        made = Embedder("BAAI/bge-m3", **{name: kind(8)})
        assert repr(getattr(made.local.options, name, made._truncate_dim)) == "8"
    with pytest.raises(InputTypeError, match=f"^{name} must be a whole number"):
        Embedder("BAAI/bge-m3", **{name: True})


def test_numpy_s_weights_are_the_same_weights():
    given = M3Weights(dense=np.float64(1), sparse=np.float64(0.3), multi_vector=np.int64(1))
    assert repr(given) == repr(M3Weights())
    embedder = M3Embedder("BAAI/bge-m3")
    with pytest.raises(InputTypeError, match=r"The weight sparse must be a number"):
        M3Reranker(embedder, weights={"sparse": True})


def test_an_m3_reranker_is_made_of_an_m3_embedder():
    with pytest.raises(InputTypeError, match=r"^embedder must be a bge_core\.M3Embedder, got str"):
        M3Reranker("BAAI/bge-m3")


@pytest.mark.parametrize("name", ["revision", "cache_folder"])
@pytest.mark.parametrize("wrong", [3, ["a"], "\ud800", True])
def test_where_a_model_comes_from_is_a_text(name, wrong):
    with pytest.raises(BGEError, match=rf"^{name} (must be a str|has a lone surrogate)"):
        Embedder("BAAI/bge-small-en-v1.5", **{name: wrong})
    with pytest.raises(ArgumentError, match=r"^cache_folder has a NUL character"):
        Embedder("BAAI/bge-small-en-v1.5", cache_folder="a\0b")


def test_only_a_package_that_is_not_there_is_an_extra_that_is_missing():
    missing = ModuleNotFoundError("No module named 'mteb'", name="mteb.types")
    error = needs_extra(missing, "This", packages=("mteb",), install="mteb")
    assert isinstance(error, MissingExtraError)
    assert str(error) == "This needs mteb, which is not installed: pip install mteb"
    for other in (
        ModuleNotFoundError("No module named 'x'", name="x"),
        ImportError("cannot import name 'Y' from 'mteb'", name="mteb"),
    ):
        with pytest.raises(ImportError, match=str(other)) as raised:
            needs_extra(other, "This", packages=("mteb",), install="mteb")
        assert raised.value is other
