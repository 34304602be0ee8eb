"""What the model computes, seen from torch's side."""

import threading
import weakref

import pytest

from tests.conftest import tokens_in


class Computed:
    """Counts what went through word embeddings, in any thread, and whose they were."""

    def __init__(self):
        self.passes = []
        self.threads = set()
        self.embeddings = []

    @property
    def tokens(self):
        return sum(self.passes)

    def __call__(self, module, args):
        # Other tables than the words' have as many rows as there are positions or types.
        if type(module).__name__ == "Embedding" and module.num_embeddings not in (
            *(1, 2),
            *(512, 514, 8194),
        ):
            self.passes.append(tokens_in(args[0]))
            self.threads.add(threading.current_thread())
            if all(known() is not module for known in self.embeddings):
                self.embeddings.append(weakref.ref(module))


@pytest.fixture
def computed():
    from torch.nn.modules.module import register_module_forward_pre_hook

    counts = Computed()
    hook = register_module_forward_pre_hook(counts)
    yield counts
    hook.remove()
