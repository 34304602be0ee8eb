"""The errors that bge-adapters raises, each also the built-in that a caller would expect.

BGEError
 |- ArgumentError      (ValueError)    an argument's value can't be served
 |- InputTypeError     (TypeError)     an argument has the wrong type
 |- TruncationError    (ValueError)    a text is too long and on_truncation="error"
 |- CheckpointError    (ValueError)    a checkpoint is missing, damaged or of another kind
 |- MissingExtraError  (ImportError)   a package that an extra installs is not there
 |- ClosedError        (RuntimeError)  the model was closed
 |- ComputationError   (RuntimeError)  the model's own arithmetic failed
 `- EndpointError      (ConnectionError)  a server can't be reached, fails, or answers nonsense
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "ArgumentError",
    "BGEError",
    "CheckpointError",
    "ClosedError",
    "ComputationError",
    "EndpointError",
    "InputTypeError",
    "MissingExtraError",
    "TruncationError",
    "fixed_argument",
    "known_arguments",
    "refused_arguments",
]


# A wrong value of these is not shown: it may be a secret, or hold one.
_SECRET = ("api_key", "encode_kwargs", "endpoint", "model_kwargs", "token")


class BGEError(Exception):
    """Stem of every error that this package raises on purpose."""


class ArgumentError(BGEError, ValueError):
    """An argument has a value that can't be served."""


class InputTypeError(BGEError, TypeError):
    """An argument has a type that can't be served."""


class TruncationError(BGEError, ValueError):
    """A text is longer than `max_length` and `on_truncation="error"` was asked for."""


class CheckpointError(BGEError, ValueError):
    """A checkpoint is missing, damaged, or not of the kind that was asked for."""


class MissingExtraError(BGEError, ImportError):
    """A package is not installed; the message has the command that installs it."""


class ClosedError(BGEError, RuntimeError):
    """The model was closed, so it can't compute any more."""


class ComputationError(BGEError, RuntimeError):
    """The model computed something that can't be used, such as NaN."""


class EndpointError(BGEError, ConnectionError):
    """A server can't be reached, fails, or gives an answer that can't be used."""


def closed(model: str) -> ClosedError:
    """Say that a model was closed before it was asked."""
    msg = f"The model {model!r} is closed: make a new one to compute with it."
    return ClosedError(msg)


def closed_meanwhile(model: str) -> ClosedError:
    """Say that a model was closed under somebody who waited."""
    msg = f"The model {model!r} was closed before this work was done."
    return ClosedError(msg)


def known_arguments(
    owner: str, arguments: Mapping[str, Any], *, known: Collection[str], moved: Mapping[str, str]
) -> dict[str, Any]:
    """Give the arguments that a class has; another class's defaults, spelt out, are no matter.

    Args:
        owner: The class's name.
        arguments: What was given.
        known: The arguments that it has.
        moved: Other libraries' arguments -> what to write here.

    Raises:
        ArgumentError: One is unknown; says what to write instead.
    """
    for name, value in arguments.items():
        if name in known or (name in moved and not value):
            continue
        close = difflib.get_close_matches(name, sorted(known), n=1)
        if name in moved:
            hint = f"{moved[name]}."
        elif close:
            hint = f"did you mean {close[0]!r}?"
        else:
            hint = f"it takes {', '.join(sorted(known))}."
        msg = f"{owner} has no argument {name!r}: {hint}"
        raise ArgumentError(msg)
    return {name: value for name, value in arguments.items() if name in known}


def refuse_positional(owner: str, given: Sequence[object], *, first: str) -> None:
    """Refuse what was given without a name, as the hosts' classes do, in a sentence.

    Args:
        owner: The class's name.
        given: What was given.
        first: The argument that was most likely meant.

    Raises:
        InputTypeError: Something was given.
    """
    if given:
        msg = f"{owner} takes keywords only: write {owner}({first}={given[0]!r:.60}, ...)."
        raise InputTypeError(msg)


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


def refused_arguments(owner: str, report: Iterable[Mapping[str, Any]]) -> ArgumentError:
    """Say on one line what pydantic says on several.

    Args:
        owner: The class's name.
        report: `ValidationError.errors()`.
    """
    said = []
    for item in report:
        name = ".".join(dict.fromkeys(str(part) for part in item["loc"][:1]))
        if item["type"] == "missing":
            said.append(f"{name} is missing")
            continue
        hidden = name in _SECRET or item["type"] == "no_such_attribute"
        shown = "" if hidden else f", got {item['input']!r:.60}"
        said.append(f"{name}: {item['msg'][:1].lower()}{item['msg'][1:]}{shown}")
    return ArgumentError(f"{owner} can't take these arguments: {'; '.join(dict.fromkeys(said))}.")


def fixed_argument(owner: str, name: str) -> ArgumentError:
    """Say that an argument can't be changed afterwards."""
    return ArgumentError(
        f"{name} of a {owner} can't be changed, since its model was made with it: make another "
        f"with model_copy(update={{{name!r}: ...}}), which shares the weights where it can."
    )
