"""What the package exports, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import langchain_bge

ROOT = Path(langchain_bge.__file__).parents[1]

EXPECTED_ALL = [
    "BGECrossEncoder",
    "BGEEmbeddings",
    "BGEReranker",
    "BGESparseEmbeddings",
    "__version__",
]


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all():
    assert sorted(langchain_bge.__all__) == langchain_bge.__all__ == EXPECTED_ALL
    assert all(hasattr(langchain_bge, name) for name in EXPECTED_ALL)


def test_version():
    assert langchain_bge.__version__[0].isdigit()


def test_typed():
    assert (Path(langchain_bge.__file__).parent / "py.typed").is_file()


def test_importing_and_constructing_loads_nothing_heavy():
    heavy = _python(
        "import sys, langchain_bge\n"
        "langchain_bge.BGEEmbeddings(model='BAAI/bge-small-en-v1.5')\n"
        "langchain_bge.BGEReranker(model='BAAI/bge-reranker-base')\n"
        "langchain_bge.BGECrossEncoder(model='BAAI/bge-reranker-base')\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'llama_index'}\n"
        "heavy |= {'langchain', 'langchain_classic', 'langchain_community'}\n"
        "heavy |= {'langchain_qdrant', 'qdrant_client'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "langchain_bge.BGESparseEmbeddings(model='BAAI/bge-m3')\n"
        "print('langchain_qdrant' in sys.modules, 'torch' in sys.modules)"
    )
    assert heavy.split("\n") == ["[]", "True False", ""]


def test_missing_langchain_qdrant_names_the_command():
    said = _python(
        "import sys\n"
        "sys.modules['langchain_qdrant'] = None\n"
        "import langchain_bge\n"
        "try:\n"
        "    langchain_bge.BGESparseEmbeddings\n"
        "except langchain_bge.MissingExtraError as error:\n"
        "    print(isinstance(error, ImportError), error)"
    )
    assert said.startswith("True ")
    assert "pip install langchain-qdrant" in said


def test_star_import_and_dir_without_langchain_qdrant():
    said = _python(
        "import sys\n"
        "sys.modules['langchain_qdrant'] = None\n"
        "from langchain_bge import *\n"
        "print(BGEEmbeddings.__name__, 'BGESparseEmbeddings' in globals())"
    )
    assert said.strip() == "BGEEmbeddings False"


def test_lazy_names_are_in_dir():
    said = _python(
        "import langchain_bge\n"
        "print('BGESparseEmbeddings' in dir(langchain_bge), '__all__' in dir(langchain_bge))\n"
        "from langchain_bge import *\n"
        "print(BGESparseEmbeddings.__name__)"
    )
    assert said.split() == ["True", "True", "BGESparseEmbeddings"]


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(langchain_bge, "BGESparse")


def test_missing_langchain_core_names_the_command():
    said = _python(
        "import sys\n"
        "sys.modules['langchain_core'] = None\n"
        "from bge_core import MissingExtraError\n"
        "try:\n"
        "    import langchain_bge.reranker\n"
        "except MissingExtraError as error:\n"
        "    print(isinstance(error, ImportError), error)"
    )
    assert said.startswith("True ")
    assert "pip install 'bge-adapters[langchain]'" in said


def test_another_missing_module_is_not_called_an_extra():
    said = _python(
        "import sys\n"
        "sys.modules['langchain_bge._fields'] = None\n"
        "try:\n"
        "    import langchain_bge\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__)"
    )
    assert said.strip() == "ModuleNotFoundError"
