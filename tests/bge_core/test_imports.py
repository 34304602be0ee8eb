import inspect
import pkgutil
import subprocess
import sys
from importlib.metadata import version

import pytest

import bge_core


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names_are_these():
    assert sorted(bge_core.__all__) == [
        "ArgumentError",
        "BGEError",
        "CheckpointError",
        "ClosedError",
        "ComputationError",
        "Embedder",
        "EndpointError",
        "InputTypeError",
        "M3Embedder",
        "M3Outputs",
        "M3Reranker",
        "M3Weights",
        "MissingExtraError",
        "ModelStats",
        "PairPrompt",
        "Profile",
        "QueryExample",
        "Ranked",
        "RemoteEmbedder",
        "RemoteReranker",
        "Reranker",
        "Scorer",
        "TruncationError",
        "make_embedder",
        "make_reranker",
        "make_scorer",
        "register",
        "supported_models",
    ]


@pytest.mark.parametrize("name", bge_core.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert inspect.getdoc(getattr(bge_core, name))


@pytest.mark.parametrize(
    ("error", "built_in"),
    [
        (bge_core.ArgumentError, ValueError),
        (bge_core.InputTypeError, TypeError),
        (bge_core.CheckpointError, ValueError),
        (bge_core.MissingExtraError, ImportError),
        (bge_core.ClosedError, RuntimeError),
        (bge_core.ComputationError, RuntimeError),
        (bge_core.EndpointError, ConnectionError),
        (bge_core.TruncationError, ValueError),
    ],
)
def test_every_error_is_a_bge_error_and_the_built_in_a_caller_expects(error, built_in):
    assert issubclass(error, bge_core.BGEError)
    assert issubclass(error, built_in)


HEAVY = (
    "import sys; heavy = {'torch', 'transformers', 'sentence_transformers', 'tokenizers', "
    "'huggingface_hub', 'httpx', 'langchain_core', 'llama_index', 'mteb'}; "
    "print(sorted(heavy & set(sys.modules)))"
)


SERVED = "'BAAI/bge-m3', endpoint='http://localhost'"


def test_importing_loads_neither_torch_nor_transformers():
    assert run_python(f"import bge_core; {HEAVY}") == "[]"


def light_modules() -> list[str]:
    """Every module but those inside the two folders that compute."""
    names = [module.name for module in pkgutil.walk_packages(bge_core.__path__, "bge_core.")]
    computing = ("bge_core.backends.", "bge_core.engine.")
    return [name for name in names if not name.startswith(computing)]


def test_importing_any_package_or_module_of_facts_loads_neither_torch_nor_transformers():
    names = light_modules()
    assert {"bge_core.backends", "bge_core.engine", "bge_core.checkpoints.metadata"} <= set(names)
    code = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    loaded = {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)\n"
        "    assert not loaded, (name, loaded)"
    )
    run_python(code)


def test_making_an_embedder_and_a_reranker_loads_neither_torch_nor_transformers(
    en_folder, reranker_folder, m3_folder
):
    made = f"Embedder({str(en_folder)!r}); Reranker({str(reranker_folder)!r})"
    made += f"; M3Embedder({str(m3_folder)!r}, share_outputs=True); make_scorer({str(m3_folder)!r})"
    made += f"; make_embedder({SERVED})"
    assert run_python(f"from bge_core import *; {made}; {HEAVY}") == "[]"


def test_without_mteb_a_sentence_says_what_to_install():
    code = (
        "import sys; sys.modules['mteb'] = None\n"
        "from bge_core import MissingExtraError\n"
        "try:\n    import bge_core.mteb\n"
        "except MissingExtraError as error:\n    print(error)"
    )
    assert "pip install 'bge-adapters[mteb]'" in run_python(code)


@pytest.mark.parametrize(
    "cls",
    [
        bge_core.Embedder,
        bge_core.M3Embedder,
        bge_core.RemoteEmbedder,
        bge_core.RemoteReranker,
        bge_core.Reranker,
        bge_core.make_embedder,
        bge_core.make_reranker,
        bge_core.make_scorer,
    ],
)
def test_everything_but_the_model_is_keyword_only_and_named(cls):
    first, *rest = inspect.signature(cls).parameters.values()
    assert first.name == "model"
    assert {parameter.kind for parameter in rest} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    "cls",
    [
        bge_core.Embedder,
        bge_core.M3Embedder,
        bge_core.RemoteEmbedder,
        bge_core.RemoteReranker,
        bge_core.Reranker,
        bge_core.make_embedder,
        bge_core.make_reranker,
        bge_core.make_scorer,
    ],
)
def test_an_unknown_argument_is_refused(cls, en_folder):
    with pytest.raises(TypeError, match="batch_size"):
        cls(en_folder, batch_size=8)


def test_the_first_vector_comes_without_transformers_modelling_code(en_folder):
    """Importing that takes longer than all the rest together."""
    unwanted = ["transformers.modeling_utils", "sentence_transformers"]
    if not version("transformers").startswith("4."):
        # AutoTokenizer of transformers 4 imports its text generation, which imports these.
        unwanted += ["torch._dynamo", "scipy"]
    code = (
        f"from bge_core import Embedder; Embedder({str(en_folder)!r}).embed_queries(['panda']); "
        f"import sys; print([n for n in {unwanted} if n in sys.modules])"
    )
    assert run_python(code) == "[]"
