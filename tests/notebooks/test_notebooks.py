"""The notebooks run from their first cell to their last, and show what is stored in them."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"

pytestmark = [pytest.mark.enable_socket, pytest.mark.filterwarnings("default")]


def shown(cell):
    """What a cell prints and returns, without its progress bars."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif output.output_type == "execute_result":
            parts.append(output.data["text/plain"])
    return "".join(parts)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_has_stored(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    stored = nbformat.read(path, as_version=4)
    fresh = copy.deepcopy(stored)
    install, *_ = code_cells(fresh)
    assert install.source.startswith("%pip install")
    install.source = "pass"  # what it installs is installed
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(fresh, timeout=900, kernel_name="python3", resources=folder).execute()
    for cell, kept in zip(code_cells(fresh), code_cells(stored), strict=True):
        assert shown(cell) == shown(kept), kept.source
    outputs = [output for cell in code_cells(fresh) for output in cell.outputs]
    bars = [output for output in outputs if WIDGET in output.get("data", {})]
    assert bars, "no progress bar is a widget"
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "\x1b" not in printed
    assert "\r" not in printed
    assert "it/s" not in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_its_outputs_and_nothing_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    assert sum(bool(shown(cell)) for cell in code_cells(notebook)) >= 6
    for own in (str(ROOT), f"{Path.home()}/", sys.prefix, "/tmp/", "site-packages"):
        assert own not in text
    assert not re.search(r"\d ?ms\b|it/s|\d seconds", text)
