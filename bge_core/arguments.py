"""Argument checks: is it a text, a number, one of these words? If not, a sentence says so.

Each check takes the argument's name and its value, and returns the value as the rest of the code
may take it. Used as `arguments.text("query", query)`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Integral, Real
from typing import Literal, TypeGuard, TypeVar, get_args

from bge_core.errors import ArgumentError, InputTypeError

__all__ = [
    "LONG_PASSAGES",
    "ON_TRUNCATION",
    "PRIORITIES",
    "LongPassages",
    "OnTruncation",
    "Priority",
    "counted",
    "flag",
    "is_list",
    "name_hint",
    "number",
    "one_of",
    "pairs",
    "secret",
    "shown",
    "text",
    "texts",
    "whole_number",
]

OnTruncation = Literal["ignore", "warn", "error"]
LongPassages = Literal["truncate", "window"]
Priority = Literal["interactive", "background"]

ON_TRUNCATION: tuple[OnTruncation, ...] = get_args(OnTruncation)
LONG_PASSAGES: tuple[LongPassages, ...] = get_args(LongPassages)
PRIORITIES: tuple[Priority, ...] = get_args(Priority)

Word = TypeVar("Word", bound=str)


def shown(value: object, *, most: int = 60) -> str:
    """Return `most` characters of a value's `repr` for a message, or its type's name without one.

    What is cut ends with an ellipsis.

    Python writes no whole number of more than 4,300 digits, and a class may fail in ways of its
    own: neither may hide the sentence that says what is wrong.
    """
    try:
        written = repr(value)
    except Exception:  # noqa: BLE001 -- whatever a class raises
        return f"a value of type {type(value).__name__}"
    return written if len(written) <= most else f"{written[: most - 1]}…"


def counted(number: int, noun: str) -> str:
    """Return a number with what it counts: `1 null`, `2 nulls`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def name_hint(name: str, known: Iterable[str]) -> str:
    """Return what to write instead of an argument that isn't there: a like name, or all of them."""
    names = sorted(known)
    # Closer than difflib's own 0.6, by which truncate_dim is like on_truncation.
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(names)}."


def is_list(value: object) -> TypeGuard[Iterable[object]]:
    """Return whether a value gives items in an order: a list, a tuple, a generator, an array.

    A str, bytes, a mapping and a set are none, nor is an array without a dimension, whose class
    has `__iter__` all the same.
    """
    if isinstance(value, (str, bytes, bytearray, Mapping, AbstractSet)):
        return False
    return isinstance(value, Iterable) and getattr(value, "shape", None) != ()


def text(name: str, value: object) -> str:
    """Refuse what is no text, or no valid Unicode, naming the argument.

    Raises:
        InputTypeError: Not a str.
        ArgumentError: A str with a lone surrogate, which no tokenizer can read.
    """
    if not isinstance(value, str):
        msg = f"{name} must be a str, got {_kind(value)}."
        raise InputTypeError(msg)
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        msg = (
            f"{name} has a lone surrogate (U+{ord(value[exc.start]):04X}) at character "
            f"{exc.start}, so it is not valid Unicode. Repair it with "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        )
        raise ArgumentError(msg) from exc
    # A subclass such as numpy.str_ becomes a plain str.
    return value if type(value) is str else str.__str__(value)


def texts(name: str, value: object) -> list[str]:
    """Refuse what is no list of texts, naming the argument and the item.

    Args:
        name: The argument's name, for the message.
        value: A list, a tuple, an array of strings or any other iterable with an order.

    Raises:
        InputTypeError: A single str, None, a mapping, a set, or an item that is no str.
        ArgumentError: An item with a lone surrogate.
    """
    if isinstance(value, str):
        msg = f"{name} must be a list of str, got one str: put it in a list, [text]."
        raise InputTypeError(msg)
    if not is_list(value):
        msg = f"{name} must be a list of str, got {_kind(value)}."
        raise InputTypeError(msg)
    return [text(f"{name}[{index}]", item) for index, item in enumerate(value)]


def pairs(name: str, value: object) -> list[tuple[str, str]]:
    """Refuse what is no list of pairs of texts.

    Raises:
        InputTypeError: It is no list, or an item is no pair of str.
        ArgumentError: A text with a lone surrogate.
    """
    if not is_list(value):
        msg = f"{name} must be a list of (query, passage), got {type(value).__name__}."
        raise InputTypeError(msg)
    checked = []
    for index, pair in enumerate(value):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            msg = f"{name}[{index}] must be (query, passage), got {shown(pair)}."
            raise InputTypeError(msg)
        checked.append((text(f"{name}[{index}][0]", pair[0]), text(f"{name}[{index}][1]", pair[1])))
    return checked


def secret(name: str, value: object) -> str:
    """Return a token as an HTTP header carries it: one read from a file ends with a newline.

    Args:
        name: The argument's name.
        value: What was given; no message shows it.

    Raises:
        InputTypeError: It is no str.
        ArgumentError: It is empty, or no header can carry it.
    """
    if not isinstance(value, str):
        msg = f"{name} must be a str or None, got {type(value).__name__}."
        raise InputTypeError(msg)
    bare = value.strip()
    if not bare or not (bare.isascii() and bare.isprintable()):
        msg = f"{name} is empty, or has characters that no HTTP header can carry: pass the token."
        raise ArgumentError(msg)
    return bare


def whole_number(
    name: str, value: object, *, least: int = 1, unit: str = "", instead: str = ""
) -> int:
    """Refuse what is no whole number, or too small a one.

    Args:
        name: The argument's name.
        value: An int, or a numpy integer. A bool is none.
        least: The least number that is accepted.
        unit: What is counted, such as `" of tokens"`, for the message.
        instead: What else the argument takes, such as `" or None"`, for the message.

    Raises:
        InputTypeError: No whole number.
        ArgumentError: Less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        msg = f"{name} must be a whole number{unit}{instead}, got {shown(value)}."
        raise InputTypeError(msg)
    if value < least:
        msg = (
            f"{name} must be {least} or more{',' if instead else ''}{instead}, got {shown(value)}."
        )
        raise ArgumentError(msg)
    return int(value)


def number(name: str, value: object, *, unit: str = "", instead: str = "") -> float:
    """Refuse what is no number; NaN and infinity are left to the caller.

    Args:
        name: The argument's name.
        value: An int, a float or numpy's. A bool is none.
        unit: What is counted, such as `" of seconds"`, for the message.
        instead: What else the argument takes, such as `" or None"`, for the message.

    Raises:
        InputTypeError: No number.
        ArgumentError: A whole number that no float can hold.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        msg = f"{name} must be a number{unit}{instead}, got {shown(value)}."
        raise InputTypeError(msg)
    try:
        return float(value)
    except OverflowError as exc:
        msg = f"{name} is too large for a float: pass a number below 1e308."
        raise ArgumentError(msg) from exc


def one_of(name: str, value: object, words: Sequence[Word], *, instead: str = "") -> Word:
    """Refuse what is none of some words.

    Args:
        name: The argument's name.
        value: What was given.
        words: What is accepted.
        instead: What else the argument takes, such as `", or None"`, for the message.

    Raises:
        ArgumentError: It is none of them.
    """
    for word in words:
        if isinstance(value, str) and value == word:
            return word
    *firsts, last = map(repr, words)
    msg = f"{name}={shown(value)} is not supported: use {', '.join(firsts)} or {last}{instead}."
    raise ArgumentError(msg)


def flag(name: str, value: object) -> bool:
    """Refuse what is no bool: of a text, such as "false", the opposite would be done.

    Raises:
        InputTypeError: Neither True nor False.
    """
    if isinstance(value, bool):
        return value
    hint = ""
    if isinstance(value, str):
        hint = f" A text from a file or an environment variable: compare it, {name}=text == 'true'."
    msg = f"{name} must be True or False, got {shown(value)}.{hint}"
    raise InputTypeError(msg)


def _kind(value: object) -> str:
    if value is None:
        return "None"
    try:
        return f"{type(value).__name__} ({str(value)[:40]!r})"
    except Exception:  # noqa: BLE001 -- see `shown`
        return type(value).__name__
