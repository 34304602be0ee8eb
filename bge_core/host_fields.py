"""What the hosts' adapters say about their fields: unknown, refused and fixed arguments."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from bge_core.errors import ArgumentError, InputTypeError

__all__ = ["check_argument_names", "frozen_field_error", "validation_error"]

# A wrong value of these is not shown: it may be a secret, or hold one.
_SECRET = ("api_key", "encode_kwargs", "endpoint", "model_kwargs", "token")


def check_argument_names(
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


def validation_error(owner: str, report: Iterable[Mapping[str, Any]]) -> ArgumentError:
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


def frozen_field_error(owner: str, name: str) -> ArgumentError:
    """Say that an argument can't be changed afterwards."""
    return ArgumentError(
        f"{name} of a {owner} can't be changed, since its model was made with it: make another "
        f"with model_copy(update={{{name!r}: ...}}), which shares the weights where it can."
    )
