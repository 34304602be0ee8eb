"""Linear layers in oneDNN's layout give what torch's own give."""

import platform
import random

import numpy as np
import pytest
import torch

from bge_core import Embedder, Reranker
from bge_core.backends import onednn
from bge_core.backends.onednn import ConvolutionLinear, CpuLinear, prepack_linear_weights
from bge_core.backends.packing import round_up_to_bucket

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not onednn._works(),
    reason="this torch or this CPU has no oneDNN layers",
)


@pytest.fixture(params=[CpuLinear, ConvolutionLinear])
def kind(request, monkeypatch):
    """Have each kind of layer, whichever this processor would get."""
    if not onednn._is_right(request.param, "layer"):
        pytest.skip("this torch lacks it")
    convolutions = request.param is ConvolutionLinear
    monkeypatch.setattr(onednn, "_convolutions_pay", lambda: convolutions)
    return request.param


def model():
    torch.manual_seed(1)
    return torch.nn.ModuleList(
        [
            torch.nn.Linear(48, 96, bias=False),
            torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.GELU()),
            torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.GELU("tanh")),
            torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.ReLU(), torch.nn.GELU()),
        ]
    ).eval()


@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (1, 300, 48), (5, 1, 48), (192, 48)])
def test_the_numbers_are_the_same(shape, kind):
    plain, fast = model(), model()
    prepack_linear_weights(fast)
    assert sum(isinstance(module, kind) for module in fast.modules()) == 4
    assert not any(type(module) is torch.nn.Linear for module in fast.modules())
    rows = torch.randn(shape)
    with torch.inference_mode():
        for own, expected in zip(fast, plain, strict=True):
            torch.testing.assert_close(own(rows), expected(rows), atol=1e-6, rtol=1e-5)
            # Rows that are a view with gaps, as a pack's may be.
            gaps = torch.randn(2, *shape)[1].expand(shape)[..., :1].expand(shape)
            torch.testing.assert_close(own(gaps), expected(gaps), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 4, 7, 20, 64, 300])
def test_others_are_added(rows, kind):
    torch.manual_seed(1)
    linear = torch.nn.Linear(64, 48)
    inputs, others = torch.randn(rows, 64), torch.randn(rows, 48)
    with torch.inference_mode():
        out = kind(linear).plus(inputs, others)
        torch.testing.assert_close(out, linear(inputs) + others, atol=1e-6, rtol=1e-5)


def test_a_layer_with_few_channels_is_no_convolution(kind):
    narrow = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.Tanh(), torch.nn.Linear(48, 1))
    prepack_linear_weights(narrow)
    assert type(narrow[0]) is kind
    assert type(narrow[2]) is CpuLinear


def test_packs_have_rows_that_images_can_be_made_of():
    assert {round_up_to_bucket(rows) % 4 for rows in range(1, 5000)} == {0}
    for channels in ((384, 384), (1152, 384), (768, 3072)):
        assert onednn._image_rows(*channels)[-1] == 4


def test_a_subclass_is_left_alone():
    class Doubled(torch.nn.Linear):
        def forward(self, rows):
            return 2 * super().forward(rows)

    parent = torch.nn.Sequential(Doubled(4, 4))
    prepack_linear_weights(parent)
    assert type(parent[0]) is Doubled


@pytest.mark.parametrize("lack", ["processor", "operators"])
def test_the_model_stays_as_it_is_where_that_can_t_be_had(lack, monkeypatch):
    if lack == "processor":
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
    else:
        # As a torch without them would.
        monkeypatch.setattr(CpuLinear, "__init__", lambda *_, **__: torch.ops.mkldnn.no_such_thing)
        monkeypatch.setattr(onednn, "_works", onednn._works.__wrapped__)
    plain = model()
    prepack_linear_weights(plain)
    ours = (CpuLinear, ConvolutionLinear)
    assert not any(isinstance(module, ours) for module in plain.modules())


def test_the_user_s_random_numbers_stay_theirs():
    onednn._works.cache_clear()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    prepack_linear_weights(model_of_one())
    assert torch.equal(torch.rand(3), expected)


def model_of_one():
    return torch.nn.Sequential(torch.nn.utils.skip_init(torch.nn.Linear, 4, 4))


@pytest.mark.parametrize("task", ["embedder", "reranker"])
def test_the_layers_get_their_rows_in_few_sizes(task, kind, en_folder, bert_reranker_folder):
    """What oneDNN keeps for each of them is what a service's memory would grow by."""
    sizes = set()

    def note(module, inputs):
        if type(module) is kind:
            sizes.add(inputs[0].shape[0])

    rnd = random.Random(1)
    texts = [" ".join(["cat"] * rnd.randint(1, 60)) for _ in range(500)]
    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        with Embedder(en_folder) as embedder, Reranker(bert_reranker_folder) as reranker:
            for _ in range(150):
                some = rnd.sample(texts, rnd.randint(1, 60))
                if task == "embedder":
                    vectors = embedder.embed_documents(some)
                    alone = embedder.embed_documents(some[:1])
                    np.testing.assert_allclose(vectors[0], alone[0], atol=1e-5)
                else:
                    scores = reranker.score("cat", some)
                    assert scores[0] == pytest.approx(reranker.score("cat", some[:1])[0], abs=1e-5)
    finally:
        hook.remove()
    assert 0 < len(sizes) <= 80
    assert max(sizes) <= 2048
