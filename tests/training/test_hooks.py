"""A quantizer's word before each step and its penalty on the loss reach the training loop."""

import pytest
import torch
from torch import nn

import lowbit
from lowbit.nn.convert import attach_
from lowbit.quantizers.base import Method, WeightQuantizer
from lowbit.training.hooks import QuantizerHooks


class Shrinking(WeightQuantizer):
    """Passes its weight on; asks for a penalty of its sum and notes how far the training is."""

    config = "Shrinking"

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, latent):
        return latent * 1.0

    def penalty(self, latent):
        return 100.0 * latent.square().sum()

    def before_step_(self, progress, latent):
        self.seen.append(progress)
        with torch.no_grad():
            latent[0, 0] = progress


class Plain(WeightQuantizer):
    """Overrides neither."""

    config = "Plain"

    def forward(self, latent):
        return latent * 1.0


class Uses(Method):
    """Hands out a given quantizer."""

    def __init__(self, quantizer):
        self.quantizer = quantizer

    def weight(self, weight):
        return self.quantizer


@pytest.fixture
def hooked(mlp):
    model, quantizer = mlp(dropout=0.0), Shrinking()
    attach_(model[1], Uses(quantizer), None)
    attach_(model[4], Uses(Plain()), None)
    return model, quantizer


def test_progress_runs_over_all_steps_and_the_penalty_shrinks_the_weight(hooked, few, quick):
    model, quantizer = hooked
    before = model[1].weight.detach().square().sum()
    lowbit.train(model, few, quick(epochs=2, lr=0.05))
    assert quantizer.seen == [step / 6 for step in range(6)]
    assert model[1].weight.square().sum() < 0.5 * before


def test_a_resumed_run_goes_on_with_the_progress_it_had(hooked, few, quick, tmp_path):
    model, quantizer = hooked

    class Stop(Exception):
        pass

    class StopAfterOne:
        def on_epoch(self, state):
            if state.epoch == 1:
                raise Stop

    config = quick(epochs=2, out=str(tmp_path / "run"))
    with pytest.raises(Stop):
        lowbit.train(model, few, config, callbacks=[StopAfterOne()])
    quantizer.seen.clear()
    lowbit.train(model, few, config, callbacks=[type("StopAfterOne", (), {})()])
    assert quantizer.seen == [step / 6 for step in range(3, 6)]


def test_the_penalty_is_added_and_a_quantizer_without_one_adds_nothing(hooked):
    model, _ = hooked
    hooks = QuantizerHooks(model)
    hooks.before_step(0.25)
    assert model[1].weight[0, 0] == 0.25
    loss = hooks.add_penalty(torch.tensor(2.0))
    assert torch.isclose(loss, 2 + 100 * model[1].weight.square().sum())
    assert QuantizerHooks(nn.Linear(2, 2)).add_penalty(loss) is loss
