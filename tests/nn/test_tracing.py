"""Graphs of code that decides by shapes: the same results at every number of items."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.nn.tracing import trace
from lowbit.quantizers import LSQ, StatsQ


class Decides(nn.Module):
    """Code that torch.fx alone does not get through."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.token = nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, x):
        batch, places, width = x.shape
        if width != 6 or x.ndim != 3 or x.dtype != torch.float32 or x.size(1) != places or x.size()[2] != width:
            raise ValueError(f"not {tuple(x.shape)}")
        y = self.first(x)
        y = torch.cat([self.token.expand(batch, -1, -1), y], dim=1)
        y = y.transpose(0, 1)  # the number of items is not the first size
        y = y.reshape(places + 1, batch * 2, 4).view(y.shape)
        one, two = y.chunk(2, -1)
        for part in (one, two):
            if part.shape[-1] != 4:
                raise ValueError("parts")
        return self.last(torch.cat([two, one], -1).transpose(0, 1).mean(1) / batch * batch)


class ByItems(Decides):
    def forward(self, x):
        return super().forward(x) if x.shape[0] > 1 else super().forward(x) * 2


def packed(cls):
    torch.manual_seed(0)
    model, x = cls(), torch.randn(4, 5, 6)
    lowbit.quantize_(model, lowbit.QuantConfig(StatsQ(bits=3), LSQ(bits=8), first_last="same"))
    return lowbit.pack(lowbit.calibrate(model, x).eval(), x), x


def test_torch_fx_alone_does_not_get_through():
    model, _ = packed(Decides)
    with pytest.raises(Exception, match="control flow"):
        trace(model, None)


@pytest.mark.parametrize("items", [1, 2, 5])
def test_a_graph_takes_any_number_of_items(items):
    model, x = packed(Decides)
    fused = lowbit.fuse(model, x)
    images = torch.randn(items, 5, 6)
    assert torch.equal(fused(images), model(images))


def test_what_depends_on_the_number_of_items_is_refused():
    model, x = packed(ByItems)
    with pytest.raises(LowbitError, match=r"torch\.fx does not get through it"):
        lowbit.fuse(model, x)


def test_modules_are_called_as_always_while_a_node_runs():
    """Tracing replaces every module's call; running a node inside must not record it."""

    class Nested(Decides):
        def __init__(self):
            super().__init__()
            self.norm = nn.Sequential(nn.LayerNorm(6), nn.Sequential(nn.GELU()))

        def forward(self, x):
            return super().forward(self.norm(x))

    model, x = packed(Nested)
    fused = lowbit.fuse(model, x)
    assert next(node.target for node in fused.graph.nodes if node.op == "call_module") == "model.norm"
    assert torch.equal(fused(x), model(x))


@pytest.mark.parametrize("attention", [False, True])
def test_torchvision_s_vision_transformer_becomes_a_plan(attention):
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    model, x = vision.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5), torch.randn(3, 3, 32, 32)
    config = lowbit.QuantConfig(StatsQ(bits=3), LSQ(bits=8), first_last=8, attention=attention)
    lowbit.calibrate(lowbit.quantize_(model, config), x)
    made = lowbit.pack(model.eval(), x)
    torch.testing.assert_close(lowbit.plan(made, x)(x), made(x), rtol=1e-3, atol=1e-4)
