"""What servers say and want to hear: paths, requests, answers, limits, error texts.

A new kind of server is a class here and a row of `PROTOCOLS`. Nothing here knows of connections.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bge_core.arguments import counted

__all__ = [
    "PROTOCOLS",
    "ServerProtocol",
    "UnreadableAnswerError",
    "batch_limit_of",
    "batch_limit_of_info",
    "detect_protocol",
    "error_message",
    "hint_for",
    "is_about_batches",
    "rerank_probe",
]


class UnreadableAnswerError(ValueError):
    """An answer of the wrong form.

    Args:
        found: What is wrong, with `{}` where the value is to be shown.
        value: The value, if any: it comes from the server and may be anything.
    """

    def __init__(self, found: str, value: object = None) -> None:
        super().__init__(found)
        self.found = found
        self.value = value


class ServerProtocol:
    """One kind of server. All of them embed by OpenAI's `/embeddings`, which is written here.

    Attributes:
        embeddings_path: What follows the address to embed.
        rerank_path: What follows the address to score passages.
        passages_key: The name of the passages in a request.
        score_key: The name of a score in an answer.
        raw_scores_key: The flag that asks for logits in place of their sigmoids.
        error_keys: Where the words of a failure are, outermost first.
        batch_limits: How a refusal names the most texts of a request, as its one group.
        hints: What to do by HTTP status.
    """

    embeddings_path: ClassVar[str] = "/embeddings"
    rerank_path: ClassVar[str] = "/rerank"
    passages_key: ClassVar[str]
    score_key: ClassVar[str]
    raw_scores_key: ClassVar[str] = "raw_scores"
    error_keys: ClassVar[tuple[str, ...]]
    batch_limits: ClassVar[tuple[re.Pattern[str], ...]] = ()
    hints: ClassVar[Mapping[int, str]] = MappingProxyType({})

    def embeddings_request(self, model: str, texts: Sequence[str]) -> dict[str, Any]:
        """Return the request for a vector of each text."""
        return {"model": model, "input": list(texts), "encoding_format": "float"}

    def read_embeddings(self, answer: object, count: int) -> NDArray[np.float32]:
        """Read [count, dimension] float32 vectors, in the order asked.

        Raises:
            UnreadableAnswerError: It is not one vector for each text, all of one length.
        """
        data = answer.get("data") if isinstance(answer, dict) else None
        found = _by_index(data, "embedding", count)
        for index, vector in enumerate(found):
            if not isinstance(vector, list) or not all(map(_is_number, vector)):
                wrong = f"embedding {index} is no list of numbers but {{}}"
                raise UnreadableAnswerError(wrong, vector)
            if len(vector) != len(found[0]):
                wrong = f"a vector of {len(vector)} numbers beside one of {len(found[0])}"
                raise UnreadableAnswerError(wrong)
        return _to_float32(found)

    def rerank_request(
        self, model: str, query: str, passages: Sequence[str], *, raw: bool
    ) -> dict[str, Any]:
        """Return the request for a score of each passage: a logit if `raw`, else its sigmoid."""
        return {
            "model": model,
            "query": query,
            self.passages_key: list(passages),
            self.raw_scores_key: raw,
        }

    def ranks_of(self, answer: object) -> object:
        """Return the list of ranks in an answer; None where this kind of server gave none."""
        raise NotImplementedError

    def read_scores(self, answer: object, count: int) -> NDArray[np.float32]:
        """Read [count] float32 scores, in the order asked.

        Raises:
            UnreadableAnswerError: It is not one number for each passage.
        """
        found = _by_index(self.ranks_of(answer), self.score_key, count)
        for index, score in enumerate(found):
            if not _is_number(score):
                wrong = f"the score of passage {index} is no number but {{}}"
                raise UnreadableAnswerError(wrong, score)
        return _to_float32(found)


class TextEmbeddingsInference(ServerProtocol):
    """Hugging Face's text-embeddings-inference."""

    passages_key = "texts"
    score_key = "score"
    # With an OpenAI route it is `message`.
    error_keys = ("error", "message")
    batch_limits = (re.compile(r"maximum allowed batch size (?:of )?(\d{1,9})"),)
    hints: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            413: (
                "Lower endpoint_batch_size=..., raise the server's limit "
                "(--max-client-batch-size, --payload-limit), or let it cut long texts "
                "(--auto-truncate)."
            ),
            422: (
                "Lower endpoint_batch_size=..., raise the server's limit "
                "(--max-client-batch-size), or let it cut long texts (--auto-truncate)."
            ),
            424: "Its model failed, or is of another kind: look at the server's log.",
        }
    )

    def rerank_request(
        self, model: str, query: str, passages: Sequence[str], *, raw: bool
    ) -> dict[str, Any]:
        """Return the request for scores, of pairs that are cut where they are too long."""
        return {**super().rerank_request(model, query, passages, raw=raw), "truncate": True}

    def ranks_of(self, answer: object) -> object:
        """Return the answer itself, which is the list."""
        return answer


class Infinity(ServerProtocol):
    """michaelfeil's infinity, and what answers like Cohere's or Jina's `/rerank`."""

    passages_key = "documents"
    score_key = "relevance_score"
    error_keys = ("error", "message", "detail")
    batch_limits = (re.compile(r"at most (\d{1,9}) items?"),)

    def ranks_of(self, answer: object) -> object:
        """Return the list in the object."""
        return answer.get("results") if isinstance(answer, dict) else None


PROTOCOLS: Mapping[str, ServerProtocol] = MappingProxyType(
    {"infinity": Infinity(), "text-embeddings-inference": TextEmbeddingsInference()}
)
"""Kinds of servers by name; the first that finds its ranks in an answer is the server's."""

_HINTS: Mapping[int, str] = MappingProxyType(
    {
        400: (
            "If it serves several models, one of them must go by the name that model= or "
            "served_model_name= gives."
        ),
        401: "Pass the server's token as api_key='...'.",
        403: "Pass a token that may ask for this as api_key='...'.",
        404: (
            "The path is endpoint=... and what follows it here: leave /v1 out where the server "
            "has none, and make sure that it serves a model of this kind, by the name that model= "
            "or served_model_name= gives."
        ),
        429: "It is overloaded: send less at a time, or give it more capacity.",
    }
)
# One text of too many tokens is none.
_BATCH_WORDS = re.compile(
    r"\bbatch|too many(?! tokens)|at most(?! \d+ tokens)|payload|too large", re.IGNORECASE
)


def rerank_probe(model: str, *, raw: bool) -> dict[str, Any]:
    """Return a request for the score of one short pair, in the words of all kinds of servers."""
    probe: dict[str, Any] = {}
    for protocol in PROTOCOLS.values():
        probe.update(protocol.rerank_request(model, "a", ["b"], raw=raw))
    return probe


def detect_protocol(answer: object) -> ServerProtocol:
    """Return the kind of server that answers to `rerank_probe` like this.

    Raises:
        UnreadableAnswerError: None that is known.
    """
    for protocol in PROTOCOLS.values():
        if isinstance(protocol.ranks_of(answer), list):
            return protocol
    raise UnreadableAnswerError(_NO_LIST)


def error_message(answer: Any) -> Any:
    """Find the words of a failure in the JSON of any kind of server."""
    keys = dict.fromkeys(key for protocol in PROTOCOLS.values() for key in protocol.error_keys)
    while isinstance(answer, dict):
        answer = next((found for key in keys if (found := answer.get(key))), "")
    return answer


def hint_for(status: int) -> str:
    """Return what to do about an HTTP status."""
    hints = {key: hint for protocol in PROTOCOLS.values() for key, hint in protocol.hints.items()}
    return {**hints, **_HINTS}.get(status, "Look at the server's log.")


def batch_limit_of(text: str) -> int | None:
    """Read in a refusal how many texts a request may have; None where it doesn't say."""
    for protocol in PROTOCOLS.values():
        for pattern in protocol.batch_limits:
            if found := pattern.search(text):
                return int(found.group(1))
    return None


def batch_limit_of_info(answer: object) -> int | None:
    """Read in text-embeddings-inference's `/info` how many texts a request may have."""
    limit = answer.get("max_client_batch_size") if isinstance(answer, dict) else None
    return limit if isinstance(limit, int) and not isinstance(limit, bool) else None


def is_about_batches(text: str) -> bool:
    """Return whether a refusal is of how much was sent, and not of what."""
    return _BATCH_WORDS.search(text) is not None


_NO_LIST = "it has no list of results"


def _by_index(entries: object, name: str, count: int) -> list[Any]:
    """Return what entries say under a name, each in its own place: 0 to `count` - 1, once each."""
    if not isinstance(entries, list):
        raise UnreadableAnswerError(_NO_LIST)
    found: dict[int, Any] = {}
    for entry in entries:
        index = entry.get("index") if isinstance(entry, dict) else None
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
            wrong = f"an entry's index is {{}} of {count} texts"
            raise UnreadableAnswerError(wrong, index)
        if index in found:
            wrong = f"index {index} is there twice"
            raise UnreadableAnswerError(wrong)
        found[index] = entry.get(name)
    if len(found) != count:
        wrong = f"{counted(len(found), 'result')} for {counted(count, 'text')}"
        raise UnreadableAnswerError(wrong)
    return [found[index] for index in range(count)]


def _is_number(value: object) -> bool:
    """Return whether a JSON value is a number that numpy can hold."""
    if isinstance(value, float):
        return True
    # JSON's whole numbers have no limit, and numpy's have.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _to_float32(values: list[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what is too big becomes infinity, and is refused as such
        return np.asarray(values, dtype=np.float64).astype(np.float32)
