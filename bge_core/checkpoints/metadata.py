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
from typing import TYPE_CHECKING, Any, Literal

from bge_core import arguments
from bge_core.checkpoints.catalog import PROFILES, LayerHeads, find_profile
from bge_core.checkpoints.files import (
    JsonFile,
    check_files,
    leaves_folder,
    other_weights,
    read_json,
    unreadable_error,
    weight_files,
)
from bge_core.checkpoints.source import cached_folder
from bge_core.errors import BGEError, CheckpointError

if TYPE_CHECKING:
    from bge_core.checkpoints.catalog import Output, PairPrompt, Profile
    from bge_core.checkpoints.source import Source

__all__ = [
    "HEADS",
    "Checkpoint",
    "check_cached",
    "check_kind",
    "check_loadable",
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
# Of sentence-transformers' lengths and lower-casing, by the age of its version; the first counts.
_READING_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
# Settings of a model there that change no number, since dtype is said by the user.
_HARMLESS = frozenset(
    {
        *("trust_remote_code", "torch_dtype", "dtype", "attn_implementation", "use_safetensors"),
        *("low_cpu_mem_usage", "device_map", "add_pooling_layer", "use_cache"),
    }
)
_TOKENIZER_SETTINGS = ("model_max_length", "truncation_side")
_HARMLESS_OF_A_TOKENIZER = ("trust_remote_code", "use_fast", "padding_side", "local_files_only")
# Settings of sentence-transformers for other models than those here, with what they are for.
_UNSERVED = {
    "tokenizer_name_or_path": "a tokenizer elsewhere: save it into the folder",
    "processing_kwargs": "settings of the tokenizer at each call",
    "query_length": "multi-vector models of its own",
    "document_length": "multi-vector models of its own",
    "query_expansion": "multi-vector models of its own",
}
# transformers makes every layer and a name for each label before it looks at the weights.
_MOST = {"num_hidden_layers": 256, "num_labels": 10_000}
_SIZES = {
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 1,
    "intermediate_size": 1,
    "vocab_size": 1,
    "type_vocab_size": 0,
}
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_LAYERWISE_CLASSES: Mapping[object, str] = MappingProxyType(
    {
        "LayerWiseMiniCPMForCausalLM": "BAAI/bge-reranker-v2-minicpm-layerwise",
        "CostWiseGemmaForCausalLM": "BAAI/bge-reranker-v2.5-gemma2-lightweight",
    }
)
# The first usable position of these families is padding_idx + 1.
_OFFSET_FAMILIES = ("xlm-roberta", "roberta", "camembert", "xlm-roberta-xl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint's own files say of it.

    Attributes:
        name: The hub id or folder that the user wrote.
        folder: Where its files are.
        transformer_folder: Where config, weights and tokenizer are: the folder, or its first
            module's.
        family: `model_type` of config.json.
        kind: What its architecture and its files make it.
        profile: Its row in the table of checkpoints that are known by name; None if it has none of
            its kind.
        pooling: `"cls"`, `"mean"` or `"last"`; another mode's name where sentence-transformers'
            own modules have to run; None if the checkpoint doesn't say.
        only_standard_modules: Transformer, pooling of all tokens and normalisation are all of it.
        pools_prompts: Its pooling reads a prompt's tokens, too.
        routes: sentence-transformers' router sends queries and documents different ways in it.
        labels: Outputs of its classification head; 0 if it has none.
        is_language_model: It has a head that predicts words, and no pooling.
        hidden_size: Width of the last layer, which is a plain embedder's dimension.
        vocabulary: Tokens that the weights have an embedding for; 0 if it doesn't say.
        max_length: Tokens that it has positions for, special ones included.
        default_max_length: Tokens that are read unless the user says otherwise.
        truncate_dim: How many of a vector's numbers are kept; None for all.
        position_offset: Where positions are counted from in the families of RoBERTa: the
            padding token's id. None where they start at 0.
        pad_token_id: The padding token's id.
        lower_case: Texts are lower-cased before the tokenizer.
        truncation_side: Which end of a text is cut: `"right"` or `"left"`.
        layer_heads: After which layers a reranker has a score; None for after the last alone.
        quantization: How its weights are quantised; None for not.
        prompts: Its own prompts for a `"query"` and a `"document"`, where it has one
            (config_sentence_transformers.json).
        m3_heads: Outputs of bge-m3 that it has a file for (`HEADS`).
    """

    name: str
    folder: Path
    transformer_folder: Path
    family: str
    kind: Kind
    profile: Profile | None
    pooling: str | None
    only_standard_modules: bool
    pools_prompts: bool
    routes: bool
    labels: int
    is_language_model: bool
    hidden_size: int
    vocabulary: int
    max_length: int
    default_max_length: int
    truncate_dim: int | None
    position_offset: int | None
    pad_token_id: int
    lower_case: bool
    truncation_side: str
    layer_heads: LayerHeads | None
    quantization: str | None
    prompts: Mapping[str, str]
    m3_heads: frozenset[Output]

    @property
    def pair_prompt(self) -> PairPrompt | None:
        """How it is asked to score a pair; None unless it does so as a language model."""
        return None if self.profile is None or self.labels else self.profile.pair_prompt

    def digest(self) -> str:
        """Hash what is in the folder, for fingerprints: the same on every machine.

        JSON files count whole. Of a weight file the size and 256 blocks spread over it count,
        which any training changes; reading a gigabyte for a name would be slow.

        Raises:
            CheckpointError: A file can't be read.
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
            try:
                _digest_file(digest, path)
            except OSError as exc:
                raise unreadable_error(path, exc) from exc
        return digest.hexdigest()


def read(source: Source, folder: Path) -> Checkpoint:
    """Read what a checkpoint says of itself.

    Args:
        source: What the user wrote.
        folder: Where the files are, from `locate`.

    Raises:
        CheckpointError: A file is missing or damaged, or points out of the folder.
    """
    check_files(folder)
    modules = _modules(folder)
    for path in sorted({module.path for module in modules or ()} - {""}):
        if (folder / path).is_dir():
            check_files(folder / path)
    transformer_folder = folder / (modules[0].path if modules else "")
    if (adapter := transformer_folder / "adapter_config.json").exists():
        # It names another folder or hub id, and transformers would load that one's weights.
        msg = (
            f"{adapter} makes {source.model!r} an adapter of another model, which is not loaded: "
            "merge the two with peft's merge_and_unload() and save_pretrained(folder)."
        )
        raise CheckpointError(msg)
    config = JsonFile(transformer_folder / "config.json")
    family = config.values.get("model_type")
    if not isinstance(family, str) or not family:
        msg = (
            f"{config.path} is missing or has no model_type, so {source.model!r} is no "
            "transformers checkpoint: pass the folder that save_pretrained wrote, or a hub id"
            f"{other_weights(folder) or '.'}"
        )
        raise CheckpointError(msg)
    _check_sizes(config)
    labels = _labels(config)
    named = _profiles(source, folder, config)
    kind = _kind(config, labels, modules, named)
    profile = next((row for row in named if row.kind == kind), None)
    pooling, whole = _pooling(folder, modules)
    if profile and modules is None:
        pooling = profile.pooling
    reading = _reading(transformer_folder)
    if kind == "embedder":
        _check_reading(reading)
    capacity, length = _lengths(config, reading, transformer_folder, profile)
    of_roberta = family in _OFFSET_FAMILIES
    pad = _pad(config, family)
    settings = JsonFile(folder / "config_sentence_transformers.json")
    return Checkpoint(
        name=source.model,
        folder=folder,
        transformer_folder=transformer_folder,
        family=family,
        kind=kind,
        profile=profile,
        pooling=pooling,
        only_standard_modules=_is_plain(modules) and whole and not _changes_model(reading),
        pools_prompts=whole,
        routes=any(module.kind in ("Router", "Asym") for module in modules or ()),
        labels=labels,
        is_language_model=_is_architecture(config, "ForCausalLM") and modules is None,
        hidden_size=config.whole("hidden_size", config.whole("dim", 0, least=0), least=1),
        vocabulary=config.whole("vocab_size", 0, least=0),
        max_length=capacity,
        default_max_length=length,
        truncate_dim=settings.whole("truncate_dim", 0, least=1) or None,
        position_offset=pad if of_roberta else None,
        pad_token_id=pad,
        lower_case=reading.flag("do_lower_case"),
        truncation_side=_truncation_side(reading, transformer_folder),
        layer_heads=_layer_heads(source.model, config, profile),
        quantization=_quantization(config),
        prompts=_prompts(settings),
        m3_heads=frozenset(output for output, name in HEADS.items() if (folder / name).is_file()),
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
    name, profile = checkpoint.name, checkpoint.profile
    if profile is not None and profile.kind != kind:
        raise _other_kind_error(profile, name)
    check_profile(profile, kind, name)
    if kind == "embedder" and checkpoint.labels:
        msg = (
            f"{name!r} is a reranker (a sequence classifier), not an embedding model: give it to "
            "a reranker class, and an embedding model such as 'BAAI/bge-small-en-v1.5' here."
        )
        raise CheckpointError(msg)
    if kind == "reranker" and checkpoint.pair_prompt is not None:
        return
    if kind == "reranker" and not checkpoint.labels and checkpoint.is_language_model:
        msg = (
            f"{name!r} is a language model ({checkpoint.family}), and none of its files says that "
            "it scores pairs. If it was trained from bge-reranker-v2-gemma or as that was, say so: "
            "register(Profile(id=..., kind='reranker', family=..., max_length=..., "
            "pair_prompt=PairPrompt())) of bge_core, with the folder's name or the hub id. Else "
            "use a reranker such as 'BAAI/bge-reranker-base'."
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
            f"{name!r} says nothing of its pooling: it is no published BGE checkpoint, and has no "
            "modules.json with a pooling module. Pass pooling='cls', 'mean' or 'last' as it was "
            "trained, or save it with sentence-transformers, which writes modules.json."
        )
        raise CheckpointError(msg)


def check_cached(
    source: Source, kind: Kind, *, pooling: str | None, loadable: bool = True
) -> Checkpoint | None:
    """Look at what the hub's cache has of an id, and refuse one of the other kind.

    What else is wrong with it is said at first use, when the rest of it has been fetched.

    Args:
        source: What the user wrote.
        kind: What the caller needs.
        pooling: What the caller said of its pooling; None if nothing.
        loadable: Whether this machine is to run it, and not a server.

    Returns:
        What the cached files say; None where there are none, or no whole checkpoint.

    Raises:
        CheckpointError: It is of the other kind, or its weights are for another program.
    """
    folder = cached_folder(source)
    if folder is None:
        return None
    try:
        found = read(source, folder)
        whole = bool(weight_files(found.transformer_folder))
    except CheckpointError:
        return None
    if loadable:
        check_loadable(found)
    elif found.is_language_model:
        return None  # a server has its own ways to rank with one
    # Without the weights modules.json may be missing, too.
    check_kind(found, kind, pooling=pooling if whole and loadable else pooling or "cls")
    return found if whole else None


def check_loadable(checkpoint: Checkpoint) -> None:
    """Refuse weights that only another program reads; a server may run them.

    Raises:
        CheckpointError: They are quantised.
    """
    if checkpoint.quantization is None:
        return
    msg = (
        f"{checkpoint.name!r} is quantised with {checkpoint.quantization} (quantization_config in "
        "config.json), which is not loaded here: use the original checkpoint, in half precision "
        "with dtype='float16' or 'bfloat16', or a server that runs it (vLLM, "
        "text-embeddings-inference, Infinity) with endpoint='...'."
    )
    raise CheckpointError(msg)


def is_m3_architecture(checkpoint: Checkpoint, pooling: str | None) -> bool:
    """Return whether a checkpoint has bge-m3's architecture, whose pass gives all outputs.

    Args:
        checkpoint: What the checkpoint says of itself.
        pooling: The rows that make the dense vector.
    """
    return (
        checkpoint.family == "xlm-roberta"
        and checkpoint.only_standard_modules
        and not checkpoint.labels
        and pooling == "cls"
    )


def check_profile(profile: Profile | None, kind: Kind, name: str) -> None:
    """Refuse what the table of known checkpoints already rules out, before any file is there.

    Raises:
        CheckpointError: It is of the other kind, or this release doesn't serve it.
    """
    if profile is None:
        return
    if profile.kind != kind:
        if "/" in name and profile.id.casefold() != name.casefold():
            return  # somebody else's model of that name, which may have been trained from it
        raise _other_kind_error(profile, name)
    if profile.refusal is not None:
        msg = f"{name!r} is not supported: {profile.refusal}."
        raise CheckpointError(msg)


def _other_kind_error(profile: Profile, name: str) -> CheckpointError:
    use = (
        "a reranker class (BGEReranker, BGECrossEncoder)"
        if profile.kind == "reranker"
        else "an embedding class (BGEEmbeddings, BGEEmbedding)"
    )
    if "multi_vector" in profile.outputs:
        use += ", or to BGEReranker (bge_core.make_reranker), which scores with it"
    article = "a reranker" if profile.kind == "reranker" else "an embedding model"
    return CheckpointError(f"{name!r} is {article}: give it to {use}.")


def missing_head_error(checkpoint: Checkpoint, output: Output) -> CheckpointError:
    """Return the error that says that a checkpoint lacks the file of an output."""
    msg = (
        f"{checkpoint.name!r} has no {HEADS[output]} in {checkpoint.folder}, so it can't give "
        f"{output.replace('_', '-')} outputs: random numbers in its place would be noise. Take the "
        "file from BAAI/bge-m3 if the model was not trained further, or ask for dense alone."
    )
    return CheckpointError(msg)


def _digest_file(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= 1 << 24 and path.suffix in (".json", ".txt"):
            digest.update(file.read())
            return
        digest.update(str(size).encode())
        for block in range(256):
            file.seek(size * block // 256)
            digest.update(file.read(1024))


def _profiles(source: Source, folder: Path, config: JsonFile) -> list[Profile]:
    """Return the rows that a checkpoint goes by: its name's, its base model's, its classes'.

    A link's target counts where the link's own name says nothing.
    """
    names = [source.model]
    if source.is_local:
        path = folder
        while path.is_symlink() and len(names) < 40:  # a circle is no folder
            path = path.parent / path.readlink()
            names.append(str(path))
        names.append(str(folder.resolve()))
    rows = [find_profile(name) for name in names]
    own = next((row for row in rows if row is not None), None)
    trained = find_profile(str(config.values.get("_name_or_path") or ""))
    # What was trained from a backbone may well be served; what comes with its code may not.
    if trained is not None and trained.refusal is not None and not config.values.get("auto_map"):
        trained = None
    return [row for row in (own, trained, _profile_of(config)) if row is not None]


def _kind(
    config: JsonFile, labels: int, modules: list[_Module] | None, named: list[Profile]
) -> Kind:
    """Return what a checkpoint is, by what is in it; its name counts where that fits both kinds."""
    if labels:
        return "reranker"
    if any(module.kind == "Pooling" for module in modules or ()):
        return "embedder"
    if named and named[0].kind == "reranker" and _is_architecture(config, "ForCausalLM"):
        return "reranker"
    return "embedder"


def _is_architecture(config: JsonFile, ending: str) -> bool:
    architectures = config.values.get("architectures") or []
    if not isinstance(architectures, list):
        config.refuse(f"architectures must be a list, it is {architectures!r:.60}")
    return any(str(name).endswith(ending) for name in architectures)


def _check_sizes(config: JsonFile) -> None:
    """Refuse sizes that no model can have, before somebody makes room for them."""
    for name, least in _SIZES.items():
        config.whole(name, least, least=least)
    for name, most in _MOST.items():
        if config.whole(name, 1) > most:
            config.refuse(f"{name} is more than {most:,}")


def _quantization(config: JsonFile) -> str | None:
    """Say how the weights are quantised; None for not."""
    # The second is compressed-tensors' older word.
    said = config.values.get("quantization_config") or config.values.get("compression_config")
    if not said:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else None
    return f"{method or 'a method that it does not name'}"


def _lengths(
    config: JsonFile, reading: JsonFile, transformer_folder: Path, profile: Profile | None
) -> tuple[int, int]:
    """Return the tokens that there are positions for, and those that are read by default."""
    of_roberta = config.values["model_type"] in _OFFSET_FAMILIES
    positions = config.whole("max_position_embeddings", 512)
    if positions < 0:  # XLNet's word for any number
        positions = 1 << 30
    if of_roberta:
        positions -= _pad(config, config.values["model_type"]) + 1
    if positions < 1:
        config.refuse(f"max_position_embeddings leaves {positions} positions for tokens")
    capacity = min(positions, profile.max_length if profile else 1 << 30)
    settings = _tokenizer_settings(reading)
    saved = JsonFile(transformer_folder / "tokenizer_config.json").whole(
        "model_max_length", capacity
    )
    if isinstance(given := settings.get("model_max_length"), int):
        saved = given
    elif reading.values.get("max_seq_length") is not None:
        saved = reading.whole("max_seq_length", capacity, least=1)
    if saved < 1:
        reading.refuse(f"model_max_length must be 1 or more, it is {saved}")
    return capacity, min(saved, capacity)


def _pad(config: JsonFile, family: str) -> int:
    """Return the padding token's id; transformers' own default where config.json has none."""
    if family in _OFFSET_FAMILIES:
        return config.whole("pad_token_id", 1, least=0)
    pad, vocabulary = config.whole("pad_token_id", 0), config.whole("vocab_size", 1 << 31)
    # Some decoders have -1 for none.
    return pad if 0 <= pad < vocabulary else 0


def _reading(transformer_folder: Path) -> JsonFile:
    """Read sentence-transformers' settings of the tokenizer, by whichever name they have."""
    for name in _READING_FILES:
        found = JsonFile(transformer_folder / name)
        if found.values:
            return found
    return JsonFile(transformer_folder / _READING_FILES[0])


def _check_reading(reading: JsonFile) -> None:
    """Refuse settings that are not honoured here, since other vectors would come of it."""
    for name, purpose in _UNSERVED.items():
        if reading.values.get(name):
            _refuse_setting(reading, f"{name} is for {purpose}")
    task = reading.values.get("transformer_task")
    if task not in (None, "feature-extraction"):
        _refuse_setting(
            reading, f"transformer_task={task!r:.60} is for other models than embedders"
        )
    modalities = reading.mapping("modality_config")
    text = modalities.get("text")
    if modalities and (
        "message" in modalities
        or not isinstance(text, dict)
        or (text.get("method"), text.get("method_output_name")) != ("forward", "last_hidden_state")
    ):
        _refuse_setting(reading, "modality_config puts texts into a chat, or reads no texts")
    for name in ("tokenizer_args", "processor_kwargs"):
        known = (*_TOKENIZER_SETTINGS, *_HARMLESS_OF_A_TOKENIZER)
        if other := [key for key in reading.mapping(name) if key not in known]:
            _refuse_setting(reading, f"{name} sets {', '.join(other)} of the tokenizer")


def _refuse_setting(reading: JsonFile, what: str) -> None:
    msg = (
        f"{reading.path} has a setting that is not honoured here: {what}. Load the model with "
        "sentence-transformers, or take the setting out if it makes no difference to its vectors."
    )
    raise CheckpointError(msg)


def _changes_model(reading: JsonFile) -> bool:
    """Return whether sentence-transformers would load the model with settings of its own."""
    names = ("model_args", "model_kwargs", "config_args", "config_kwargs")
    return any(key not in _HARMLESS for name in names for key in reading.mapping(name))


def _tokenizer_settings(reading: JsonFile) -> dict[str, Any]:
    return reading.mapping("tokenizer_args") or reading.mapping("processor_kwargs")


def _truncation_side(reading: JsonFile, transformer_folder: Path) -> str:
    file = JsonFile(transformer_folder / "tokenizer_config.json")
    side = (
        _tokenizer_settings(reading).get("truncation_side")
        or file.values.get("truncation_side")
        or "right"
    )
    if side not in ("left", "right"):
        file.refuse(f"truncation_side must be 'left' or 'right', it is {side!r:.60}")
    return str(side)


@dataclass(frozen=True, slots=True)
class _Module:
    """An entry of modules.json.

    Attributes:
        kind: The class's name, without its package.
        path: Its folder inside the checkpoint.
        own: The class is sentence-transformers' own.
    """

    kind: str
    path: str
    own: bool


def _labels(config: JsonFile) -> int:
    if not _is_architecture(config, "ForSequenceClassification"):
        return 0
    # transformers' default is two labels, and id2label is how config.json says otherwise.
    labels = config.values.get("id2label")
    if isinstance(labels, dict) and labels:
        return len(labels)
    return config.whole("num_labels", 2, least=1)


def _profile_of(config: JsonFile) -> Profile | None:
    """Return the row of a model that was trained further, where its classes are one row's own."""
    named = config.values.get("architectures")
    names = map(str, named if isinstance(named, list) else ())  # a file may have anything there
    rows = (_LAYERWISE_CLASSES.get(name) for name in names)
    return next((PROFILES[row] for row in rows if row is not None), None)


def _layer_heads(name: str, config: JsonFile, profile: Profile | None) -> LayerHeads | None:
    """Return after which layers a checkpoint has a score.

    Raises:
        CheckpointError: Its layers or heads are not those of the published checkpoint.
    """
    published = profile.layer_heads if profile else None
    if published is None or profile is None or _labels(config):
        return None
    values = config.values
    families = ("gemma2", "cost_wise_gemma") if published.compresses else ("minicpm",)
    if published.compresses:
        heads = values.get("layer_wise") is True
    else:
        heads = values.get("head_multi", True) is True
        heads = heads and values.get("head_type", "simple") == "simple"
    if values["model_type"] not in families or not heads:
        msg = (
            f"{config.path} describes another model than {profile.id}, as which {name!r} is known: "
            f"one of model_type {families[-1]!r} with a head of one score after each layer was "
            "expected. Fetch the checkpoint again, or give the folder another name."
        )
        raise CheckpointError(msg)
    last = config.whole("num_hidden_layers", 0)
    first = config.whole("start_layer", published.first, least=0)
    if first > last:
        config.refuse(f"start_layer={first} is none of num_hidden_layers={last}")
    step = config.whole("layer_sep", 1, least=1)
    return LayerHeads(first=first, last=last, step=step, compresses=published.compresses)


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
        _Module(
            kind=module["type"].rpartition(".")[2],
            path=module.get("path", ""),
            own=module["type"].startswith("sentence_transformers."),
        )
        for module in listed
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


def _is_plain(modules: list[_Module] | None) -> bool:
    """Return whether modules are a transformer, its pooling and normalisation, and nothing else."""
    if modules is None:
        return True
    kinds = [module.kind for module in modules]
    return (
        all(module.own for module in modules)
        and kinds[:2] == ["Transformer", "Pooling"]
        and set(kinds[2:]) <= {"Normalize"}
    )


def _pooling(folder: Path, modules: list[_Module] | None) -> tuple[str | None, bool]:
    """Return the pooling's mode, None where nothing says it, and whether it pools prompts, too."""
    module = next((module for module in modules or () if module.kind == "Pooling"), None)
    if module is None:
        return None, True
    config = JsonFile(folder / module.path / "config.json")
    mode = config.values.get("pooling_mode")
    modes = mode if isinstance(mode, list) else [mode] if mode else []
    modes = modes or [name for key, name in _POOLING_KEYS.items() if config.flag(key)]
    if not modes:
        config.refuse("it names no pooling mode")
    for name in modes:
        if name not in _POOLING_MODES:
            config.refuse(f"pooling mode {name!r:.60} is none of {', '.join(_POOLING_MODES)}")
    named = "+".join("last" if name == "lasttoken" else name for name in modes)
    return named, config.flag("include_prompt", default=True)


def _prompts(config: JsonFile) -> dict[str, str]:
    """Return the prompts of queries and of documents, as `SentenceTransformer.encode` has them.

    An empty prompt says nothing: sentence-transformers writes them into every folder it saves.
    """
    prompts = {}
    for name, text in config.mapping("prompts").items():
        if text is not None:
            try:
                prompts[name] = arguments.text(f"the prompt {name!r:.60}", text)
            except BGEError as exc:
                config.refuse(str(exc).rstrip("."))
    default = config.values.get("default_prompt_name")
    known = ("query", "document", *prompts)  # a tuple: a list has no hash
    if default is not None and default not in known:
        config.refuse(f"default_prompt_name {default!r:.60} is none of its prompts")
    names = {"query": ("query",), "document": ("document", "passage", "corpus")}
    found = {}
    for role, words in names.items():
        other = [word for each in names.values() for word in each if word not in words]
        given = [prompts[word] for word in words if prompts.get(word)]
        # A default that is named after the other role is not for this one.
        if not given and default is not None and default not in other:
            given = [prompts.get(default, "")]
        if given and given[0]:
            found[role] = given[0]
    return found
