"""A progress bar is a picture of the work: whatever becomes of it, the work comes."""

from __future__ import annotations

import io
import sys
import threading

import numpy as np
import pytest
from tqdm.auto import tqdm

from bge_core import Embedder, M3Embedder, Reranker
from bge_core.progress import progress_bar

TEXTS = [f"text {number}" for number in range(300)]
PAIRS = [("a query", text) for text in TEXTS]
WORK = {
    "embedder": ("en_folder", Embedder, "embed_documents", TEXTS),
    "reranker": ("bert_reranker_folder", Reranker, "score_pairs", PAIRS),
    "m3": ("m3_folder", M3Embedder, "encode", TEXTS),
}


class Breaking(io.StringIO):
    """A stream that breaks at one of its writes, and stays broken."""

    def __init__(self, error: Exception, *, at: int) -> None:
        super().__init__()
        self.error = error
        self.left = at

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


def arrays(outcome):
    return outcome if isinstance(outcome, np.ndarray) else outcome.dense


def other_bars_are_drawn() -> bool:
    """Draw one in a thread of its own: it would hang where tqdm's lock is still taken."""
    stream = io.StringIO()

    def draw():
        with tqdm(total=2, file=stream) as bar:
            bar.update(2)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive() and "2/2" in stream.getvalue()


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file")])
@pytest.mark.parametrize("kind", WORK)
async def test_a_stream_that_breaks_costs_the_bar_alone(
    request, call, monkeypatch, kind, error, at
):
    folder, make, method, items = WORK[kind]
    with make(request.getfixturevalue(folder), batch_tokens=64) as model:
        expected = arrays(await call(model, method, items))
        stream = Breaking(error, at=at)
        monkeypatch.setattr(sys, "stderr", stream)
        outcome = arrays(await call(model, method, items, show_progress=True))
        monkeypatch.undo()
        assert stream.left < 0, "it broke"
        np.testing.assert_allclose(outcome, expected, atol=1e-6)
        assert other_bars_are_drawn()


def test_a_bar_that_fails_in_a_worker_is_dropped(monkeypatch):
    """As one of a notebook does whose page is gone."""
    drawn = []

    def display(self, *args, **options):
        drawn.append(threading.current_thread())
        raise ConnectionError

    monkeypatch.setattr(tqdm, "display", display)
    with progress_bar(3, show=True) as move:
        for _ in range(3):
            thread = threading.Thread(target=move, args=(1,))
            thread.start()
            thread.join()
    assert len(drawn) == 1
    monkeypatch.undo()
    assert other_bars_are_drawn()


def test_a_bar_that_can_t_be_made_is_none(monkeypatch):
    def make(self, **options):
        raise OSError

    monkeypatch.setattr(tqdm, "__init__", make)
    monkeypatch.setattr(tqdm, "__del__", lambda self: None)
    with progress_bar(3, show=True) as move:
        assert move is None


def test_a_bar_counts_and_ends(capsys):
    with progress_bar(3, show=True, unit="pair") as move:
        assert move is not None
        move(2)
        move(1)
    assert "3/3" in capsys.readouterr().err
    with progress_bar(3, show=False) as move:
        assert move is None
