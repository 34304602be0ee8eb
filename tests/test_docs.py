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
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bge_core import doctor, supported_models

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


BLOCKS = runpy.run_path(str(ROOT / "docs" / "code_blocks.py"))["blocks"]()
EXAMPLES = [
    pytest.param(block, id=f"{block.page.name}:{block.line}")
    for block in BLOCKS
    # tests/stores/test_page.py has the stores' packages.
    if block.page.name != "stores.md"
    # A cluster opens sockets: test_ray.py runs it in a process of its own.
    and not (block.page.name == "scale.md" and "bge_core.ray" in block.code)
]


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


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, stand_in_folder: Path) -> dict[str, Path]:
    """Real, small models for the examples whose output depends on what a model knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        made = runpy.run_path(str(ROOT / "examples" / "stand_in.py"))
        return {
            "bge-small-en-v1.5": stand_in_folder,
            "bge-reranker-base": made["reranker_folder"](),
        }


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
@pytest.mark.parametrize("block", EXAMPLES)
def test_an_example_of_the_pages_runs_and_prints_what_stands_below_it(
    block: Any,
    retrieval_task: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if "import mteb\n" in block.code:  # its tasks are on the hub
        monkeypatch.setattr("mteb.get_tasks", lambda tasks: [retrieval_task(*tasks)])
    if block.printed:
        for name, folder in request.getfixturevalue("stand_ins").items():
            snapshot = Path("hub", f"models--BAAI--{name}", "snapshots", "0123456789abcdef")
            shutil.rmtree(snapshot)
            shutil.copytree(folder, snapshot)
    exec(compile(block.code, "example", "exec"), {"__name__": "__main__"})
    if block.printed:
        printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert printed == block.printed.splitlines()


def test_the_readme_shows_what_its_examples_print() -> None:
    shown: list[Any] = [one.values[0] for one in EXAMPLES]
    shown = [block for block in shown if block.page == README]
    assert len(shown) >= 3
    assert all(block.printed for block in shown)


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


def test_every_link_of_the_readme_is_absolute_on_pypi() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hook = settings["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = here = README.read_text(encoding="utf-8")
    for change in hook["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    address = "https://github.com/bge-adapters/bge-adapters/blob/v$HFPR_VERSION/"
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", text)
    assert len(links) > 10
    for picture, target in links:
        if not target.startswith(address):
            assert target.startswith("https://"), target
        else:
            assert target.endswith("?raw=true") == bool(picture), target
    code = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    assert code.findall(text) == code.findall(here)


def test_the_page_of_models_is_what_the_catalogue_says() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:bge|llm)-.*) \|$", page, re.MULTILINE)
    shown = {name: facts for name, *facts in (row.split(" | ") for row in rows)}
    known = {
        row.id.removeprefix("BAAI/"): [
            row.kind,
            str(row.dimension or ""),
            f"{row.max_length:,}",
            ", ".join(row.languages),
            row.licence,
        ]
        for row in supported_models()
    }
    sizes = [facts.pop(1) for facts in shown.values()]
    assert shown == known
    assert all(re.fullmatch(r"\d+(\.\d)?[MB]", size) for size in sizes)


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
