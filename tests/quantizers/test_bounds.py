"""Gradients exactly at the bounds, by hand, eager and compiled: there frameworks and their versions differ."""

import math

import pytest
import torch

from lowbit import functional as F
from lowbit import quantizers
from lowbit.quantizers import S3
from lowbit.training.dampening import dampening_loss

FORMS = ["eager", "compiled"]


def form(function, kind: str):
    """``function``, or what torch.compile makes of it; aot_eager traces forward and backward as all backends do."""
    if kind == "eager":
        return function
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)


def gradients(function, *inputs, upstream=None) -> list[list[float]]:
    """The gradient to each input, flat, of ``Σ upstream · function(*inputs)``; upstream is all ones by default."""
    inputs = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in inputs]
    y = function(*inputs)
    y.backward(torch.ones_like(y) if upstream is None else torch.tensor(upstream))
    return [x.grad.flatten().tolist() for x in inputs]


# A step of ½ and 2 bits: -2 ... 1 of LSQ ends at -1 and ½. The points: below, on the lower bound, half-way between two
# levels, 0, on the upper bound, above.
AROUND = [[-1.5, -1.0, -0.75, 0.0, 0.5, 0.75]]
INSIDE = [0, 0, 1, 1, 0, 0]
LN2 = math.log(2)
ZEROS_COST_HALF = S3(bits=2, sparse_penalty=0.5).weight(torch.ones(1, 4))

CASES = {
    # v = -3, -2, -1½, 0, 1, 1½: -2, -2, -2 - -1½, 0, 1, 1
    "lsq": (lambda x, s: F.lsq(x, s, 2, grad_scale=1.0), [AROUND, [0.5]], [INSIDE, [-2 - 2 - 0.5 + 0 + 1 + 1]]),
    "lsq, a step a row": (
        lambda x, s: F.lsq(x, s, 2, grad_scale=1.0), [AROUND * 2, [[0.5], [0.5]]], [INSIDE * 2, [-2.5, -2.5]],
    ),
    "lsq, unsigned": (
        lambda x, s: F.lsq(x, s, 2, signed=False, grad_scale=1.0),
        [[-0.5, 0.0, 0.25, 1.5, 2.0], [0.5]], [[0, 0, 1, 0, 0], [0 + 0 - 0.5 + 3 + 3]],
    ),
    # v - round(v) = ½ at -0.75, else 0; upstream and δ are positive: 1 + ¼·½
    "ewgs": (lambda x: F.ewgs(x, torch.tensor([0.5]), 2, 0.25), [AROUND], [[0, 0, 1.125, 1, 0, 0]]),
    # v = -1, 0, ½, 1½, 3, 3½ on 0 ... 3: step 0, 0, -½, ½, 3, 3; the offset has what the clipped ones lose
    "lsqplus": (
        lambda x, s, b: F.lsqplus(x, s, b, 2, grad_scale=1.0),
        [[-0.25, 0.25, 0.5, 1.0, 1.75, 2.0], [0.5], [0.25]], [[0, 0, 1, 1, 0, 0], [6.0], [4.0]],
    ),
    "pact": (lambda x, a: F.pact(x, a, 2), [[-1.0, 0.0, 1.0, 2.0, 3.0], 2.0], [[0, 1, 1, 0, 0], [2.0]]),
    "dorefa, activation": (
        lambda x: F.dorefa_activation(x, 2), [[-0.5, -0.0, 0.0, 0.5, 1.0, 1.5]], [[0, 1, 1, 1, 1, 0]],
    ),
    "uniform, mid-tread": (
        lambda x: F.uniform(x, torch.tensor([[0.5]]), 2, "mid-tread", "masked"), [AROUND], [INSIDE],
    ),
    "uniform, mid-rise": (
        lambda x: F.uniform(x, torch.tensor([[0.5]]), 2, "mid-rise", "masked"),
        [[[-1.5, -1.0, -0.5, 0.0, 1.0, 1.5]]], [[0, 0, 1, 1, 0, 0]],
    ),
    "binary": (lambda w: F.binary(w), [[[-1.0, 1.0, 0.5, -1.5]]], [[1.25, 1.25, 1.25, 0.25]]),  # mean|w| = 1, n = 4
    "binary, ste": (lambda w: F.binary(w, "ste"), [[[-1.0, 1.0, 0.5, -1.5]]], [[1, 1, 1, 0]]),
    "ternary, ttq": (  # the threshold ½ itself belongs to the zeros
        lambda w, p, n: F.ttq(w, p, n, 0.5), [[1.0, 0.5, -0.5, -1.0], 2.0, 3.0], [[2, 1, 1, 3], [1.0], [-1.0]],
    ),
    "ternary, twn": (lambda w: F.ternary(w), [[[1.0, 0.7, 0.0, -1.0, -2.3]]], [[1, 1, 1, 1, 1]]),
    "statsq": (lambda w: F.statsq(w, 2), [[[2.0, -2.0, 0.0, 1.0, 5.0]]], [[1, 1, 1, 1, 1]]),
    "deepshift_q": (lambda w: F.deepshift_q(w, 3), [[1.0, -1.0, 0.125, 0.0, 3.0]], [[1, 1, 1, 1, 1]]),
    "inq": (lambda w: F.inq(w, 3), [[1.0, -0.75, 0.25, 0.0]], [[1, 1, 1, 1]]),
    # p on both ends of -2 ... 0 and beyond; the sign rounds ½ to 0, and a zero weight moves no shift
    "deepshift_ps": (
        lambda p, s: F.deepshift_ps(p, s, 3),
        [[0.0, 1.0, -2.0, -3.0, 0.0], [1.0, 1.0, -1.0, 1.0, 0.5]],
        [[LN2, LN2, -LN2 / 4, LN2 / 4, 0], [1, 1, 1, 1, 1]],
    ),
    # gates and signs at 0: closed and positive. S = 0, so sqrt(S + 1) = 1 and the gate's slope ½
    "denseshift": (lambda s, t: F.denseshift(s, t), [[0.0, -0.0], [0.0, -0.0]], [[1, 1], [0.5, 0.5]]),
    "s3": (lambda s, z: F.s3(s, z), [[0.0, -0.0], [0.0, 1.0]], [[0, 1], [1, 1]]),
    "s3, penalty": (
        lambda z: ZEROS_COST_HALF.penalty(torch.ones_like(z), z),
        [[[-1.0, 0.0, -0.0, 1.0]]], [[-0.5, 0, 0, 0]],
    ),
    # The ends belong to the clip range: 2·(w - q) at w = -1 and 1, q being 0 everywhere.
    "dampening": (
        lambda w: dampening_loss(w, torch.zeros(4), -1.0, 1.0), [[-1.5, -1.0, 1.0, 1.5]], [[0, -2, 2, 0]],
    ),
    "dampening, bounds a row": (
        lambda w: dampening_loss(w, torch.zeros(2, 2), torch.tensor([[-1.0], [-2.0]]), torch.tensor([[1.0], [2.0]])),
        [[[-1.0, 1.5], [-1.5, 2.0]]], [[-2, 0, -3, 4]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_at_the_bounds_by_hand(case, kind):
    function, inputs, expected = CASES[case]
    for given, wanted in zip(gradients(form(function, kind), *inputs), expected, strict=True):
        assert given == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", FORMS)
def test_equal_maxima_share_dorefas_gradient(kind):
    """ŵ counts as t/M; t = ½, -½, ¼ and M = ½: G/M, and half of -ΣG·t/M² each, with its sign, for the two largest."""
    w = [math.atanh(t) for t in (0.5, -0.5, 0.25)]
    total = 1 * 0.5 - 2 * 0.5 + 4 * 0.25
    expected = [(2 - total / 0.25 / 2) * 0.75, (4 + total / 0.25 / 2) * 0.75, 8 * (1 - 0.25**2)]
    (given,) = gradients(form(lambda w: F.dorefa(w, 4), kind), w, upstream=[1.0, 2.0, 4.0])
    assert given == pytest.approx(expected, rel=1e-5)


def on_and_around(levels: torch.Tensor) -> torch.Tensor:
    """All levels, all places half-way between two, both ends and what lies beyond them, and ±0: ``[2, n]``."""
    ends = torch.stack([2 * levels[0], 2 * levels[-1], torch.tensor(0.0), torch.tensor(-0.0)])
    row = torch.cat([levels, (levels[1:] + levels[:-1]) / 2, ends])
    return torch.stack([row, row.flip(0)])


def same(forward, module, inputs) -> None:
    """The compiled form of ``forward`` has the values and the gradients of the eager one, which are numbers."""
    found = []
    for kind in FORMS:
        latents = [x.clone().requires_grad_() for x in inputs]
        y = form(forward, kind)(*latents)
        y.backward(torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape))
        found.append([y.detach(), *(x.grad for x in latents), *(p.grad for p in module.parameters())])
        module.zero_grad()
    assert all(torch.isfinite(x).all() for x in found[0]) and any(x.any() for x in found[0][1:])
    for eager, compiled in zip(*found, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", quantizers.names("weight"))
def test_compiled_weights_agree_with_eager_ones_at_every_kink(name):
    method = quantizers.get(name)()
    weight = on_and_around(method.weight(torch.ones(2, 2)).levels)
    quantizer = method.weight(weight)
    latents = quantizer.right_inverse(weight)
    if isinstance(latents, tuple):  # signs and gates: all their kinks lie at 0
        around = torch.tensor([-1.0, -0.5, -0.0, 0.0, 0.5, 1.0]).repeat(2, 1)
        inputs = [around.roll(k, dims=1) for k in range(len(latents))]
    else:
        inputs = [weight]
    same(quantizer.forward, quantizer, inputs)


@pytest.mark.parametrize("name", quantizers.names("activation"))
def test_compiled_activations_agree_with_eager_ones_at_every_kink(name):
    quantizer = quantizers.get(name)().activation()
    quantizer(torch.tensor([[-1.0, 2.0]]))  # calibrates
    same(quantizer.forward, quantizer, [on_and_around(quantizer.levels)])
