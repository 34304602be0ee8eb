"""What LangChain's adapters have beside the fields that all hosts share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bge_core import host_fields
from bge_core.host_fields import ModelName

__all__ = ["LocalModelFields", "ServedModelFields"]


class LocalModelFields(host_fields.LocalModelFields):
    """A checkpoint on this machine, under LangChain's word `model`."""

    _not_compared = frozenset({"encode_kwargs", "model_kwargs"})

    if TYPE_CHECKING:  # either of them
        model: ModelName = Field(default="")
        model_name: str = Field(default="")
    else:
        model: ModelName = Field(frozen=True)
        """A hub id (`"BAAI/bge-small-en-v1.5"`) or a folder; `model_name=` is the same argument."""

        @property
        def model_name(self) -> str:
            """The hub id or folder."""
            return self.model

    def _copied_fields(self) -> dict[str, object]:
        # The two dicts have become other fields, which an update may change.
        return self._compared()


class ServedModelFields(LocalModelFields, host_fields.ServedModelFields):
    """A checkpoint on this machine, or on a server that runs already."""
