"""`model_kwargs` and `encode_kwargs` as users of LangChain's HuggingFace classes write them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

from bge_core import ArgumentError
from bge_core.arguments import shown

__all__ = ["ENCODE_KEYS", "MODEL_KEYS", "fold"]

logger = logging.getLogger(__name__)

MODEL_KEYS = {
    "backend": "backend",
    "cache_folder": "cache_folder",
    "device": "device",
    "dtype": "dtype",
    "local_files_only": "local_files_only",
    "revision": "revision",
    "token": "token",
    "torch_dtype": "dtype",
    "trust_remote_code": "trust_remote_code",
}
"""A key of `model_kwargs` -> the argument that it means."""

ENCODE_KEYS = {
    "device": "device",
    "normalize_embeddings": "normalize_embeddings",
    "show_progress_bar": "show_progress",
}
"""A key of `encode_kwargs` -> the argument that it means."""

# They say how sentence-transformers works, not what comes out, which is lists in any case.
_NO_EFFECT = ("batch_size", "convert_to_numpy", "convert_to_tensor")

_PROMPT = "write query_instruction='...' and, for models that want one, document_instruction='...'"
_HINTS = {
    "activation_fn": "write normalize=False for raw logits, normalize=True for their sigmoid",
    "attn_implementation": "the attention is this package's own, so leave it out",
    "default_prompt_name": _PROMPT,
    "max_seq_length": "write max_length=...",
    "precision": "vectors are float32, so leave it out",
    "prompt": _PROMPT,
    "prompt_name": _PROMPT,
    "prompts": _PROMPT,
    "truncate_dim": "it is an embedding's: a score has no dimension, so leave it out",
}


def fold(arguments: Mapping[str, Any], *, of: str, keys: Mapping[str, str]) -> dict[str, Any]:
    """Write the keys of one dict among the arguments as the arguments that they mean.

    Args:
        arguments: What a constructor was given.
        of: The dict's name, such as `"model_kwargs"`; it is left as it is.
        keys: A key -> the argument that it means.

    Returns:
        The arguments, with those that the dict gives.

    Raises:
        ArgumentError: A key that is not supported, or that disagrees with an argument.
    """
    folded = dict(arguments)
    for label, key, value in _entries(of, arguments.get(of)):
        if key in _NO_EFFECT and of == "encode_kwargs":
            if key == "batch_size":
                _check_batch_size(label, value)
            logger.debug("%s has no effect: batches are sized in tokens (batch_tokens).", label)
            continue
        if key not in keys:
            hint = _HINTS.get(key, f"the keys are {', '.join(keys)}; leave it out")
            msg = f"{label} is not supported: {hint}."
            raise ArgumentError(msg)
        name = keys[key]
        if value is None:
            continue
        # No values in the message: one of them may be a token.
        if folded.get(name) is not None and _without_torch(folded[name]) != _without_torch(value):
            msg = (
                f"{label} and {name} are one setting, and two values were given for it: pass "
                f"{name}=... and drop the key."
            )
            raise ArgumentError(msg)
        folded[name] = value
    return folded


def _entries(label: str, given: object) -> Iterator[tuple[str, Any, Any]]:
    if not isinstance(given, Mapping):
        return  # the field's own type refuses what is no dict
    for key, value in given.items():
        here = f"{label}[{key!r}]"
        if key == "model_kwargs" and isinstance(value, Mapping):
            # HuggingFaceEmbeddings reaches the transformers model by a dict in the dict.
            yield from _entries(here, value)
        else:
            yield here, key, value


def _check_batch_size(label: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        msg = f"{label} must be a whole number, 1 or more, got {shown(value)}."
        raise ArgumentError(msg)


def _without_torch(value: object) -> str:
    return str(value).removeprefix("torch.")
