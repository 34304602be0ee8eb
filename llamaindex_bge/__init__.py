"""BGE embedding models and rerankers for LlamaIndex, run on your own machine."""

from bge_core import __version__
from bge_core.errors import needs_extra

try:
    import llama_index.core  # noqa: F401
except ImportError as exc:
    raise needs_extra(
        exc,
        "llamaindex_bge",
        packages=("llama_index",),
        install="'bge-adapters[llamaindex]'",
    ) from exc

from llamaindex_bge.embedding import BGEEmbedding
from llamaindex_bge.reranker import BGEReranker
from llamaindex_bge.sparse import BGESparseEmbedding

__all__ = ["BGEEmbedding", "BGEReranker", "BGESparseEmbedding", "__version__"]
