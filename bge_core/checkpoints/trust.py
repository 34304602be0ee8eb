"""What a checkpoint is not allowed to name: files elsewhere, and classes of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bge_core.checkpoints.files import read_json
from bge_core.errors import CheckpointError

if TYPE_CHECKING:
    from bge_core.checkpoints.metadata import Checkpoint

__all__ = ["reject_remote_classes"]

# Beside modules.json, the files in which sentence-transformers 5 finds names that it imports.
_NAMING_FILES = ("config.json", "router_config.json", "wordembedding_config.json")
# What it imports by name, and the package that it may be of.
_CLASSES = {
    "type": "sentence_transformers",
    "types": "sentence_transformers",
    "tokenizer_class": "sentence_transformers",
    "activation_function": "torch",
}


def reject_remote_classes(checkpoint: Checkpoint) -> None:
    """Refuse classes that sentence-transformers would import for a checkpoint nobody vouched for.

    Since its version 6 it refuses them itself; before, it imports them, those in the checkpoint's
    folder included.

    Raises:
        CheckpointError: A module or an activation is of neither sentence-transformers nor torch.
    """
    named = (path for path in checkpoint.folder.rglob("*") if path.name.lower() in _NAMING_FILES)
    for path in [checkpoint.folder / "modules.json", *sorted(named)]:
        for name, package in _named_classes(read_json(path)):
            if not name.startswith(f"{package}."):
                msg = (
                    f"{path} names {name!r}, Python code from elsewhere than {package}, which was "
                    "not run: it could do anything that you can. If you have read it and trust "
                    "it, pass trust_remote_code=True."
                )
                raise CheckpointError(msg)


def _named_classes(value: Any) -> Iterator[tuple[str, str]]:
    """Return the classes that a file's content names, and the package that each may be of."""
    for entry in value if isinstance(value, list) else [value]:
        for key, package in _CLASSES.items():
            named = entry.get(key) if isinstance(entry, dict) else None
            for name in named.values() if isinstance(named, dict) else [named]:
                if isinstance(name, str) and "." in name:  # without one, a name of transformers'
                    yield name, package
