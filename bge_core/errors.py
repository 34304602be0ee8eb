"""The errors that bge-adapters raises, each also the built-in that a caller would expect.

BGEError
 |- ArgumentError      (ValueError)    an argument's value is not supported
 |- InputTypeError     (TypeError)     an argument has the wrong type
 |- TruncationError    (ValueError)    a text is too long and on_truncation="error"
 |- CheckpointError    (ValueError)    a checkpoint is missing, damaged or of another kind
 |- MissingExtraError  (ImportError)   a package that an extra installs is not there
 |- ClosedError        (RuntimeError)  the model was closed
 |- ComputationError   (RuntimeError)  the model's own arithmetic failed
 `- EndpointError      (ConnectionError)  a server can't be reached, fails, or answers nonsense
"""

from __future__ import annotations

from collections.abc import Collection

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
    "closed_error",
    "closed_while_waiting_error",
    "needs_extra",
]


class BGEError(Exception):
    """Stem of every error that this package raises on purpose."""


class ArgumentError(BGEError, ValueError):
    """An argument has a value that is not supported."""


class InputTypeError(BGEError, TypeError):
    """An argument has a type that is not supported."""


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


def closed_error(model: str) -> ClosedError:
    """Return the error that says that a model was closed before it was asked."""
    msg = f"The model {model!r} is closed: make a new one to compute with it."
    return ClosedError(msg)


def closed_while_waiting_error(model: str) -> ClosedError:
    """Return the error that says that a model was closed while a caller waited."""
    msg = f"The model {model!r} was closed before this work was done."
    return ClosedError(msg)


def needs_extra(
    exc: ImportError, what: str, *, packages: Collection[str], install: str, instead: str = ""
) -> MissingExtraError:
    """Return the error that says how to install what an import did not find.

    Args:
        exc: What the import raised.
        what: What needs the packages, such as `"bge_core.mteb"`.
        packages: Their import names, dotted ones included.
        install: What pip installs, such as `"'bge-adapters[mteb]'"`.
        instead: What else to do, such as `", or pass backend='torch'"`.

    Raises:
        ImportError: `exc` itself, where it is about another module: one of the packages is there
            and broken, and installing it again would not help.
    """
    name = f"{exc.name}."
    # Of a.b.c, a or a.b may be what is not there; and what is not there may be inside of it.
    found = (own for own in packages if name.startswith(f"{own}.") or f"{own}.".startswith(name))
    missing = next(found, None)
    if not isinstance(exc, ModuleNotFoundError) or missing is None:
        raise exc
    msg = f"{what} needs {missing}, which is not installed: pip install {install}{instead}"
    return MissingExtraError(msg)
