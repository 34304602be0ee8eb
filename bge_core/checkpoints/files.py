"""Reading a checkpoint's files, with errors that say what is wrong, where, and what mends it."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from bge_core.errors import CheckpointError

__all__ = [
    "JsonFile",
    "check_files",
    "first_line",
    "leaves_folder",
    "other_weights",
    "read_json",
    "unreadable_error",
    "variant_of",
    "weight_files",
]

# What transformers loads, first come first served: a file with all of the weights, or the index of
# files with a part each. Without the shards an index is left over from another format.
_FORMATS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# One file of another number format, as `save_pretrained(variant="fp16")` names it.
_VARIANT = re.compile(r"(?:model\.([\w-]+)\.safetensors|pytorch_model\.([\w-]+)\.bin)")
_SERVED = "pass endpoint='...' of such a server"
# What there may be in their place, and what to do with it.
_OTHER_FORMATS = {
    ".onnx": ("ONNX, which onnxruntime, optimum or text-embeddings-inference serve", _SERVED),
    ".gguf": ("GGUF, which llama.cpp and Ollama serve", _SERVED),
    ".h5": (
        "TensorFlow's, which transformers 4 reads with from_pretrained(folder, from_tf=True)",
        "save them from there with save_pretrained(folder)",
    ),
    ".msgpack": (
        "Flax's, which transformers 4 reads with from_pretrained(folder, from_flax=True)",
        "save them from there with save_pretrained(folder)",
    ),
    ".ot": ("rust-bert's, which rust-bert runs", "use it there"),
    ".tflite": ("TensorFlow Lite's, which LiteRT runs", "use it there"),
    ".mlpackage": ("CoreML's, which Apple's devices run", "use it there"),
    ".mlmodel": ("CoreML's, which Apple's devices run", "use it there"),
    ".xml": ("OpenVINO's, which optimum-intel serves", _SERVED),
}
_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_BYTES = 1 << 26
_MOST_NESTED = 100


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder's weights, safetensors before pickles; empty if it has none.

    Where there are none under transformers' usual names, a single variant of them counts.

    Raises:
        CheckpointError: The index of the format that is there is damaged, or names a file that
            leaves the folder or is missing.
    """
    missing: str | None = None
    for whole, index in _FORMATS:
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            names = _shards(folder / index)
            lacking = [name for name in names if not (folder / name).is_file()]
            if not lacking:
                return [folder / name for name in names]
            missing = missing or lacking[0]
    if missing is not None:
        msg = f"{folder} lacks {missing}, a part of the weights: fetch the checkpoint again."
        raise CheckpointError(msg)
    variants = _variants(folder)
    return variants if len(variants) == 1 else []


def variant_of(file: Path) -> str | None:
    """Return what a file of weights is a variant of, such as `"fp16"`; None for the usual name."""
    found = _VARIANT.fullmatch(file.name)
    return found and (found[1] or found[2])


def _variants(folder: Path) -> list[Path]:
    """Return the variants of one format, safetensors before pickles."""
    for suffix in (".safetensors", ".bin"):
        files = [path for path in folder.glob(f"*model.*{suffix}") if path.is_file()]
        if found := sorted(path for path in files if variant_of(path)):
            return found
    return []


def other_weights(folder: Path, *names: str) -> str:
    """Return what a folder without weights has instead, as a sentence; empty for nothing.

    Args:
        folder: The folder.
        names: What is looked at in it; none for all that may be weights.
    """
    if not names and (variants := _variants(folder)):
        which = ", ".join(path.name for path in variants)
        first = variants[0]
        usual = f"model{first.suffix}" if first.suffix == ".safetensors" else "pytorch_model.bin"
        return (
            f". It has several variants of them ({which}): rename the one that you want to {usual}."
        )
    patterns = names or ("*", "onnx/*", "openvino/*", "coreml/*", "coreml/*/*", "tflite/*")
    found = {path.suffix.lower() for name in patterns for path in folder.glob(name)}
    for suffix, (said, remedy) in _OTHER_FORMATS.items():
        if suffix in found:
            return (
                f". Its weights are {said}: {remedy}, or fetch the checkpoint's model.safetensors."
            )
    return ""


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

    def whole(self, key: str, default: int, *, least: int | None = None) -> int:
        """Return a whole number, or the default where there is none.

        Args:
            key: Its name.
            default: What is given for null, and for infinity or what is as good as that.
            least: Less is refused, as is what is too big for a tensor's size; None for any number.
        """
        value = self.values.get(key)
        if value is None:
            return default
        # Some tokenizers write a float of 1e30 for "no limit".
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(f"{key} must be a number, it is {value!r:.60}")
        # Python's JSON has Infinity and NaN, too.
        if not math.isfinite(value):
            return default
        if least is not None and not least <= value < 1 << 31:
            self.refuse(f"{key} must be {least} or more and no more than 2^31, it is {value!r:.60}")
        return int(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """Return a mapping, empty where there is none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(f"{key} must be a mapping, it is {value!r:.60}")
        return value or {}

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return true or false, or the default where there is neither."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(f"{key} must be true or false, it is {value!r:.60}")
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        """Return a number, or the default where there is none."""
        value = self.values.get(key)
        if value is None:
            return float(default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(f"{key} must be a number, it is {value!r:.60}")
        return float(value)

    def refuse(self, why: str) -> NoReturn:
        """Raise the error that says what is wrong with the file."""
        msg = f"{self.path} is damaged ({why}): fetch the checkpoint again."
        raise CheckpointError(msg)


def check_files(folder: Path) -> None:
    """Refuse what is in a checkpoint's folder and is not the file that its name says.

    Raises:
        CheckpointError: A pointer of Git LFS in a file's place, or a pipe, a socket or a device,
            which nobody may open: one might wait for ever.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as exc:
        raise unreadable_error(folder, exc) from exc
    for path in entries:
        try:
            status = path.stat()
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                msg = (
                    f"{path} is a pipe, a socket or a device, and no file: take it away, and fetch "
                    "the checkpoint again if it lacks that file."
                )
                raise CheckpointError(msg)
            # They are of some 130 bytes.
            if stat.S_ISREG(status.st_mode) and len(_POINTER) < status.st_size < 1024:
                with path.open("rb") as file:
                    pointer = file.read(len(_POINTER)) == _POINTER
                if pointer:
                    msg = (
                        f"{path} is a pointer of Git LFS and not the file itself: run git lfs "
                        "install and git lfs pull in the repository, or fetch the checkpoint with "
                        "hf download."
                    )
                    raise CheckpointError(msg)
        except OSError:  # a link to nothing, or one that nobody may read: said when it is needed
            continue


def leaves_folder(folder: Path, path: str) -> bool:
    """Return whether a path, as any system would read it, is not in a folder."""
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
        if path.stat().st_size > _MOST_BYTES:
            msg = f"{path} is damaged (it has more than 64 MiB): fetch the checkpoint again."
            raise CheckpointError(msg)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise unreadable_error(path, exc) from exc
    except (ValueError, RecursionError) as exc:
        msg = f"{path} is damaged ({first_line(exc)}): fetch the checkpoint again."
        raise CheckpointError(msg) from exc
    if _is_nested(value):
        msg = f"{path} is damaged (it nests {_MOST_NESTED} times): fetch the checkpoint again."
        raise CheckpointError(msg)
    return value


def unreadable_error(path: Path, exc: OSError) -> CheckpointError:
    """Return the error that says that the system doesn't let a file be read."""
    msg = (
        f"{path} can't be read ({exc.strerror or first_line(exc)}): check that this user may read "
        "it, and that its disk is there and sound."
    )
    return CheckpointError(msg)


def first_line(exc: BaseException) -> str:
    """Return an error's first line, shortened."""
    line = next(iter(str(exc).strip().splitlines()), type(exc).__name__)
    line = line.encode(errors="backslashreplace").decode()  # a lone surrogate can't be printed
    return line if len(line) <= 200 else f"{line[:200]}..."


def _shards(index: Path) -> list[str]:
    """Return the files that an index of weights names."""
    file = JsonFile(index)
    named = file.mapping("weight_map").values()
    if not named or not all(isinstance(name, str) for name in named):
        file.refuse("weight_map must map tensors to files")
    names = sorted(set(named))
    for name in names:
        if PurePosixPath(name.replace("\\", "/")).name != name or ":" in name:
            msg = (
                f"{index} names the file {name!r}, which leaves the checkpoint's folder: "
                "such a checkpoint is refused."
            )
            raise CheckpointError(msg)
    return names


def _is_nested(value: Any) -> bool:
    """Return whether lists and mappings nest deeper than any that somebody wrote."""
    level = [value]
    for _ in range(_MOST_NESTED):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
