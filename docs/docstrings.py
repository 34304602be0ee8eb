"""Show the examples of docstrings as code: an extension of griffe, which reads the source."""

from __future__ import annotations

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
