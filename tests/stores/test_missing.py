"""What is said where a store's package is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "absent", "command"),
    [
        ("langchain_bge.milvus", "langchain_milvus", "pip install langchain-milvus"),
        (
            "llamaindex_bge.milvus",
            "llama_index.vector_stores.milvus",
            "pip install llama-index-vector-stores-milvus",
        ),
    ],
)
def test_the_error_names_the_command(module: str, absent: str, command: str):
    code = (
        f"import sys\nsys.modules[{absent!r}] = None\n"
        "from bge_core import MissingExtraError\n"
        f"import {module.partition('.')[0]}\n"
        f"try:\n    import {module}\n"
        "except MissingExtraError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"needs {absent}, which is not installed: {command}\n" in done.stdout
