"""The uniform grid in parts: two corners are StatsQ and LSQ, and each part does what it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import LowbitError
from lowbit.functional import lsq, statsq, uniform, uniform_codes, uniform_levels, uniform_step
from lowbit.quantizers import LSQ, StatsQ, Uniform


def value_and_gradients(quantizer, w, grad):
    latent = w.clone().requires_grad_()
    value = quantizer(latent)
    steps = [p for p in quantizer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(value, [latent, *steps], grad)
    return value.detach(), *grads


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Uniform, StatsQ),
        (
            lambda bits: Uniform(bits=bits, grid="mid-tread", scale="learned", gradient="masked"),
            lambda bits: LSQ(bits=bits, granularity="channel"),
        ),
        (
            lambda bits: Uniform(bits=bits, grid="mid-tread", scale="fixed", gradient="masked"),
            lambda bits: LSQ(bits=bits, granularity="channel", learn_step=False),
        ),
    ],
)
def test_the_published_corners(bits, ours, theirs):
    torch.manual_seed(bits)
    w, grad = torch.randn(6, 40), torch.randn(6, 40)
    mine, published = (m(bits=bits).weight(w) for m in (ours, theirs))
    for one, other in zip(value_and_gradients(mine, w, grad), value_and_gradients(published, w, grad), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(mine.codes(w), published.codes(w))


def test_by_hand_at_two_bits():
    w = torch.tensor([[-3.0, -1.2, -0.6, -0.1, 0.3, 0.9, 1.4, 5.0]])
    step = torch.ones(1, 1)
    rise = [-1.5, -1.5, -0.5, -0.5, 0.5, 0.5, 1.5, 1.5]
    tread = [-2.0, -1.0, -1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert uniform(w, step, 2, "mid-rise").tolist() == [rise]
    assert uniform(w, step, 2, "mid-tread").tolist() == [tread]
    latent = w.clone().requires_grad_()
    for grid, inside in (("mid-rise", [0, 1, 1, 1, 1, 1, 1, 0]), ("mid-tread", [0, 1, 1, 1, 1, 1, 0, 0])):
        (masked,) = torch.autograd.grad(uniform(latent, step, 2, grid, "masked").sum(), latent)
        assert masked.tolist() == [inside]
        (identity,) = torch.autograd.grad(uniform(latent, step, 2, grid).sum(), latent)
        assert identity.tolist() == [[1.0] * 8]


def test_the_gradient_of_the_step_by_hand():
    """One weight inside, 0.3, and one outside on each side; n - 1 = 1 and three elements share the step."""
    w, step = torch.tensor([[0.3, 5.0, -5.0]]), torch.ones(1, 1, requires_grad=True)
    for grid, slopes in (("mid-rise", (0.5 - 0.3, 1.5, -1.5)), ("mid-tread", (0.0 - 0.3, 1.0, -2.0))):
        grad = torch.tensor([[1.0, 10.0, 100.0]])
        (found,) = torch.autograd.grad(uniform(w, step, 2, grid), step, grad)
        expected = sum(g * s for g, s in zip((1, 10, 100), slopes, strict=True)) / 3**0.5
        assert found.item() == pytest.approx(expected)


def test_where_the_step_comes_from():
    w = torch.tensor([[1.0, -3.0], [0.5, 0.5]])
    assert uniform_step(w, 2, "mid-rise").flatten().tolist() == [2.0, 0.5]
    assert uniform_step(w, 2, "mid-tread").flatten().tolist() == [4.0, 1.0]
    for scale, follows, learned in (("statistical", True, False), ("learned", False, True), ("fixed", False, False)):
        quantizer = Uniform(bits=2, scale=scale).weight(w)
        assert quantizer.scale(2 * w).flatten().tolist() == ([4.0, 1.0] if follows else [2.0, 0.5])
        assert (len(list(quantizer.parameters())) == 1) is learned


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20), st.sampled_from(["mid-rise", "mid-tread"]))
def test_it_is_the_nearest_level(values, grid):
    w, step = torch.tensor([values]), torch.full((1, 1), 0.7)
    levels = 0.7 * uniform_levels(3, grid)
    distance = (w.flatten()[:, None] - levels).abs()
    codes = uniform_codes(w, step, 3, grid).flatten().long()
    assert torch.allclose(distance.gather(1, codes[:, None])[:, 0], distance.min(1).values, atol=1e-6)


def test_refusals():
    w, step = torch.ones(1, 2), torch.ones(1, 1)
    for arguments, message in (
        ((w, step, 1), "bits=1"),
        ((w, step, 2, "middle"), "grid='middle'"),
        ((w, step, 2, "mid-rise", "none"), "gradient='none'"),
    ):
        with pytest.raises(LowbitError, match=message):
            uniform(*arguments)
    assert torch.allclose(lsq(w, step, 2), w) and statsq(w, 2).shape == w.shape
