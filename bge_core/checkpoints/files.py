"""Reading a checkpoint's JSON files, with errors that say what is wrong and where."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from bge_core.errors import CheckpointError

__all__ = ["JsonFile", "first_line", "leaves_folder", "read_json", "weight_files"]


def weight_files(folder: Path) -> list[Path]:
    """Give the files of a folder's weights, safetensors before pickles; empty if it has none."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


class JsonFile:
    """A JSON file's mapping, empty where there is no file.

    Raises:
        CheckpointError: The file is no JSON, or a value in it is not of the type that is needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        value = read_json(path) if path.is_file() else {}
        if not isinstance(value, dict):
            self.refuse(f"a mapping was expected, it has a {type(value).__name__}")
        self.values: dict[str, Any] = value

    def whole(self, key: str, default: int) -> int:
        """Give a whole number, or the default where there is none."""
        value = self.values.get(key)
        if value is None:
            return default
        # Some tokenizers write a float of 1e30 for "no limit".
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(f"{key} must be a number, it is {value!r:.60}")
        # Python's JSON has Infinity and NaN, too.
        return int(value) if math.isfinite(value) else default

    def refuse(self, why: str) -> NoReturn:
        """Say what is wrong with the file."""
        msg = f"{self.path} is damaged ({why}): fetch the checkpoint again."
        raise CheckpointError(msg)


def leaves_folder(folder: Path, path: str) -> bool:
    """Say whether a path, as any system would read it, is not in a folder."""
    inside = PurePosixPath(path.replace("\\", "/"))
    if inside.is_absolute() or ".." in inside.parts or re.match(r"[A-Za-z]:", path):
        return True
    place = folder / path
    try:
        place.exists()
        # Files may be links, as those of the hub's cache are; folders are none there.
        return not place.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return True


def read_json(path: Path) -> Any:
    """Read a JSON file, or say in a sentence why it can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as exc:
        msg = f"{path} is damaged ({first_line(exc)}): fetch the checkpoint again."
        raise CheckpointError(msg) from exc


def first_line(exc: BaseException) -> str:
    """Return an error's first line, shortened."""
    line = next(iter(str(exc).strip().splitlines()), type(exc).__name__)
    return line if len(line) <= 200 else f"{line[:200]}..."
