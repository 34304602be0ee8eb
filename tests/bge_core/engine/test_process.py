import gc
import os
import subprocess
import sys
import weakref

import pytest

from bge_core.engine.process import on_fork


def in_child(look) -> bytes:
    """Give what a forked child writes."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, look())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read()


def test_the_process_module_is_cheap_to_import():
    code = (
        "import sys, bge_core.engine.process; "
        "print(sorted({'torch', 'httpx', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_owners_are_told_of_a_fork_in_the_order_they_came_in_and_held_weakly():
    class Owner:
        def __init__(self, name: str) -> None:
            self.name = name

    said: list[str] = []
    first, second, third = Owner("first"), Owner("second"), Owner("third")
    for owner in (first, second, third):
        on_fork(owner, lambda owner: said.append(owner.name))
    gone = weakref.ref(second)
    del second, owner
    gc.collect()
    assert gone() is None
    assert in_child(lambda: " ".join(said).encode()) == b"first third"
    assert said == []
