"""LangChain's own suite for embedding models, on a tiny checkpoint and on a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from langchain_bge import BGEEmbeddings


class OnFolders:
    """The class under test, once a folder; the folders are fixtures of the whole session."""

    folder: Path

    @pytest.fixture(autouse=True, params=["en_folder", "stand_in_folder"])
    def on_folder(self, request: pytest.FixtureRequest) -> None:
        self.folder = request.getfixturevalue(request.param)

    @property
    def embeddings_class(self) -> type[BGEEmbeddings]:
        return BGEEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": self.folder, "query_instruction": ""}


class TestUnit(OnFolders, EmbeddingsUnitTests):
    """`langchain_tests.unit_tests`."""


class TestIntegration(OnFolders, EmbeddingsIntegrationTests):
    """`langchain_tests.integration_tests`."""
