"""A checkpoint's files and the user's home, while a model is loaded and before."""

from __future__ import annotations

import os

import pytest

from bge_core import Embedder, M3Embedder, Reranker

TEXTS = ["Paris is in France.", "A cat sat on the mat."]


# The file on disk is not the model in memory.


@pytest.mark.parametrize("how", ["overwritten", "cut"])
def test_a_loaded_model_is_not_changed_by_its_file(script, request, copy_of, how):
    """In a process of its own, which a file that was cut would end."""
    models = {
        "code_folder": Embedder,
        "gemma2_folder": Embedder,
        "en_folder": Embedder,
        "gemma_reranker_folder": Reranker,
    }
    folders = {copy_of(request.getfixturevalue(name)): make for name, make in models.items()}
    done = script(
        """
        import os
        import numpy as np
        from bge_core import Embedder, Reranker
        for name in FOLDERS.split(os.pathsep):
            make, _, folder = name.partition(" ")
            model = (Embedder if make == "Embedder" else Reranker)(folder, device="cpu")
            texts = ["Paris is in France.", "A cat sat on the mat."]
            ask = getattr(model, "embed_documents", lambda some: model.score("where?", some))
            before = np.array(ask(texts))
            path = folder + "/model.safetensors"
            size = os.path.getsize(path)
            with open(path, "r+b") as file:
                if HOW == "cut":
                    file.truncate(100)
                else:
                    file.seek(size // 2)
                    file.write(b"\\x3c" * (size - size // 2))
            assert np.array_equal(before, np.array(ask(texts))), folder
            print(folder, "the same", flush=True)
        """,
        FOLDERS=os.pathsep.join(f"{make.__name__} {folder}" for folder, make in folders.items()),
        HOW=how,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{folder} the same" for folder in folders]


def test_a_head_that_is_replaced_later_is_not_put_on_the_old_encoder(m3_folder, copy_of):
    import torch

    folder = copy_of(m3_folder)
    with M3Embedder(m3_folder) as known:
        expected = known.encode(TEXTS, sparse=True)
    with M3Embedder(folder) as model:
        model.encode(TEXTS, sparse=False)
        state = torch.load(folder / "sparse_linear.pt", weights_only=True)
        torch.save({name: -tensor for name, tensor in state.items()}, folder / "sparse_linear.pt")
        assert model.encode(TEXTS, sparse=True).sparse == expected.sparse


def test_a_user_without_a_home_converts_for_openvino_all_the_same(script, en_folder):
    pytest.importorskip("openvino")
    done = script(
        """
        import os, pwd
        os.environ.pop("HOME", None), os.environ.pop("XDG_CACHE_HOME", None)
        def nobody(_):
            raise KeyError("uid not found")
        pwd.getpwuid = nobody
        from bge_core import Embedder
        for backend in ("openvino", "auto"):
            with Embedder(FOLDER, backend=backend) as embedder:
                print(embedder.embed_queries(["where?"]).shape)
        """,
        FOLDER=en_folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(1, 32)") == 2


HUB = """
import os, socket, threading
address = socket.create_server(("127.0.0.1", 0))
def serve():
    while True:
        try:
            caller, _ = address.accept()
        except OSError:
            return
        with caller:
            caller.recv(65536)
            caller.sendall(ANSWER.encode("latin-1"))
threading.Thread(target=serve, daemon=True).start()
os.environ.update(
    HF_ENDPOINT=f"http://127.0.0.1:{address.getsockname()[1]}",
    HF_HUB_OFFLINE="0",
    NO_PROXY="127.0.0.1",
)
from bge_core import BGEError, Embedder
try:
    Embedder("acme/encoder", cache_folder=CACHE).embed_queries(["where?"])
except BGEError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    "said",
    [
        "",
        "NONSENSE\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Type: application/json\r\n\r\n[1]",
        "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Type: application/json\r\n\r\nnull",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nContent-Type: application/json\r\n\r\n{",
        "HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["dropped", "garbage", "a list", "null", "empty", "cut", "redirects", "broken", "denied"],
)
def test_whatever_a_hub_answers_is_a_sentence(script, tmp_path, said):
    """With the hub's own client, and a hub that it may reach."""
    done = script(HUB, ANSWER=said, CACHE=tmp_path / "hub")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("CheckpointError model='acme/encoder' can't be found")
    assert "the hub gave none" in done.stdout
