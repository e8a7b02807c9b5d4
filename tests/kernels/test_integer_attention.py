"""Attention on integers: what is lowered to it, and the numbers it gives."""

import numpy as np
import pytest
import torch
from timm.layers.attention import Attention
from torch import nn

import lowbit
from lowbit.engine import attention
from lowbit.engine.format import Op, Tensor, write
from lowbit.nn import QuantConfig
from lowbit.nn.attention import LowBitAttention, expect_, operand
from lowbit.quantizers import LSQ, DenseShift
from lowbit.quantizers.lsq import LSQActivation


class Net(nn.Module):
    """Attention between linear layers."""

    def __init__(self, width: int = 32, heads: int = 2):
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 3)
        self.attention = Attention(width, heads)

    def forward(self, x):
        return self.last(self.attention(3 * self.first(x)))


def packed(x: torch.Tensor, activation: LSQ, powers: bool = False, **factors: nn.Module) -> nn.Module:
    """A packed `Net` with low-bit attention.

    Args:
        x: the batch for calibration.
        activation: the method of attention's factors.
        powers: whether their steps are powers of two.
        factors: other quantizers in place of ``activation``'s.
    """
    model = Net()
    weight = DenseShift(bits=3, scale="statistical", init="project")
    lowbit.quantize_(model, QuantConfig(weight=weight, activation=LSQ(bits=8), first_last="same"))
    model.attention = LowBitAttention(model.attention, activation=activation)
    for name, quantizer in factors.items():
        expect_(quantizer, (None, None, 32), model.last.weight)
        setattr(model.attention, name, quantizer)
    lowbit.calibrate(model.eval(), x)
    for module in model.attention.children():
        if isinstance(module, LSQActivation):
            if powers:
                module.step.data = torch.exp2(torch.log2(module.step.data).round())
            for bias in (module.bias_in, module.bias_out):
                if bias is not None:
                    nn.init.normal_(bias, std=0.5)
    return lowbit.pack(model, x)


def kinds(plan: lowbit.Plan) -> set[str]:
    return {row["kind"] for row in plan.operations()}


def on_floats(model: nn.Module, x: torch.Tensor, monkeypatch) -> lowbit.Plan:
    """The plan in which the rounded factors are multiplied as floats."""
    with monkeypatch.context() as patch:
        patch.setattr(attention, "integer_attention", lambda lowering, shares, v: None)
        return lowbit.plan(model, x)


METHODS = {
    "tensor": LSQ(bits=8),
    "token": LSQ(bits=8, granularity="token"),
    "4 bits": LSQ(bits=4),
    "2 bits by token": LSQ(bits=2, granularity="token"),
}


@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 70])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_as_products_of_floats(method, tokens, library, monkeypatch):
    """With steps that are powers of two, sums of float products are exact too."""
    torch.manual_seed(tokens)
    x = torch.randn(3, tokens, 32)
    model = packed(x, METHODS[method], powers=True)
    plan, floats = lowbit.plan(model, x), on_floats(model, x, monkeypatch)
    assert "integer attention" in kinds(plan) and not kinds(plan) & {"round", "softmax", "matmul"}
    assert {"round", "softmax", "matmul"} <= kinds(floats)
    expected = floats(x)
    assert tokens == 1 or len(expected.unique()) > 3
    torch.testing.assert_close(expected, model(x).flatten(1), rtol=0.02, atol=0.02)
    for isa in library.isas():
        with library.use(isa):
            for threads in (1, 3):
                made = lowbit.Plan(plan.content, threads)
                assert torch.equal(made(x), expected), (isa, threads)
                assert torch.equal(made(x[1:2]), expected[1:2]), (isa, threads)


@pytest.mark.parametrize("granularity", ["tensor", "token", "channel of values"])
def test_shifts_before_and_after_rounding(granularity, library):
    """What stands beside the products is calculated in another order: the same but for the last bits."""
    torch.manual_seed(0)
    x = torch.randn(2, 20, 32)
    biased = LSQ(bits=8, granularity=granularity.split()[0], bias=True)
    by_tensor = LSQ(bits=8, bias=True)
    others = {"q_quantizer": operand(by_tensor), "k_quantizer": operand(by_tensor)} if "of" in granularity else {}
    model = packed(x, biased, **others)
    plan = lowbit.plan(model, x)
    assert "integer attention" in kinds(plan) and "matmul" not in kinds(plan)
    expected = model(x).flatten(1)
    for isa in library.isas():
        with library.use(isa):
            actual = lowbit.Plan(plan.content)(x)
            assert (actual - expected).norm() < 0.02 * expected.norm(), isa


@pytest.mark.parametrize(
    "factors",
    [
        {"v_quantizer": operand(LSQ(bits=8, granularity="token"))},
        {"k_quantizer": operand(LSQ(bits=8, granularity="channel"))},
        {"q_quantizer": operand(LSQ(bits=8, granularity="channel"))},
        {"v_quantizer": operand(None)},
    ],
)
def test_steps_that_are_no_factors_stay_on_floats(factors):
    """A step for each token's values would have to stand inside the sum over tokens."""
    torch.manual_seed(1)
    x = torch.randn(2, 6, 32)
    model = packed(x, LSQ(bits=8), **factors)
    plan = lowbit.plan(model, x)
    assert {"matmul", "softmax"} <= kinds(plan) and "integer attention" not in kinds(plan)
    expected = model(x).flatten(1)
    assert (plan(x) - expected).norm() < 0.02 * expected.norm()


RANGES = [((-128, 127), (-128, 127), (-128, 127), (0, 255)), ((0, 15), (-8, 7), (0, 3), (-2, 1))]
"""Of queries, keys, values and the softmax's output."""


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    "ranges", [((-128, 127), (-128, 127), (-128, 127), (0, 255)), ((0, 15), (-8, 7), (0, 3), (-2, 1))]
)
@pytest.mark.parametrize("by_row", [False, True])
def test_the_definition(by_row, ranges, shifted, library):
    """Of the operation alone, against float64: heads that lie anyhow in three tensors, every step and shift."""
    heads, tokens, size, v_size, gain = 3, 19, 5, 18, 0.3
    draw = np.random.default_rng(5)
    inputs = draw.standard_normal((2, tokens * (64 + 16))).astype(np.float32)
    q, k, v = (inputs.reshape(2, tokens, 80)[:, :, at : at + n] for at, n in ((2, 15), (20, 5), (25, 54)))
    q, k, v = q.reshape(2, tokens, 3, size), np.stack([k] * 3, 2), v.reshape(2, tokens, 3, v_size)
    q, k, v = (x.transpose(0, 2, 1, 3).astype(np.float64) for x in (q, k, v))
    counts = [heads * n if by_row else 1 for n in (tokens, tokens, v_size, tokens)]
    steps = [draw.uniform(0.5, 1, n).astype(np.float32) * f for n, f in zip(counts, (0.1, 0.1, 0.1, 0.01), strict=True)]
    shifts = [draw.standard_normal((heads, n)).astype(np.float32) * shifted for n in (5, 5, 5, 18, 18)]
    shapes = ((heads, -1, 1), (heads, -1, 1), (heads, 1, -1), (heads, -1, 1))
    wide = [s.astype(np.float64).reshape(to if by_row else 1) for s, to in zip(steps, shapes, strict=True)]
    sq, sk, sv, ss = wide
    q0, q1, k0, v0, v1 = (s[:, None].astype(np.float64) for s in shifts)

    def rounded(x, step, which):
        return np.clip(np.rint(x / step), *ranges[which])

    logits = gain * (rounded(q + q0, sq, 0) * sq + q1) @ (rounded(k + k0, sk, 1) * sk).transpose(0, 1, 3, 2)
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share = rounded(share / share.sum(-1, keepdims=True), ss, 3) * ss
    expected = share @ (rounded(v + v0, sv, 2) * sv + v1)
    x, y = Tensor(1, tokens, 80), Tensor(1, tokens, heads * v_size)
    n = {0: 2, 1: 80, 2: heads, 3: size, 4: 20, 5: 25, 6: 80, 7: 80, 8: size, 9: 0, 10: v_size, 11: v_size}
    n |= {12 + i: (low + 256) * 1024 + high for i, (low, high) in enumerate(ranges)}
    data = dict(enumerate(steps)) | ({4: np.concatenate([s.ravel() for s in shifts])} if shifted else {})
    content = write([Op("integer attention", [x, x, x], y, n=n, f={0: gain}, data=data)], x, y)
    for isa in library.isas():
        with library.use(isa):
            actual = lowbit.Plan(content, 1)(inputs).reshape(2, tokens, heads, v_size).transpose(0, 2, 1, 3)
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5, err_msg=isa)
