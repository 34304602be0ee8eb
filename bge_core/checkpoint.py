"""A folder or a hub id -> what the checkpoint says of itself, its tokenizer and its model.

`read` looks at small JSON files only, so that a wrong configuration is refused before anything
heavy is imported; `load_tokenizer` and `load_model` import transformers.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from bge_core.errors import CheckpointError, ComputationError, InputTypeError, check_secret
from bge_core.profiles import PROFILES, Output, PairPrompt, Profile, find_profile
from bge_core.tokens import Tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = [
    "HEADS",
    "Checkpoint",
    "Source",
    "check_classes",
    "check_kind",
    "check_profile",
    "gives_m3",
    "load_head",
    "load_model",
    "load_tokenizer",
    "locate",
    "no_head",
    "no_room",
    "read",
    "weight_files",
    "without_bars",
]

logger = logging.getLogger(__name__)

Kind = Literal["embedder", "reranker"]

HEADS: Mapping[Output, str] = MappingProxyType(
    {"sparse": "sparse_linear.pt", "multi_vector": "colbert_linear.pt"}
)
"""An output of bge-m3 beside the dense vector -> the file of the layer that makes it."""

# No space left, file too large, quota exceeded.
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_DIGESTED = (".json", ".txt", ".model", ".safetensors", ".bin", ".pt", ".py")
_WANTED = ("*.json", "*.txt", "*.model", "*.safetensors", "*.pt", "*.py")
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
        if name and folder.is_dir():
            # Absolute, so that "." has a name to be known by and a later chdir changes nothing.
            name = os.path.abspath(folder)  # noqa: PTH100 -- resolve() would follow the cache's links
        elif isinstance(model, os.PathLike) or not _HUB_ID.fullmatch(name):
            msg = (
                f"model={name!r} is no folder on this machine and no hub id: pass a folder with "
                "config.json, or an id such as 'BAAI/bge-small-en-v1.5'."
            )
            raise CheckpointError(msg)
        elif "/" not in name and (profile := find_profile(name)):
            msg = f"model={name!r} is no folder here and no hub id: did you mean {profile.id!r}?"
            raise CheckpointError(msg)
        if token is not None:
            token = check_secret("token", token)
        return cls(
            model=name,
            revision=revision,
            cache_folder=None if cache_folder is None else os.fspath(cache_folder),
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
            token=token,
        )

    @property
    def name(self) -> tuple[str | None, ...]:
        """What tells one checkpoint from another before anything of it is read."""
        return self.model, self.revision, self.cache_folder

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


def locate(source: Source) -> Path:
    """Find a checkpoint's folder, downloading it from the hub where that is allowed.

    Raises:
        CheckpointError: It isn't in the cache and can't be downloaded; says why.
    """
    if source.is_local:
        return Path(source.model)
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError

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
        if not weight_files(folder):
            # Older checkpoints, bge-m3 among them, have no safetensors.
            folder = fetch((*_WANTED, "*pytorch_model*.bin"), local=source.local_files_only)
    except (OSError, ValueError, httpx.HTTPError, HFValidationError) as exc:
        where = f"cache_folder={source.cache_folder!r}" if source.cache_folder else "the hub cache"
        if source.local_files_only:
            why = f"it is not in {where}, and local_files_only=True forbids a download"
        elif HF_HUB_OFFLINE:
            why = f"it is not in {where}, and HF_HUB_OFFLINE=1 forbids a download"
        else:
            why = f"it is not in {where}, and the hub gave none ({_first_line(exc)})"
        if isinstance(exc, OSError) and exc.errno in _NO_ROOM:
            msg = (
                f"model={source.model!r} can't be downloaded: {where} has no room "
                f"({_first_line(exc)}). Free some, or pass cache_folder='...' on another disk."
            )
            raise CheckpointError(msg) from exc
        close = difflib.get_close_matches(source.model, PROFILES, n=1)
        typo = close and close[0] != source.model
        hint = f"Did you mean {close[0]!r}? Else check" if typo else "Check the spelling,"
        msg = (
            f"model={source.model!r} can't be found: {why}. {hint} the network and the revision, "
            "or pass the path of a folder that has it."
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
    modules = _modules(folder)
    body = folder / (modules[0].path if modules else "")
    if (adapter := body / "adapter_config.json").exists():
        # It names another folder or hub id, and transformers would load that one's weights.
        msg = (
            f"{adapter} makes {source.model!r} an adapter of another model, which is not loaded: "
            "merge the two with peft's merge_and_unload() and save_pretrained(folder)."
        )
        raise CheckpointError(msg)
    config = _File(body / "config.json")
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
    reading = _File(body / "sentence_bert_config.json")
    offset = family in _OFFSET_FAMILIES
    # transformers' own defaults, where config.json has none.
    pad = config.whole("pad_token_id", 1 if offset else 0)
    capacity = min(
        config.whole("max_position_embeddings", 512) - (pad + 1 if offset else 0),
        _File(body / "tokenizer_config.json").whole("model_max_length", 1 << 30),
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
        prompts=_prompts(_File(folder / "config_sentence_transformers.json")),
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


def gives_m3(checkpoint: Checkpoint, pooling: str | None) -> bool:
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


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Tokenizer:
    """Load a checkpoint's fast tokenizer.

    Raises:
        CheckpointError: It has none, or it is damaged.
    """
    from transformers import AutoTokenizer

    own = {
        word: next((str(path) for name in names if (path := checkpoint.body / name).exists()), None)
        for word, names in _TOKENIZER_FILES.items()
    }
    if own["tokenizer_file"] is None and own["vocab_file"] is None:
        names = ", ".join(name for names in _TOKENIZER_FILES.values() for name in names)
        msg = (
            f"{checkpoint.name!r} has no tokenizer: {checkpoint.body} has none of {names}. Save it "
            "there with tokenizer.save_pretrained(folder)."
        )
        raise CheckpointError(msg)
    try:
        loaded = AutoTokenizer.from_pretrained(
            checkpoint.body,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            # transformers 4 would follow paths in tokenizer_config.json, which are its maker's.
            **own,
        )
    except Exception as exc:
        raise _unreadable(checkpoint, "tokenizer", exc) from exc
    if not loaded.is_fast:
        msg = (
            f"{checkpoint.name!r} has no fast tokenizer: save one, a tokenizer.json, into "
            f"{checkpoint.body} with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
        raise CheckpointError(msg)
    _mark_ends(loaded, _File(checkpoint.body / "tokenizer_config.json").values)
    if 0 < checkpoint.vocabulary < len(loaded):
        msg = (
            f"The tokenizer of {checkpoint.name!r} in {checkpoint.body} has {len(loaded)} tokens, "
            f"and the weights embed {checkpoint.vocabulary} (vocab_size in config.json): one of "
            "the two is of another model; fetch the checkpoint again."
        )
        raise CheckpointError(msg)
    marks = (loaded.cls_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id)
    return Tokenizer(
        loaded.backend_tokenizer,
        pad=checkpoint.pad,
        lower_case=checkpoint.lower_case,
        marks={mark for mark in marks if mark is not None},
    )


def _mark_ends(loaded: Any, settings: Mapping[str, Any]) -> None:
    """Add the first and the last token that tokenizer_config.json asks for.

    transformers 5 adds those of tokenizer.json alone, where transformers 4 went by these settings
    for the classes named here. The decoders come from the time of transformers 4, and their
    vector is that of the last token.
    """
    if settings.get("tokenizer_class") in _MARKED_CLASSES and "add_eos_token" in settings:
        loaded.add_bos_token = bool(settings.get("add_bos_token", True))
        loaded.add_eos_token = bool(settings["add_eos_token"])


def check_classes(checkpoint: Checkpoint) -> None:
    """Refuse classes that sentence-transformers would import for a checkpoint nobody vouched for.

    Since its version 6 it refuses them itself; before, it imports them, those in the checkpoint's
    folder included.

    Raises:
        CheckpointError: A module or an activation is of neither sentence-transformers nor torch.
    """
    named = (path for path in checkpoint.folder.rglob("*") if path.name.lower() in _NAMING_FILES)
    for path in [checkpoint.folder / "modules.json", *sorted(named)]:
        for name, package in _named_classes(_json(path)):
            if not name.startswith(f"{package}."):
                msg = (
                    f"{path} names {name!r}, Python code from elsewhere than {package}, which was "
                    "not run: it could do anything that you can. If you have read it and trust "
                    "it, pass trust_remote_code=True."
                )
                raise CheckpointError(msg)


def load_model(
    checkpoint: Checkpoint, *, kind: Kind, dtype: str, trust_remote_code: bool
) -> PreTrainedModel:
    """Load a checkpoint's weights, onto the CPU, in evaluation mode.

    Raises:
        CheckpointError: The weights are missing, damaged or of another shape.
    """
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification

    weights = weight_files(checkpoint.body)
    if not weights:
        msg = (
            f"{checkpoint.name!r} has no weights: {checkpoint.body} has neither "
            "model.safetensors nor pytorch_model.bin; fetch it again."
        )
        raise CheckpointError(msg)
    _check_shards(checkpoint.body)
    loader: Any = AutoModel if kind == "embedder" else AutoModelForSequenceClassification
    if kind == "reranker" and checkpoint.pair_prompt is not None:
        from transformers import AutoModelForCausalLM

        loader = AutoModelForCausalLM
    try:
        with without_bars():
            model, report = loader.from_pretrained(
                checkpoint.body,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=weights[0].suffix == ".safetensors",
                output_loading_info=True,
            )
    except Exception as exc:
        raise _unreadable(checkpoint, "weights", exc) from exc
    # A pooler is extra on an encoder; anything else that is missing would be random numbers.
    missing = sorted(
        name for name in report["missing_keys"] if kind == "reranker" or "pooler." not in name
    )
    if missing:
        msg = (
            f"The weights of {checkpoint.name!r} in {checkpoint.body} lack {len(missing)} of "
            f"the model's tensors, {missing[0]!r} first: computing with random ones in their "
            "place would give noise. Fetch the checkpoint again."
        )
        raise CheckpointError(msg)
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model  # type: ignore[no-any-return]


def load_head(checkpoint: Checkpoint, output: Output) -> torch.nn.Linear:
    """Load one of bge-m3's further layers, onto the CPU; never a random one.

    Args:
        checkpoint: What the checkpoint says of itself.
        output: `"sparse"` or `"multi_vector"`.

    Returns:
        A layer from the encoder's width to 1, or to the width of a token's vector.

    Raises:
        CheckpointError: Its file is missing, damaged or of another shape.
    """
    import torch

    path = checkpoint.folder / HEADS[output]
    if output not in checkpoint.heads:
        raise no_head(checkpoint, output)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weight, bias = state["weight"].float(), state["bias"].float()
    except Exception as exc:
        raise _unreadable(checkpoint, f"layer {path.name}", exc) from exc
    width = 1 if output == "sparse" else weight.shape[0]
    expected = ([width, checkpoint.hidden_size], [width])
    if (list(weight.shape), list(bias.shape)) != expected:
        msg = (
            f"{path} is of another model: a weight of {expected[0]} and a bias of {expected[1]} "
            f"were expected, it has {list(weight.shape)} and {list(bias.shape)}. Fetch the "
            "checkpoint again."
        )
        raise CheckpointError(msg)
    head = torch.nn.Linear(checkpoint.hidden_size, width)
    head.weight, head.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    return head.eval().requires_grad_(requires_grad=False)


def no_room(name: str, device: object) -> ComputationError:
    """Say that a model doesn't fit on a device."""
    msg = (
        f"{name!r} doesn't fit into the memory of device={str(device)!r}: pass dtype='float16' or "
        "'bfloat16', another device, or free memory there."
    )
    return ComputationError(msg)


def no_head(checkpoint: Checkpoint, output: Output) -> CheckpointError:
    """Say that a checkpoint lacks the file of an output."""
    msg = (
        f"{checkpoint.name!r} has no {HEADS[output]} in {checkpoint.folder}, so it can't give "
        f"{output.replace('_', '-')} outputs: random numbers in its place would be noise. Take the "
        "file from BAAI/bge-m3 if the model was not trained further, or ask for dense alone."
    )
    return CheckpointError(msg)


def weight_files(folder: Path) -> list[Path]:
    """Give the files of a folder's weights, safetensors before pickles; empty if it has none."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing a progress bar while it loads weights."""
    from transformers.utils import logging as transformers_logging

    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _unreadable(checkpoint: Checkpoint, what: str, error: Exception) -> CheckpointError:
    if "trust_remote_code" in str(error):
        msg = (
            f"{checkpoint.name!r} carries Python code of its own for its {what}, which was not "
            "run: it could do anything that you can. If you have read it and trust it, pass "
            "trust_remote_code=True."
        )
    elif any(isinstance(e, UnpicklingError) or "weights_only" in str(e) for e in _chain(error)):
        msg = (
            f"There is more than tensors in the {what} of {checkpoint.name!r} in "
            f"{checkpoint.body}: the file is damaged, or a pickle with code in it, which was not "
            "run. Use a checkpoint with model.safetensors, from a publisher whom you trust."
        )
    else:
        msg = (
            f"The {what} of {checkpoint.name!r} in {checkpoint.body} can't be read "
            f"({_first_line(error)}): the files are damaged or incomplete, or config.json "
            "describes another model; fetch the checkpoint again."
        )
    return CheckpointError(msg)


# Beside modules.json, the files in which sentence-transformers 5 finds names that it imports.
_NAMING_FILES = ("config.json", "router_config.json", "wordembedding_config.json")
# What it imports by name, and the package that it may be of.
_CLASSES = {
    "type": "sentence_transformers",
    "types": "sentence_transformers",
    "tokenizer_class": "sentence_transformers",
    "activation_function": "torch",
}
# Those whose fast versions in transformers 4 went by tokenizer_config.json.
_MARKED_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast")
# Under transformers' word for them; the first that is there.
_TOKENIZER_FILES = {
    "tokenizer_file": ("tokenizer.json",),
    "vocab_file": ("vocab.txt", "sentencepiece.bpe.model", "tokenizer.model"),
}


def _check_shards(folder: Path) -> None:
    """Refuse an index of weights that names a file elsewhere, or one that is not there."""
    for index in folder.glob("*.index.json"):
        named = _File(index).values.get("weight_map")
        for name in sorted(set(map(str, named.values()))) if isinstance(named, dict) else ():
            if PurePosixPath(name.replace("\\", "/")).name != name or ":" in name:
                msg = (
                    f"{index} names the file {name!r}, which leaves the checkpoint's folder: "
                    "such a checkpoint is refused."
                )
                raise CheckpointError(msg)
            if not (folder / name).is_file():
                msg = f"{folder} lacks {name}, a part of the weights: fetch the checkpoint again."
                raise CheckpointError(msg)


class _File:
    """A JSON file's mapping, empty where there is no file.

    Raises:
        CheckpointError: The file is no JSON, or a value in it is not of the type that is needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        value = _json(path) if path.is_file() else {}
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


@dataclass(frozen=True, slots=True)
class _Module:
    """An entry of modules.json.

    Attributes:
        kind: The class's name, without its package.
        path: Its folder inside the checkpoint.
    """

    kind: str
    path: str


def _labels(config: _File) -> int:
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
    listed = _json(path)
    if not isinstance(listed, list) or not listed or not all(map(_is_module, listed)):
        msg = f"{path} is damaged (a list of modules was expected): fetch the checkpoint again."
        raise CheckpointError(msg)
    modules = [
        _Module(module["type"].rpartition(".")[2], module.get("path", "")) for module in listed
    ]
    for module in modules:
        if _leaves(folder, module.path):
            msg = (
                f"{path} names the path {module.path!r}, which leaves the checkpoint's folder: "
                "such a checkpoint is refused."
            )
            raise CheckpointError(msg)
    return modules


def _leaves(folder: Path, path: str) -> bool:
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
    config = _File(folder / module.path / "config.json")
    mode = config.values.get("pooling_mode")
    modes = mode if isinstance(mode, list) else [mode] if mode else []
    modes = modes or [name for key, name in _POOLING_KEYS.items() if config.values.get(key)]
    if not modes:
        config.refuse("it names no pooling mode")
    return "+".join("last" if name == "lasttoken" else str(name) for name in modes)


def _prompts(config: _File) -> dict[str, str]:
    prompts = config.values.get("prompts") or {}
    if not isinstance(prompts, dict):
        config.refuse(f"prompts must be a mapping, it is {prompts!r:.60}")
    given = {name: text for name, text in prompts.items() if text is not None}
    for name, text in given.items():
        if not isinstance(text, str):
            config.refuse(f"the prompt {name!r} must be a string, it is {text!r:.60}")
    return given


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as exc:
        msg = f"{path} is damaged ({_first_line(exc)}): fetch the checkpoint again."
        raise CheckpointError(msg) from exc


def _named_classes(value: Any) -> Iterator[tuple[str, str]]:
    """Give the classes that a file's content names, and the package that each may be of."""
    for entry in value if isinstance(value, list) else [value]:
        for key, package in _CLASSES.items():
            named = entry.get(key) if isinstance(entry, dict) else None
            for name in named.values() if isinstance(named, dict) else [named]:
                if isinstance(name, str) and "." in name:  # without one, a name of transformers'
                    yield name, package


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    """Give an error and what it came of."""
    while exc is not None:
        yield exc
        exc = exc.__context__


def _first_line(exc: BaseException) -> str:
    line = next(iter(str(exc).strip().splitlines()), type(exc).__name__)
    return line if len(line) <= 200 else f"{line[:200]}..."
