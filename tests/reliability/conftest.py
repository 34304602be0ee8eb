"""What the reliability tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def script() -> Script:
    """Run Python code in a process of its own, its capitals replaced by what is given."""

    def run(code: str, *, timeout: float = 120, env: dict[str, str] | None = None, **given: object):
        code = textwrap.dedent(code)
        for name, value in given.items():
            code = code.replace(name, repr(str(value)))
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, **(env or {})},
        )

    return run
