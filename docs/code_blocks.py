"""The Python blocks of the README and the guides, and what they print: for tests and type checks.

`python docs/code_blocks.py FOLDER` writes each into a file of its own, named after page and line.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One example.

    Attributes:
        page: Where it is from.
        line: The first of its code there, from 1.
        code: All of it.
        printed: The text block directly below it, which is what it prints; None without one.
    """

    page: Path
    line: int
    code: str
    printed: str | None


def blocks() -> Iterator[Block]:
    """Read every page's blocks, in order."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            line = text[: match.start()].count("\n") + 2
            yield Block(page, line, match["code"], match["printed"])


def main(folder: Path) -> None:
    """Write the blocks into a folder, which is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for block in blocks():
        name = re.sub(r"\W", "_", block.page.relative_to(ROOT).with_suffix("").as_posix())
        (folder / f"{name}_line_{block.line}.py").write_text(block.code, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
