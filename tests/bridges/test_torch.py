"""Packed models in PyTorch's own tools: torch.export, torch.compile, AOTInductor, channels-last memory."""

import copy
import shutil

import pytest
import torch
from torch import nn

import lowbit
from lowbit.quantizers import LSQ, DenseShift, StatsQ

CONFIGS = {
    "resnet8": {"weight": DenseShift(bits=3), "activation": LSQ(bits=8), "first_last": 8},
    "vit_nano": {
        "weight": StatsQ(bits=2),
        "activation": LSQ(bits=4),
        "first_last": 8,
        "attention": True,
        "unsigned": ("*.fc2",),
    },
    "dynamic": {"weight": StatsQ(bits=4), "first_last": "same"},
}


class Small(nn.Sequential):
    """A convolution and a linear layer."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))


def images(n):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))


@pytest.fixture(params=CONFIGS, scope="module")
def packed(request):
    torch.manual_seed(0)
    model = Small() if request.param == "dynamic" else lowbit.models.create(request.param, 10)
    lowbit.quantize_(model, lowbit.QuantConfig(**CONFIGS[request.param]))
    lowbit.calibrate(model, images(4))
    return lowbit.pack(model, images(4))


def exported(model):
    with torch.no_grad():
        return torch.export.export(model, (images(4),), dynamic_shapes=({0: torch.export.Dim("batch")},))


def test_an_exported_model_takes_any_batch(packed, tmp_path):
    torch.export.save(exported(packed), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        for n in (1, 4, 7):
            assert torch.equal(program(images(n)), packed(images(n)))


def test_there_is_one_graph(packed):
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch._dynamo.explain(packed)(images(4))
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
        compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (2, 5):
            torch.testing.assert_close(compiled(images(n)), packed(images(n)))


def test_channels_last_memory_changes_nothing(packed):
    x = images(4)
    model = copy.deepcopy(packed).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = packed(x)
        for candidate in (packed, model):
            torch.testing.assert_close(candidate(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which AOTInductor calls")
def test_a_package_of_aotinductor_says_the_same(packed, tmp_path):
    path = torch._inductor.aoti_compile_and_package(exported(packed), package_path=str(tmp_path / "model.pt2"))
    program = torch._inductor.aoti_load_package(path)
    with torch.no_grad():
        for n in (2, 7):
            expected = packed(images(n))
            found = program(images(n))
            assert (found - expected).norm() <= 0.02 * expected.norm()  # float layers that are fused round otherwise
