import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_core import Embedder
from bge_core.backends.packing import Pack, next_batch_end, round_up_to_bucket
from bge_core.tokenizer import TokenSequence

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


PAIRS = st.lists(
    st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(0, 20)),
    min_size=1,
    max_size=8,
)


@given(PAIRS, st.sampled_from([None, 0, 1, 3]), st.booleans())
def test_inputs_are_those_of_the_models_own_code(pairs, offset, bucketed):
    """For RoBERTa that is `create_position_ids_from_input_ids`, whatever token is spelt out."""
    texts = [TokenSequence(ids, min(second, len(ids))) for ids, second in pairs]
    pack = Pack(texts, torch.device("cpu"), offset, bucketed)
    inputs = {name: tensor[0] for name, tensor in pack.inputs().items()}
    assert {tensor.dtype for tensor in inputs.values()} == {torch.int64}
    start = 0
    for text in texts:
        own = {name: tensor[start : start + len(text)] for name, tensor in inputs.items()}
        ids = torch.tensor(text.ids)
        positions = torch.arange(len(text))
        if offset is not None:
            real = ids.ne(offset).long()
            positions = torch.cumsum(real, 0) * real + offset
        assert own["input_ids"].equal(ids)
        assert own["position_ids"].equal(positions)
        assert own["token_type_ids"].equal(
            (torch.arange(len(text)) >= text.second_segment_start).long()
        )
        start += len(text)
    rows = round_up_to_bucket(start) if bucketed else start
    for name, tensor in inputs.items():
        assert len(tensor) == rows
        assert set(tensor[start:].tolist()) <= {0 if name == "token_type_ids" else offset or 0}
    ends = np.cumsum([len(text) for text in texts])
    assert pack.cu_seqlens.tolist() == [0, *ends]
    assert pack.cu_seqlens.dtype == torch.int32
    assert pack.first_token_indices()[: len(texts)].tolist() == [0, *ends[:-1]]
    assert pack.last_token_indices().tolist() == (ends - 1).tolist()


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
