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
]


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


def closed_error(model: str) -> ClosedError:
    """Say that a model was closed before it was asked."""
    msg = f"The model {model!r} is closed: make a new one to compute with it."
    return ClosedError(msg)


def closed_while_waiting_error(model: str) -> ClosedError:
    """Say that a model was closed under somebody who waited."""
    msg = f"The model {model!r} was closed before this work was done."
    return ClosedError(msg)
