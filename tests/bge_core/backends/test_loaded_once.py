"""Several devices: the files are read once, and the others get copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bge_core import ComputationError, Embedder
from bge_core.backends import bert, loading, select
from bge_core.backends.loading import Originals, copied_to, load_model
from bge_core.backends.runner_options import RunnerOptions
from bge_core.checkpoints.metadata import read
from bge_core.checkpoints.source import Source
from bge_core.layers import LayerOptions
from bge_core.tokenizer import TokenSequence

CPU, META = torch.device("cpu"), torch.device("meta")
TEXTS = [TokenSequence([5, 6, 7], 3), TokenSequence([8, 9, 6, 5], 4)]


def checkpoint_of(folder):
    return read(Source.of(folder), folder)


@pytest.mark.parametrize("name", ["reasoner_folder", "reranker_folder", "gemma_reranker_folder"])
def test_a_copy_has_the_numbers_and_no_memory_of_the_original(name, request):
    checkpoint = checkpoint_of(request.getfixturevalue(name))
    kind = "embedder" if name == "reasoner_folder" else "reranker"
    model = load_model(checkpoint, kind=kind, dtype="float32", trust_remote_code=False)
    copied = copied_to(model, CPU)
    tensors = [dict([*one.named_parameters(), *one.named_buffers()]) for one in (model, copied)]
    assert tensors[0].keys() == tensors[1].keys()
    for key, tensor in tensors[0].items():
        assert tensors[1][key].equal(tensor)
        assert tensors[1][key].data_ptr() != tensor.data_ptr()
        assert not tensors[1][key].requires_grad
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before, after = (one(input_ids=ids)[0] for one in (model, copied))
    assert after.equal(before)
    # Weights that two layers share stay one, and whatever the model holds goes along.
    elsewhere = copied_to(model, META)
    shared = [len({id(one) for one in each.parameters()}) for each in (model, elsewhere)]
    assert shared[0] == shared[1]
    assert {one.device for one in (*elsewhere.parameters(), *elsewhere.buffers())} == {META}
    assert {one.device for one in model.parameters()} == {CPU}


@pytest.mark.parametrize("name", ["en_folder", "lightweight_folder"])
def test_the_second_device_reads_no_weights(name, request, monkeypatch):
    checkpoint = checkpoint_of(request.getfixturevalue(name))
    heads = checkpoint.layer_heads
    reads = []
    for module in (bert, loading):
        checked = module.checked_weight_files

        def count(*args, _checked=checked):
            reads.append(args)
            return _checked(*args)

        monkeypatch.setattr(module, "checked_weight_files", count)
    options = RunnerOptions(
        kind="reranker" if heads else "embedder",
        dtype="bfloat16",
        depth=LayerOptions().resolve(checkpoint.name, heads),
    )
    originals = Originals(checkpoint.name)
    first, second = (
        select.load_runner(checkpoint, options, device=device, originals=originals)
        for device in ("cpu", "meta")
    )
    assert len(reads) == 1
    module_name = "_decoder" if heads else "_encoder"
    modules = [getattr(one, module_name) for one in (first, second)]
    shapes = [{key: one.shape for key, one in each.state_dict().items()} for each in modules]
    assert shapes[0] == shapes[1]
    assert {one.device for one in modules[1].parameters()} == {META}
    plain = select.load_runner(checkpoint, options, device="cpu")
    np.testing.assert_array_equal(first.run(TEXTS), plain.run(TEXTS))


def test_a_copy_that_does_not_fit_is_an_error_that_names_its_device(monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(loading, "copied_to", too_large)
    originals = Originals("a-model")
    layer = torch.nn.Linear(2, 2)
    assert originals.on("bert", CPU, lambda: layer) is layer
    with pytest.raises(ComputationError, match=r"'a-model' doesn't fit .*device='cuda:7'"):
        originals.on("bert", torch.device("cuda:7"), lambda: layer)


def test_what_cannot_be_copied_is_loaded_again():
    originals = Originals("a-model")
    loads = []

    class Locking(torch.nn.Linear):
        def __deepcopy__(self, memo):
            msg = "cannot pickle '_thread.lock' object"
            raise TypeError(msg)

    def load():
        loads.append(Locking(2, 2))
        return loads[-1]

    assert originals.on("model", CPU, load) is loads[0]
    assert originals.on("model", META, load) is loads[1]
    assert originals.on("other", CPU, lambda: None) is None


def test_workers_of_one_cpu_share_a_model(en_folder, reference_embed):
    texts = ["panda", "a cat", "Paris"]
    with Embedder(en_folder, device=["cpu", "cpu:0"]) as embedder:
        runners = embedder.local.loaded().runners["background"]
        assert len(runners) == 2
        assert runners[0] is runners[1]
        vectors = embedder.embed_documents(texts)
    np.testing.assert_allclose(vectors, reference_embed(en_folder, texts), atol=1e-5)
