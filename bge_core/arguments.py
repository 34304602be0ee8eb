"""Argument checks: is it a text, a number, one of these words? If not, a sentence says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal, get_args

from bge_core.errors import ArgumentError, InputTypeError

__all__ = [
    "LongPassages",
    "OnTruncation",
    "check_long_passages",
    "check_on_truncation",
    "check_pairs",
    "check_text",
    "check_texts",
]

OnTruncation = Literal["ignore", "warn", "error"]
LongPassages = Literal["truncate", "window"]


def check_on_truncation(value: str) -> OnTruncation:
    """Refuse an unknown truncation policy.

    Raises:
        ArgumentError: `value` is none of "ignore", "warn" and "error".
    """
    for word in get_args(OnTruncation):
        if value == word:
            return word  # type: ignore[no-any-return]
    msg = f"on_truncation={value!r} is not served: use 'ignore', 'warn' or 'error'."
    raise ArgumentError(msg)


def check_long_passages(value: str) -> LongPassages:
    """Refuse an unknown way with what doesn't fit.

    Raises:
        ArgumentError: `value` is neither "truncate" nor "window".
    """
    for word in get_args(LongPassages):
        if value == word:
            return word  # type: ignore[no-any-return]
    msg = f"long_passages={value!r} is not served: use 'truncate' or 'window'."
    raise ArgumentError(msg)


def check_text(text: object, argument: str) -> str:
    """Refuse what is no text, or no valid Unicode, naming the argument.

    Raises:
        InputTypeError: Not a str.
        ArgumentError: A str with a lone surrogate, which no tokenizer can read.
    """
    if not isinstance(text, str):
        msg = f"{argument} must be a str, got {_kind(text)}."
        raise InputTypeError(msg)
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        msg = (
            f"{argument} has a lone surrogate (U+{ord(text[exc.start]):04X}) at character "
            f"{exc.start}, so it is not valid Unicode. Repair it with "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        )
        raise ArgumentError(msg) from exc
    # A subclass such as numpy.str_ becomes a plain str.
    return text if type(text) is str else str.__str__(text)


def check_texts(texts: object, argument: str) -> list[str]:
    """Refuse what is no list of texts, naming the argument and the item.

    Args:
        texts: A list, a tuple, an array of strings or any other iterable with an order.
        argument: Its name, for the message.

    Raises:
        InputTypeError: A single str, None, a mapping, a set, or an item that is no str.
        ArgumentError: An item with a lone surrogate.
    """
    if isinstance(texts, str):
        msg = f"{argument} must be a list of str, got one str: put it in a list, [text]."
        raise InputTypeError(msg)
    if not isinstance(texts, Iterable) or isinstance(
        texts, (bytes, bytearray, Mapping, AbstractSet)
    ):
        msg = f"{argument} must be a list of str, got {_kind(texts)}."
        raise InputTypeError(msg)
    return [check_text(text, f"{argument}[{index}]") for index, text in enumerate(texts)]


def check_pairs(pairs: object) -> list[tuple[str, str]]:
    """Refuse what is no list of pairs of texts.

    Raises:
        InputTypeError: It is no list, or an item is no pair of str.
        ArgumentError: A text with a lone surrogate.
    """
    if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes, Mapping, AbstractSet)):
        msg = f"pairs must be a list of (query, passage), got {type(pairs).__name__}."
        raise InputTypeError(msg)
    checked = []
    for index, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            msg = f"pairs[{index}] must be (query, passage), got {pair!r:.60}."
            raise InputTypeError(msg)
        checked.append(
            (check_text(pair[0], f"pairs[{index}][0]"), check_text(pair[1], f"pairs[{index}][1]"))
        )
    return checked


def _kind(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} ({str(value)[:40]!r})"


def check_secret(name: str, secret: object) -> str:
    """Give a token as an HTTP header carries it: one that was read from a file ends with a newline.

    Args:
        name: The argument's name.
        secret: What was given; it is in no message.

    Raises:
        InputTypeError: It is no str.
        ArgumentError: It is empty, or no header can carry it.
    """
    if not isinstance(secret, str):
        msg = f"{name} must be a str or None, got {type(secret).__name__}."
        raise InputTypeError(msg)
    bare = secret.strip()
    if not bare or not (bare.isascii() and bare.isprintable()):
        msg = f"{name} is empty, or has characters that no HTTP header can carry: pass the token."
        raise ArgumentError(msg)
    return bare
