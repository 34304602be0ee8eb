"""Windows of long passages, each of them against plain transformers on its text."""

import copy
import functools
import itertools
import logging
import math
import pickle
import unicodedata

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer as Backend

import bge_core.windows
from bge_core import (
    ArgumentError,
    CheckpointError,
    Embedder,
    M3Embedder,
    Reranker,
    TruncationError,
    make_embedder,
    make_reranker,
)
from bge_core.engine.scheduler import Engine
from bge_core.tokenizer import SequenceLayout, Tokenizer
from bge_core.windows import best_window, split

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
def loaded(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def by_hand(tokenizer, text, size, prefix=""):
    """Return the characters of windows that fit, spread so that neighbours share a quarter."""
    encoded = tokenizer(
        prefix + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    offsets = encoded["offset_mapping"]
    if len(offsets) <= size:
        return [(0, len(text))]
    lead = len(prefix)
    own = [(max(one - lead, 0), two - lead) for one, two in offsets if not lead or two > lead]
    tokens = size - (len(offsets) - len(own))
    while True:
        spare = len(own) - tokens
        steps = math.ceil(spare / (tokens - tokens // 4))
        starts = [step * spare // steps for step in range(steps + 1)]
        spans = [(own[start][0], own[start + tokens - 1][1]) for start in starts]
        over = max(len(ids_of(tokenizer, prefix + text[one:two])) for one, two in spans) - size
        if over <= 0 or tokens == 1:
            return spans
        tokens = max(tokens - over, 1)


def room_of(tokenizer, query, max_length):
    """Count the tokens of a passage that fit beside a query."""
    special = 3 if tokenizer.sep_token == "[SEP]" else 4
    asked = min(max_length * 3 // 4, max_length - special, len(ids_of(tokenizer, query)))
    return max_length - special - asked


def expected_windows(folder, query, passage, max_length, reference_score):
    """(logit, span) of each window, computed one by one."""
    tokenizer = loaded(folder)
    spans = by_hand(tokenizer, passage, room_of(tokenizer, query, max_length))
    pairs = [(query, passage[one:two]) for one, two in spans]
    return list(zip(reference_score(folder, pairs, max_length=max_length), spans, strict=True))


# The right score, and the right place.


@both
@pytest.mark.parametrize("max_length", [18, 40])
async def test_a_score_is_that_of_the_best_window(
    request, call, model, max_length, reference_score
):
    folder = request.getfixturevalue(model)
    with Reranker(
        folder, normalize=False, max_length=max_length, long_passages="window"
    ) as reranker:
        scores = await call(reranker, "score", QUERY, PASSAGES)
        ranked = await call(reranker, "rank", QUERY, PASSAGES)
    windows = [
        expected_windows(folder, QUERY, passage, max_length, reference_score)
        for passage in PASSAGES
    ]
    best = [max(found, key=lambda window: window[0]) for found in windows]
    np.testing.assert_allclose(scores, [logit for logit, _ in best], atol=1e-5)
    assert max(map(len, windows)) > 8
    assert any(found.index(top) for found, top in zip(windows, best, strict=True))
    order = np.argsort(-scores, kind="stable").tolist()
    assert [found.index for found in ranked] == order
    assert scores[0] == scores[-1]
    assert order.index(0) < order.index(len(PASSAGES) - 1)  # equal ones keep their order
    for found in ranked:
        assert type(found.score) is float
        # Windows with the same words have the same score, up to the last digit.
        near = [span for logit, span in windows[found.index] if logit > found.score - 1e-5]
        assert found.span in near


@both
@pytest.mark.parametrize("size", [2, 7, 30])
@pytest.mark.parametrize("prefix", ["", "passage: "])
def test_windows_fit_cover_everything_and_share_a_quarter(request, model, size, prefix):
    tokenizer = loaded(request.getfixturevalue(model))
    backend = Tokenizer(copy.deepcopy(tokenizer.backend_tokenizer))
    size += len(ids_of(tokenizer, prefix))
    layout = SequenceLayout([], [], size)
    for passage in PASSAGES:
        spans = split(backend, passage, layout, prefix=prefix)
        assert spans == by_hand(tokenizer, passage, size, prefix)
        if len(ids_of(tokenizer, prefix + passage)) <= size:
            assert spans == [(0, len(passage))]
            continue
        assert len(spans) > 1
        covered = {place for one, two in spans for place in range(one, two)}
        left = (letter for place, letter in enumerate(passage) if place not in covered)
        # BERT's tokenizer drops accents.
        assert not [letter for letter in left if unicodedata.category(letter) not in ("Zs", "Mn")]
        if size < 20:  # a word of one token may have more by itself
            continue
        counts = [len(ids_of(tokenizer, prefix + passage[one:two])) for one, two in spans]
        assert max(counts) <= size
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert start < end


@both
async def test_what_fits_has_the_score_that_it_has_without_windows(request, call, model):
    folder = request.getfixturevalue(model)
    fit = [passage for passage in PASSAGES if passage != LONG * 4]
    with Reranker(folder) as plain, Reranker(folder, long_passages="window") as windowed:
        expected = await call(plain, "score", QUERY, fit)
        assert np.array_equal(await call(windowed, "score", QUERY, fit), expected)
        assert (await call(windowed, "score", QUERY, [])).shape == (0,)
        (alone,) = await call(windowed, "rank", QUERY, ["\u5df4\u9ece"])
        (without,) = await call(plain, "rank", QUERY, ["\u5df4\u9ece"])
    assert (alone.span, without.span, alone.score) == ((0, 2), None, without.score)


async def test_a_window_may_hold_a_single_token(bert_reranker_folder, call, reference_score):
    passage = "the panda is a bear"
    with Reranker(
        bert_reranker_folder, normalize=False, max_length=5, long_passages="window"
    ) as reranker:
        (found,) = await call(reranker, "rank", "a", [passage])
        windows = expected_windows(bert_reranker_folder, "a", passage, 5, reference_score)
        assert len(windows) >= 5
        assert found.score == pytest.approx(max(windows)[0], abs=1e-5)
        assert found.span == max(windows)[1]
        # A question of two tokens takes all the room; an empty passage needs none.
        assert (await call(reranker, "score", "a b", [""])).shape == (1,)
        with pytest.raises(ArgumentError, match="max_length=6 or more, or long_passages"):
            await call(reranker, "score", "a b", [passage])


async def test_of_equal_windows_the_first_is_given(reranker_folder, call):
    passage = "panda " * 300
    with Reranker(reranker_folder, max_length=32, long_passages="window") as reranker:
        (found,) = await call(reranker, "rank", "panda", [passage])
    assert found.span[0] < 10
    assert set(passage[slice(*found.span)].split()) == {"panda"}


def test_what_is_not_finite_is_never_hidden_by_a_better_window():
    for bad in (np.nan, -np.inf, np.inf):
        assert best_window(np.array([1.0, bad, 2.0])) == 1


async def test_a_language_model_is_asked_about_each_window(gemma_reranker_folder, call):
    tokenizer = loaded(gemma_reranker_folder)
    with Reranker(
        gemma_reranker_folder, normalize=False, max_length=40, long_passages="window"
    ) as reranker:
        (found,) = await call(reranker, "rank", "Paris?", [LONG])
        prompt = reranker.checkpoint.pair_prompt
        (short,) = await call(reranker, "score", "Paris?", ["Rome"])
    with Reranker(gemma_reranker_folder, normalize=False, max_length=40) as plain:
        assert plain.score("Paris?", ["Rome"])[0] == short
        between, question = (ids_of(tokenizer, text) for text in ("\n", prompt.question))
        first = [tokenizer.bos_token_id, *ids_of(tokenizer, "A: Paris?"), *between]
        room = min(40, 40 + len(between) + len(question) - len(first))
        spans = by_hand(tokenizer, LONG, room, prompt.passage)
        assert len(spans) > 2
        # What the model makes of one passage that fits, tests/bge_core/test_decoders.py shows.
        scores = plain.score("Paris?", [LONG[one:two] for one, two in spans])
    assert found.score == pytest.approx(scores.max(), abs=1e-5)
    assert found.span == spans[int(scores.argmax())]


def test_offsets_lead_to_the_text_as_it_was_given(bert_reranker_folder):
    backend = Backend.from_file(str(bert_reranker_folder / "tokenizer.json"))
    tokenizer = Tokenizer(backend, lower_case=True)
    for text in ("\u0130\u0130 Paris \u0130", "PARIS is in France"):
        (offsets,) = tokenizer.offsets([text])
        layout = tokenizer.text_layout(99)
        special = len(layout.before) + len(layout.after)
        assert len(offsets) + special == len(tokenizer.encode([text], max_length=99)[0][0].ids)
        start = text.lower().replace("i\u0307", "i").index("paris")
        spelt = [text[one:two] for one, two in offsets if start <= one < start + 5]
        assert "".join(spelt).lower() == "paris"
        assert offsets[-1][1] == len(text)


# Vectors.


def expected_vector(folder, text, max_length, pooling, reference_embed, lead=""):
    spans = by_hand(loaded(folder), text, max_length - 2, lead)
    windows = [lead + text[one:two] for one, two in spans]
    return reference_embed(folder, windows, pooling, normalize=False, max_length=max_length).mean(0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("model", ["en_folder", "m3_folder"])
async def test_a_vector_is_the_mean_of_its_windows(request, call, model, pooling, reference_embed):
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
    expected = np.stack(
        [expected_vector(folder, text, 20, pooling, reference_embed) for text in PASSAGES]
    )
    np.testing.assert_allclose(unscaled, expected, atol=1e-5)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


async def test_each_window_has_the_instruction_of_documents(
    llm_embedder_folder, call, reference_embed
):
    with Embedder(
        llm_embedder_folder, max_length=40, normalize=False, long_passages="window"
    ) as embedder:
        lead = embedder._template.document_prefix
        vectors = await call(embedder, "embed_documents", [LONG, "Rome"])
        pooling = embedder.checkpoint.pooling
    assert lead
    expected = [
        expected_vector(llm_embedder_folder, text, 40, pooling, reference_embed, lead)
        for text in (LONG, "Rome")
    ]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


# On a server.


@pytest.mark.allow_hosts(["127.0.0.1"])
async def test_windows_are_sent_to_a_server(
    call, server, en_folder, reranker_folder, reference_embed, reference_score
):
    server.embed = lambda texts: reference_embed(en_folder, texts, normalize=False, max_length=20)
    options = {"max_length": 20, "long_passages": "window"}
    where = {"endpoint": server.address, **options}
    with Embedder(en_folder, **options) as here, make_embedder(en_folder, **where) as there:
        expected = here.embed_documents(PASSAGES)
        np.testing.assert_allclose(
            await call(there, "embed_documents", PASSAGES), expected, atol=1e-5
        )
        assert max(len(text) for _, body in server.asked for text in body["input"]) < len(LONG)
        other = make_embedder(en_folder, endpoint=server.address)
        assert there.fingerprint != other.fingerprint
    server.logits = lambda pairs: reference_score(reranker_folder, pairs, max_length=40)
    where |= {"max_length": 40}
    with (
        Reranker(reranker_folder, max_length=40, long_passages="window") as here,
        make_reranker(reranker_folder, **where) as there,
    ):
        local = here.rank(QUERY, PASSAGES)
        ranked = await call(there, "rank", QUERY, PASSAGES)
    scores = {found.index: found.score for found in local}
    assert {found.index: pytest.approx(found.score, abs=1e-5) for found in ranked} == scores
    spans = {found.index: found.span for found in local}
    assert ranked[0].span == spans[ranked[0].index] != (0, len(PASSAGES[ranked[0].index]))


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_server_s_limit_must_be_known_for_windows(server):
    with (
        make_embedder(
            "our-own-encoder", endpoint=server.address, query_instruction="", long_passages="window"
        ) as embedder,
        pytest.raises(CheckpointError, match="our-own-encoder"),
    ):
        embedder.embed_documents([LONG])
    with pytest.raises(ArgumentError, match="max_length can't be set with endpoint"):
        make_embedder("BAAI/bge-m3", endpoint=server.address, max_length=20)
    with pytest.raises(ArgumentError, match="max_length must be 1 or more"):
        make_embedder("BAAI/bge-m3", endpoint=server.address, max_length=0, long_passages="window")


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


async def test_bge_m3_as_a_reranker_scores_windows(m3_folder, call):
    passages = [LONG, "Rome", LONG * 2]
    with make_reranker(m3_folder, long_passages="window", max_length=20) as windowed:
        ranked = await call(windowed, "rank", QUERY, passages)
        bulk = await call(windowed, "score_pairs", [(QUERY, passage) for passage in passages])
    plain = make_reranker(m3_folder, max_length=20)
    for found in ranked:
        passage = passages[found.index]
        spans = by_hand(loaded(m3_folder), passage, 18)
        scores = plain.score(QUERY, [passage[one:two] for one, two in spans])
        assert found.score == pytest.approx(scores.max(), abs=1e-5)
        assert found.span in [
            span for span, score in zip(spans, scores, strict=True) if score > scores.max() - 1e-5
        ]
        assert bulk[found.index] == pytest.approx(found.score, abs=1e-5)
    assert plain.fingerprint != windowed.fingerprint
    assert [found.span for found in plain.rank(QUERY, ["Paris", "Rome"])] == [None, None]
    with pytest.raises(ArgumentError, match="'truncate' or 'window'"):
        make_reranker(m3_folder, long_passages="windows")
    plain.close()


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
        assert len(sparse.local.loaded().output_cache) == 0
