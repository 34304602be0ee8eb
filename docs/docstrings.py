"""Show docstrings and signatures as they are meant: extensions of griffe, the site's reader."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Call a docstring's section `Example` what griffe calls it."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section, once the docstring is read.

        Args:
            obj: A module, class, function or attribute.
        """
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )


class Options(griffe.UnpackTypedDictExtension):
    """Spell `**options: Unpack[...]` out in signatures, where the names are this package's."""

    def on_function(self, **event: Any) -> None:
        """Spell a function's options out.

        Args:
            **event: The function, and what else griffe says of it.
        """
        with contextlib.suppress(KeyError):  # another library's, which is not installed
            super().on_function(**event)

    def on_class(self, **event: Any) -> None:
        """Spell a constructor's options out.

        Args:
            **event: The class, and what else griffe says of it.
        """
        with contextlib.suppress(KeyError):
            super().on_class(**event)
