"""A folder or a hub id -> what the checkpoint says of itself, its tokenizer and its model.

`read` looks at small JSON files only, so that a wrong configuration is refused before anything
heavy is imported; `load_tokenizer` and `load_model` import transformers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from bge_core.errors import CheckpointError, InputTypeError
from bge_core.profiles import Profile, find_profile
from bge_core.tokens import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Checkpoint",
    "Source",
    "check_kind",
    "check_profile",
    "load_model",
    "load_tokenizer",
    "locate",
    "read",
]

logger = logging.getLogger(__name__)

Kind = Literal["embedder", "reranker"]

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WANTED = ("*.json", "*.txt", "*.model", "*.safetensors", "*.pt", "*/config.json", "*.py")
_MODULES = {"Transformer": "transformer", "Pooling": "pooling", "Normalize": "normalize"}
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
# The first usable position of these families is padding_idx + 1.
_OFFSET_FAMILIES = ("xlm-roberta", "roberta", "camembert", "xlm-roberta-xl")


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
            InputTypeError: `model` is neither a str nor a path.
            CheckpointError: It looks like a folder and is none, or it can't be a hub id.
        """
        if not isinstance(model, (str, os.PathLike)):
            msg = f"model must be a hub id or a folder's path, got {type(model).__name__}."
            raise InputTypeError(msg)
        name = os.fspath(model)
        folder = Path(name).expanduser()
        if folder.is_dir():
            # Absolute, so that "." has a name to be known by and a later chdir changes nothing.
            name = os.path.abspath(folder)  # noqa: PTH100 -- resolve() would follow the cache's links
        elif isinstance(model, os.PathLike) or not _HUB_ID.fullmatch(name):
            msg = (
                f"model={name!r} is no folder on this machine and no hub id: pass a folder with "
                "config.json, or an id such as 'BAAI/bge-small-en-v1.5'."
            )
            raise CheckpointError(msg)
        return cls(
            model=name,
            revision=revision,
            cache_folder=None if cache_folder is None else os.fspath(cache_folder),
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
            token=token,
        )

    @property
    def is_local(self) -> bool:
        """Whether the model is a folder on this machine."""
        return Path(self.model).is_dir()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint's own files say of it.

    Attributes:
        name: The hub id or folder that the user wrote.
        folder: Where its files are.
        family: `model_type` of config.json.
        profile: Its row in the table of published checkpoints; None if it has none.
        pooling: `"cls"`, `"mean"` or `"last"`; another mode's name where sentence-transformers'
            own modules have to run; None if the checkpoint doesn't say.
        plain: Transformer, pooling and normalisation are all of it.
        labels: Outputs of its classification head; 0 if it has none.
        hidden_size: Width of the last layer, which is a plain embedder's dimension.
        max_length: Tokens that it can take, special ones included.
        default_length: Tokens that are read unless the user says otherwise.
        first_position: Position of the first token.
        lower_case: Texts are lower-cased before the tokenizer.
        prompts: Its own prompts by name (config_sentence_transformers.json).
    """

    name: str
    folder: Path
    family: str
    profile: Profile | None
    pooling: str | None
    plain: bool
    labels: int
    hidden_size: int
    max_length: int
    default_length: int
    first_position: int
    lower_case: bool
    prompts: Mapping[str, str]

    def digest(self) -> str:
        """Hash what is in the folder, for fingerprints: the same on every machine.

        JSON files count whole. Of a weight file the size and 256 blocks spread over it count,
        which any training changes; reading a gigabyte for a name would be slow.
        """
        digest = hashlib.sha256()
        names = sorted(
            path.relative_to(self.folder).as_posix()
            for pattern in ("*.json", "*.txt", "*.safetensors", "*.bin", "*.pt", "*/config.json")
            for path in self.folder.glob(pattern)
        )
        for name in names:
            digest.update(name.encode())
            path = self.folder / name
            size = path.stat().st_size
            with path.open("rb") as file:
                if size <= 1 << 24 and path.suffix in (".json", ".txt"):
                    digest.update(file.read())
                    continue
                digest.update(str(size).encode())
                for block in range(256):
                    file.seek(size * block // 256)
                    digest.update(file.read(1024))
        return digest.hexdigest()


def locate(source: Source) -> Path:
    """Find a checkpoint's folder, downloading it from the hub where that is allowed.

    Raises:
        CheckpointError: It isn't in the cache and can't be downloaded; says why.
    """
    if source.is_local:
        return Path(source.model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: tuple[str, ...], *, local: bool) -> Path:
        return Path(
            snapshot_download(
                source.model,
                revision=source.revision,
                cache_dir=source.cache_folder,
                local_files_only=local,
                token=source.token,
                allow_patterns=list(patterns),
            )
        )

    try:
        folder = fetch(_WANTED, local=source.local_files_only)
        if not _weights(folder):
            # Older checkpoints, bge-m3 among them, have no safetensors.
            folder = fetch((*_WANTED, "pytorch_model*.bin"), local=source.local_files_only)
    except (OSError, ValueError, HFValidationError, LocalEntryNotFoundError) as exc:
        where = f"cache_folder={source.cache_folder!r}" if source.cache_folder else "the hub cache"
        if source.local_files_only:
            why = f"it is not in {where}, and local_files_only=True forbids a download"
        else:
            why = f"it is not in {where}, and the hub gave none ({_first_line(exc)})"
        msg = (
            f"model={source.model!r} can't be found: {why}. Check the spelling, the network and "
            "the revision, or pass the path of a folder that has it."
        )
        raise CheckpointError(msg) from exc
    return folder


def read(source: Source, folder: Path) -> Checkpoint:
    """Read what a checkpoint says of itself.

    Args:
        source: What the user wrote.
        folder: Where the files are, from `locate`.

    Raises:
        CheckpointError: A file is missing or damaged, or points out of the folder.
    """
    config = _json(folder / "config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        msg = (
            f"{folder / 'config.json'} is missing or has no model_type, so {source.model!r} is no "
            "transformers checkpoint: pass the folder that save_pretrained wrote, or a hub id."
        )
        raise CheckpointError(msg)
    family = str(config["model_type"])
    profile = find_profile(source.model) or find_profile(str(config.get("_name_or_path") or ""))
    modules, transformer = _modules(folder)
    pooling = _pooling(folder, modules)
    bert_config = _mapping(folder / transformer / "sentence_bert_config.json")
    tokenizer_config = _mapping(folder / transformer / "tokenizer_config.json")
    prompts = _mapping(folder / "config_sentence_transformers.json").get("prompts") or {}
    first = int(config.get("pad_token_id") or 0) + 1 if family in _OFFSET_FAMILIES else 0
    capacity = min(
        int(config.get("max_position_embeddings") or 512) - first,
        int(tokenizer_config.get("model_max_length") or 1 << 30),
        profile.max_length if profile else 1 << 30,
    )
    default = min(int(bert_config.get("max_seq_length") or capacity), capacity)
    if profile and pooling is None and modules is None:
        pooling = profile.pooling
    return Checkpoint(
        name=source.model,
        folder=folder,
        family=family,
        profile=profile,
        pooling=pooling,
        plain=modules is None or set(modules) <= {"transformer", "pooling", "normalize"},
        labels=_labels(config),
        hidden_size=int(config.get("hidden_size") or config.get("dim") or 0),
        max_length=capacity,
        default_length=default,
        first_position=first,
        lower_case=bool(bert_config.get("do_lower_case", False)),
        prompts={str(name): str(text) for name, text in prompts.items()},
    )


def check_kind(checkpoint: Checkpoint, kind: Kind, *, pooling: str | None) -> None:
    """Refuse a checkpoint of the other kind, or one that this release doesn't serve.

    Args:
        checkpoint: What the checkpoint says of itself.
        kind: What the caller needs.
        pooling: What the caller said of its pooling; None if nothing.

    Raises:
        CheckpointError: A sentence that says which class or checkpoint to use instead.
    """
    check_profile(checkpoint.profile, kind, checkpoint.name)
    name = checkpoint.name
    if kind == "embedder" and checkpoint.labels:
        msg = (
            f"{name!r} is a reranker (a sequence classifier), not an embedding model: give it to "
            "a reranker class, and an embedding model such as 'BAAI/bge-small-en-v1.5' here."
        )
        raise CheckpointError(msg)
    if kind == "reranker" and not checkpoint.labels:
        msg = (
            f"{name!r} is an embedding model: it has no classification head, so it can't score "
            "pairs. Give it to an embedding class, and a reranker such as "
            "'BAAI/bge-reranker-base' here."
        )
        raise CheckpointError(msg)
    if kind == "reranker" and checkpoint.labels != 1:
        msg = (
            f"{name!r} has {checkpoint.labels} labels, and a reranker has one, whose logit is the "
            "score: which of the labels means 'relevant' can't be guessed. Use a checkpoint that "
            "was trained with num_labels=1."
        )
        raise CheckpointError(msg)
    if kind == "embedder" and (pooling or checkpoint.pooling) is None:
        msg = (
            f"{name!r} says nothing of its pooling: it has no modules.json and is no published "
            "BGE checkpoint. Pass pooling='cls', 'mean' or 'last' as it was trained, or save it "
            "with sentence-transformers, which writes modules.json."
        )
        raise CheckpointError(msg)


def check_profile(profile: Profile | None, kind: Kind, name: str) -> None:
    """Refuse what the table of published checkpoints already rules out.

    Raises:
        CheckpointError: It is of the other kind, or this release doesn't serve it.
    """
    if profile is None:
        return
    if profile.kind != kind:
        use = (
            "a reranker class (BGEReranker, BGECrossEncoder)"
            if profile.kind == "reranker"
            else "an embedding class (BGEEmbeddings, BGEEmbedding)"
        )
        article = "a reranker" if profile.kind == "reranker" else "an embedding model"
        msg = f"{name!r} is {article}: give it to {use}."
        raise CheckpointError(msg)
    if profile.refusal is not None:
        msg = f"{name!r} can't be served: {profile.refusal}."
        raise CheckpointError(msg)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Load a checkpoint's fast tokenizer.

    Raises:
        CheckpointError: It has none, or it is damaged.
    """
    from transformers import AutoTokenizer

    if not any((checkpoint.folder / name).exists() for name in _TOKENIZER_FILES):
        msg = (
            f"{checkpoint.name!r} has no tokenizer: {checkpoint.folder} has none of "
            f"{', '.join(_TOKENIZER_FILES)}. Save it there with tokenizer.save_pretrained(folder)."
        )
        raise CheckpointError(msg)
    try:
        loaded = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
    except Exception as exc:
        msg = (
            f"The tokenizer of {checkpoint.name!r} in {checkpoint.folder} can't be read "
            f"({_first_line(exc)}): its files are damaged or incomplete; fetch them again."
        )
        raise CheckpointError(msg) from exc
    if not loaded.is_fast:
        msg = (
            f"{checkpoint.name!r} has no fast tokenizer: save one, a tokenizer.json, into "
            f"{checkpoint.folder} with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
        raise CheckpointError(msg)
    return Tokenizer(loaded.backend_tokenizer, lower_case=checkpoint.lower_case)


def load_model(
    checkpoint: Checkpoint, *, kind: Kind, dtype: str, trust_remote_code: bool
) -> PreTrainedModel:
    """Load a checkpoint's weights, onto the CPU, in evaluation mode.

    Raises:
        CheckpointError: The weights are missing, damaged or of another shape.
    """
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    weights = _weights(checkpoint.folder)
    if not weights:
        msg = (
            f"{checkpoint.name!r} has no weights: {checkpoint.folder} has neither "
            "model.safetensors nor pytorch_model.bin; fetch it again."
        )
        raise CheckpointError(msg)
    loader: Any = AutoModel if kind == "embedder" else AutoModelForSequenceClassification
    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model, report = loader.from_pretrained(
            checkpoint.folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=weights[0].suffix == ".safetensors",
            output_loading_info=True,
        )
    except Exception as exc:
        msg = (
            f"The weights of {checkpoint.name!r} in {checkpoint.folder} can't be loaded "
            f"({_first_line(exc)}): the files are damaged, or config.json describes another "
            "model; fetch it again."
        )
        raise CheckpointError(msg) from exc
    finally:
        if shown:
            bars.enable_progress_bar()
    # A pooler is extra on an encoder; anything else that is missing would be random numbers.
    missing = sorted(
        name for name in report["missing_keys"] if kind == "reranker" or "pooler." not in name
    )
    if missing:
        msg = (
            f"The weights of {checkpoint.name!r} in {checkpoint.folder} lack {len(missing)} of "
            f"the model's tensors, {missing[0]!r} first: computing with random ones in their "
            "place would give noise. Fetch the checkpoint again."
        )
        raise CheckpointError(msg)
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model  # type: ignore[no-any-return]


_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "sentencepiece.bpe.model", "tokenizer.model")


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _labels(config: Mapping[str, Any]) -> int:
    architectures = config.get("architectures") or []
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return 0
    # transformers' default is two labels, and id2label is how config.json says otherwise.
    return len(config.get("id2label") or {}) or int(config.get("num_labels", 2))


def _modules(folder: Path) -> tuple[list[str] | None, str]:
    """Give the kinds of the modules in order, None without modules.json; and the first's path."""
    listed = _json(folder / "modules.json")
    if listed is None:
        return None, ""
    if not isinstance(listed, list) or not listed:
        msg = f"{folder / 'modules.json'} lists no modules: fetch the checkpoint again."
        raise CheckpointError(msg)
    kinds, first = [], ""
    for index, module in enumerate(listed):
        path = str(module.get("path", ""))
        inside = PurePosixPath(path.replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts or re.match(r"[A-Za-z]:", path):
            msg = (
                f"{folder / 'modules.json'} names the path {path!r}, which leaves the "
                "checkpoint's folder: such a checkpoint is refused."
            )
            raise CheckpointError(msg)
        name = str(module.get("type", "")).rpartition(".")[2]
        kinds.append(_MODULES.get(name, name))
        if index == 0:
            first = path
    return kinds, first


def _pooling(folder: Path, modules: list[str] | None) -> str | None:
    if modules is None or "pooling" not in modules:
        return None
    listed = _json(folder / "modules.json") or []
    config = _mapping(folder / listed[modules.index("pooling")].get("path", "") / "config.json")
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or [])
    modes = modes or [name for key, name in _POOLING_KEYS.items() if config.get(key)]
    if not modes:
        msg = f"The pooling config of {folder} names no pooling mode: fetch the checkpoint again."
        raise CheckpointError(msg)
    return "+".join("last" if name == "lasttoken" else str(name) for name in modes)


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as exc:
        msg = f"{path} is damaged ({_first_line(exc)}): fetch the checkpoint again."
        raise CheckpointError(msg) from exc


def _mapping(path: Path) -> Mapping[str, Any]:
    value = _json(path)
    return value if isinstance(value, dict) else {}


def _first_line(exc: BaseException) -> str:
    return next(iter(str(exc).strip().splitlines()), type(exc).__name__)[:200]
