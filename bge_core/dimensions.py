"""How many of a vector's numbers are kept (Matryoshka), and what is said where few may be kept."""

from __future__ import annotations

import logging

from bge_core import arguments
from bge_core.checkpoints.catalog import find_profile, is_published
from bge_core.errors import ArgumentError

__all__ = ["check_truncate_dim", "kept_dimension"]

logger = logging.getLogger(__name__)

_warned: set[str] = set()


def check_truncate_dim(value: object, *, model: str, width: int | None) -> int | None:
    """Check what a user wrote as `truncate_dim=`; of a published BGE model, warn once.

    Args:
        value: What was given; None for what the checkpoint says.
        model: The model's name.
        width: Length of a whole vector; None where that is not known yet.

    Raises:
        ArgumentError: It is less than 1, or more than there is.
        InputTypeError: It is no whole number.
    """
    if value is None:
        return None
    asked = arguments.whole_number("truncate_dim", value, unit=" of numbers", instead=" or None")
    if width is not None:
        kept_dimension(asked, saved=None, width=width, model=model)
    # By its own name: what was trained from it may have been trained for this, too.
    profile = find_profile(model, "embedder")
    if profile is not None and is_published(profile) and asked != width and model not in _warned:
        _warned.add(model)
        logger.warning(
            "truncate_dim=%s: %r was not trained to be cut (Matryoshka), and its vectors lose more "
            "quality by it than those of a model that was. They are cut all the same: measure it.",
            arguments.shown(asked),
            model,
        )
    return asked


def kept_dimension(asked: int | None, *, saved: int | None, width: int, model: str) -> int:
    """Return how many numbers are kept of a vector.

    Args:
        asked: What the user asked for; None for what the checkpoint says.
        saved: What the checkpoint says; None for all, as is more than there is.
        width: Length of a whole vector.
        model: The model's name, for the message.

    Raises:
        ArgumentError: The user asked for more than there is.
    """
    if asked is None:
        return width if saved is None else min(width, saved)
    if asked > width:
        msg = (
            f"truncate_dim={arguments.shown(asked)} is more than the {width} numbers that a vector "
            f"of {model!r} has: pass {width} or less, or None."
        )
        raise ArgumentError(msg)
    return asked
