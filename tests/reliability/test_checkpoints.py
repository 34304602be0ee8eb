"""Damaged and malicious checkpoints: a sentence with the file, nothing run, nothing left half."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bge_core import BGEError, CheckpointError, Embedder, M3Embedder, Reranker
from bge_core.factory import make_scorer

Model = Embedder | M3Embedder | Reranker


def use(model: Model) -> Any:
    if isinstance(model, Reranker):
        return model.score("where?", ["there", "a panda"])
    if isinstance(model, M3Embedder):
        return model.encode(["where?", "a panda"], multi_vector=True)
    return model.embed_documents(["where?", "a panda"])


def edit(path: Path, **changes: Any) -> None:
    """Change a JSON file's keys."""
    value = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(value), encoding="utf-8")


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return damage


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink(missing_ok=True)  # written by transformers 4


def add_tokens(folder: Path) -> None:
    """Give the tokenizer tokens that the weights have no embedding for."""
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = value["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary |= {"where": len(vocabulary), "wherever": len(vocabulary) + 1}
    else:
        vocabulary += [["▁where", -1.0], ["▁wherever", -1.0]]
    path.write_text(json.dumps(value), encoding="utf-8")


def fewer_embeddings(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("word_embeddings.weight"))
    tensors[name] = tensors[name][:50].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", vocab_size=50)


def lose_a_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[:5],
        "model-00002-of-00002.safetensors": names[5:],
    }
    first = next(iter(parts))
    save_file({n: tensors[n] for n in parts[first]}, folder / first, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: part for part, own in parts.items() for n in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights cut": (cut("model.safetensors"), r"weights.*fetch the checkpoint again"),
    "weights lost": (lose("model.safetensors"), r"no weights.*model\.safetensors.*fetch it again"),
    "a shard lost": (lose_a_shard, r"lacks model-00002-of-00002\.safetensors.*fetch"),
    "tokenizer cut": (cut("tokenizer.json"), r"tokenizer.*fetch the checkpoint again"),
    "tokenizer lost": (lose_the_tokenizer, r"no tokenizer.*tokenizer\.json.*save_pretrained"),
    "config cut": (cut("config.json"), r"config\.json is damaged.*fetch the checkpoint again"),
    "config lost": (lose("config.json"), r"config\.json is missing.*save_pretrained"),
    "tokens too many": (add_tokens, r"tokenizer.*tokens.*vocab_size in config\.json.*fetch"),
    "embeddings too few": (fewer_embeddings, r"tokenizer.*embed 50 .*fetch"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["embedder", "reranker", "m3"])
async def test_a_damage_is_a_sentence_with_folder_and_remedy_within_a_second(
    kind, damage, request, copy_of
):
    cls, source = {
        "embedder": (Embedder, "en_folder"),
        "reranker": (Reranker, "reranker_folder"),
        "m3": (M3Embedder, "m3_folder"),
    }[kind]
    folder = copy_of(request.getfixturevalue(source))
    with cls(folder) as sound:
        use(sound)  # everything that is imported is imported now
    how, said = DAMAGES[damage]
    how(folder)
    # The thread's own time: what other processes take is no part of it.
    begun = time.thread_time()
    for _ in range(2):  # and again: the first failure leaves nothing behind
        with pytest.raises(CheckpointError, match=said) as caught:
            use(cls(folder))
        assert str(folder) in str(caught.value)
    assert time.thread_time() - begun < 1


def test_more_embeddings_than_tokens_are_usual(en_folder: Path, copy_of: Any):
    """Some checkpoints round the number of rows up."""
    folder = copy_of(en_folder)
    tensors = load_file(folder / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    rows = tensors[name]
    tensors[name] = rows.new_zeros(len(rows) + 37, rows.shape[1])
    tensors[name][: len(rows)] = rows
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", vocab_size=len(rows) + 37)
    with Embedder(folder) as padded, Embedder(en_folder) as plain:
        np.testing.assert_array_equal(use(padded), use(plain))


@pytest.mark.parametrize("name", ["sparse_linear.pt", "colbert_linear.pt"])
@pytest.mark.parametrize("damage", [cut, lose])
def test_a_damaged_head_is_a_sentence_for_its_outputs(m3_folder, copy_of, name, damage):
    folder = copy_of(m3_folder)
    damage(name)(folder)
    with pytest.raises(CheckpointError, match=rf"{name}.*(tensors|random numbers|damaged)"):
        use(M3Embedder(folder))
    with pytest.raises(CheckpointError, match=name):
        make_scorer(folder).rank("q", ["p"])
    with Embedder(folder) as dense, Embedder(m3_folder) as sound:
        np.testing.assert_allclose(use(dense), use(sound), atol=1e-6)


# The hub.


@pytest.mark.parametrize(
    ("name", "meant"),
    [("BAAI/bge-smal-en-v1.5", "BAAI/bge-small-en-v1.5"), ("BAAI/bge-m4", "BAAI/bge-m3")],
)
async def test_a_typo_is_answered_with_the_name_that_was_meant(call, name, meant):
    with Embedder(name) as embedder:
        begun = time.thread_time()
        with pytest.raises(CheckpointError, match=rf"{name}.*Did you mean '{meant}'"):
            await call(embedder, "embed_queries", ["where?"])
        assert time.thread_time() - begun < 1


def test_no_network_is_a_sentence_and_nothing_is_left_in_the_cache(script, tmp_path):
    """With the hub's own client, and no way out of this machine."""
    done = script(
        """
        import socket
        def refused(*_, **__):
            raise OSError(101, "Network is unreachable")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused
        from bge_core import CheckpointError, Reranker
        try:
            Reranker("BAAI/bge-reranker-base", cache_folder=CACHE).score("q", ["p"])
        except CheckpointError as error:
            print(error)
        """,
        CACHE=tmp_path / "hub",
        env={"HF_HUB_OFFLINE": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # the sentence is all
    assert "model='BAAI/bge-reranker-base' can't be found" in done.stdout
    assert "check the network" in done.stdout.lower() or "the network" in done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_full_disk_is_named_when_a_checkpoint_is_fetched(monkeypatch, tmp_path, number):
    import huggingface_hub

    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with (
        Embedder("acme/encoder", cache_folder=tmp_path) as embedder,
        pytest.raises(CheckpointError, match=r"has no room.*Free some.*cache_folder") as caught,
    ):
        embedder.embed_queries(["where?"])
    assert str(tmp_path) in str(caught.value)
    assert "network" not in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="no limit on file sizes")
def test_a_full_disk_keeps_no_half_of_a_converted_model(script, en_folder, tmp_path):
    """The limit stands for the disk's end: the weights have more than either."""
    done = script(
        """
        import logging, resource
        logging.basicConfig(level="WARNING", format="%(name)s %(message)s")
        from bge_core import Embedder
        import openvino, transformers
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for room in (1000, 150_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
            cache = f"{CACHE}/{room}"
            for _ in range(2):
                with Embedder(FOLDER, backend="openvino", cache_folder=cache) as embedder:
                    print(embedder.embed_queries(["x"]).shape)
        """,
        FOLDER=en_folder,
        CACHE=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 32)\n" * 4
    for room in (1000, 150_000):
        assert f"can't be kept in {tmp_path / str(room)}" in done.stderr
    assert "free some room there" in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["model.bin", "model.xml"])
def test_a_converted_model_that_was_cut_is_converted_again(en_folder, tmp_path, name, caplog):
    def embed() -> Any:
        with Embedder(en_folder, backend="openvino", cache_folder=tmp_path) as embedder:
            return embedder.embed_queries(["a panda"])

    expected = embed()
    (kept,) = (tmp_path / "openvino").iterdir()
    size = (kept / name).stat().st_size
    cut(name)(kept)
    np.testing.assert_allclose(embed(), expected, atol=1e-5)
    assert "converting" in caplog.text
    assert (kept / name).stat().st_size == size


# Malice.


class Trap:
    """Code that a pickle runs, which leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.makedirs, (str(self.mark), 0o777, True)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("kind", ["embedder", "reranker", "sparse", "multi_vector"])
def test_code_in_a_pickle_is_never_run(
    kind, form, en_folder, reranker_folder, m3_folder, copy_of, tmp_path
):
    import torch

    mark = tmp_path / "it_ran"
    folder, cls, name = {
        "embedder": (en_folder, Embedder, "pytorch_model.bin"),
        "reranker": (reranker_folder, Reranker, "pytorch_model.bin"),
        "sparse": (m3_folder, M3Embedder, "sparse_linear.pt"),
        "multi_vector": (m3_folder, M3Embedder, "colbert_linear.pt"),
    }[kind]
    folder = copy_of(folder)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    content = {"weight": Trap(mark), "bias": Trap(mark)}
    if form == "pickle":
        (folder / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, folder / name)
    # It does run where pickles are trusted, or this would show nothing.
    with contextlib.suppress(RuntimeError):
        torch.load(folder / name, weights_only=False)
    mark.rmdir()
    for trust in (False, True):
        with pytest.raises(CheckpointError, match=r"code in it, which was not run.*safetensors"):
            use(cls(folder, trust_remote_code=trust))
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_not_even_read(en_folder, copy_of, tmp_path):
    folder = copy_of(en_folder)
    for name in ("pytorch_model.bin", "training_args.bin", "sparse_linear.pt", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "it_ran")))
    use(Embedder(folder))
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("name", ["own_module.Own", "os.system"])
@pytest.mark.parametrize("place", ["module", "route", "activation"])
def test_a_class_of_the_checkpoint_s_own_is_not_run(
    en_folder, copy_of, tmp_path, monkeypatch, place, name
):
    """As a sentence-transformers module, a third way beside config.json and the tokenizer's."""
    folder = copy_of(en_folder)
    monkeypatch.syspath_prepend(folder)  # as where one works in it
    (folder / "own_module.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'it_ran')!r})\n")
    dense = {"in_features": 32, "out_features": 32, "bias": False, "activation_function": name}
    kind, file, content = {
        "module": (name, "config.json", {}),
        "route": (
            "sentence_transformers.models.Router",
            "router_config.json",
            {"types": {"0": name}, "structure": {"query": ["0"]}},
        ),
        "activation": ("sentence_transformers.models.Dense", "config.json", dense),
    }[place]
    (folder / "3_Own").mkdir()
    (folder / "3_Own" / file).write_text(json.dumps(content))
    listed = json.loads((folder / "modules.json").read_text())
    own = {"idx": 3, "name": "3", "path": "3_Own", "type": kind}
    (folder / "modules.json").write_text(json.dumps([*listed, own]))
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        use(Embedder(folder))
    assert not (tmp_path / "it_ran").exists()


def test_links_that_leave_the_folder_are_refused_for_modules(en_folder, copy_of, tmp_path):
    folder = copy_of(en_folder)
    shutil.move(folder / "1_Pooling", tmp_path / "elsewhere")
    (folder / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        Embedder(folder)


def test_links_to_files_are_the_hub_s_own_way_and_are_read(en_folder, copy_of, tmp_path):
    folder = copy_of(en_folder)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = shutil.move(path, tmp_path / f"blob-{path.parent.name}-{path.name}")
        path.symlink_to(blob)
    with Embedder(folder) as linked, Embedder(en_folder) as plain:
        np.testing.assert_array_equal(use(linked), use(plain))


@pytest.mark.parametrize("name", ["../{}", "{}", "sub/../../x.safetensors", "..\\x", "C:x"])
def test_an_index_of_weights_may_not_name_a_file_elsewhere(en_folder, copy_of, tmp_path, name):
    folder = copy_of(en_folder)
    outside = shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shutil.copy(outside, folder / "model-00002-of-00002.safetensors")
    name = name.format("outside.safetensors") if ".." in name else name.format(outside)
    tensors = load_file(outside)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        use(Embedder(folder))


@pytest.mark.parametrize("cls", [Embedder, Reranker])
def test_an_adapter_does_not_have_another_folder_loaded(
    cls, en_folder, bert_reranker_folder, copy_of
):
    source = en_folder if cls is Embedder else bert_reranker_folder
    folder = copy_of(source)
    named = {"base_model_name_or_path": str(source), "peft_type": "LORA", "task_type": None}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*merge_and_unload"):
        cls(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_paths_in_a_tokenizer_s_config_are_not_followed(en_folder, copy_of, tmp_path, file):
    """Published checkpoints have their makers' own there, so they can't be refused."""
    other = tmp_path / "other.txt"
    other.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    folder = copy_of(en_folder)
    if file == "vocab.txt":
        vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        (folder / file).write_text("\n".join(words), encoding="utf-8")
        (folder / "tokenizer.json").unlink()
    names = ("vocab_file", "tokenizer_file", "special_tokens_map_file", "name_or_path")
    # With from_slow, transformers 4 goes by the vocabulary even beside a better file.
    edit(folder / "tokenizer_config.json", from_slow=True, **dict.fromkeys(names, str(other)))
    with Embedder(folder) as tricked, Embedder(en_folder) as plain:
        np.testing.assert_array_equal(use(tricked), use(plain))


@pytest.mark.parametrize("path", ["../../x", "/etc", "\0", "a" * 5000, "1_Pooling\n"])
def test_an_odd_path_in_modules_is_a_sentence(en_folder, copy_of, path):
    folder = copy_of(en_folder)
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(BGEError):
        Embedder(folder)
