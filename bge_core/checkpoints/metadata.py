"""What a checkpoint's files say of it: its architecture, its pooling, its limits, its kind.

Only small JSON files are read, so that a wrong configuration is refused before anything heavy is
imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from bge_core.checkpoints.catalog import find_profile
from bge_core.checkpoints.files import JsonFile, leaves_folder, read_json
from bge_core.errors import CheckpointError

if TYPE_CHECKING:
    from bge_core.checkpoints.catalog import Output, PairPrompt, Profile
    from bge_core.checkpoints.source import Source

__all__ = [
    "HEADS",
    "Checkpoint",
    "check_kind",
    "check_profile",
    "is_m3_architecture",
    "missing_head_error",
    "read",
]

Kind = Literal["embedder", "reranker"]

HEADS: Mapping[Output, str] = MappingProxyType(
    {"sparse": "sparse_linear.pt", "multi_vector": "colbert_linear.pt"}
)
"""An output of bge-m3 beside the dense vector -> the file of the layer that makes it."""
_DIGESTED = (".json", ".txt", ".model", ".safetensors", ".bin", ".pt", ".py")
_PLAIN_MODULES = ("Transformer", "Pooling", "Normalize")
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
class Checkpoint:
    """What a checkpoint's own files say of it.

    Attributes:
        name: The hub id or folder that the user wrote.
        folder: Where its files are.
        body: Where config, weights and tokenizer are: the folder, or its first module's.
        family: `model_type` of config.json.
        profile: Its row in the table of published checkpoints; None if it has none.
        pooling: `"cls"`, `"mean"` or `"last"`; another mode's name where sentence-transformers'
            own modules have to run; None if the checkpoint doesn't say.
        plain: Transformer, pooling and normalisation are all of it.
        labels: Outputs of its classification head; 0 if it has none.
        hidden_size: Width of the last layer, which is a plain embedder's dimension.
        vocabulary: Tokens that the weights have an embedding for; 0 if it doesn't say.
        max_length: Tokens that it can take, special ones included.
        default_length: Tokens that are read unless the user says otherwise.
        padding_position: Where positions are counted from in the families of RoBERTa: the
            padding token's id. None where they start at 0.
        pad: The padding token's id.
        lower_case: Texts are lower-cased before the tokenizer.
        prompts: Its own prompts by name (config_sentence_transformers.json).
        heads: Outputs of bge-m3 that it has a file for (`HEADS`).
    """

    name: str
    folder: Path
    body: Path
    family: str
    profile: Profile | None
    pooling: str | None
    plain: bool
    labels: int
    hidden_size: int
    vocabulary: int
    max_length: int
    default_length: int
    padding_position: int | None
    pad: int
    lower_case: bool
    prompts: Mapping[str, str]
    heads: frozenset[Output]

    @property
    def pair_prompt(self) -> PairPrompt | None:
        """How it is asked to score a pair; None unless it does so as a language model."""
        return None if self.profile is None or self.labels else self.profile.pair_prompt

    def digest(self) -> str:
        """Hash what is in the folder, for fingerprints: the same on every machine.

        JSON files count whole. Of a weight file the size and 256 blocks spread over it count,
        which any training changes; reading a gigabyte for a name would be slow.
        """
        digest = hashlib.sha256()
        names = sorted(
            path.relative_to(self.folder).as_posix()
            for path in (*self.folder.glob("*"), *self.folder.glob("[0-9]_*/*"))
            if path.suffix in _DIGESTED and path.is_file()
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


def read(source: Source, folder: Path) -> Checkpoint:
    """Read what a checkpoint says of itself.

    Args:
        source: What the user wrote.
        folder: Where the files are, from `locate`.

    Raises:
        CheckpointError: A file is missing or damaged, or points out of the folder.
    """
    modules = _modules(folder)
    body = folder / (modules[0].path if modules else "")
    if (adapter := body / "adapter_config.json").exists():
        # It names another folder or hub id, and transformers would load that one's weights.
        msg = (
            f"{adapter} makes {source.model!r} an adapter of another model, which is not loaded: "
            "merge the two with peft's merge_and_unload() and save_pretrained(folder)."
        )
        raise CheckpointError(msg)
    config = JsonFile(body / "config.json")
    if "model_type" not in config.values:
        msg = (
            f"{config.path} is missing or has no model_type, so {source.model!r} is no "
            "transformers checkpoint: pass the folder that save_pretrained wrote, or a hub id."
        )
        raise CheckpointError(msg)
    family = str(config.values["model_type"])
    profile = find_profile(source.model) or find_profile(
        str(config.values.get("_name_or_path") or "")
    )
    pooling = _pooling(folder, modules)
    if profile and modules is None:
        pooling = profile.pooling
    reading = JsonFile(body / "sentence_bert_config.json")
    offset = family in _OFFSET_FAMILIES
    # transformers' own defaults, where config.json has none.
    pad = config.whole("pad_token_id", 1 if offset else 0)
    capacity = min(
        config.whole("max_position_embeddings", 512) - (pad + 1 if offset else 0),
        JsonFile(body / "tokenizer_config.json").whole("model_max_length", 1 << 30),
        profile.max_length if profile else 1 << 30,
    )
    return Checkpoint(
        name=source.model,
        folder=folder,
        body=body,
        family=family,
        profile=profile,
        pooling=pooling,
        plain=all(module.kind in _PLAIN_MODULES for module in modules or ()),
        labels=_labels(config),
        hidden_size=config.whole("hidden_size", config.whole("dim", 0)),
        vocabulary=config.whole("vocab_size", 0),
        max_length=capacity,
        default_length=min(reading.whole("max_seq_length", capacity), capacity),
        padding_position=pad if offset else None,
        pad=pad,
        lower_case=bool(reading.values.get("do_lower_case")),
        prompts=_prompts(JsonFile(folder / "config_sentence_transformers.json")),
        heads=frozenset(output for output, name in HEADS.items() if (folder / name).is_file()),
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
    if kind == "reranker" and checkpoint.pair_prompt is not None:
        return
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
            f"{name!r} says nothing of its pooling: it is no published BGE checkpoint, and has no "
            "modules.json with a pooling module. Pass pooling='cls', 'mean' or 'last' as it was "
            "trained, or save it with sentence-transformers, which writes modules.json."
        )
        raise CheckpointError(msg)


def is_m3_architecture(checkpoint: Checkpoint, pooling: str | None) -> bool:
    """Say whether a checkpoint is one of bge-m3's make, from whose pass all outputs come.

    Args:
        checkpoint: What the checkpoint says of itself.
        pooling: The rows that make the dense vector.
    """
    return (
        checkpoint.family == "xlm-roberta"
        and checkpoint.plain
        and not checkpoint.labels
        and pooling == "cls"
    )


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
        if "multi_vector" in profile.outputs:
            use += ", or to BGEReranker (bge_core.make_scorer), which scores with it"
        article = "a reranker" if profile.kind == "reranker" else "an embedding model"
        msg = f"{name!r} is {article}: give it to {use}."
        raise CheckpointError(msg)
    if profile.refusal is not None:
        msg = f"{name!r} can't be served: {profile.refusal}."
        raise CheckpointError(msg)


def missing_head_error(checkpoint: Checkpoint, output: Output) -> CheckpointError:
    """Say that a checkpoint lacks the file of an output."""
    msg = (
        f"{checkpoint.name!r} has no {HEADS[output]} in {checkpoint.folder}, so it can't give "
        f"{output.replace('_', '-')} outputs: random numbers in its place would be noise. Take the "
        "file from BAAI/bge-m3 if the model was not trained further, or ask for dense alone."
    )
    return CheckpointError(msg)


@dataclass(frozen=True, slots=True)
class _Module:
    """An entry of modules.json.

    Attributes:
        kind: The class's name, without its package.
        path: Its folder inside the checkpoint.
    """

    kind: str
    path: str


def _labels(config: JsonFile) -> int:
    architectures = config.values.get("architectures") or []
    if not isinstance(architectures, list):
        config.refuse(f"architectures must be a list, it is {architectures!r:.60}")
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return 0
    # transformers' default is two labels, and id2label is how config.json says otherwise.
    labels = config.values.get("id2label")
    return len(labels) if isinstance(labels, dict) and labels else config.whole("num_labels", 2)


def _modules(folder: Path) -> list[_Module] | None:
    """Read modules.json; None where there is none."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    listed = read_json(path)
    if not isinstance(listed, list) or not listed or not all(map(_is_module, listed)):
        msg = f"{path} is damaged (a list of modules was expected): fetch the checkpoint again."
        raise CheckpointError(msg)
    modules = [
        _Module(module["type"].rpartition(".")[2], module.get("path", "")) for module in listed
    ]
    for module in modules:
        if leaves_folder(folder, module.path):
            msg = (
                f"{path} names the path {module.path!r}, which leaves the checkpoint's folder: "
                "such a checkpoint is refused."
            )
            raise CheckpointError(msg)
    return modules


def _is_module(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("type"), str)
        and isinstance(entry.get("path", ""), str)
    )


def _pooling(folder: Path, modules: list[_Module] | None) -> str | None:
    module = next((module for module in modules or () if module.kind == "Pooling"), None)
    if module is None:
        return None
    config = JsonFile(folder / module.path / "config.json")
    mode = config.values.get("pooling_mode")
    modes = mode if isinstance(mode, list) else [mode] if mode else []
    modes = modes or [name for key, name in _POOLING_KEYS.items() if config.values.get(key)]
    if not modes:
        config.refuse("it names no pooling mode")
    return "+".join("last" if name == "lasttoken" else str(name) for name in modes)


def _prompts(config: JsonFile) -> dict[str, str]:
    prompts = config.values.get("prompts") or {}
    if not isinstance(prompts, dict):
        config.refuse(f"prompts must be a mapping, it is {prompts!r:.60}")
    given = {name: text for name, text in prompts.items() if text is not None}
    for name, text in given.items():
        if not isinstance(text, str):
            config.refuse(f"the prompt {name!r} must be a string, it is {text!r:.60}")
    return given
