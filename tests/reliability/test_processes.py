"""The end of a process, and its children: nothing hangs, nothing crashes, nothing heavy travels."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import langchain_bge
import llamaindex_bge
from bge_core import Embedder, M3Embedder, Reranker
from bge_core.factory import make_scorer

# The end.


def test_a_daemon_thread_that_loads_a_model_does_not_crash_the_end(script, en_folder: Path):
    """It would come back from torch to an interpreter that has ended, and abort the process."""
    done = script(
        """
        import atexit, os, threading, time
        import torch
        loading, loaded = threading.Event(), threading.Event()
        # Called last of all: the first to be registered.
        atexit.register(lambda: os.write(1, f"{loaded.is_set()}\\n".encode()))
        from bge_core import Embedder
        from bge_core.engine.local_model import LocalModel

        once = LocalModel._new_engine

        def over_and_over(*arguments):
            # So that the end finds it in the middle of one.
            loading.set()
            until = time.monotonic() + 1.5
            try:
                while time.monotonic() < until:
                    engine = once(*arguments)
                return engine
            finally:
                loaded.set()

        # What is imported is imported before the end comes.
        Embedder(FOLDER, pooling="mean").embed_documents(["warm"])
        LocalModel._new_engine = over_and_over
        embedder = Embedder(FOLDER)
        threading.Thread(target=embedder.embed_documents, args=(["x"],), daemon=True).start()
        loading.wait()
        """,
        FOLDER=en_folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"


@pytest.mark.parametrize("priority", ["embed_documents", "embed_queries"])
def test_a_long_pass_is_left_at_its_next_module(script, en_folder: Path, priority: str):
    done = script(
        f"""
        import atexit, os, threading, time
        import torch
        begun = time.monotonic()
        # Called last of all: the first to be registered.
        atexit.register(lambda: os.write(2, f"took {{time.monotonic() - begun}}\\n".encode()))
        from bge_core import Embedder
        embedder = Embedder(FOLDER)
        embedder.embed_queries(["warm"])
        inside = threading.Event()

        def slow(module, inputs):
            inside.set()
            time.sleep(0.5)

        torch.nn.modules.module.register_module_forward_pre_hook(slow)

        def work():
            try:
                embedder.{priority}(["a text"] * 9)
            except BaseException as error:
                os.write(1, f"{{type(error).__name__}}\\n".encode())

        threading.Thread(target=work, daemon=True).start()
        inside.wait()
        begun = time.monotonic()
        """,
        FOLDER=en_folder,
    )
    assert done.returncode == 0, done.stderr
    # The caller hears of it, if the machine gives a daemon thread its turn before the end.
    assert done.stdout in ("ClosedError\n", "")
    # The pass has some thirty modules, half a second each.
    assert float(done.stderr.rpartition("took ")[2]) < 4


def test_an_ended_thread_pool_ends_with_its_work_done(script, reranker_folder: Path):
    done = script(
        """
        import sys
        from concurrent.futures import ThreadPoolExecutor
        from bge_core import Reranker
        reranker = Reranker(FOLDER)
        reranker.score("warm", ["up"])
        pool = ThreadPoolExecutor(4)
        for n in range(8):
            work = pool.submit(reranker.rank, "what?", [f"{n} {m} text" for m in range(300)])
            # One write each: print writes the end of a line by itself, and threads mix.
            work.add_done_callback(lambda done: sys.stdout.write(f"{len(done.result())}\\n"))
        """,
        FOLDER=reranker_folder,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["300"] * 8), done.stderr


def test_an_unreferenced_model_with_work_in_flight_is_collected_and_the_process_ends(
    script, en_folder: Path
):
    done = script(
        """
        import asyncio, gc, threading, weakref
        from bge_core import Embedder

        async def main():
            embedder = Embedder(FOLDER, batch_tokens=64)
            await embedder.aembed_queries(["warm"])
            task = asyncio.create_task(embedder.aembed_documents([f"{n}" for n in range(50_000)]))
            await asyncio.sleep(0.1)
            return weakref.ref(embedder.local.loaded())

        engine = asyncio.run(main())
        for _ in range(100):
            gc.collect()
            if engine() is None:
                break
            threading.Event().wait(0.05)
        print(engine())
        """,
        FOLDER=en_folder,
    )
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("wait", ["embedder.embed_documents(texts)", "asyncio.run(serve())"])
def test_ctrl_c_ends_a_process_as_usual(en_folder: Path, wait: str):
    code = textwrap.dedent(
        f"""
        import asyncio, signal
        # A test run in a shell's background inherits that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from bge_core import Embedder
        embedder = Embedder({str(en_folder)!r}, batch_tokens=64)
        embedder.embed_queries(["warm"])
        texts = [f"text {{n}}" for n in range(300_000)]

        async def serve():
            await asyncio.gather(
                embedder.aembed_documents(texts),
                *(embedder.aembed_queries([text]) for text in texts[:50]),
            )

        print("ready", flush=True)
        {wait}
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 5
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode in (-signal.SIGINT, 130)


# Children. OMP_NUM_THREADS is set for the tests; where it is not, GNU OpenMP starts a thread a
# core, and a forked child that waits for its parent's would hang.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("stage", ["loaded", "computed", "computing"])
def test_workers_forked_from_a_process_with_a_model_compute(
    script, stage: str, m3_folder: Path, reranker_folder: Path
):
    """As gunicorn's do with --preload: the application, its models loaded, forks its workers."""
    done = script(
        """
        import asyncio, os, threading, time
        import torch
        torch.set_num_threads(2)
        from bge_core import Embedder, M3Embedder, Reranker
        embedder, m3 = Embedder(FOLDER), M3Embedder(FOLDER, share_outputs=True)
        reranker = Reranker(OTHER)
        # Long enough for torch to use its threads.
        long = ["panda " * 800, "cat " * 500]
        embedder.local.loaded(), reranker.local.loaded()
        if STAGE != "loaded":
            embedder.embed_documents(long)
            embedder.embed_queries(["q"])
            reranker.score("q", long)
        if STAGE == "computing":
            def work():
                while True:
                    embedder.embed_documents(long)
            threading.Thread(target=work, daemon=True).start()
            time.sleep(0.2)

        def serve():
            async def ask():
                return (await embedder.aembed_queries(["q"])).shape
            assert embedder.embed_documents(long).shape == (2, 32)
            assert asyncio.run(ask()) == (1, 32)
            assert len(m3.encode(long).sparse) == 2
            assert reranker.score("q", long).shape == (2,)

        children = []
        for _ in range(2):
            child = os.fork()
            if not child:
                try:
                    serve()
                except BaseException as error:
                    os.write(2, repr(error).encode())
                    os._exit(3)
                os._exit(0)
            children.append(child)
        print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
        """,
        FOLDER=m3_folder,
        OTHER=reranker_folder,
        STAGE=stage,
        env={"OMP_NUM_THREADS": "2"},
    )
    assert (done.returncode, done.stdout) == (0, "[0, 0]\n"), done.stderr


def embed(embedder: Embedder, texts: list[str]) -> np.ndarray:
    return embedder.embed_documents(texts)


@pytest.mark.parametrize("kind", ["spawn", "loky"])
def test_processes_take_a_model_s_configuration_and_compute(kind: str, en_folder: Path):
    texts = [f"{n} cats" for n in range(40)]
    with Embedder(en_folder, normalize=False) as embedder:
        expected = embedder.embed_documents(texts)
        if kind == "spawn":
            import multiprocessing

            with multiprocessing.get_context("spawn").Pool(1) as pool:
                parts = pool.starmap(embed, [(embedder, texts[:20]), (embedder, texts[20:])])
        else:
            import joblib

            parts = joblib.Parallel(n_jobs=1 if os.cpu_count() == 1 else 2)(
                joblib.delayed(embed)(embedder, part) for part in (texts[:20], texts[20:])
            )
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=True)
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-5)


def test_what_travels_is_light(
    stand_in_folder: Path, en_folder: Path, m3_folder: Path, reranker_folder: Path
):
    made: list[Any] = [
        Embedder(stand_in_folder),
        M3Embedder(m3_folder, share_outputs=True),
        Reranker(reranker_folder),
        make_scorer(m3_folder),
        langchain_bge.BGEEmbeddings(model=stand_in_folder),
        langchain_bge.BGESparseEmbeddings(model=m3_folder),
        langchain_bge.BGEReranker(model=reranker_folder),
        langchain_bge.BGECrossEncoder(model=reranker_folder),
        llamaindex_bge.BGEEmbedding(model_name=stand_in_folder),
        llamaindex_bge.BGESparseEmbedding(model_name=m3_folder),
        llamaindex_bge.BGEReranker(model=reranker_folder),
    ]
    methods = ("embed_documents", "encode", "get_text_embedding_batch")
    for model in made:
        # Used: what has been loaded and computed stays behind.
        for method in methods:
            if hasattr(model, method):
                getattr(model, method)(["a text"])
                break
        carried = pickle.dumps(model)
        assert len(carried) < 10_000, type(model)
        assert type(pickle.loads(carried)) is type(model)
        model.close()
