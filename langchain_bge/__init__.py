"""BGE embeddings and rerankers for LangChain, on your own machine."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from bge_core import __version__
from bge_core.errors import MissingExtraError as MissingExtraError
from bge_core.errors import needs_extra

if TYPE_CHECKING:
    from langchain_bge.sparse import BGESparseEmbeddings

try:
    from langchain_bge.cross_encoder import BGECrossEncoder
    from langchain_bge.embeddings import BGEEmbeddings
    from langchain_bge.reranker import BGEReranker
except ImportError as exc:
    raise needs_extra(
        exc,
        "langchain_bge",
        packages=("langchain_core", "pydantic"),
        install="'bge-adapters[langchain]'",
    ) from exc

__all__ = [
    "BGECrossEncoder",
    "BGEEmbeddings",
    "BGEReranker",
    "BGESparseEmbeddings",
    "__version__",
]
# `from langchain_bge import *` works without langchain-qdrant, which only this class needs.
if not TYPE_CHECKING and find_spec("langchain_qdrant") is None:
    __all__ = [name for name in __all__ if name != "BGESparseEmbeddings"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # langchain-qdrant takes a second to import, and who searches elsewhere does not have it.
    if name == "BGESparseEmbeddings":
        from langchain_bge.sparse import BGESparseEmbeddings

        return BGESparseEmbeddings
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
