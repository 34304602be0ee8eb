"""What the package exports, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import llamaindex_bge

ROOT = Path(llamaindex_bge.__file__).parents[1]


def run_python(code: str) -> str:
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
    expected = ["BGEEmbedding", "BGEReranker", "BGESparseEmbedding", "__version__"]
    assert sorted(llamaindex_bge.__all__) == llamaindex_bge.__all__ == expected
    assert all(hasattr(llamaindex_bge, name) for name in expected)


def test_version():
    try:
        expected = version("bge-adapters")
    except PackageNotFoundError:
        expected = "0+unknown"
    assert llamaindex_bge.__version__ == expected


def test_typed():
    assert (Path(llamaindex_bge.__file__).parent / "py.typed").is_file()


def test_importing_and_constructing_loads_nothing_heavy():
    heavy = run_python(
        "import sys, llamaindex_bge\n"
        "model = llamaindex_bge.BGEEmbedding(model_name='BAAI/bge-small-en-v1.5')\n"
        "llamaindex_bge.BGEReranker(model='BAAI/bge-reranker-base')\n"
        "llamaindex_bge.BGESparseEmbedding(model_name='BAAI/bge-m3')\n"
        "model.to_payload(), repr(model)\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers'}\n"
        "heavy |= {'langchain', 'langchain_core', 'langchain_classic', 'langchain_bge'}\n"
        "heavy |= {'qdrant_client'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert heavy.strip() == "[]"


def test_missing_llama_index_core_names_the_command():
    said = run_python(
        "import sys\n"
        "sys.modules['llama_index'] = None\n"
        "from bge_core import MissingExtraError\n"
        "try:\n"
        "    import llamaindex_bge.reranker\n"
        "except MissingExtraError as error:\n"
        "    print(isinstance(error, ImportError), error)"
    )
    assert said.startswith("True ")
    assert "pip install 'bge-adapters[llamaindex]'" in said


def test_another_missing_module_is_not_called_an_extra():
    said = run_python(
        "import sys\n"
        "sys.modules['pydantic'] = None\n"
        "try:\n"
        "    import llamaindex_bge\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error.name)"
    )
    assert said.strip() == "ModuleNotFoundError pydantic"
