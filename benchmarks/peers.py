"""One contender in a process of its own: its threads and its libraries' versions disturb nobody.

    python peers.py KIND FOLDER

Reads a pickled (texts, batch size) a time from standard input, and answers with the seconds that
they took and their vectors. KIND is a key of `KINDS`. FOLDER is a checkpoint; what is converted of
it is kept beside it, in a copy a kind.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Encode = Callable[[Sequence[str], int], Any]


def ours(folder: Path, dtype: str) -> Encode:
    """bge-adapters, whose packs have no batch size; one text is a query."""
    from bge_core import Embedder

    model = Embedder(folder, dtype=dtype, query_instruction="", on_truncation="ignore")
    return lambda texts, _: (
        model.embed_queries(texts) if len(texts) == 1 else model.embed_documents(texts)
    )


def sentence_transformers(folder: Path, **options: Any) -> Encode:
    """sentence-transformers with one of its backends."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", **options)
    return lambda texts, batch: model.encode(
        list(texts), batch_size=batch, normalize_embeddings=True
    )


def _onnx(folder: Path) -> Encode:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.backend import export_optimized_onnx_model

    if not list(folder.glob("onnx/*O3.onnx")):
        model = SentenceTransformer(str(folder), device="cpu", backend="onnx")
        model.save_pretrained(str(folder))
        export_optimized_onnx_model(model, "O3", str(folder))
    file = next(folder.glob("onnx/*O3.onnx")).name
    return sentence_transformers(folder, backend="onnx", model_kwargs={"file_name": file})


def _onnx_int8(folder: Path) -> Encode:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.backend import export_dynamic_quantized_onnx_model

    flags = Path("/proc/cpuinfo").read_text()
    target = "avx512_vnni" if "avx512_vnni" in flags else "avx2"
    if not list(folder.glob("onnx/*int8*.onnx")):
        model = SentenceTransformer(str(folder), device="cpu", backend="onnx")
        model.save_pretrained(str(folder))
        export_dynamic_quantized_onnx_model(model, target, str(folder))
    file = next(folder.glob("onnx/*int8*.onnx")).name
    return sentence_transformers(folder, backend="onnx", model_kwargs={"file_name": file})


def _fastembed(folder: Path) -> Encode:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType
    from sentence_transformers import SentenceTransformer

    if not (folder / "onnx" / "model.onnx").exists():
        SentenceTransformer(str(folder), device="cpu", backend="onnx").save_pretrained(str(folder))
    # It reads as many tokens as these say, and in the checkpoint they say fewer.
    for name, changed in (
        ("tokenizer.json", {"truncation": None, "padding": None}),
        ("tokenizer_config.json", {"model_max_length": 512, "max_length": 512}),
    ):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "unk_token": "[UNK]"}))
    TextEmbedding.add_custom_model(
        model="bench/own",
        pooling=PoolingType.CLS,
        normalization=True,
        sources=ModelSource(hf="bench/own"),
        dim=json.loads((folder / "config.json").read_text())["hidden_size"],
        model_file="onnx/model.onnx",
    )
    model = TextEmbedding("bench/own", specific_model_path=str(folder))
    return lambda texts, batch: np.array(list(model.embed(list(texts), batch_size=batch)))


KINDS: dict[str, Callable[[Path], Encode]] = {
    "bge-adapters": lambda folder: ours(folder, "float32"),
    "bge-adapters, int8": lambda folder: ours(folder, "int8"),
    "sentence-transformers, torch": sentence_transformers,
    "sentence-transformers, ONNX O3": _onnx,
    "sentence-transformers, ONNX int8": _onnx_int8,
    "sentence-transformers, OpenVINO": lambda folder: sentence_transformers(
        folder, backend="openvino"
    ),
    "sentence-transformers, OpenVINO int8": lambda folder: sentence_transformers(
        folder, backend="openvino", model_kwargs={"load_in_8bit": True}
    ),
    "FastEmbed": _fastembed,
}


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if not kind.startswith("bge-adapters"):
        own = folder.with_name(f"{folder.name} for {kind}".replace(",", "").replace(" ", "-"))
        if not own.exists():
            shutil.copytree(folder, own)
        folder = own
    encode = KINDS[kind](folder)
    encode(["ready?"], 1)
    pickle.dump("ready", answers)
    answers.flush()
    while True:
        try:
            texts, batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        started = time.perf_counter()
        vectors = encode(texts, batch)
        seconds = time.perf_counter() - started
        pickle.dump((seconds, np.asarray(vectors, dtype=np.float32)), answers)
        answers.flush()


if __name__ == "__main__":
    main()
