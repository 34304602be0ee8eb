"""What the commands of this package share: quiet logs, and a sentence in place of a traceback."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from bge_core.errors import ArgumentError, BGEError

__all__ = ["check_writable", "run_command"]


def run_command(work: Callable[[], None]) -> int:
    """Do a command's work.

    Args:
        work: The work; an error of this package is written to stderr as its sentence alone.

    Returns:
        The exit code: 0 if all is well, 1 if something was missing, which is then said.
    """
    logging.getLogger("bge_core").setLevel(logging.ERROR)
    try:
        work()
    except BGEError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


def check_writable(file: Path, option: str) -> None:
    """Refuse a place for results before they are computed.

    Args:
        file: The file to write.
        option: What it was given as, for the message.

    Raises:
        ArgumentError: Its folder is missing, or it is a folder itself.
    """
    if file.is_dir() or not file.parent.is_dir():
        why = "it is a folder" if file.is_dir() else f"there is no folder {file.parent}"
        msg = f"{option}={file} can't be written, since {why}: name a file in a known folder."
        raise ArgumentError(msg)
