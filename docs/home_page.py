"""Make the README the documentation's first page: a hook of mkdocs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: object) -> str:
    """Give index.md the README's text, with its links made right for the site."""
    source = f"{config.repo_url}/blob/main/"
    if page.file.src_uri != "index.md":
        return re.sub(r"\]\(((?:\.\./)+)(?!api|decisions)([A-Za-z])", rf"]({source}\2", markdown)
    text = Path("README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?!http)(docs/)?", lambda m: "](" if m[1] else f"]({source}", text)
