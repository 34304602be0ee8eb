"""Texts to token ids: input checks, special tokens, cutting, and what is said about it.

No truncation or padding state is ever set on the tokenizer, so that any number of threads may
share it with different lengths; ids are cut here instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bge_core.errors import ArgumentError, TruncationError

if TYPE_CHECKING:
    import tokenizers

    from bge_core.arguments import OnTruncation
    from bge_core.checkpoints.catalog import Output, PairPrompt

__all__ = [
    "Room",
    "TokenSequence",
    "Tokenizer",
    "can_check_inline",
    "can_tokenize_inline",
    "report_truncation",
]

logger = logging.getLogger(__name__)

# Tokenised in about a millisecond.
_FEW_TEXTS = 32
_FEW_CHARACTERS = 4096


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One sequence, ready for the model.

    Attributes:
        ids: Token ids with special tokens, cut to `max_length`.
        second: Index at which the second segment of a pair begins (token type 1); `len(ids)`
            for a single text and for models without token types.
        requested_outputs: The outputs of bge-m3 that make its row; None for the plain vector or
            score, which is the row of every other model.
        shares_outputs: Whether its pass may take from the output cache and leave the other output
            there; False for what nobody else asks for, such as a part of a text.
        prompt_length: Tokens at the beginning, the first special ones and a prompt's, that the
            pooling of some checkpoints leaves out; 0 for none.
    """

    ids: list[int]
    second: int
    requested_outputs: frozenset[Output] | None = None
    shares_outputs: bool = True
    prompt_length: int = 0

    def __len__(self) -> int:
        """Count the tokens, special ones included."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Room:
    """What stands around a text in a sequence, and how much of the text fits.

    Attributes:
        before: Token ids in front of it: special ones, and of a pair the query.
        after: Token ids behind it.
        size: Tokens of the text that fit.
        typed: Whether token type 1 begins with the text.
        cut: Whether the query in front was cut.
    """

    before: list[int]
    after: list[int]
    size: int
    typed: bool = False
    cut: bool = False


class Tokenizer:
    """A fast tokenizer whose settings never change.

    Args:
        backend: The `tokenizers.Tokenizer` of the checkpoint; its truncation and padding
            settings are switched off here, once.
        pad: The padding token's id, which stands for an empty text where there are no special
            tokens: a model needs at least one.
        lower_case: Whether the checkpoint asks for lower-cased text before the tokenizer
            (`do_lower_case` in sentence_bert_config.json).
        marks: Ids of the first, the last, the padding and the unknown token, which stand for no
            word of a text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        pad: int = 0,
        lower_case: bool = False,
        marks: AbstractSet[int] = frozenset(),
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._pad = pad
        self._lower_case = lower_case
        self.marks = frozenset(marks)
        single = backend.encode("a")
        self._prefix, self._suffix = _around(single.ids, single.special_tokens_mask)
        pair = backend.encode("a", "a")
        self._pair_prefix, self._middle, self._pair_suffix = _between(
            pair.ids, pair.special_tokens_mask
        )
        # Token type 1 starts with the passage, or does not exist at all (XLM-RoBERTa).
        self._has_types = 1 in pair.type_ids

    @property
    def single_extra(self) -> int:
        """How many special tokens a single text gets."""
        return len(self._prefix) + len(self._suffix)

    @property
    def pair_extra(self) -> int:
        """How many special tokens a pair gets."""
        return len(self._pair_prefix) + len(self._middle) + len(self._pair_suffix)

    def encode(
        self, texts: Sequence[str], *, max_length: int
    ) -> tuple[list[TokenSequence], list[bool]]:
        """Tokenise single texts.

        Args:
            texts: Any texts; an empty one becomes its special tokens alone.
            max_length: Tokens that may remain, special ones included.

        Returns:
            A sequence a text, and of each text whether it was longer than `max_length`.
        """
        return self._cut([self.single_room(max_length)] * len(texts), texts)

    def encode_pairs(
        self, queries: Sequence[str], passages: Sequence[str], *, max_length: int
    ) -> tuple[list[TokenSequence], list[bool]]:
        """Tokenise (query, passage) pairs as FlagEmbedding does.

        The query is cut to three quarters of `max_length`, special tokens not counted, then the
        passage to what remains of `max_length`: from 20 tokens on, a long query never pushes a
        passage out.

        Args:
            queries: A query a pair; equal ones are tokenised once.
            passages: A passage a pair.
            max_length: Tokens that may remain of a pair, special ones included.

        Returns:
            A sequence a pair, and of each pair whether it was longer than `max_length`.
        """
        return self._cut(self.pair_rooms(queries, max_length=max_length), passages)

    def encode_between(
        self, texts: Sequence[str], *, before: str, after: str, max_length: int, most: int
    ) -> tuple[list[TokenSequence], list[bool]]:
        """Tokenise texts that stand between two others which are never cut.

        As FlagEmbedding and the model card do for bge-en-icl: the text is tokenised, cut and spelt
        out again, which may add a space after a special token, and then the whole is tokenised as
        one.

        Args:
            texts: Any texts.
            before: Put in front of each, beside `max_length`.
            after: Put behind each, and counted in it.
            max_length: Tokens that may remain of a text and what is behind it, special ones
                included.
            most: Tokens that may remain of the whole, save for such spaces.

        Returns:
            A sequence a text, and of each text whether it was cut.

        Raises:
            ArgumentError: What stands around a text leaves no room for it.
        """
        ahead, behind = (len(ids) for ids in self._ids([before, after]))
        room = min(max_length, most - ahead) - behind - self.single_extra
        if room < 1:
            msg = (
                f"No room is left for a query: the examples take {ahead} tokens, and what is "
                f"behind it {behind + self.single_extra}, of max_length={max_length} beside the "
                f"examples and of the {most} that the model can take with them. Pass fewer or "
                "shorter examples, or a larger max_length."
            )
            raise ArgumentError(msg)
        kept, cut = [], []
        for ids in self._ids(texts):
            cut.append(len(ids) > room)
            text = self._backend.decode(ids[:room], skip_special_tokens=False)
            kept.append(f"{before}{text}{after}")
        wholes = ([*self._prefix, *ids, *self._suffix] for ids in self._ids(kept))
        return [TokenSequence(whole, len(whole)) for whole in wholes], cut

    def encode_prompted(
        self,
        queries: Sequence[str],
        passages: Sequence[str],
        prompt: PairPrompt,
        *,
        max_length: int,
        most: int,
    ) -> tuple[list[TokenSequence], list[bool]]:
        """Tokenise pairs for a language model that is asked about them, as FlagEmbedding does.

        The query is cut to three quarters of `max_length` and the passage to `max_length`, then
        the pair to `max_length` and as many tokens as the separator and the question have. These
        follow after the cut, and are always whole.

        Args:
            queries: A query a pair; equal ones are tokenised once.
            passages: A passage a pair.
            prompt: What is put around them.
            max_length: Tokens of a pair, the question not counted.
            most: Tokens that may remain of the whole.

        Returns:
            A sequence a pair, and of each pair whether it was cut.
        """
        rooms = self.prompted_rooms(queries, prompt, max_length=max_length, most=most)
        return self._cut(rooms, [prompt.passage + passage for passage in passages])

    def single_room(self, max_length: int) -> Room:
        """Say what stands around a single text; see `encode`."""
        return Room(self._prefix, self._suffix, max_length - self.single_extra)

    def pair_rooms(self, queries: Sequence[str], *, max_length: int) -> list[Room]:
        """Say what stands around the passage of each pair; see `encode_pairs`."""
        query_room = min(max_length * 3 // 4, max_length - self.pair_extra)
        distinct = list(dict.fromkeys(queries))
        rooms = {}
        for query, ids in zip(distinct, self._ids(distinct), strict=True):
            asked = ids[:query_room]
            rooms[query] = Room(
                [*self._pair_prefix, *asked, *self._middle],
                self._pair_suffix,
                max_length - self.pair_extra - len(asked),
                typed=self._has_types,
                cut=len(ids) > query_room,
            )
        return [rooms[query] for query in queries]

    def prompted_rooms(
        self, queries: Sequence[str], prompt: PairPrompt, *, max_length: int, most: int
    ) -> list[Room]:
        """Say what stands around the passage of each pair; see `encode_prompted`."""
        between, question = self._ids([prompt.separator, prompt.question])
        tail = [*between, *question]
        pair_room = min(max_length + len(tail), most - len(tail))
        query_room = max_length * 3 // 4
        distinct = list(dict.fromkeys(queries))
        written = self._ids([prompt.query + query for query in distinct])
        rooms = {}
        for query, ids in zip(distinct, written, strict=True):
            first = [*self._prefix, *ids[:query_room], *between]
            room = max(min(max_length, pair_room - len(first)), 0)
            rooms[query] = Room(first, tail, room, cut=len(ids) > query_room)
        return [rooms[query] for query in queries]

    def fill(self, room: Room, ids: Sequence[int]) -> TokenSequence:
        """Put a text's ids, which must fit, where they go."""
        whole = [*room.before, *ids, *room.after] or [self._pad]
        return TokenSequence(whole, len(room.before) if room.typed else len(whole))

    def places(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Tokenise texts whole, without special tokens.

        Args:
            texts: Any texts.

        Returns:
            Token ids of each text, and for each token the characters [start, end) that it was
            made of, in the text as it was given.
        """
        cased = self._cased(texts)
        if can_tokenize_inline(cased):  # on this thread, as in `_ids`
            encodings = [self._backend.encode(text, add_special_tokens=False) for text in cased]
        else:
            encodings = self._backend.encode_batch(cased, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            yield encoding.ids, self._uncased_places(text, encoding.offsets)

    def first_id(self, word: str) -> int:
        """Give a word's first token."""
        return next(iter(self._ids([word])))[0]

    def text_of(self, token_id: int) -> str:
        """Give a token's text, as the vocabulary spells it."""
        return self._backend.id_to_token(token_id) or ""

    def _cut(
        self, rooms: Sequence[Room], texts: Sequence[str]
    ) -> tuple[list[TokenSequence], list[bool]]:
        sequences, cut = [], []
        for room, ids in zip(rooms, self._ids(texts), strict=True):
            cut.append(len(ids) > room.size or room.cut)
            sequences.append(self.fill(room, ids[: room.size]))
        return sequences, cut

    def _ids(self, texts: Sequence[str]) -> Iterable[list[int]]:
        texts = self._cased(texts)
        if can_tokenize_inline(texts):
            # On this thread: the tokenizer's pool may be busy with somebody's documents.
            return [self._backend.encode(text, add_special_tokens=False).ids for text in texts]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return (encoding.ids for encoding in encodings)

    def _cased(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() for text in texts] if self._lower_case else list(texts)

    def _uncased_places(self, text: str, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Lead places in the lower-cased text back to the text."""
        if not self._lower_case or len(text.lower()) == len(text):
            return places
        # Some capitals become two characters, such as the Turkish I with its dot.
        origin = [place for place, letter in enumerate(text) for _ in letter.lower()]
        origin.append(len(text))
        return [
            (origin[start], origin[end - 1] + 1 if end > start else origin[start])
            for start, end in places
        ]


def _around(ids: list[int], special: list[int]) -> tuple[list[int], list[int]]:
    start = special.index(0)
    end = len(special) - special[::-1].index(0)
    return ids[:start], ids[end:]


def _between(ids: list[int], special: list[int]) -> tuple[list[int], list[int], list[int]]:
    prefix, suffix = _around(ids, special)
    inner, inner_special = ids[len(prefix) : len(ids) - len(suffix)], special[len(prefix) :]
    if 1 not in inner_special[: len(inner)]:
        return prefix, [], suffix
    start = inner_special.index(1)
    length = inner_special[start:].index(0)
    return prefix, inner[start : start + length], suffix


def can_check_inline(items: object) -> bool:
    """Say whether an event loop can check what came in itself."""
    return isinstance(items, (list, tuple)) and len(items) <= _FEW_TEXTS


def can_tokenize_inline(items: Sequence[str | tuple[str, str]]) -> bool:
    """Say whether an event loop can tokenise texts or pairs itself, so little are they."""
    if not can_check_inline(items):
        return False
    texts = (text for item in items for text in ((item,) if isinstance(item, str) else item))
    return sum(map(len, texts)) <= _FEW_CHARACTERS


def report_truncation(
    *, what: str, cut: int, total: int, max_length: int, policy: OnTruncation, model: str
) -> None:
    """Say once a call how many texts were cut, or refuse them.

    Raises:
        TruncationError: Some were cut and the policy is "error".
    """
    if not cut or policy == "ignore":
        return
    said = f"{cut} of {total} {what} are longer than max_length={max_length} tokens of {model}"
    if policy == "error":
        msg = (
            f"{said}, and on_truncation='error' was asked for: split them, raise max_length if "
            "the model takes more, or pass on_truncation='warn'."
        )
        raise TruncationError(msg)
    logger.warning("%s: the rest was not read.", said)
