import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_core import Embedder
from bge_core.backends.packing import next_batch_end

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40).map(sorted)


def packs(lengths, *, room, padded):
    start, parts = 0, []
    while start < len(lengths):
        end = next_batch_end(lengths, start=start, limit=room, padded=padded)
        parts.append(lengths[start:end])
        start = end
    return parts


def cost(part, *, padded):
    return max(part) * len(part) if padded else sum(part)


@given(LENGTHS, st.integers(1, 200), st.booleans())
def test_packs_hold_every_sequence_once_within_the_budget(lengths, room, padded):
    parts = packs(lengths, room=room, padded=padded)
    assert list(itertools.chain(*parts)) == lengths
    assert all(cost(part, padded=padded) <= room for part in parts if len(part) > 1)


@given(LENGTHS, st.integers(1, 200), st.booleans())
def test_a_pack_takes_as_many_as_fit(lengths, room, padded):
    parts = packs(lengths, room=room, padded=padded)
    for part, after in itertools.pairwise(parts):
        assert cost([*part, after[0]], padded=padded) > room


def test_a_sequence_larger_than_the_budget_gets_a_pack_of_its_own():
    assert packs([30, 20, 3, 2], room=10, padded=False) == [[30], [20], [3, 2]]


@pytest.fixture(scope="module")
def embedder(m3_folder):
    with Embedder(m3_folder, device="cpu") as embedder:
        yield embedder


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=12))
def test_who_shares_a_pack_changes_no_vector(embedder, lengths):
    texts = ["panda " * length for length in lengths]
    alone = np.concatenate([embedder.embed_documents([text]) for text in texts])
    np.testing.assert_allclose(embedder.embed_documents(texts), alone, atol=1e-5)
