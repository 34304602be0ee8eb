"""The examples of docs/stores.md run, where their packages are."""

from __future__ import annotations

import ast
import logging
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.test_docs import hub  # noqa: F401 -- checkpoints under the names of the examples

PAGE = Path(__file__).parents[2] / "docs" / "stores.md"
COMMUNITY = {"FAISS": "faiss", "LanceDB": "lancedb"}
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:
        return True


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.split()[1])
def test_an_example_runs(code: str) -> None:
    nodes = list(ast.walk(ast.parse(code)))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    modules = {str(node.module) for node in imports} - {
        "langchain_bge.milvus",
        "llamaindex_bge.milvus",
    }
    modules |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    if "langchain_community.vectorstores" in modules:  # whose classes import their package late
        modules |= {package for name, package in COMMUNITY.items() if name in code}
    for module in sorted(modules):
        if is_missing(module):
            pytest.skip(f"{module} is not installed")
    if "langchain_milvus" in modules:
        from langchain_milvus.vectorstores import milvus

        if not hasattr(milvus, "_MilvusClientCollection"):
            pytest.skip("langchain-milvus 0.3.3 finds no connection with pymilvus 2.6.10 and later")
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(code, "example", "exec"), names)
    assert names.get("best", True)
