"""Texts to token ids: special tokens, truncation, and what is said about it.

No truncation or padding state is ever set on the tokenizer, so that any number of threads may
share it with different lengths; ids are cut here instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bge_core.errors import ArgumentError, TruncationError

if TYPE_CHECKING:
    import tokenizers
    from numpy.typing import NDArray

    from bge_core.checkpoints.catalog import Output, PairPrompt

__all__ = [
    "SequenceLayout",
    "TokenSequence",
    "Tokenizer",
    "can_check_inline",
    "can_tokenize_inline",
    "report_truncation",
    "room_remedy",
]

logger = logging.getLogger(__name__)

# Tokenised in about a millisecond.
_FEW_TEXTS = 32
_FEW_CHARACTERS = 4096
_SHOWN_PLACES = 5


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """One sequence, ready for the model.

    Attributes:
        id_array: Token ids with special tokens, cut to `max_length`, [tokens] int32; a list becomes
            an array.
        second_segment_start: Index at which the second segment of a pair begins (token type 1);
            `len(ids)` for a single text and for models without token types.
        requested_outputs: The outputs of bge-m3 that make its row; None for the plain vector or
            score, which is the row of every other model.
        shares_outputs: Whether its pass may take from the output cache and leave the other output
            there; False for what nobody else asks for, such as a part of a text.
        prompt_length: Tokens at the beginning, the first special ones and a prompt's, that the
            pooling of some checkpoints leaves out; 0 for none.
    """

    id_array: NDArray[np.int32]
    second_segment_start: int
    requested_outputs: frozenset[Output] | None = None
    shares_outputs: bool = True
    prompt_length: int = 0

    def __post_init__(self) -> None:
        """Make an array of a list."""
        if not isinstance(self.id_array, np.ndarray):
            object.__setattr__(self, "id_array", np.array(self.id_array, dtype=np.int32))

    @property
    def ids(self) -> list[int]:
        """The token ids as a list."""
        ids: list[int] = self.id_array.tolist()
        return ids

    def __len__(self) -> int:
        """Count the tokens, special ones included."""
        return len(self.id_array)


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """What stands around a text in a sequence, and how much of the text fits.

    Attributes:
        before: Token ids in front of it: special ones, and of a pair the query.
        after: Token ids behind it.
        max_text_tokens: Tokens of the text that fit.
        has_token_types: Whether token type 1 begins with the text.
        query_excess: Tokens of the query in front that were cut.
    """

    before: list[int]
    after: list[int]
    max_text_tokens: int
    has_token_types: bool = False
    query_excess: int = 0


class Tokenizer:
    """A fast tokenizer whose settings never change.

    Args:
        backend: The `tokenizers.Tokenizer` of the checkpoint; its truncation and padding
            settings are switched off here, once.
        pad: The padding token's id, which stands for an empty text where there are no special
            tokens: a model needs at least one.
        lower_case: Whether the checkpoint asks for lower-cased text before the tokenizer
            (`do_lower_case` in sentence_bert_config.json).
        bos: The id of the token that a text begins with; None where there is none.
        truncation_side: Which end of a text is cut, `"right"` or `"left"`.
        special_token_ids: Ids of the first, the last, the padding and the unknown token, which
            stand for no word of a text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        pad: int = 0,
        lower_case: bool = False,
        bos: int | None = None,
        truncation_side: str = "right",
        special_token_ids: AbstractSet[int] = frozenset(),
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._pad = pad
        self._lower_case = lower_case
        self._bos = bos
        self._keeps_end = truncation_side == "left"
        self.special_token_ids = frozenset(special_token_ids)
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
    ) -> tuple[list[TokenSequence], list[int]]:
        """Tokenise single texts.

        Args:
            texts: Any texts; an empty one becomes its special tokens alone.
            max_length: Tokens that may remain, special ones included.

        Returns:
            A sequence a text, and of each text its length where that is more than `max_length`,
            else 0.
        """
        return self.fit([self.text_layout(max_length)] * len(texts), texts)

    def encode_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        prompt: PairPrompt | None = None,
        *,
        max_length: int,
        limit: int,
    ) -> tuple[list[TokenSequence], list[int]]:
        """Tokenise (query, passage) pairs as FlagEmbedding does; see `passage_layouts`.

        Args:
            pairs: The pairs; equal queries are tokenised once.
            prompt: What a language model is asked about each; None for a cross-encoder.
            max_length: Tokens that may remain of a pair, special ones included.
            limit: Tokens that may remain with the prompt's question.

        Returns:
            A sequence a pair, and of each pair its length where it was truncated, else 0.
        """
        layouts = self.passage_layouts(
            [query for query, _ in pairs], prompt, max_length=max_length, limit=limit
        )
        prefix = "" if prompt is None else prompt.passage
        return self.fit(layouts, [prefix + passage for _, passage in pairs])

    def encode_between(
        self, texts: Sequence[str], *, around: tuple[str, str], max_length: int, limit: int
    ) -> tuple[list[TokenSequence], list[int]]:
        """Tokenise texts that stand between two others which are never truncated.

        As FlagEmbedding and the model card do for bge-en-icl: the text is tokenised, truncated and
        spelt out again, which may add a space after a special token, and then the whole is
        tokenised as one.

        Args:
            texts: Any texts.
            around: What is put in front of each, beside `max_length`, and behind each, counted
                in it.
            max_length: Tokens that may remain of a text and what is behind it, special ones
                included.
            limit: Tokens that may remain of the whole, save for such spaces.

        Returns:
            A sequence a text, and of each text its length where it was truncated, without what is
            in front; else 0.

        Raises:
            ArgumentError: What stands around a text leaves no room for it.
        """
        before, after = around
        ahead, behind = (len(ids) for ids in self._ids(around))
        room = min(max_length, limit - ahead) - behind - self.single_extra
        if room < 1:
            msg = (
                f"No room is left for a query: the examples take {ahead} tokens, and what is "
                f"behind it {behind + self.single_extra}, of max_length={max_length} beside the "
                f"examples and of the {limit} that the model can take with them. "
                + room_remedy(
                    behind + self.single_extra + 1,
                    capacity=limit - ahead,
                    otherwise="fewer or shorter examples",
                )
            )
            raise ArgumentError(msg)
        kept, truncated = [], []
        for ids in self._ids(texts):
            length = len(ids) + behind + self.single_extra
            truncated.append(length if len(ids) > room else 0)
            text = self._backend.decode(self._cut(ids, room), skip_special_tokens=False)
            kept.append(f"{before}{text}{after}")
        wholes = ([*self._prefix, *ids, *self._suffix] for ids in self._ids(kept))
        return [_sequence(whole, len(whole)) for whole in wholes], truncated

    def text_layout(self, max_length: int) -> SequenceLayout:
        """Return what stands around a single text."""
        return SequenceLayout(self._prefix, self._suffix, max_length - self.single_extra)

    def passage_layouts(
        self,
        queries: Sequence[str],
        prompt: PairPrompt | None = None,
        *,
        max_length: int,
        limit: int,
    ) -> list[SequenceLayout]:
        """Return what stands around the passage of each pair, as FlagEmbedding builds it.

        The query is cut to three quarters of `max_length`, special tokens not counted, then the
        passage to what remains of `max_length`: from 20 tokens on, a long query never pushes a
        passage out. With a prompt the pair is cut to `max_length` and as many tokens as the
        separator and the question have; these follow after the cut, and are always whole.

        Args:
            queries: A query a pair; equal ones are tokenised once.
            prompt: What a language model is asked about each pair; None for a cross-encoder.
            max_length: Tokens that may remain of a pair, the question not counted.
            limit: Tokens that may remain of the whole.
        """
        if prompt is None:
            first, between, tail = self._pair_prefix, self._middle, self._pair_suffix
            room = max_length - self.pair_extra
            query_room = min(max_length * 3 // 4, room)
        else:
            (between,) = self._ids([prompt.separator])
            tail = self.prompt_tail(prompt)
            # As in FlagEmbedding, whether or not a single text gets one.
            first = self._prefix if self._bos is None else [self._bos]
            query_room = max_length * 3 // 4
        prefix = "" if prompt is None else prompt.query
        distinct = list(dict.fromkeys(queries))
        layouts = {}
        written = self._ids([prefix + query for query in distinct])
        for query, ids in zip(distinct, written, strict=True):
            asked = self._cut(ids, query_room)
            before = [*first, *asked, *between]
            if prompt is None:
                size = room - len(asked)
            else:
                pair_room = min(max_length + len(tail), limit - len(tail))
                size = max(min(max_length, pair_room - len(before)), 0)
            layouts[query] = SequenceLayout(
                before,
                tail,
                size,
                has_token_types=prompt is not None or self._has_types,
                query_excess=max(len(ids) - query_room, 0),
            )
        return [layouts[query] for query in queries]

    def fit(
        self, layouts: Sequence[SequenceLayout], texts: Sequence[str]
    ) -> tuple[list[TokenSequence], list[int]]:
        """Tokenise texts, truncate each to what its layout leaves, and put it there.

        Returns:
            A sequence a text, and of each the whole's length where it or the query in front was
            truncated, else 0.
        """
        sequences, truncated = [], []
        for layout, ids in zip(layouts, self._ids(texts), strict=True):
            size = layout.max_text_tokens
            whole = len(layout.before) + layout.query_excess + len(ids) + len(layout.after)
            truncated.append(whole if len(ids) > size or layout.query_excess else 0)
            sequences.append(self.build_sequence(layout, self._cut(ids, size)))
        return sequences, truncated

    def prompt_tail(self, prompt: PairPrompt) -> list[int]:
        """Return what stands behind each passage; see `passage_layouts`."""
        between, question = self._ids([prompt.separator, prompt.question])
        return [*between, *question]

    def build_sequence(self, layout: SequenceLayout, ids: Sequence[int]) -> TokenSequence:
        """Put a text's ids, which must fit, where they go."""
        whole = [*layout.before, *ids, *layout.after] or [self._pad]
        return _sequence(whole, len(layout.before) if layout.has_token_types else len(whole))

    def prompt_length(self, prompt: str) -> int:
        """Count what a prompt puts in front of a text: its tokens, and the special ones before."""
        return len(self._prefix) + self.count([prompt])[0]

    def _cut(self, ids: Sequence[int], size: int) -> Sequence[int]:
        """Leave what fits of a text: its beginning, or its end where the checkpoint says so."""
        if len(ids) <= size:
            return ids
        return ids[max(len(ids) - size, 0) :] if self._keeps_end else ids[:size]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Count each text's tokens, without special ones."""
        return [len(ids) for ids in self._ids(texts)]

    def offsets(self, texts: Sequence[str]) -> Iterator[list[tuple[int, int]]]:
        """Tokenise texts whole, without special tokens.

        Args:
            texts: Any texts.

        Returns:
            Of each text and each token the characters [start, end) that it was made of, in the
            text as it was given; as `offset_mapping` of transformers.
        """
        cased = self._cased(texts)
        if can_tokenize_inline(cased):  # on this thread, as in `_ids`
            encodings = [self._backend.encode(text, add_special_tokens=False) for text in cased]
        else:
            encodings = self._backend.encode_batch(cased, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            yield self._original_offsets(text, encoding.offsets)

    def first_id(self, word: str) -> int:
        """Return a word's first token."""
        return next(iter(self._ids([word])))[0]

    def text_of(self, token_id: int) -> str:
        """Return a token's text, as the vocabulary spells it."""
        return self._backend.id_to_token(token_id) or ""

    def _ids(self, texts: Sequence[str]) -> Iterable[list[int]]:
        texts = self._cased(texts)
        if can_tokenize_inline(texts):
            # On this thread: the tokenizer's pool may be busy with somebody's documents.
            return [self._backend.encode(text, add_special_tokens=False).ids for text in texts]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return (encoding.ids for encoding in encodings)

    def _cased(self, texts: Sequence[str]) -> list[str]:
        return [text.lower() for text in texts] if self._lower_case else list(texts)

    def _original_offsets(self, text: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Lead offsets in the lower-cased text back to the text."""
        if not self._lower_case or len(text.lower()) == len(text):
            return offsets
        # Some capitals become two characters, such as the Turkish I with its dot.
        origin = [position for position, letter in enumerate(text) for _ in letter.lower()]
        origin.append(len(text))
        return [
            (origin[start], origin[end - 1] + 1 if end > start else origin[start])
            for start, end in offsets
        ]


def _sequence(ids: list[int], second_segment_start: int) -> TokenSequence:
    # On the tokenising thread, so that no device waits for it; two thirds of np.array's time.
    return TokenSequence(np.fromiter(ids, np.int32, len(ids)), second_segment_start)


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
    """Return whether an event loop can check what came in itself."""
    return isinstance(items, (list, tuple)) and len(items) <= _FEW_TEXTS


def can_tokenize_inline(items: object) -> bool:
    """Return whether an event loop can check and tokenise texts or pairs itself: so few they are.

    Args:
        items: Whatever was given as texts or pairs; it need not be checked yet.
    """
    if not can_check_inline(items):
        return False
    characters = 0
    for item in items:  # type: ignore[attr-defined]
        for text in (item,) if isinstance(item, str) else item if isinstance(item, tuple) else ():
            characters += len(text) if isinstance(text, str) else 0
    return characters <= _FEW_CHARACTERS


def room_remedy(needed: int, *, capacity: int | None, otherwise: str) -> str:
    """Return what makes room for a text: a larger `max_length` where there is one, or less around.

    Args:
        needed: The least `max_length` that leaves room.
        capacity: The largest that the model can take; None for any.
        otherwise: What else to pass.
    """
    if capacity is not None and needed > capacity:
        return f"No max_length that the model can take is enough: pass {otherwise}."
    return f"Pass max_length={needed} or more, or {otherwise}."


def report_truncation(
    *,
    what: str,
    lengths: Sequence[int],
    pairs: Sequence[int] | None,
    max_length: int,
    capacity: int,
    windows: bool,
    policy: str,
    model: str,
) -> None:
    """Log which texts were truncated and what would read them whole, or refuse them.

    Args:
        what: What the texts are, in the plural.
        lengths: Of each text 0 where it was not truncated, else its tokens, special ones included.
        pairs: The places of the pairs that they are in; None for texts that stand for themselves.
        max_length: The tokens that are read.
        capacity: The tokens that the model could read.
        windows: Whether `long_passages="window"` would read all of them.
        policy: `"warn"`, `"error"` or `"ignore"`.
        model: The model's name.

    Raises:
        TruncationError: Some were and the policy is "error".
    """
    truncated = [index for index, length in enumerate(lengths) if length]
    if not truncated or policy == "ignore":
        return
    places, where = (truncated, "at") if pairs is None else (pairs, "in the pairs at")
    shown = ", ".join(map(str, places[:_SHOWN_PLACES]))
    more = ", ..." if len(places) > _SHOWN_PLACES else ""
    are = "is" if len(truncated) == 1 else "are"
    said = (
        f"{len(truncated)} of {len(lengths)} {what} {are} longer than max_length={max_length} "
        f"tokens of {model} ({where} index {shown}{more}; the longest has {max(lengths)})"
    )
    remedies = ["split or shorten them"]
    if capacity > max_length:
        remedies.append(f"raise max_length, of which the model takes {capacity}")
    if windows:
        remedies.append("pass long_passages='window', which reads them to their end")
    if policy == "error":
        remedies.append("pass on_truncation='warn'")
    remedy = ", or ".join([", ".join(remedies[:-1]), remedies[-1]] if remedies[1:] else remedies)
    if policy == "error":
        msg = f"{said}, and on_truncation='error' was asked for: {remedy}."
        raise TruncationError(msg)
    logger.warning("%s: the rest was not read. %s%s.", said, remedy[:1].upper(), remedy[1:])
