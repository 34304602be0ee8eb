"""BGE embedding models and rerankers for LlamaIndex, run on your own machine."""

from importlib.metadata import PackageNotFoundError, version

from bge_core import MissingExtraError

try:
    import llama_index.core  # noqa: F401
except ModuleNotFoundError as exc:
    if (exc.name or "").partition(".")[0] != "llama_index":
        raise
    msg = (
        "llamaindex_bge needs llama-index-core, which is not installed: "
        "run  pip install 'bge-adapters[llamaindex]'"
    )
    raise MissingExtraError(msg) from exc

from llamaindex_bge.embedding import BGEEmbedding
from llamaindex_bge.reranker import BGEReranker
from llamaindex_bge.sparse import BGESparseEmbedding

try:
    __version__ = version("bge-adapters")
except PackageNotFoundError:
    # Run from a checkout that was never installed.
    __version__ = "0.0.0"

__all__ = ["BGEEmbedding", "BGEReranker", "BGESparseEmbedding", "__version__"]
