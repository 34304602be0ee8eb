"""Every Python example of the README, the guides and the docstrings runs.

The hub is a cache folder with tiny checkpoints under the names that the examples use.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import runpy
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bge_core import doctor

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))
MODULES = (
    "bge_core.checkpoints.catalog",
    "bge_core.embedder",
    "bge_core.engine.stats",
    "bge_core.prompts",
    "bge_core.m3",
    "bge_core.mteb",
    "bge_core.scale.steps",
    "bge_core.servers.models",
    "bge_core.reranker",
    "bge_core.factory",
    "langchain_bge.cross_encoder",
    "langchain_bge.embeddings",
    "langchain_bge.reranker",
    "langchain_bge.sparse",
    "llamaindex_bge.embedding",
    "llamaindex_bge.reranker",
    "llamaindex_bge.sparse",
)


def examples() -> list[object]:
    found: list[object] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if page == README and "bge_core.ray" in match.group(1):
                continue  # a cluster opens sockets: test_ray.py runs it in a process of its own
            line = text[: match.start()].count("\n") + 2
            found.append(pytest.param(match.group(1), id=f"{page.name}:{line}"))
    return found


@pytest.fixture(autouse=True)
def hub(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    en_folder: Path,
    m3_folder: Path,
    reranker_folder: Path,
    icl_folder: Path,
    gemma_reranker_folder: Path,
) -> None:
    """Put checkpoints into a hub cache, as a download would."""
    for folder in (en_folder, m3_folder, reranker_folder, icl_folder, gemma_reranker_folder):
        repo = tmp_path / "hub" / f"models--BAAI--{folder.name}"
        shutil.copytree(folder, repo / "snapshots" / "0123456789abcdef")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0123456789abcdef")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
@pytest.mark.parametrize("code", examples())
def test_an_example_of_the_pages_runs(
    code: str, retrieval_task: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "import mteb\n" in code:  # its tasks are on the hub
        monkeypatch.setattr("mteb.get_tasks", lambda tasks: [retrieval_task(*tasks)])
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})


def test_the_readme_s_commands_for_a_report_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text(encoding="utf-8")
    commands = re.findall(r"^python -m bge_core\.doctor\b([^#\n]*)", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        code = doctor.main(shlex.split(command))
        assert code == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted(ROOT.glob("[A-Z]*.md"))], ids=lambda page: page.name
)
def test_a_page_s_links_and_file_names_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
    folders = ("bge_core", "langchain_bge", "tests", "examples", "benchmarks", "docs", "training")
    files = [file.as_posix() for folder in folders for file in (ROOT / folder).rglob("*.py")]
    for name in re.findall(r"`([\w/]+\.py)\b", text):
        assert any(file.endswith(f"/{name}") for file in files), name


@pytest.mark.parametrize(
    "package", ["bge_core", "bge_core.mteb", "bge_core.ray", "langchain_bge", "llamaindex_bge"]
)
def test_the_api_reference_has_every_public_name(package: str) -> None:
    page = ROOT / "docs" / "api" / f"{package.partition('.')[0]}.md"
    text = page.read_text(encoding="utf-8")
    named = re.findall(rf"^::: {re.escape(package)}\.(\w+)$", text, re.MULTILINE)
    named += re.findall(rf"`{re.escape(package)}\.(__version__)`", text)
    # A module there, such as `testing`, is shown with all that is in it.
    named = [name for name in named if not (ROOT / package / f"{name}.py").exists()]
    assert sorted(named) == sorted(importlib.import_module(package).__all__)


def messages() -> list[str]:
    """Every string of the code, its docstrings left out, with … where a value stands."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        return str(node.value) if isinstance(node, ast.Constant) else "…"

    found = []
    for package in ("bge_core", "langchain_bge", "llamaindex_bge"):
        for file in (ROOT / package).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
            alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            found += [
                text(node)
                for node in nodes
                if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in alone
            ]
    return found


def test_each_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (.*)$", page, re.MULTILINE)
    assert len(headings) > 40
    said = "\n".join(messages())
    stale = []
    for heading in headings:
        parts = re.fullmatch(r"`(.{15,})`", heading)
        words = [part for part in parts[1].split("…") if part.strip()] if parts else [heading]
        pattern = "[^\n]*?".join(re.escape(part) for part in words)
        if not re.search(pattern, said):
            stale.append(heading)
    assert not stale, "\n".join(stale)


def test_the_picture_of_the_imports_is_drawn_from_them() -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "draw_imports.py"))["draw"]
    picture = (ROOT / "docs" / "imports.svg").read_text(encoding="utf-8")
    assert picture == draw(), "run python docs/draw_imports.py"


@pytest.mark.parametrize("name", MODULES)
def test_a_docstring_s_example_runs(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0
