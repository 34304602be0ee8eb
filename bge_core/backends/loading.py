"""A checkpoint's tokenizer, weights and heads, loaded by transformers, torch and tokenizers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, TypeVar
from zipfile import is_zipfile

import numpy as np

from bge_core.checkpoints.files import (
    JsonFile,
    first_line,
    other_weights,
    variant_of,
    weight_files,
)
from bge_core.checkpoints.metadata import HEADS, missing_head_error
from bge_core.errors import BGEError, CheckpointError, ComputationError
from bge_core.tokenizer import Tokenizer, TokenSequence

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from bge_core.backends.base import Runner
    from bge_core.checkpoints.catalog import Output
    from bge_core.checkpoints.metadata import Checkpoint, Kind

__all__ = [
    "Originals",
    "check_computes",
    "check_numbers",
    "checked_weight_files",
    "copied_to",
    "copy_weights",
    "load_head",
    "load_model",
    "load_tensors",
    "load_tokenizer",
    "no_progress_bars",
    "out_of_memory_error",
]

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound="torch.nn.Module")
Loaded = TypeVar("Loaded", bound="torch.nn.Module | None")

# Those whose fast versions in transformers 4 went by tokenizer_config.json.
_MARKED_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast")
# Under transformers' word for them; the first that is there.
_TOKENIZER_FILES = {
    "tokenizer_file": ("tokenizer.json",),
    "vocab_file": ("vocab.txt", "sentencepiece.bpe.model", "tokenizer.model"),
}


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Tokenizer:
    """Load a checkpoint's fast tokenizer.

    Raises:
        CheckpointError: It has none, or it is damaged.
    """
    try:
        return _load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    except BGEError:
        raise
    except Exception as exc:
        raise _unreadable(checkpoint, "tokenizer", exc) from exc


def _load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Tokenizer:
    from transformers import AutoTokenizer, PretrainedConfig

    folder = checkpoint.transformer_folder
    own = {
        word: next((str(path) for name in names if (path := folder / name).is_file()), None)
        for word, names in _TOKENIZER_FILES.items()
    }
    if own["tokenizer_file"] is None and own["vocab_file"] is None:
        names = ", ".join(name for names in _TOKENIZER_FILES.values() for name in names)
        msg = (
            f"{checkpoint.name!r} has no tokenizer: {folder} has none of {names}. Save it "
            "there with tokenizer.save_pretrained(folder)."
        )
        raise CheckpointError(msg)
    # What transformers has no model for, it would look for in the checkpoint's own code.
    config = {} if checkpoint.layer_heads is None else {"config": PretrainedConfig()}
    loaded = AutoTokenizer.from_pretrained(
        folder,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        **config,
        # transformers 4 would follow paths in tokenizer_config.json, which are its maker's.
        **own,
    )
    if not loaded.is_fast:
        msg = (
            f"{checkpoint.name!r} has no fast tokenizer: save one, a tokenizer.json, into "
            f"{folder} with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
        raise CheckpointError(msg)
    _set_bos_eos(loaded, JsonFile(folder / "tokenizer_config.json").values)
    if 0 < checkpoint.vocabulary < len(loaded):
        msg = (
            f"The tokenizer of {checkpoint.name!r} in {folder} has {len(loaded)} tokens, "
            f"and the weights embed {checkpoint.vocabulary} (vocab_size in config.json): one of "
            "the two is of another model; fetch the checkpoint again."
        )
        raise CheckpointError(msg)
    specials = (loaded.cls_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id)
    return Tokenizer(
        loaded.backend_tokenizer,
        pad=checkpoint.pad_token_id,
        lower_case=checkpoint.lower_case,
        bos=loaded.bos_token_id,
        truncation_side=checkpoint.truncation_side,
        special_token_ids={special for special in specials if special is not None},
    )


def _set_bos_eos(loaded: Any, settings: Mapping[str, Any]) -> None:
    """Add the first and the last token that tokenizer_config.json asks for.

    transformers 5 adds those of tokenizer.json alone, where transformers 4 went by these settings
    for the classes named here. The decoders come from the time of transformers 4, and their
    vector is that of the last token.
    """
    if settings.get("tokenizer_class") in _MARKED_CLASSES and "add_eos_token" in settings:
        loaded.add_bos_token = bool(settings.get("add_bos_token", True))
        loaded.add_eos_token = bool(settings["add_eos_token"])


def load_model(
    checkpoint: Checkpoint,
    *,
    kind: Kind,
    dtype: str,
    trust_remote_code: bool,
    copied: bool = True,
) -> PreTrainedModel:
    """Load a checkpoint's weights, onto the CPU, in evaluation mode.

    Args:
        checkpoint: What the checkpoint says of itself.
        kind: `"embedder"` or `"reranker"`.
        dtype: The number format of the weights.
        trust_remote_code: Run Python code that the checkpoint carries.
        copied: Into memory, so that the file may change; False where they are copied to a device.

    Raises:
        CheckpointError: The weights are missing, damaged or of another shape.
    """
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification

    weights = checked_weight_files(checkpoint)
    loader: Any = AutoModel if kind == "embedder" else AutoModelForSequenceClassification
    if kind == "reranker" and checkpoint.pair_prompt is not None:
        from transformers import AutoModelForCausalLM

        loader = AutoModelForCausalLM
    try:
        with no_progress_bars():
            model, report = loader.from_pretrained(
                checkpoint.transformer_folder,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=weights[0].suffix == ".safetensors",
                variant=variant_of(weights[0]),
                output_loading_info=True,
            )
    except Exception as exc:
        raise _unreadable(checkpoint, "weights", exc) from exc
    # A pooler is extra on an encoder; anything else that is missing would be random numbers.
    missing = sorted(
        name for name in report["missing_keys"] if kind == "reranker" or "pooler." not in name
    )
    if missing:
        raise _missing_error(checkpoint, missing)
    if copied:
        copy_weights(model)
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model  # type: ignore[no-any-return]


def copy_weights(model: torch.nn.Module) -> None:
    """Copy a model's numbers into memory of their own.

    transformers maps the file instead: whoever overwrote it later would change the model, and
    whoever cut it would end the process.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def copied_to(module: Module, device: torch.device) -> Module:
    """Copy a module onto another device, without a further copy where it is."""
    import torch

    copies: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        copied = tensor.detach().to(device, copy=True)
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
        copies[id(tensor)] = copied
    # With these in place of what it would copy itself; a tensor that is used twice stays one.
    return copy.deepcopy(module, copies)


class Originals:
    """What was loaded of a checkpoint for the first of its devices: the others get copies.

    Args:
        name: The checkpoint's name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._modules: dict[str, Any] = {}

    def on(self, what: str, device: torch.device, load: Callable[[], Loaded]) -> Loaded:
        """Return a module on a device, from the files the first time.

        Args:
            what: Which module it is.
            device: Where it is to be.
            load: Loads it, onto the device or, if the module is changed afterwards, elsewhere.

        Raises:
            ComputationError: A copy doesn't fit on the device.
        """
        if what not in self._modules:
            self._modules[what] = load()
        original: Loaded = self._modules[what]
        if original is None or next(original.parameters()).device == device:
            return original
        from bge_core.backends.memory import is_out_of_memory

        try:
            return copied_to(original, device)
        except Exception as exc:
            if is_out_of_memory(exc):
                raise out_of_memory_error(self._name, device) from exc
            # A model's own code may hold what Python can't copy.
            logger.debug("%r is loaded again for %s: %s", self._name, device, exc)
            return load()


def _check_size(checkpoint: Checkpoint, weights: list[Path]) -> None:
    """Refuse a config.json that describes far more than the weights, before room is made for it."""
    config = JsonFile(checkpoint.transformer_folder / "config.json")
    width = config.whole("hidden_size", 1, least=1)
    of_a_layer = config.whole("intermediate_size", 1, least=1) + config.whole(
        "num_attention_heads", 1, least=1
    ) * config.whole("head_dim", 1, least=1)
    rows = config.whole("vocab_size", 1, least=1)
    rows += config.whole("num_hidden_layers", 1, least=1) * of_a_layer
    if "type_vocab_size" in config.values:  # of models with a table of positions
        rows += config.whole("type_vocab_size", 0, least=0)
        rows += max(config.whole("max_position_embeddings", 0), 0)
    stored = sum(path.stat().st_size for path in weights)
    # A number takes a byte at the least; some models use a layer's several times.
    if rows * width > 16 * stored:
        if weights[0].suffix == ".bin":  # what is no tensors at all is worse
            import torch

            try:
                torch.load(weights[0], map_location="meta", weights_only=True)
            except Exception as exc:
                raise _unreadable(checkpoint, "weights", exc) from exc
        msg = (
            f"config.json of {checkpoint.name!r} in {config.path.parent} describes a model of "
            f"{rows * width:,} numbers or more, and its weights have {stored:,} bytes: it is "
            "another model's, or damaged; fetch the checkpoint again."
        )
        raise CheckpointError(msg)


def check_computes(checkpoint: Checkpoint, runner: Runner) -> None:
    """Refuse a model that can't compute three tokens: some settings are looked at only then.

    Raises:
        CheckpointError: It can't.
    """
    from bge_core.backends.memory import is_out_of_memory

    try:
        runner.run([TokenSequence(np.full(3, checkpoint.pad_token_id, np.int32), 3)])
    except Exception as exc:
        if is_out_of_memory(exc):  # which has nothing to do with the checkpoint
            raise
        raise _unreadable(checkpoint, "weights", exc) from exc


def load_tensors(
    checkpoint: Checkpoint,
    shapes: Mapping[str, torch.Size],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Load some of a checkpoint's tensors onto a device, each a copy of its own.

    Args:
        checkpoint: What the checkpoint says of itself.
        shapes: The names of those that are needed, and their shapes.
        dtype: The number format that they get.
        device: Where they go.

    Raises:
        CheckpointError: The weights are missing, damaged or of another shape.
        ComputationError: They don't fit on the device.
    """
    import torch
    from safetensors import safe_open

    from bge_core.backends.memory import is_out_of_memory

    found: dict[str, torch.Tensor] = {}
    for file in checked_weight_files(checkpoint):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    for name in shapes.keys() & set(opened.keys()):
                        found[name] = opened.get_tensor(name).to(device, dtype, copy=True)
            else:
                read = torch.load(file, map_location="cpu", weights_only=True)
                for name in shapes.keys() & read.keys():
                    found[name] = read[name].to(device, dtype, copy=True)
        except Exception as exc:
            if is_out_of_memory(exc):
                raise out_of_memory_error(checkpoint.name, device) from exc
            raise _unreadable(checkpoint, "weights", exc) from exc
    if missing := sorted(shapes.keys() - found.keys()):
        raise _missing_error(checkpoint, missing)
    for name, shape in shapes.items():
        if found[name].shape != shape:
            msg = (
                f"The weights of {checkpoint.name!r} in {checkpoint.transformer_folder} are of "
                f"another model: {name!r} is of shape {list(found[name].shape)}, and config.json "
                f"describes {list(shape)}. Fetch the checkpoint again."
            )
            raise CheckpointError(msg)
    return found


def checked_weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files of a checkpoint's weights.

    Raises:
        CheckpointError: There are none, or not of the numbers that are computed with.
    """
    folder = checkpoint.transformer_folder
    files = weight_files(folder)
    if not files:
        end = "; fetch it again."
        msg = (
            f"{checkpoint.name!r} has no weights: {folder} has neither "
            f"model.safetensors nor pytorch_model.bin{other_weights(folder) or end}"
        )
        raise CheckpointError(msg)
    _check_size(checkpoint, files)
    check_numbers(checkpoint, files)
    return files


def check_numbers(checkpoint: Checkpoint, files: Sequence[Path]) -> None:
    """Refuse weights that are quantised without a word: as plain numbers they would be noise.

    Raises:
        CheckpointError: A weight is of whole numbers, or of 8 bits with a scale beside it.
    """
    for file in files:
        try:
            formats = _formats(file)
        except Exception:  # noqa: BLE001 -- a damaged file is called so where it is loaded
            return
        scaled = any(name.endswith(("_scale", "_scale_inv")) for name in formats)
        for name, format_ in sorted(formats.items()):
            whole = format_.startswith(("I", "U", "int", "uint"))
            eighth = format_.startswith(("F8", "float8")) and scaled
            if name.endswith(("weight", "bias")) and (whole or eighth):
                msg = (
                    f"The weights of {checkpoint.name!r} in {file} are quantised ({name!r} is of "
                    f"{format_.lower()}), and config.json has no quantization_config that says "
                    "how: computed with as they are, they would give noise. Use the original "
                    "checkpoint, or a server that runs this one with endpoint='...'."
                )
                raise CheckpointError(msg)


def _formats(file: Path) -> dict[str, str]:
    """Return the number format of each tensor in a file."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "np") as opened:
            return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    import torch

    # Mapped, so that no number is read; files from before torch 1.6 can't be.
    tensors = torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
    return {
        name: str(tensor.dtype).removeprefix("torch.")
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }


def _missing_error(checkpoint: Checkpoint, missing: Sequence[str]) -> CheckpointError:
    msg = (
        f"The weights of {checkpoint.name!r} in {checkpoint.transformer_folder} lack "
        f"{len(missing)} of the model's tensors, {missing[0]!r} first: computing with random ones "
        "in their place would give noise. Fetch the checkpoint again."
    )
    return CheckpointError(msg)


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
    if output not in checkpoint.m3_heads:
        raise missing_head_error(checkpoint, output)
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


def out_of_memory_error(name: str, device: object) -> ComputationError:
    """Return the error that says that a model doesn't fit on a device."""
    msg = (
        f"{name!r} doesn't fit into the memory of device={str(device)!r}: pass dtype='float16' or "
        "'bfloat16', another device, or free memory there."
    )
    return ComputationError(msg)


@contextmanager
def no_progress_bars() -> Iterator[None]:
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


def _unreadable(
    checkpoint: Checkpoint, what: str, error: Exception
) -> CheckpointError | ComputationError:
    from bge_core.backends.memory import is_out_of_memory

    if any(is_out_of_memory(exc) for exc in _chain(error)):
        return out_of_memory_error(checkpoint.name, "cpu")
    folder = checkpoint.transformer_folder
    if "trust_remote_code" in str(error):
        msg = (
            f"{checkpoint.name!r} carries Python code of its own for its {what}, which was not "
            "run: it could do anything that you can. If you have read it and trust it, pass "
            "trust_remote_code=True."
        )
    elif any(isinstance(e, UnpicklingError) or "weights_only" in str(e) for e in _chain(error)):
        msg = (
            f"There is more than tensors in the {what} of {checkpoint.name!r} in "
            f"{folder}: the file is damaged, or a pickle with code in it, which was not "
            "run. Use a checkpoint with model.safetensors, from a publisher whom you trust."
        )
    elif missing := next((e for e in _chain(error) if isinstance(e, ImportError)), None):
        msg = (
            f"The {what} of {checkpoint.name!r} in {folder} can't be loaded without a "
            f"package that is not installed here ({first_line(missing)}): install it."
        )
    elif denied := next((e for e in _chain(error) if isinstance(e, PermissionError)), None):
        msg = (
            f"The {what} of {checkpoint.name!r} in {folder} can't be read "
            f"({first_line(denied)}): check that this user may read it."
        )
    else:
        msg = (
            f"The {what} of {checkpoint.name!r} in {folder} can't be read "
            f"({first_line(error)}): the files are damaged or incomplete, or config.json "
            "describes another model; fetch the checkpoint again."
        )
    return CheckpointError(msg)


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    """Return an error and what it came of."""
    while exc is not None:
        yield exc
        exc = exc.__context__
