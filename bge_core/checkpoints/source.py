"""A hub id or a folder, as the user wrote it, and the folder that holds its files."""

from __future__ import annotations

import difflib
import errno
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bge_core import arguments
from bge_core.arguments import shown
from bge_core.checkpoints.catalog import (
    PROFILES,
    Profile,
    find_profile,
    is_hub_id,
    registered_profiles,
    restore_profiles,
)
from bge_core.checkpoints.files import first_line, other_weights
from bge_core.errors import ArgumentError, CheckpointError, InputTypeError

__all__ = ["Source", "cached_folder", "check_name", "locate"]

logger = logging.getLogger(__name__)

# No space left, file too large, quota exceeded.
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_SMALL = ("*.json", "*.txt", "*.model")
_WANTED = (*_SMALL, "*.safetensors", "*.pt", "*.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a checkpoint comes from, as the user wrote it.

    Attributes:
        model: A hub id or a folder.
        revision: A branch, tag or commit on the hub; None for its default.
        cache_folder: The hub's cache; None for the usual one (`HF_HOME`).
        local_files_only: Never go to the network.
        trust_remote_code: Run Python code that the checkpoint carries.
        token: A hub token, kept out of every message.
    """

    model: str
    revision: str | None = None
    cache_folder: str | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    token: str | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_folder: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        token: str | None = None,
    ) -> Source:
        """Check the model's name and make a source of it.

        Raises:
            ArgumentError: A value that is not supported.
            InputTypeError: A value of the wrong type.
            CheckpointError: It looks like a folder and is none, or it can't be a hub id.
        """
        name = os.fspath(check_name(model))
        folder = Path(os.path.expanduser(name))  # noqa: PTH111 -- Path's raises where there is no home
        if name and _is_folder(folder):
            # Absolute, so that "." has a name to be known by and a later chdir changes nothing.
            name = os.path.abspath(folder)  # noqa: PTH100 -- resolve() would follow the cache's links
        elif isinstance(model, os.PathLike) or not is_hub_id(name):
            is_file = _is_file(folder)
            hint = other_weights(folder.parent, folder.name) if is_file else ""
            said = shown(name, most=500)  # a path is long
            msg = (
                f"model={said} is {'a file, ' if is_file else ''}no folder on this machine and "
                "no hub id: pass a folder with config.json, or an id such as "
                f"'BAAI/bge-small-en-v1.5'{hint or '.'}"
            )
            raise CheckpointError(msg)
        elif "/" not in name and (profile := find_profile(name)) and profile.id != name:
            msg = f"model={name!r} is no folder here and no hub id: did you mean {profile.id!r}?"
            raise CheckpointError(msg)
        if revision is not None:
            revision = arguments.text("revision", revision)
        if token is not None:
            token = arguments.secret("token", token)
        return cls(
            model=name,
            revision=revision,
            cache_folder=None if cache_folder is None else _folder_name(cache_folder),
            local_files_only=arguments.flag("local_files_only", local_files_only),
            trust_remote_code=arguments.flag("trust_remote_code", trust_remote_code),
            token=token,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the rows that were registered: without them a model is another elsewhere."""
        values = {column.name: getattr(self, column.name) for column in fields(self)}
        return _source_of, (values, registered_profiles())

    @property
    def name(self) -> tuple[str | None, ...]:
        """What tells one checkpoint from another before anything of it is read."""
        return self.model, self.revision, self.cache_folder

    @property
    def is_local(self) -> bool:
        """Whether the model is a folder on this machine."""
        return _is_folder(Path(self.model))

    @property
    def hub_cache(self) -> str | None:
        """The hub's cache: the one that was asked for, sentence-transformers', or None for HF's."""
        return self.cache_folder or os.environ.get("SENTENCE_TRANSFORMERS_HOME") or None


def check_name(model: object) -> str | os.PathLike[str]:
    """Refuse what names no model; of an object with a model in it, say its name.

    Raises:
        InputTypeError: Neither a str nor a path.
    """
    if isinstance(model, (str, os.PathLike)):
        return model
    names = (getattr(model, attribute, None) for attribute in ("model_name", "model"))
    name = next((name for name in names if isinstance(name, str) and name), None)
    remedy = "an id such as 'BAAI/bge-small-en-v1.5'"
    if name is not None:
        remedy = f"the name of its model, {shown(name, most=500)}, whose weights are shared"
    what = "None" if model is None else type(model).__name__
    msg = f"model must be a hub id or a folder's path, got {what}: pass {remedy}."
    raise InputTypeError(msg)


def _folder_name(folder: object) -> str:
    name = os.fspath(folder) if isinstance(folder, os.PathLike) else folder
    name = arguments.text("cache_folder", name)
    if "\0" in name:
        msg = "cache_folder has a NUL character, which no folder's name has: pass a folder's path."
        raise ArgumentError(msg)
    return name


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long for a path, with a NUL, or nobody's to see
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _source_of(values: Mapping[str, Any], rows: tuple[Profile, ...]) -> Source:
    restore_profiles(rows)
    return Source(**values)


def locate(source: Source, *, weights: bool = True) -> Path:
    """Find a checkpoint's folder, downloading it from the hub where that is allowed.

    Args:
        source: What the user wrote.
        weights: Whether the weights are needed, and not its small files only.

    Raises:
        CheckpointError: It isn't in the cache and can't be downloaded; says why.
    """
    if source.is_local:
        return Path(source.model)
    try:
        folder = _fetch(source, _WANTED if weights else _SMALL)
        if weights and not any(folder.rglob("*.safetensors")):
            # Older checkpoints, bge-m3 among them, have no safetensors.
            folder = _fetch(source, (*_WANTED, "*pytorch_model*.bin"))
    except Exception as exc:  # its two majors raise two HTTP clients' errors, and any of Python's
        # A hundred lines of the hub's client would stand in front of the sentence.
        logger.debug("Looking for %r failed.", source.model, exc_info=exc)
        raise _not_found_error(source, exc) from None
    return folder


def cached_folder(source: Source) -> Path | None:
    """Return the folder that the hub's cache has of an id, with its config.json; None for none.

    Nobody is asked, and the hub's client is not imported.
    """
    if source.is_local or "/" not in source.model:
        return None
    try:
        from huggingface_hub.constants import HF_HUB_CACHE

        home = Path(source.hub_cache or HF_HUB_CACHE) / f"models--{source.model.replace('/', '--')}"
        name = source.revision or "main"
        reference = home / "refs" / name
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else name
        folder = home / "snapshots" / commit
        return folder if (folder / "config.json").is_file() else None
    except Exception:  # noqa: BLE001 -- whatever a cache has; it is read in earnest at first use
        return None


def _fetch(source: Source, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(*, local: bool) -> Path:
        with _quiet_hub():
            return Path(
                snapshot_download(
                    source.model,
                    revision=source.revision,
                    cache_dir=source.hub_cache,
                    local_files_only=local,
                    token=source.token,
                    allow_patterns=list(patterns),
                )
            )

    local = source.local_files_only or _is_offline()
    try:
        return fetch(local=local)
    except Exception as exc:
        # Of a full commit that is in the cache the hub is asked all the same.
        if local or _is_disk_full(exc):
            raise
        try:
            folder = fetch(local=True)
        except Exception:  # noqa: BLE001 -- why the hub gave none says more
            raise exc from None
        # A download that broke off may have left a part.
        if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
            raise
        logger.warning(
            "The hub gave no %r (%s): what the cache has of it is used.",
            source.model,
            first_line(exc),
        )
        return folder


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Have what the hub's client prints of retries and the like in this package's debug log.

    What it comes to is a sentence of ours. Who asked the client to say more hears it as ever.
    """
    client = logging.getLogger("huggingface_hub")
    if client.getEffectiveLevel() < logging.WARNING:
        yield
        return

    def take(record: logging.LogRecord) -> bool:
        logger.debug("%s: %s", record.name, record.getMessage())
        return False

    # On what prints, and not on the logger: no record of a module below would pass there.
    handlers = list(client.handlers)
    for handler in handlers:
        handler.addFilter(take)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(take)


def _is_disk_full(exc: Exception) -> bool:
    return isinstance(exc, OSError) and exc.errno in _NO_ROOM


def _not_found_error(source: Source, exc: Exception) -> CheckpointError:
    where = f"cache_folder={source.cache_folder!r}"
    if not source.cache_folder:
        own = source.hub_cache
        where = f"SENTENCE_TRANSFORMERS_HOME={own!r}" if own else "the hub cache"
    if _is_disk_full(exc):
        msg = (
            f"model={source.model!r} can't be downloaded: {where} has no room "
            f"({first_line(exc)}). Free some, or pass cache_folder='...' on another disk."
        )
        return CheckpointError(msg)
    if source.local_files_only:
        why = f"it is not in {where}, and local_files_only=True forbids a download"
        remedy = "leave local_files_only out"
    elif _is_offline():
        why = f"it is not in {where}, and HF_HUB_OFFLINE=1 forbids a download"
        remedy = "unset HF_HUB_OFFLINE"
    else:
        why = f"it is not in {where}, and the hub gave none ({first_line(exc)})"
        remedy = "check the network"
    close = difflib.get_close_matches(source.model, tuple(PROFILES), n=1)
    typo = close and close[0] != source.model
    hint = f"Did you mean {close[0]!r}? Else check" if typo else "Check the spelling and"
    msg = (
        f"model={source.model!r} can't be found: {why}. {hint} the revision, "
        f"{remedy}, or pass the path of a folder that has it."
    )
    return CheckpointError(msg)


def _is_offline() -> bool:
    try:
        from huggingface_hub.constants import HF_HUB_OFFLINE
    except Exception:  # noqa: BLE001 -- it raises of a variable that it can't read
        return False
    return bool(HF_HUB_OFFLINE)
