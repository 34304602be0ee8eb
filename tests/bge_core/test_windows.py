"""Windows of long passages, against windows that are cut here by hand and plain transformers."""

import functools
import logging
import math
import pickle
import re
import unicodedata
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import bge_core.windows
from bge_core import (
    ArgumentError,
    Embedder,
    M3Embedder,
    Reranker,
    TruncationError,
    make_scorer,
)
from bge_core.engine.scheduler import Engine
from bge_core.windows import BestWindow

QUERY = "Where is the capital of France?"
LONG = (
    "Cats purr when they are content. The giant panda is a bear of China. Water boils at a hundred "
    "degrees; Berlin is the capital of Germany and Rome is the capital of Italy. "
    "Paris is the capital and the largest city of France, on the river Seine."
)
UNICODE = [
    "大熊猫是中国特有的一种熊科动物，法国的首都是巴黎，德国的首都是柏林，水在一百度沸腾。" * 2,
    "Cafe\u0301s in Zu\u0308rich: re\u0301sume\u0301 na\u00efve fac\u0327ade \ufb01ne \u2460 " * 4,
    "Paris \U0001f600 is \U0001f468\u200d\U0001f469\u200d\U0001f467 in \U0001f1eb\U0001f1f7 France "
    * 5,
    "\u0130stanbul I\u0130\u0130I \u1e9e\u00df the capital \u0130 of \u0130\u0130 France \u0130 "
    * 5,
]
PASSAGES = [LONG, "", "  ", "Paris is in France.", LONG * 4, *UNICODE, LONG]

both = pytest.mark.parametrize("model", ["reranker_folder", "bert_reranker_folder"])


@functools.cache
def loaded(folder, auto_class):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, getattr(transformers, auto_class).from_pretrained(folder).float().eval()


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def by_hand(ids, size):
    """Spread windows of `size` so that neighbours share a quarter of one or more."""
    if len(ids) <= size:
        return [ids]
    spare = len(ids) - size
    steps = math.ceil(spare / (size - size // 4))
    return [ids[step * spare // steps :][:size] for step in range(steps + 1)]


def around(tokenizer, query, max_length):
    """What a pair has in front of its passage."""
    typed = tokenizer.sep_token == "[SEP]"
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    middle = [sep] if typed else [sep, sep]
    room = min(max_length * 3 // 4, max_length - len(middle) - 2)
    return [cls, *ids_of(tokenizer, query)[:room], *middle], [sep], typed


@torch.inference_mode()
def expected_windows(folder, query, passage, max_length):
    """(logit, ids) of each window, computed one by one."""
    tokenizer, model = loaded(folder, "AutoModelForSequenceClassification")
    first, last, typed = around(tokenizer, query, max_length)
    found = []
    for window in by_hand(ids_of(tokenizer, passage), max_length - len(first) - len(last)):
        ids = torch.tensor([[*first, *window, *last]])
        types = torch.tensor([[0] * len(first) + [1] * (len(window) + 1)])
        logits = model(input_ids=ids, **({"token_type_ids": types} if typed else {})).logits
        found.append((float(logits), window))
    return found


def reads(tokenizer, ids, quote):
    """Whether a text is what tokens spell, up to the tokenizer's own normalisation."""
    unknown = tokenizer.unk_token_id
    if tokenizer.unk_token == "[UNK]":  # BERT's, which drops case and accents
        quote = unicodedata.normalize("NFD", quote.lower())
        quote = "".join(letter for letter in quote if unicodedata.category(letter) != "Mn")
    pieces = tokenizer.convert_ids_to_tokens(ids)
    spelt = "".join(
        ".*?" if token == unknown else re.escape(re.sub("^##|\u2581", "", piece))
        for token, piece in zip(ids, pieces, strict=True)
    )
    return re.fullmatch(spelt, "".join(quote.split()), re.DOTALL) is not None


# The right score, and the right place.


@both
@pytest.mark.parametrize("max_length", [18, 40])
async def test_a_score_is_that_of_the_best_window(request, call, model, max_length):
    folder = request.getfixturevalue(model)
    tokenizer, _ = loaded(folder, "AutoModelForSequenceClassification")
    with Reranker(
        folder, normalize=False, max_length=max_length, long_passages="window"
    ) as reranker:
        scores = await call(reranker, "score", QUERY, PASSAGES)
        ranked = await call(reranker, "rank_spans", QUERY, PASSAGES)
        plain = await call(reranker, "rank", QUERY, PASSAGES)
    windows = [expected_windows(folder, QUERY, passage, max_length) for passage in PASSAGES]
    best = [max(found, key=lambda window: window[0]) for found in windows]
    np.testing.assert_allclose(scores, [logit for logit, _ in best], atol=1e-5)
    assert max(map(len, windows)) > 8
    assert any(found.index(top) for found, top in zip(windows, best, strict=True))
    assert plain == [(found.index, found.score) for found in ranked]
    order = np.argsort(-scores, kind="stable").tolist()
    assert [found.index for found in ranked] == order
    assert scores[0] == scores[-1]
    assert order.index(0) < order.index(len(PASSAGES) - 1)  # equal ones keep their order
    for found in ranked:
        passage, (start, end) = PASSAGES[found.index], found.span
        assert type(found.score) is float
        assert 0 <= start <= end <= len(passage)
        if len(windows[found.index]) == 1:
            assert (start, end) == (0, len(passage))
        else:
            assert reads(tokenizer, best[found.index][1], passage[start:end]), passage[start:end]


@both
async def test_what_fits_has_the_score_that_it_has_without_windows(request, call, model):
    folder = request.getfixturevalue(model)
    fit = [passage for passage in PASSAGES if passage != LONG * 4]
    with Reranker(folder) as plain, Reranker(folder, long_passages="window") as windowed:
        expected = await call(plain, "score", QUERY, fit)
        assert np.array_equal(await call(windowed, "score", QUERY, fit), expected)
        assert (await call(windowed, "score", QUERY, [])).shape == (0,)
        (alone,) = await call(windowed, "rank_spans", QUERY, ["\u5df4\u9ece"])
        (without,) = await call(plain, "rank_spans", QUERY, ["\u5df4\u9ece"])
    assert (alone.span, without.span, alone.score) == ((0, 2), None, without.score)


async def test_a_window_may_hold_a_single_token(bert_reranker_folder, call):
    passage = "the panda is a bear"
    with Reranker(
        bert_reranker_folder, normalize=False, max_length=5, long_passages="window"
    ) as reranker:
        (found,) = await call(reranker, "rank_spans", "a", [passage])
        windows = expected_windows(bert_reranker_folder, "a", passage, 5)
        assert {len(ids) for _, ids in windows} == {1}
        assert found.score == pytest.approx(max(windows)[0], abs=1e-5)
        tokenizer, _ = loaded(bert_reranker_folder, "AutoModelForSequenceClassification")
        assert reads(tokenizer, max(windows)[1], passage[slice(*found.span)])
        # A question of two tokens takes all the room; an empty passage needs none.
        assert (await call(reranker, "score", "a b", [""])).shape == (1,)
        with pytest.raises(ArgumentError, match="max_length=6 or more, or long_passages"):
            await call(reranker, "score", "a b", [passage])


async def test_of_equal_windows_the_first_is_given(reranker_folder, call):
    passage = "panda " * 300
    with Reranker(reranker_folder, max_length=32, long_passages="window") as reranker:
        (found,) = await call(reranker, "rank_spans", "panda", [passage])
    assert found.span[0] < 10
    assert set(passage[slice(*found.span)].split()) == {"panda"}


def test_what_is_not_finite_is_never_hidden_by_a_better_window():
    for bad in (np.nan, -np.inf, np.inf):
        call = BestWindow([("a", "b")], cut=lambda *_: ([], []))
        call._due.append([[(0, 1), (1, 2), (2, 3)]])
        call.take([np.array([1.0]), np.array([bad]), np.array([2.0])])
        assert not np.isfinite(call.rows[0]).any()
        assert call.spans == [(1, 2)]


async def test_a_language_model_is_asked_about_each_window(gemma_reranker_folder, call):
    tokenizer, model = loaded(gemma_reranker_folder, "AutoModelForCausalLM")
    with Reranker(
        gemma_reranker_folder, normalize=False, max_length=40, long_passages="window"
    ) as reranker:
        (found,) = await call(reranker, "rank_spans", "Paris?", [LONG])
        prompt = reranker.checkpoint.pair_prompt
        (short,) = await call(reranker, "score", "Paris?", ["Rome"])
    with Reranker(gemma_reranker_folder, normalize=False, max_length=40) as plain:
        assert plain.score("Paris?", ["Rome"])[0] == short
    between, question = (ids_of(tokenizer, text) for text in ("\n", prompt.question))
    asked = ids_of(tokenizer, "A: Paris?")
    first = [tokenizer.bos_token_id, *asked, *between]
    encoded = tokenizer(f"B: {LONG}", add_special_tokens=False, return_offsets_mapping=True)
    places = encoded["offset_mapping"]
    head = sum(end <= 3 for _, end in places)
    room = min(40, 40 + len(between) + len(question) - len(first)) - head
    numbered = list(enumerate(encoded["input_ids"]))[head:]
    best: tuple[float, Any] = (-math.inf, None)
    for window in by_hand(numbered, room):
        ids = [*first, *encoded["input_ids"][:head], *(token for _, token in window)]
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([[*ids, *between, *question]])).logits[0, -1]
        span = max(places[window[0][0]][0] - 3, 0), places[window[-1][0]][1] - 3
        best = max(best, (float(out[ids_of(tokenizer, "Yes")[0]]), span))
    assert found.score == pytest.approx(best[0], abs=1e-5)
    assert found.span == best[1] != (0, len(LONG))


def test_places_lead_to_the_text_as_it_was_given(bert_reranker_folder):
    from tokenizers import Tokenizer as Backend

    from bge_core.tokenizer import Tokenizer

    backend = Backend.from_file(str(bert_reranker_folder / "tokenizer.json"))
    tokenizer = Tokenizer(backend, lower_case=True)
    for text in ("\u0130\u0130 Paris \u0130", "PARIS is in France"):
        ((ids, places),) = tokenizer.places([text])
        plain = tokenizer.encode([text], max_length=99)[0][0].ids
        assert [*tokenizer.single_room(99).before, *ids, *tokenizer.single_room(99).after] == plain
        start = text.lower().replace("i\u0307", "i").index("paris")
        spelt = [text[one:two] for one, two in places if start <= one < start + 5]
        assert "".join(spelt).lower() == "paris"
        assert places[-1][1] == len(text)


# Vectors.


@torch.inference_mode()
def expected_vector(folder, text, max_length, pooling, lead=""):
    tokenizer, model = loaded(folder, "AutoModel")
    ids, head = ids_of(tokenizer, lead + text), len(ids_of(tokenizer, lead))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    fits = len(ids) <= max_length - 2
    windows = [ids] if fits else by_hand(ids[head:], max_length - 2 - head)
    rows = []
    for window in windows:
        whole = [cls, *([] if fits else ids[:head]), *window, sep]
        hidden = model(input_ids=torch.tensor([whole])).last_hidden_state[0]
        rows.append(hidden[0] if pooling == "cls" else hidden.mean(0))
    return torch.stack(rows).mean(0).numpy()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("model", ["en_folder", "m3_folder"])
async def test_a_vector_is_the_mean_of_its_windows(request, call, model, pooling):
    folder = request.getfixturevalue(model)
    options = {"pooling": pooling, "max_length": 20, "long_passages": "window"}
    with Embedder(folder, **options) as unit, Embedder(folder, normalize=False, **options) as raw:
        vectors = await call(unit, "embed_documents", PASSAGES)
        unscaled = await call(raw, "embed_documents", PASSAGES)
        query = await call(unit, "embed_queries", [LONG])
    with Embedder(folder, pooling=pooling, max_length=20) as plain:
        assert np.array_equal(await call(plain, "embed_queries", [LONG]), query)
        short = ["", "Paris is in France."]
        expected = await call(plain, "embed_documents", short)
        np.testing.assert_allclose(vectors[[1, 3]], expected, atol=1e-6)
    expected = np.stack([expected_vector(folder, text, 20, pooling) for text in PASSAGES])
    np.testing.assert_allclose(unscaled, expected, atol=1e-5)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


async def test_each_window_has_the_instruction_of_documents(llm_embedder_folder, call):
    with Embedder(
        llm_embedder_folder, max_length=40, normalize=False, long_passages="window"
    ) as embedder:
        lead = embedder._template.document
        vectors = await call(embedder, "embed_documents", [LONG, "Rome"])
        pooling = embedder.checkpoint.pooling
    assert lead
    expected = [
        expected_vector(llm_embedder_folder, text, 40, pooling, lead) for text in (LONG, "Rome")
    ]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


# What is said, and what is refused.


async def test_nothing_is_cut_but_queries(bert_reranker_folder, en_folder, call, caplog):
    caplog.set_level(logging.WARNING, logger="bge_core.tokenizer")
    options = {"max_length": 20, "long_passages": "window"}
    with Reranker(bert_reranker_folder, **options) as reranker:
        await call(reranker, "score", "cat", [LONG, ""])
        with Embedder(en_folder, **options) as embedder:
            await call(embedder, "embed_documents", [LONG])
        assert not caplog.messages
        await call(reranker, "score", LONG, [LONG, ""])
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("2 of 2 queries, with room left for a passage, are longer")


async def test_a_query_that_is_too_long_can_be_an_error(
    bert_reranker_folder, en_folder, call, computed
):
    options = {"max_length": 20, "long_passages": "window", "on_truncation": "error"}
    with Reranker(bert_reranker_folder, **options) as reranker:
        with pytest.raises(TruncationError, match="3 of 3 queries"):
            await call(reranker, "score", LONG, [LONG, "", "Paris"])
        assert computed.tokens == 0
        assert (await call(reranker, "score", "cat", [LONG, ""])).shape == (2,)
    with Embedder(en_folder, **options) as embedder:
        assert (await call(embedder, "embed_documents", [LONG])).shape[0] == 1
        with pytest.raises(TruncationError):
            await call(embedder, "embed_queries", [LONG])


def test_it_counts_in_the_fingerprint_and_travels(bert_reranker_folder, en_folder):
    for cls, folder in ((Reranker, bert_reranker_folder), (Embedder, en_folder)):
        plain, windowed = cls(folder), cls(folder, long_passages="window")
        assert plain.fingerprint != windowed.fingerprint
        assert plain.fingerprint == cls(folder, long_passages="truncate").fingerprint
        assert pickle.loads(pickle.dumps(windowed)).fingerprint == windowed.fingerprint
        with pytest.raises(ArgumentError, match="'truncate' or 'window'"):
            cls(folder, long_passages="windows")


def test_bge_m3_as_a_reranker_has_no_windows(m3_folder):
    with pytest.raises(ArgumentError, match="long_passages='window' is for rerankers"):
        make_scorer(m3_folder, long_passages="window")
    ranked = make_scorer(m3_folder).rank_spans(QUERY, ["Paris", "Rome"])
    assert [found.span for found in ranked] == [None, None]


async def test_long_texts_are_computed_slice_by_slice(en_folder, call, monkeypatch):
    jobs = []
    submit = Engine.submit

    def spy(self, sequences, **options):
        jobs.append(len(sequences))
        return submit(self, sequences, **options)

    monkeypatch.setattr(Engine, "submit", spy)
    texts = [f"{number} {LONG}" for number in range(9)] + ["a"] * 3
    with Embedder(en_folder, max_length=20, long_passages="window") as embedder:
        whole = await call(embedder, "embed_documents", texts)
        assert len(jobs) == 1
        monkeypatch.setattr(bge_core.windows, "_SLICE_CHARACTERS", 2 * len(texts[0]))
        jobs.clear()
        sliced = await call(embedder, "embed_documents", texts)
    assert len(jobs) == 5
    np.testing.assert_allclose(sliced, whole, atol=1e-6)


async def test_a_text_that_fits_shares_its_pass_with_bge_m3_s_sparse_output(
    m3_folder, call, computed
):
    short = "Paris is in France."
    with (
        M3Embedder(m3_folder, share_outputs=True) as sparse,
        Embedder(m3_folder, max_length=20, long_passages="window") as embedder,
    ):
        await call(embedder, "embed_documents", [short, LONG])
        before = computed.tokens
        await call(sparse, "encode", [short], dense=False)
        assert computed.tokens == before
        # The halves of windows would be nobody's.
        assert len(sparse._loaded().output_cache) == 0
