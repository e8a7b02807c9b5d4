"""Flips and frozen weights: hand-worked sequences, every method, the full-precision twin, and training runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metrics_helpers import make_config, make_data, make_model
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.metrics import FreezingTracker, FrozenFrom, OscillationTracker, oscillation_step
from lowbit.metrics.tracking import FlatCodes, signed_ranks, tracked_layers
from lowbit.quantizers import LSQ, DenseShift, PoT, StatsQ, Ternary, get, names


@pytest.mark.parametrize(
    ("levels", "ranks"),
    [
        ([-2, -1, 0, 1], [-2, -1, 0, 1]),
        ([-8, -4, -2, -1, 1, 2, 4, 8], [-4, -3, -2, -1, 1, 2, 3, 4]),
        ([-0.75, -0.25, 0.25, 0.75], [-2, -1, 1, 2]),
        ([-0.3, 0, 0.7], [-1, 0, 2]),
        ([-4, -1, 2], [-3, -1, 2]),
    ],
)
def test_signed_ranks(levels, ranks):
    assert signed_ranks(torch.tensor(levels, dtype=torch.float32)).tolist() == ranks


@given(st.sets(st.integers(-50, 50), min_size=2), st.data())
def test_signed_ranks_tell_values_signs_and_sizes_apart(levels, data):
    levels = sorted(levels)
    ranks = signed_ranks(torch.tensor(levels, dtype=torch.float32)).tolist()
    a, b = (data.draw(st.integers(0, len(levels) - 1)) for _ in range(2))
    assert (levels[a] < levels[b]) == (ranks[a] < ranks[b])
    assert (abs(levels[a]) == abs(levels[b])) == (abs(ranks[a]) == abs(ranks[b]))
    assert np.sign(levels[a]) == np.sign(ranks[a])


def two_layers(**options):
    """A model of 6 + 4 weights on LSQ's grid -2, -1, 0, 1, with its tracker and a function that sets the codes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    lowbit.quantize_(model, lowbit.QuantConfig(weight=LSQ(bits=2), first_last="same"))

    def put(first, second):
        with torch.no_grad():
            for layer, codes in zip(model, (first, second), strict=True):
                held = layer.parametrizations.weight
                held.original.copy_(torch.tensor(codes).view(held.original.shape) * held[0].step)

    put([0] * 6, [1] * 4)
    return model, FreezingTracker(model, **options), put


def test_a_sequence_worked_by_hand():
    _, tracker, put = two_layers(momentum=0.5, threshold=0.3)
    put([0, 1, 0, 0, -1, 0], [1, 1, 1, 1])
    tracker.update()  # two value flips, both change sign (0 has sign 0) and size
    put([0, -1, 0, 0, -2, 0], [1, -1, 1, -2])
    tracker.update()  # +1 → -1: sign only; -1 → -2: size only. Below: sign, and both
    put([0, 0, 0, 0, -2, 0], [1, 1, 1, 1])
    tracker.update()  # -1 → 0 and, below, back to where they were
    frame = tracker.summary(total=True).set_index("layer")
    assert frame.index.tolist() == ["0", "1", "(all)"] and frame.weights.tolist() == [6, 4, 10]
    # 5 of 3 looks at 6 weights, 4 of 3 at 4; sign: 4 and 4; size: 4 and 2
    assert frame.flip_rate.tolist() == pytest.approx([5 / 18, 4 / 12, 9 / 30])
    assert frame.sign_flip_rate.tolist() == pytest.approx([4 / 18, 4 / 12, 8 / 30])
    assert frame.size_flip_rate.tolist() == pytest.approx([4 / 18, 2 / 12, 6 / 30])
    # a weight that came back is not frozen
    assert frame.frozen.tolist() == pytest.approx([4 / 6, 2 / 4, 6 / 10])
    assert frame.sign_frozen.tolist() == pytest.approx([4 / 6, 2 / 4, 6 / 10])
    assert frame.size_frozen.tolist() == pytest.approx([4 / 6, 3 / 4, 7 / 10])
    assert tracker.changed("1").tolist() == [[False, True], [False, True]]
    # o of the second weight above: 0 1 1; of the two below: 0 0 1, all with m = 1/2
    assert tracker.frequency("0").tolist() == [[0, 1 / 4 + 1 / 2, 0], [0, 0, 0]]
    assert frame.frequency.tolist() == pytest.approx([0.75 / 6, 1 / 4, 1.75 / 10])
    assert frame.oscillating.tolist() == pytest.approx([1 / 6, 2 / 4, 3 / 10])


def test_signs_sizes_and_values_are_frozen_separately():
    _, tracker, put = two_layers()
    put([0] * 6, [-1, 1, 1, 0])
    tracker.update()
    put([0] * 6, [-1, 1, 1, 0])
    tracker.update()
    row = tracker.summary().set_index("layer").loc["1"]
    assert (row.frozen, row.sign_frozen, row.size_frozen) == (2 / 4, 2 / 4, 3 / 4)
    assert (row.flip_rate, row.sign_flip_rate, row.size_flip_rate) == (2 / 8, 2 / 8, 1 / 8)


def test_a_new_window_counts_afresh_and_the_start_is_remembered():
    _, tracker, put = two_layers()
    put([1, 0, 0, 0, 0, 0], [1] * 4)
    tracker.update()
    tracker.mark()
    assert tracker.summary().flip_rate.isna().all() and (tracker.summary().frozen == 1).all()
    put([1, 1, 0, 0, 0, 0], [1] * 4)
    tracker.update()
    tracker.update()
    window, whole = (tracker.summary(since=since).set_index("layer").loc["0"] for since in ("mark", "start"))
    assert (window.flip_rate, window.frozen) == (pytest.approx(1 / 12), 5 / 6)
    assert (whole.flip_rate, whole.frozen) == (pytest.approx(2 / 18), 4 / 6)
    assert tracker.changed("0").sum() == 1 and tracker.changed("0", since="start").sum() == 2
    tracker.mark()
    tracker.mark()
    assert tracker.summary(since="start").set_index("layer").frozen["0"] == 4 / 6
    tracker.reset()
    assert tracker.summary(since="start").set_index("layer").frozen["0"] == 1


def test_delta_is_the_number_of_steps_between_looks():
    _, tracker, put = two_layers(every=3)
    for code in (1, 0, 1, 0, 0, 1, -1):
        put([code] * 6, [1] * 4)
        tracker.update()
    # looks at the third and the sixth step: 0 → 1 → 1
    row = tracker.summary().set_index("layer").loc["0"]
    assert (row.flip_rate, row.frozen) == (1 / 2, 0)


def test_more_flips_than_a_byte_holds():
    _, tracker, put = two_layers()
    for step in range(600):
        put([step % 2, 0, 0, 0, 0, 0], [1] * 4)
        tracker.update()
    row = tracker.summary().set_index("layer").loc["0"]
    assert row.flip_rate == pytest.approx(599 / 600 / 6) and row.frozen == 5 / 6


@pytest.mark.parametrize("name", names("weight"))
def test_every_method_is_seen_as_its_weight_shows(name):
    """Value, sign and size of the layer's own weight over its scale, compared outright, and the shared definition."""
    model = make_model(get(name)())
    layers = list(lowbit.nn.quantized_layers(model))
    tracker, state = FreezingTracker(model), None
    random = torch.Generator().manual_seed(2)

    def look():
        return [layer.weight.levels[layer.codes().long()].detach().clone() for layer in layers]

    before, flips = look(), torch.zeros(3, len(layers))
    state = oscillation_step(layers[1].codes())
    for _ in range(5):
        with torch.no_grad():
            for layer in layers:
                for latent in layer.latents:
                    latent += torch.randn(latent.shape, generator=random) * latent.std()
        tracker.update()
        now = look()
        for i, (a, b) in enumerate(zip(before, now, strict=True)):
            kinds = a != b, a.sign() != b.sign(), a.abs() != b.abs()
            flips[:, i] += torch.stack([kind.float().mean() for kind in kinds])
        before, state = now, oscillation_step(layers[1].codes(), state)
    frame = tracker.summary()
    found = frame[["flip_rate", "sign_flip_rate", "size_flip_rate"]].to_numpy().T
    assert flips[0].min() > 0 and np.allclose(found, flips / 5)
    assert torch.equal(tracker.frequency(layers[1].name), state.frequency)


@pytest.mark.parametrize("method", [*(get(name)() for name in names("weight")), Ternary(variant="ttq")], ids=str)
def test_the_watched_value_is_the_layers_weight(method):
    model = make_model(method)
    tracker = FreezingTracker(model)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):  # learned scales and levels too
            parameter *= 1.1 + i / 10
    tracker.watch("3", list(range(40)))
    expected = model[3].weight.detach().flatten()[:40]
    assert tracker.trajectories().value.to_numpy() == pytest.approx(expected.numpy(), rel=1e-6)


def test_neighbors_with_other_levels_are_told_apart():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    lowbit.quantize_(model, lowbit.QuantConfig(weight=DenseShift(bits=3), first_last=8))
    layers = tracked_layers(model, None)
    codes = FlatCodes(layers)
    expected = [signed_ranks(layer.levels)[layer.codes().long()].flatten() for layer in layers]
    assert torch.equal(codes.read(torch.empty(64, dtype=torch.int16)), torch.cat(expected))
    assert expected[0].abs().max() > 4 >= expected[1].abs().max()


def test_channels_last_weights_keep_their_places():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    lowbit.quantize_(model, lowbit.QuantConfig(weight=StatsQ(bits=3)))
    tracker = FreezingTracker(model)
    model.to(memory_format=torch.channels_last)
    tracker.update()
    assert tracker.summary().flip_rate.tolist() == [0.0]


def twin():
    """Four layers in full precision; "2" is a 2 x 2 layer with easy weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2), nn.Linear(2, 4))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[1.0, -1.0], [0.1, 2.0]]))
    return model


def test_a_full_precision_twin_is_seen_through_a_grid_that_stays():
    model = twin()
    tracker = FreezingTracker(model, grid=PoT(bits=3, scale="max"))
    # scales 1 and 2; levels 0, ¼, ½, 1: values 1, -1 and 0 (0.1 is nearer to 0 than to ½), 2
    assert tracker.summary().layer.tolist() == ["1", "2"]  # those that quantize_ would take
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[1.0, -1.0], [0.2, 2.0]]))  # 0.1 of the scale: still nearer to 0
    tracker.update()
    assert tracker.summary().flip_rate.tolist() == [0, 0]
    tracker.mark()
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[0.9, 1.2], [0.3, 4.0]]))
    tracker.update()
    # kept, sign flip, 0 → ½, still at the top although the scale would have doubled
    row = tracker.summary().set_index("layer").loc["2"]
    assert (row.flip_rate, row.sign_flip_rate, row.size_flip_rate) == (2 / 4, 2 / 4, 1 / 4)
    assert tracker.changed("2").tolist() == [[False, True], [True, False]]
    tracker.watch("2", [1])
    assert tracker.trajectories()[["latent_0", "value"]].to_numpy() == pytest.approx(np.array([[1.2, 1.0]]))


def test_the_grid_may_be_a_method_of_several_latents():
    model = twin()
    tracker = FreezingTracker(model, grid=DenseShift(bits=2, scale="statistical"))
    with torch.no_grad():
        model[2].weight.mul_(-1)
    tracker.update()
    row = tracker.summary().set_index("layer").loc["2"]
    assert (row.sign_flip_rate, row.size_flip_rate) == (1, 0)
    with pytest.raises(LowbitError, match=r"no scale.*scale='statistical'"):
        FreezingTracker(twin(), grid=DenseShift(bits=3))


def test_the_grid_does_not_touch_layers_that_are_quantized():
    model = lowbit.quantize_(
        twin(), lowbit.QuantConfig(weight=StatsQ(bits=2)), filter_fn=lambda layer, name: name == "2"
    )
    assert FreezingTracker(model).summary().layer.tolist() == ["2"]
    tracker = FreezingTracker(model, grid=PoT(bits=3))
    assert tracker.summary().layer.tolist() == ["1", "2"]
    assert len(tracker.codes.layers[0].levels) == 7 and len(tracker.codes.layers[1].levels) == 4


class Stop:
    """Ends the run at a step, as a lost machine does."""

    def __init__(self, step=-1):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            raise KeyboardInterrupt


def run(out, stop=-1, seed=0):
    model = make_model(DenseShift(bits=3, sigma=0.1))
    torch.manual_seed(seed)
    with torch.no_grad():  # a resumed run must not depend on the weights it is handed
        for parameter in model.parameters():
            parameter += seed * torch.randn(parameter.shape)
    tracker = FreezingTracker(model, momentum=0.1)
    tracker.watch("3", [0, 100])
    config = make_config(out=str(out), batch_size=16)
    record = lowbit.train(model, make_data(), config, callbacks=[Stop(stop), tracker], device="cpu")
    return record, tracker


def test_the_callback_writes_history_and_resumes_exactly(tmp_path):
    whole, expected = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=10)  # 4 steps an epoch: in the third
    resumed, tracker = run(tmp_path / "cut", seed=1)
    measured = [key for key in whole.history[0] if "fro" in key or "rate" in key or key in ("frequency", "oscillating")]
    assert set(measured) == {
        "flip_rate", "sign_flip_rate", "size_flip_rate", "frozen", "sign_frozen", "size_frozen", "frozen_epoch",
        "sign_frozen_epoch", "size_frozen_epoch", "frequency", "oscillating",
    }  # fmt: skip
    for row, other in zip(whole.history, resumed.history, strict=True):
        assert [row[key] for key in measured] == [other[key] for key in measured]
    for since in ("mark", "start"):
        pandas.testing.assert_frame_equal(tracker.summary(True, since), expected.summary(True, since))
    pandas.testing.assert_frame_equal(tracker.trajectories(), expected.trajectories())
    assert tracker.trajectories().step.max() == 16

    # The history is what the summary says, epoch by epoch and since the start.
    frame = whole.frame
    assert frame.flip_rate.iloc[-1] == expected.summary(total=True).flip_rate.iloc[-1] > 0
    assert frame.frozen_epoch.iloc[-1] == expected.summary(total=True).frozen.iloc[-1] < 1
    assert frame.frozen.iloc[-1] == expected.summary(total=True, since="start").frozen.iloc[-1]
    assert frame.flip_rate.mean() == pytest.approx(expected.summary(True, "start").flip_rate.iloc[-1])
    assert frame.frozen.iloc[0] == frame.frozen_epoch.iloc[0] and frame.frozen.is_monotonic_decreasing
    assert (frame.frozen_epoch.iloc[1:] > frame.frozen.iloc[1:]).all()
    json.dumps(whole.to_json(), allow_nan=False)


def test_an_epoch_without_a_look_has_no_rate():
    model = make_model(StatsQ())
    tracker = FreezingTracker(model, every=5)
    record = lowbit.train(model, make_data(), make_config(), callbacks=[tracker], device="cpu")
    assert record.history[0]["flip_rate"] is None and record.history[1]["flip_rate"] is not None


def test_a_state_of_another_model_or_setting_is_refused():
    state = FreezingTracker(make_model(StatsQ())).state_dict()
    with pytest.raises(LowbitError, match="settings"):
        FreezingTracker(make_model(StatsQ()), every=2).load_state_dict(state)
    with pytest.raises(LowbitError, match="layers"):
        FreezingTracker(twin(), grid=PoT()).load_state_dict(state)
    with pytest.raises(LowbitError, match="since='epoch'"):
        FreezingTracker(make_model(StatsQ())).summary(since="epoch")
    with pytest.raises(LowbitError, match="since='epoch'"):
        FreezingTracker(make_model(StatsQ())).changed("1", since="epoch")


def test_learnt_levels_are_ranked_as_they_were_at_the_start():
    """A method that learns its levels may order their sizes otherwise by the time of a resume."""
    model = make_model(PoT(bits=2))
    tracker = FreezingTracker(model)
    state = tracker.state_dict()
    state["levels"] = [torch.tensor([-0.3, 0.0, 0.7]) for _ in state["levels"]]
    tracker.load_state_dict(state)
    assert tracker.codes.read(tracker._next).unique().tolist() == [-1, 0, 2]


def test_tracking_changes_nothing_in_the_run():
    weights = []
    for callbacks in (lambda model: [], lambda model: [FreezingTracker(model)]):
        model = make_model(LSQ(bits=3))
        lowbit.train(model, make_data(), make_config(), callbacks=callbacks(model), device="cpu")
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_tracker_follows_its_model_to_another_device():
    model = make_model(StatsQ(bits=2))
    tracker = FreezingTracker(model)
    model.cuda()
    tracker.update()
    assert tracker.summary().flip_rate.eq(0).all() and tracker.changed("3").device.type == "cpu"


@pytest.mark.slow
def test_two_processes_measure_the_same_as_one_with_the_same_weights(tmp_path):
    """Two gloo ranks write their statistics, and rank 0 the weights of every step, which are tracked again here."""
    script = Path(__file__).with_name("two_processes.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ranks = [pandas.read_json(tmp_path / f"{rank}.json", dtype={"layer": str}, precise_float=True) for rank in (0, 1)]
    pandas.testing.assert_frame_equal(*ranks, check_exact=True)
    model = make_model(StatsQ(bits=2))
    start, *steps = torch.load(tmp_path / "weights.pt", weights_only=True)
    model.load_state_dict(start)
    tracker = FreezingTracker(model, momentum=0.1)
    for weights in steps:
        model.load_state_dict(weights)
        tracker.update()
    assert len(steps) == 16 and tracker.summary(since="start").flip_rate.min() > 0
    pandas.testing.assert_frame_equal(tracker.summary(since="start"), ranks[0], check_exact=False, rtol=1e-12)


def test_frozen_from_a_step_on_by_hand():
    """Followed from the second step: a change before it does not count, and what comes back has changed."""
    _, tracker, put = two_layers()
    follower = FrozenFrom(tracker, 2)
    codes = [
        ([1, 1, 0, 0, 0, 0], [1, 1, 1, 1]),
        ([1, 0, 0, -1, 0, 0], [1, 1, -2, 1]),  # from here
        ([1, 1, 0, -2, 0, 0], [1, 1, -2, 1]),  # 0 → 1, -1 → -2
        ([1, 0, 0, -2, 0, 0], [1, 1, 1, 1]),  # 1 → 0: back, but changed; -2 → 1
    ]
    with pytest.raises(LowbitError, match="did not reach step 2"):
        follower.frozen()
    for step, (first, second) in enumerate(codes):
        put(first, second)
        tracker.update()
        follower.on_step(SimpleNamespace(step=step))
    assert follower.frozen() == pytest.approx({"frozen": 7 / 10, "sign_frozen": 8 / 10})
    fresh = FrozenFrom(tracker, 2)
    fresh.load_state_dict(follower.state_dict())
    assert fresh.frozen() == follower.frozen()
    with pytest.raises(LowbitError, match="saved step 2"):
        FrozenFrom(tracker, 3).load_state_dict(follower.state_dict())


@pytest.mark.parametrize("tracker", [FreezingTracker, OscillationTracker])
def test_only_the_named_layers_are_tracked(tracker):
    model, _, _ = two_layers()
    assert tracker(model, layers=["1"]).summary().layer.tolist() == ["1"]
    assert tracker(model, layers=["[01]"]).summary().layer.tolist() == ["0", "1"]
    with pytest.raises(LowbitError, match="'2' matches no tracked layer; the tracked layers are 0, 1"):
        tracker(model, layers=["0", "2"])
