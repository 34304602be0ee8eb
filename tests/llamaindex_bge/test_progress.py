"""The bar of an index build moves as packs are done, and ends at 100 %."""

import pytest
import tqdm.auto
from llama_index.core.storage.kvstore import SimpleKVStore

from llamaindex_bge import BGEEmbedding, BGESparseEmbedding
from llamaindex_bge.testing import FakeBGEEmbedding

TEXTS = [f"text {number}" for number in range(40)]


@pytest.fixture
def bars(monkeypatch):
    """The moves of each bar that was shown, with its total first."""
    shown = []

    class Recorded(tqdm.auto.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            shown.append([self.total])

        def update(self, n=1):
            shown[-1].append(n)
            return super().update(n)

    monkeypatch.setattr(tqdm.auto, "tqdm", Recorded)
    return shown


async def test_it_moves_within_a_batch_of_the_host(en_folder, call, bars):
    name = "get_text_embedding_batch"
    with BGEEmbedding(model=en_folder, batch_tokens=64) as embedding:
        await call(embedding, name, TEXTS, show_progress=True)
        plain = await call(embedding, name, TEXTS)
    (moves,) = bars
    assert moves[0] == sum(moves[1:]) == len(TEXTS)
    assert max(moves[1:]) < 20
    assert len(plain) == len(TEXTS)


def test_it_ends_at_the_end_whatever_had_not_to_be_computed(en_folder, bars):
    texts = [*TEXTS, *TEXTS[:10]]
    with BGEEmbedding(model=en_folder, embeddings_cache=SimpleKVStore()) as embedding:
        for _ in range(2):
            embedding.get_text_embedding_batch(texts, show_progress=True)
    FakeBGEEmbedding().get_text_embedding_batch(texts, show_progress=True)
    assert [sum(moves[1:]) for moves in bars] == [50, 50, 50]
    assert [moves[0] for moves in bars] == [50, 50, 50]


def test_of_the_sparse_embedding_and_of_windows(m3_folder, en_folder, bars):
    with BGESparseEmbedding(model=m3_folder, batch_tokens=64) as embedding:
        embedding.get_text_embedding_batch(TEXTS, show_progress=True)
    with BGEEmbedding(model=en_folder, max_length=16, long_passages="window") as embedding:
        embedding.get_text_embedding_batch([" ".join(map(str, range(40)))], show_progress=True)
    sparse, windows = bars
    assert sparse[0] == sum(sparse[1:]) == len(TEXTS)
    assert windows[0] is None
    assert sum(windows[1:]) > 1


@pytest.mark.allow_hosts(["127.0.0.1"])
async def test_of_a_server(server, call, bars):
    embedding = BGEEmbedding(model="acme/x", query_instruction="", endpoint=server.address)
    await call(embedding, "get_text_embedding_batch", TEXTS, show_progress=True)
    assert sorted(bars[0][1:]) == [8, 32]
