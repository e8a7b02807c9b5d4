"""Confidence-guided annealing: who may move, and that the others do not, by not a single bit."""

import math

import pytest
import torch
from torch import nn

import lowbit
from lowbit import LowbitError, QuantConfig, TrainConfig
from lowbit.functional import cga_mask
from lowbit.nn import quantize_, quantized_layers
from lowbit.quantizers import LSQ, StatsQ
from lowbit.training import ConfidenceGuidedAnnealing
from lowbit.training.annealing import annealing_phase
from lowbit.training.optim import build_optimizer, learning_rate


def test_mask_by_hand():
    """Mean |w| is 0.5, so s = 1; at 2 bits y = 2·clip(w) has its boundaries at -1, 0 and 1."""
    w = torch.tensor([[0.01, -0.26, 0.49, 0.52, -0.5, 0.74, 1.24, -0.24]])
    assert torch.isclose(w.abs().mean(), torch.tensor(0.5))
    # distances in y:   0.02    0.48   0.02   0.04   0    0.48  1 (clipped: y = 2, nearest k is 1)  0.48
    for bits in (0, 9, 2.0):
        with pytest.raises(LowbitError, match=f"bits={bits} is not allowed: StatsQ takes 1 to 8 bits"):
            cga_mask(w, bits, 0.03)
    assert torch.equal(cga_mask(w, 1, 0.5), w.abs() <= 0.5)  # y = clip(w) has one boundary, 0
    assert cga_mask(w, 8, 0.5).shape == w.shape
    assert cga_mask(w, 2, 0.03).tolist() == [[True, False, True, False, True, False, False, False]]
    assert cga_mask(w, 2, 0.05).tolist() == [[True, False, True, True, True, False, False, False]]
    assert cga_mask(w, 2, 0.5).tolist() == [[True] * 6 + [False, True]]
    assert cga_mask(w, 2, 0.0).tolist() == [[False, False, False, False, True, False, False, False]]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_share_of_gaussian_weights_that_may_move(bits):
    """About 2·BR times the density of y = w·n/s at each boundary, with s = 2·sqrt(2/π)."""
    torch.manual_seed(0)
    n, scale, boundary = 2 ** (bits - 1), 2 * math.sqrt(2 / math.pi), 0.02
    density = sum(math.exp(-((k * scale / n) ** 2) / 2) for k in range(1 - n, n)) / math.sqrt(2 * math.pi) * scale / n
    share = cga_mask(torch.randn(64, 20_000), bits, boundary).double().mean().item()
    expected = 2 * boundary * density
    assert abs(share - expected) < 5 * math.sqrt(expected / (64 * 20_000)) + 0.01 * expected


def layer(bits=2):
    torch.manual_seed(0)
    return quantize_(nn.Sequential(nn.Linear(64, 32)), QuantConfig(weight=StatsQ(bits=bits), first_last="same"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "radam"])
def test_frozen_weights_keep_their_bits_under_momentum_and_decay(optimizer):
    model = layer()
    (found,) = quantized_layers(model)
    (latent,) = found.latents
    optimize = build_optimizer(model, TrainConfig(epochs=1, optimizer=optimizer, lr=0.01, weight_decay=0.1))
    for _ in range(3):  # momentum for everyone
        latent.grad = torch.randn_like(latent)
        optimize.step()
    annealing = ConfidenceGuidedAnnealing(model, boundary=0.1)
    moved = torch.zeros_like(latent, dtype=torch.bool)
    for _ in range(3):
        before = latent.detach().clone()
        movable = cga_mask(latent, 2, 0.1)
        assert 0 < movable.double().mean() < 0.3
        latent.grad = torch.randn_like(latent)
        annealing.freeze()
        assert (latent.grad[~movable] == 0).all() and (latent.grad[movable] != 0).all()
        optimize.step()
        assert not torch.equal(latent[~movable], before[~movable])  # what the optimizer alone would do
        annealing.restore()
        assert torch.equal(latent[~movable], before[~movable])
        assert (latent[movable] != before[movable]).all()
        moved |= latent != before
    assert moved.any()


def data():
    return lowbit.data.load("digits").subset(train=96, test=40)


def vit(**quant):
    torch.manual_seed(0)
    model = lowbit.models.create("vit_nano", 10, 1, 8, depth=1)
    return quantize_(model, QuantConfig(**({"weight": StatsQ(bits=2)} | quant)))


def config(**changes):
    settings = {"epochs": 1, "cga_epochs": 2, "cga_lr": 5e-5, "cga_boundary": 0.05, "batch_size": 32}
    return TrainConfig(**(settings | {"progress": False} | changes))


class Watch:
    """Notes the latents before and after each step of the phase."""

    def __init__(self, model):
        self.latents = {f.name: f.latents[0] for f in quantized_layers(model) if f.weight is not None}
        self.violations, self.moved, self.rates = 0, 0, []

    def before_forward(self, state):
        self.before = {name: latent.detach().clone() for name, latent in self.latents.items()}

    def on_step(self, state):
        self.rates.append(state.lr)
        if state.epoch < state.config.epochs:
            return
        for name, latent in self.latents.items():
            movable = cga_mask(self.before[name], 2, state.config.cga_boundary)
            changed = latent != self.before[name]
            self.violations += int((changed & ~movable).sum())
            self.moved += int((changed & movable).sum())


def test_the_phase_follows_training_at_its_own_rate():
    model = vit()
    watch = Watch(model)
    run = lowbit.train(model, data(), config(), callbacks=[watch])
    assert len(run.history) == 3 and run.history[-1]["test_acc"] is not None
    assert watch.rates[3:] == [5e-5] * 6 and watch.rates[0] == 1e-3
    assert watch.violations == 0 and watch.moved > 0


def test_without_it_every_weight_moves():
    model = vit()
    latents = Watch(model).latents
    before = {name: latent.detach().clone() for name, latent in latents.items()}
    lowbit.train(model, data(), config(epochs=3, cga_epochs=0))
    changed = torch.cat([(latent != before[name]).flatten() for name, latent in latents.items()])
    assert changed.double().mean() > 0.99


def test_resumed_inside_the_phase_it_ends_with_the_same_bits(tmp_path):
    class Stop(Exception):
        pass

    class StopIn:
        def __init__(self, epoch):
            self.epoch = epoch

        def on_step(self, state):
            if state.epoch == self.epoch:
                raise Stop

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    whole = vit()
    lowbit.train(whole, data(), config(), callbacks=[StopIn(None)])
    halves = vit()
    out = str(tmp_path / "run")
    with pytest.raises(Stop):
        lowbit.train(halves, data(), config(out=out), callbacks=[StopIn(2)])
    again = vit()
    record = lowbit.train(again, data(), config(out=out), callbacks=[StopIn(None)])
    assert len(record.history) == 3
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("variant", ["effective", "as_published"])
def test_query_key_product_in_both_variants(variant):
    """As published the mask leaves the gradients of Wq and Wk as they are; the effective one changes them."""
    model = vit(qkr=True)
    x, target = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    product = model.blocks[0].attn.qk.parametrizations.weight

    def gradients():
        model.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        return product.original0.grad.clone()

    plain = gradients()
    annealing = ConfidenceGuidedAnnealing(model, boundary=0.05, query_key=variant, from_step=7)

    class State:
        step = 6

    annealing.before_forward(State)
    assert torch.equal(gradients(), plain)  # not yet
    State.step = 7
    annealing.before_forward(State)
    masked = gradients()
    assert torch.equal(masked, plain) == (variant == "as_published")
    if variant == "effective":
        assert 0 < masked.norm() < 0.7 * plain.norm()  # a small share of the product's elements is left
        # by hand: only elements of the product near a boundary pass their gradient on
        seen = []
        handle = product[0].quantizer.register_full_backward_hook(lambda module, given, taken: seen.append(given[0]))
        gradients()
        handle.remove()
        mask = cga_mask(product[0].product(product.original0, product.original1), 2, 0.05)
        heads = product[0].heads
        grad = (seen[0] * mask).view(heads, -1, mask.shape[1])
        wk = product.original1.view(heads, -1, mask.shape[1])
        torch.testing.assert_close(masked, (wk @ grad.transpose(1, 2)).reshape(masked.shape), rtol=1e-4, atol=1e-7)


def test_chosen_layers_only():
    model = vit()
    annealing = ConfidenceGuidedAnnealing(model, boundary=0.05, layers=("*.fc1", "*.fc2"))
    for found in quantized_layers(model):
        found.latents[0].grad = torch.ones_like(found.latents[0])
    annealing.freeze()
    for found in quantized_layers(model):
        assert bool((found.latents[0].grad == 0).any()) == found.name.endswith(("fc1", "fc2")), found.name


def test_learning_rate_of_the_phase():
    settings = TrainConfig(epochs=2, cga_epochs=1, lr=0.1, cga_lr=0.003)
    assert learning_rate(9, 5, settings) < 0.01 and learning_rate(10, 5, settings) == 0.003 == learning_rate(
        14, 5, settings
    )


WRONG = [
    (lambda: ConfidenceGuidedAnnealing(vit(weight=LSQ(bits=2))), "needs StatsQ"),
    (lambda: ConfidenceGuidedAnnealing(vit(), boundary=0.6), "boundary=0.6"),
    (lambda: ConfidenceGuidedAnnealing(vit(), layers=("fc7",)), "fc7.*blocks.0"),
    (lambda: ConfidenceGuidedAnnealing(vit(), query_key="none"), "query_key='none'"),
    (lambda: TrainConfig(epochs=1, cga_epochs=-1), "cga_epochs=-1"),
    (lambda: TrainConfig(epochs=1, cga_boundary=0.7), "cga_boundary=0.7"),
    (lambda: cga_mask(torch.ones(2, 2), 2, -0.1), "boundary=-0.1"),
    (lambda: cga_mask(torch.ones(2, 2), 0, 0.1), "bits=0"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[message for _, message in WRONG])
def test_refusals(wrong, message):
    with pytest.raises(LowbitError, match=message):
        wrong()


def test_the_largest_rate_by_hand():
    """Mean |w| of the rows is 1, 2 and 3, so at 2 bits thresholds lie 1, 2 and 3 apart; the median counts."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 3.0], [-3.0, 3.0]]))
    quantize_(model, QuantConfig(weight=StatsQ(bits=2), first_last="same"))
    annealing = ConfidenceGuidedAnnealing(model, boundary=0.02)
    assert annealing.largest_rate() == pytest.approx(0.1 * 0.02 * 2)
    annealing.check_rate(0.0039)
    with pytest.raises(LowbitError, match=r"learning rate of 0\.0041 .* boundary=0\.02.* = 0\.004 is allowed"):
        annealing.check_rate(0.0041)
    ConfidenceGuidedAnnealing(model, boundary=0.02, rate_rule=False).check_rate(1.0)


@pytest.mark.parametrize(("optimizer", "refused"), [("adamw", True), ("radam", True), ("sgd", False)])
def test_a_rate_that_leaves_the_zone_is_refused_before_the_first_epoch(few, optimizer, refused):
    model, epochs = quantized_mlp(), []
    settings = TrainConfig(
        epochs=1, cga_epochs=1, cga_lr=1e-3, cga_boundary=0.005, batch_size=10, optimizer=optimizer, progress=False
    )

    class Watch:
        def on_epoch(self, state):
            epochs.append(state.epoch)

    if refused:
        with pytest.raises(LowbitError, match=r"learning rate of 0\.001 is too large"):
            lowbit.train(model, few, settings, callbacks=[Watch()], device="cpu")
    else:
        lowbit.train(model, few, settings, callbacks=[Watch()], device="cpu")
    assert len(epochs) == (0 if refused else 2)


def test_the_callback_refuses_at_its_first_step(few):
    model = quantized_mlp()
    settings = TrainConfig(epochs=1, lr=1e-3, batch_size=10, progress=False)
    for rule in (True, False):
        annealing = ConfidenceGuidedAnnealing(model, 0.005, rate_rule=rule)
        if rule:
            with pytest.raises(LowbitError, match="too large for confidence-guided annealing"):
                lowbit.train(model, few, settings, callbacks=[annealing], device="cpu")
        else:
            lowbit.train(model, few, settings, callbacks=[annealing], device="cpu")


def quantized_mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    return quantize_(model, QuantConfig(weight=StatsQ(bits=2), first_last="same"))


def test_products_have_their_whole_gradient_after_the_phase():
    """The mask is part of the product's forward pass: left on, it would be in every gradient taken later."""
    model, masked = vit(qkr=True), []

    class Look:
        def on_gradients(self, state):
            masked.append(model.blocks[0].attn.qk.parametrizations.weight[0].boundary)

    lowbit.train(model, data(), config(), callbacks=[Look()])
    assert masked[:3] == [None] * 3 and masked[3:] == [0.05] * 6
    assert model.blocks[0].attn.qk.parametrizations.weight[0].boundary is None


def test_the_phase_that_the_settings_ask_for():
    model = vit()
    given = config(epochs=2, cga_layers=("*.fc1",), cga_query_key="as_published")
    (annealing,) = annealing_phase(model, build_optimizer(model, given), given, steps_per_epoch=3)
    assert (annealing.boundary, annealing.query_key, annealing.from_step) == (0.05, "as_published", 6)
    latents = {found.name: found.latents[0] for found in quantized_layers(model)}
    for latent in latents.values():
        latent.grad = torch.ones_like(latent)
    annealing.freeze()
    assert [name for name, latent in latents.items() if (latent.grad == 0).any()] == ["blocks.0.mlp.fc1"]


@pytest.mark.parametrize(("optimizer", "refused"), [("adamw", True), ("radam", True), ("sgd", False)])
def test_the_rate_of_the_phase_is_checked_when_it_is_built(optimizer, refused):
    model, given = quantized_mlp(), config(optimizer=optimizer, cga_lr=1e-3, cga_boundary=0.005)
    optimize = build_optimizer(model, given)
    if refused:
        with pytest.raises(LowbitError, match=r"learning rate of 0\.001 is too large"):
            annealing_phase(model, optimize, given, steps_per_epoch=3)
    else:
        assert len(annealing_phase(model, optimize, given, steps_per_epoch=3)) == 1


def test_no_phase_without_epochs_for_it():
    """Whatever the weights, and although the rate would be refused."""
    model, given = quantized_mlp(), config(cga_epochs=0, cga_lr=1.0)
    assert annealing_phase(model, build_optimizer(model, given), given, steps_per_epoch=3) == []
    assert annealing_phase(nn.Linear(2, 2), build_optimizer(model, given), given, steps_per_epoch=3) == []
