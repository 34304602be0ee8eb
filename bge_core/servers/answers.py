"""An answer as it came over the wire, and what of it may be shown: unpacked, short, no secrets."""

from __future__ import annotations

import contextlib
import html
import re
import reprlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from bge_core.servers.protocols import UnreadableAnswerError

__all__ = ["ERROR_BYTES", "Answer", "mask", "plain_line", "retry_after", "short_repr"]

# What is read of an answer that says that the request failed.
ERROR_BYTES = 1 << 14


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it was sent.

    Attributes:
        status: The HTTP status.
        reason: The words behind it.
        headers: The headers.
        body: The bytes, packed if a header says so.
    """

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_success(self) -> bool:
        """Whether the status says yes."""
        return 200 <= self.status < 300

    @property
    def encoding(self) -> str:
        """How the body is packed; empty for not at all."""
        encoding = self.headers.get("content-encoding", "").strip().lower()
        return "" if encoding == "identity" else encoding

    def unpacked(self, largest: int) -> bytes:
        """Return the body as it was before it was packed.

        Raises:
            OverflowError: It has more than `largest` bytes.
            UnreadableAnswerError: It is packed in a way that wasn't asked for.
            zlib.error: It is damaged.
        """
        if not self.encoding:
            return self.body
        if self.encoding not in ("gzip", "x-gzip", "deflate"):
            wrong = "its content-encoding is {}, and gzip or deflate was asked for"
            raise UnreadableAnswerError(wrong, self.encoding)
        # Both have a header that zlib knows; some send deflate without one.
        bare = self.encoding == "deflate" and self.body[:1] and self.body[0] & 0x0F != 8
        unpacking = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
        body = unpacking.decompress(self.body, largest + 1)
        if len(body) > largest:
            raise OverflowError
        if not unpacking.eof:
            wrong = "it ends in the middle of what is packed"
            raise UnreadableAnswerError(wrong)
        return body

    def text(self) -> str:
        """Return the beginning of the body as text, for a message."""
        body = self.body
        with contextlib.suppress(OverflowError, UnreadableAnswerError, zlib.error):
            body = self.unpacked(ERROR_BYTES)
        return body[:ERROR_BYTES].decode(errors="replace")


def retry_after(headers: Mapping[str, str]) -> float:
    """Read how many seconds the server asks to be left alone; 0 where it says nothing."""
    value = headers.get("retry-after", "").strip()
    if len(value) > 40:
        return 0.0
    if value.isdecimal():
        return float(value)
    # A date of nonsense fails in many ways.
    with contextlib.suppress(ValueError, TypeError, OverflowError, IndexError):
        when = parsedate_to_datetime(value)
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    return 0.0


def plain_line(found: object) -> str:
    """Write what came from outside on one line, without tags and what can't be printed."""
    text = html.unescape(_TAG.sub(" ", str(found)))
    text = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(text.split())


_TAG = re.compile(r"<[^<>]*>")
# A character as it is, and as a repr writes it where it can't be shown.
_SPELLINGS = (re.compile(r".", re.DOTALL), re.compile(r"\\x..|\\u....|\\U.{8}|\\.|.", re.DOTALL))


def mask(text: str, secret: str) -> str:
    """Replace a secret with three stars, whatever is strewn between its letters."""
    text = text.replace(secret, "***")
    wanted = "".join(_folded(letter) for letter in secret if letter.isalnum())
    if len(wanted) < 4:  # would be found in every word
        return text
    for spelling in _SPELLINGS:
        letters = [found for found in spelling.finditer(text) if found[0].isalnum()]
        squeezed = "".join(_folded(found[0]) for found in letters)
        kept, end, at = [], 0, squeezed.find(wanted)
        while at >= 0:
            kept.append(text[end : letters[at].start()])
            end = letters[at + len(wanted) - 1].end()
            at = squeezed.find(wanted, at + len(wanted))
        text = "***".join([*kept, text[end:]])
    return text


def _folded(letter: str) -> str:
    return letter.lower() if letter.isascii() else letter


class _Repr(reprlib.Repr):
    """Shows any JSON value in a line, however deep and long it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxdict = 4
        self.maxstring = self.maxother = 4096
        self.maxlong = 40


short_repr = _Repr().repr
