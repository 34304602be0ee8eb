"""Jobs on a local Ray cluster, in a process of their own; test_ray.py reads what they leave."""

import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from bge_core import ArgumentError, Embedder
from bge_core.scale.ray import add_columns
from bge_core.scale.steps import Embed

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class Dying(Embed):
    """Kills the process of its actor, once, in the middle of a block."""

    fatal: str
    notes: str

    def __call__(self, table):
        done = super().__call__(table)
        notes = Path(self.notes)
        (notes / f"pid-{os.getpid()}").touch()
        if self.fatal in table["text"].to_pylist() and not (notes / "killed").exists():
            (notes / "killed").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return done


def one_of_two_actors_dies(model, fatal):
    blocks = [pq.read_table(path) for path in sorted(Path("passages").iterdir())]
    Path("notes").mkdir()
    step = Dying(
        embedder=Embedder(model), batch_size=8, fatal=fatal, notes=str(Path.cwd() / "notes")
    )
    embedded = add_columns(ray.data.from_arrow(blocks), step, actors=2)
    batches = list(embedded.iter_batches(batch_format="pyarrow", batch_size=None))
    pq.write_table(pa.concat_tables(batches), "survived.parquet")


def a_wrong_column_is_refused_before_anything_runs(model):
    step = Embed(embedder=Embedder(model), text_column="body")
    said = []
    for dataset in (ray.data.from_items([{"text": "a"}]), ray.data.read_parquet("passages")):
        try:
            add_columns(dataset, step)
        except ArgumentError as error:
            said.append(str(error))
    Path("refused.json").write_text(json.dumps(said))


def guide():
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n([^`]*bge_core\.ray.*?)^```", text, re.DOTALL | re.MULTILINE)
    exec(compile(code, "scale.md", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    try:
        one_of_two_actors_dies(*sys.argv[1:3])
        a_wrong_column_is_refused_before_anything_runs(sys.argv[1])
        guide()
    finally:
        ray.shutdown()
