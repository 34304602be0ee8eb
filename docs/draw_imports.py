"""Draw docs/imports.svg: which part of the code imports which, from the imports themselves.

Rows are the layers that `make lint` holds (pyproject.toml). A line from a box to one below it is
an import; what follows from two other lines is left out. A test fails when the picture is stale.

Example:
    python docs/draw_imports.py
"""

from __future__ import annotations

import ast
import re
import tomllib
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "imports.svg"
HOSTS = ("langchain_bge", "llamaindex_bge")
STYLE = """<style>
rect { stroke: #555 } .host { fill: #ffe9c7 } .folder { fill: #d5e8fb } .module { fill: #f4f4f4 }
.line { fill: none; stroke: #888 } text { font: 13px monospace; text-anchor: middle; fill: #111 }
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7"
orient="auto"><path d="M0 0L8 4L0 8z" fill="#888"/></marker></defs>"""
WIDTH, ROW, BOX, HEIGHT = 760, 62, 128, 30


def layers() -> list[list[str]]:
    """Give the parts, the topmost row first, as the contract of the layers names them."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = config["tool"]["importlinter"]["contracts"]
    (contract,) = (each for each in contracts if each.get("containers") == ["bge_core"])
    rows = [re.findall(r"\w+", row) for row in contract["layers"]]
    there = [[name for name in row if _path(name).exists()] for row in rows]
    return [list(HOSTS), *(row for row in there if row)]


def imports(parts: list[str]) -> set[tuple[str, str]]:
    """Give the pairs of parts of which the first imports the second."""
    found = set()
    for part in parts:
        path = _path(part)
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            for name in _imported(file):
                top, _, rest = name.partition(".")
                other = rest.partition(".")[0] if top == "bge_core" else ""
                if other in parts and other != part:
                    found.add((part, other))
    return found


def reduced(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Leave out the pairs that follow from others."""
    reach = set(edges)
    while more := {(a, d) for (a, b), (c, d) in product(reach, reach) if b == c} - reach:
        reach |= more
    between = {c for _, c in edges}
    return {
        (a, b)
        for a, b in edges
        if not any((a, c) in reach and (c, b) in reach for c in between - {a, b})
    }


def draw() -> str:
    """Give the picture as SVG."""
    rows = layers()
    place = {
        name: (WIDTH * (column + 0.5) / len(row), 24 + ROW * number)
        for number, row in enumerate(rows)
        for column, name in enumerate(row)
    }
    lines = []
    for upper, lower in sorted(reduced(imports(list(place)))):
        (x1, y1), (x2, y2) = place[upper], place[lower]
        y1, y2 = y1 + HEIGHT, y2 - 5
        middle = (y1 + y2) / 2
        curve = f"M{x1:.0f} {y1:.0f} C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
        lines.append(f'<path class="line" d="{curve}" marker-end="url(#tip)"/>')
    boxes = []
    for name, (x, y) in place.items():
        kind = "host" if name in HOSTS else "folder" if _path(name).is_dir() else "module"
        label = name if name in HOSTS else f"{name}/" if kind == "folder" else f"{name}.py"
        boxes.append(
            f'<rect class="{kind}" x="{x - BOX / 2:.0f}" y="{y:.0f}" width="{BOX}" '
            f'height="{HEIGHT}" rx="5"/><text x="{x:.0f}" y="{y + 20:.0f}">{label}</text>'
        )
    height = 24 + ROW * len(rows)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            "<title>Which part imports which</title>",
            STYLE,
            f'<rect width="{WIDTH}" height="{height}" style="fill:#fff;stroke:none"/>',
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


def _path(part: str) -> Path:
    if part in HOSTS:
        return ROOT / part
    folder = ROOT / "bge_core" / part
    return folder if folder.is_dir() else folder.with_suffix(".py")


def _imported(file: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    # What an adapter imports from the core's front door stands where it is written.
    return names + [_home(name) for name in names if name.startswith("bge_core.")]


def _home(name: str) -> str:
    """Follow a name of `bge_core` itself to the module that it is from."""
    front = ast.parse((ROOT / "bge_core" / "__init__.py").read_text(encoding="utf-8"))
    for node in ast.walk(front):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if name == f"bge_core.{alias.name}":
                    return node.module
    return name


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
