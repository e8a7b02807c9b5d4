"""The oscillation frequency: sequences worked by hand, a toy with an analytic answer, and the tracker."""

import itertools
import math

import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import lowbit
from lowbit.errors import LowbitError
from lowbit.metrics import OscillationTracker, oscillation_step
from lowbit.quantizers import LSQ, DenseShift


def run(sequences, momentum):
    """States after each step; ``sequences [steps][weights]``, the first row is the start."""
    state, states = None, []
    for codes in sequences:
        state = oscillation_step(torch.tensor(codes, dtype=torch.int16), state, momentum)
        states.append(state)
    return states


@pytest.mark.parametrize(
    ("codes", "oscillations"),
    [
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
        ([0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1]),
        ([0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0]),  # always the same way
        ([0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1]),  # the last switch is remembered over the gap
        ([5, 0, 3, 3, 4, 2], [0, 1, 0, 0, 1]),  # jumps count once; 3 → 4 goes on upwards after the gap
        ([0, -1, -2, -1, -1, -2], [0, 0, 1, 0, 1]),
    ],
)
def test_oscillations_of_sequences_worked_by_hand(codes, oscillations):
    """With momentum 1 the frequency is o_t itself."""
    states = run([[k] for k in codes], 1.0)
    assert states[0].frequency.tolist() == [0.0]
    assert [state.frequency.item() for state in states[1:]] == oscillations


def test_frequency_and_direction_worked_by_hand():
    states = run([[0, 3], [1, 3], [0, 2], [0, 2], [1, 3]], 0.25)
    assert [state.direction.tolist() for state in states] == [[0, 0], [-1, 0], [1, 1], [1, 1], [-1, -1]]
    # o = 0 1 0 1 and 0 0 0 1: f = o/4 + 3f/4
    expected = [[0, 0], [0, 0], [1 / 4, 0], [3 / 16, 0], [1 / 4 + 9 / 64, 1 / 4]]
    assert [state.frequency.tolist() for state in states] == expected
    assert states[-1].codes.tolist() == [1, 3] and states[-1].direction.dtype == torch.int8


def test_the_default_momentum_is_the_papers():
    state = None
    for k in (0, 1, 0):
        state = oscillation_step(torch.tensor([k]), state)
    assert state.frequency.item() == pytest.approx(0.01, rel=1e-6)
    assert oscillation_step(torch.tensor([1]), state).frequency.item() == pytest.approx(0.01 + 0.99 * 0.01, rel=1e-6)


def test_earlier_states_stay_as_they_were():
    first = oscillation_step(torch.tensor([0, 0]))
    second = oscillation_step(torch.tensor([1, 0]), first)
    third = oscillation_step(torch.tensor([0, 0]), second)
    assert first.codes.tolist() == [0, 0] and second.codes.tolist() == [1, 0]
    assert second.direction.tolist() == [-1, 0] and third.direction.tolist() == [1, 0]
    assert second.frequency.tolist() == [0, 0] and third.frequency[0] > 0


def published(codes, momentum):
    """The definition, one weight at a time."""
    f, last = 0.0, 0
    for before, now in itertools.pairwise(codes):
        switch = (before > now) - (before < now)
        f = momentum * (switch != 0 and switch == -last) + (1 - momentum) * f
        last = switch or last
    return f


@given(hnp.arrays("int16", st.tuples(st.integers(2, 30), st.integers(1, 4)), elements=st.integers(-3, 3)))
def test_equal_to_the_definition_weight_by_weight(codes):
    state = run(codes.tolist(), 0.1)[-1]
    expected = [published([int(k) for k in column], 0.1) for column in codes.T]
    assert state.frequency.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_any_kind_of_whole_number_is_a_code(dtype):
    state = None
    for k in (200, 100, 200):
        state = oscillation_step(torch.tensor([k]).to(dtype), state, 1.0)
    assert state.frequency.item() == 1


def descend(distance, rate, steps, start):
    """Codes of L = (q(w) - distance)²/2 with a straight-through gradient, q = round, in float64."""
    w, codes = torch.tensor([start], dtype=torch.float64), []
    for _ in range(steps):
        codes.append(torch.round(w))
        w = w - rate * (codes[-1] - distance)
    return codes


@pytest.mark.parametrize("rate", [2**-2, 2**-7, 2**-11])
@pytest.mark.parametrize("distance", [1 / 2, 1 / 4, 3 / 8, 7 / 8, 1 / 16])
def test_a_straight_through_optimum_between_two_levels_oscillates_twice_its_distance(distance, rate):
    """Analytic: frequency 2·min(d, 1-d), whatever the learning rate. All numbers are dyadic, so the cycle is exact."""
    state, f = None, []
    for codes in descend(distance, rate, 2048, 0.5):
        state = oscillation_step(codes, state)
        f.append(state.frequency.item())
    # The average over one period of 16 steps, once the start is forgotten (0.99^2000 = 2e-9).
    assert sum(f[-16:]) / 16 == pytest.approx(2 * min(distance, 1 - distance), abs=1e-4)


@given(st.floats(0.05, 0.95), st.floats(1e-3, 0.3))
def test_any_distance_and_learning_rate_give_the_analytic_frequency(distance, rate):
    state, oscillations, steps = None, 0, 300
    for codes in descend(distance, rate, steps, 0.5):
        state = oscillation_step(codes, state, 1.0)
        oscillations += state.frequency.item()
    # Codes 0 and 1 balance: ones·(1-d) = zeros·d up to the two moves at the ends, and each rare code is two switches.
    assert oscillations / steps == pytest.approx(2 * min(distance, 1 - distance), abs=6 / steps)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: oscillation_step(torch.tensor([0.5])), "integers"),
        (lambda: oscillation_step(torch.zeros(2), oscillation_step(torch.zeros(3))), r"\[2\].*\[3\]"),
        (lambda: oscillation_step(torch.zeros(2), momentum=0.0), "momentum=0.0"),
        (lambda: oscillation_step(torch.zeros(2), momentum=math.nan), "momentum=nan"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(LowbitError, match=message):
        call()


def two_layers(method=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False), nn.Linear(2, 4))
    return lowbit.quantize_(model, lowbit.QuantConfig(weight=method or LSQ(bits=3), first_last="same"))


def set_codes(layer, codes):
    """Puts an LSQ weight exactly on integer ``codes``."""
    quantizer = layer.parametrizations.weight[0]
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.tensor(codes) * quantizer.step)


def test_the_tracker_finds_the_frequency_of_every_weight():
    model = two_layers()
    set_codes(model[1], [[0, 0, 0], [0, 0, 0]])
    tracker = OscillationTracker(model, momentum=0.25, threshold=0.2)
    for codes in ([[1, -1, 0], [3, 0, 0]], [[0, -1, 0], [2, 0, 0]], [[1, 0, 0], [2, 0, 0]]):
        set_codes(model[1], codes)
        tracker.update()
    # o: 0 1 1, 0 0 1 and 0 1 0
    expected = [[1 / 4 + 3 / 16, 1 / 4, 0], [3 / 16, 0, 0]]
    assert tracker.frequency("1").tolist() == expected
    frame = tracker.summary(total=True)
    assert frame.columns.tolist() == ["layer", "weights", "frequency", "oscillating"]
    assert frame.layer.tolist() == ["0", "1", "2", "(all)"] and frame.weights.tolist() == [12, 6, 8, 26]
    total = sum(map(sum, expected))
    assert frame.frequency.tolist() == pytest.approx([0, total / 6, 0, total / 26])
    assert frame.oscillating.tolist() == pytest.approx([0, 2 / 6, 0, 2 / 26])
    assert tracker.on_epoch(None) == pytest.approx({"frequency": total / 26, "oscillating": 2 / 26})


def test_watched_weights_leave_trajectories():
    model = two_layers(DenseShift(bits=3))
    tracker = OscillationTracker(model, every=2)
    tracker.watch("1", [4, 0])
    held = model[1].parametrizations.weight
    expected = [[0, held.original0[1, 1].item(), held.original3[1, 1].item(), model[1].weight[1, 1].item()]]
    for step in (1, 2, 3, 4):
        with torch.no_grad():
            for latent in (held.original0, held.original1, held.original2, held.original3):
                latent.neg_().mul_(1.5)
        tracker.update()
        if step % 2 == 0:
            values = held.original0[1, 1].item(), held.original3[1, 1].item(), model[1].weight[1, 1].item()
            expected.append([step, *values])
    frame = tracker.trajectories()
    assert frame.columns.tolist() == ["layer", "weight", "step", *(f"latent_{i}" for i in range(4)), "value"]
    assert len(frame) == 6 and frame.weight.tolist() == [4, 0] * 3
    mine = frame[frame.weight == 4][["step", "latent_0", "latent_3", "value"]]
    assert mine.to_numpy().tolist() == expected
    tracker.watch("0", [11])
    assert tracker.trajectories().step.tolist() == [0, 0, 2, 2, 4, 4, 4]

    other = OscillationTracker(model, every=2)
    other.load_state_dict(tracker.state_dict())
    pandas.testing.assert_frame_equal(other.trajectories(), tracker.trajectories())


def test_a_look_every_few_steps_does_not_see_what_lies_between():
    model = two_layers()
    set_codes(model[1], [[0, 0, 0], [0, 0, 0]])
    tracker = OscillationTracker(model, every=2, momentum=1.0)
    for code in (1, 0, 1, 0):
        set_codes(model[1], [[code] * 3] * 2)
        tracker.update()
    assert tracker.frequency("1").sum() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OscillationTracker(nn.Sequential(nn.Linear(2, 2))), "no quantized weight.*quantize_.*grid"),
        (lambda: OscillationTracker(two_layers(), every=0), "every=0"),
        (lambda: OscillationTracker(two_layers(), momentum=2.0), "momentum=2.0"),
        (lambda: OscillationTracker(two_layers(), threshold=1.0), "threshold=1.0"),
        (lambda: OscillationTracker(two_layers(), grid="pot"), "weight="),
        (lambda: OscillationTracker(two_layers()).watch("3", [0]), "'3'; the tracked layers are 0, 1, 2"),
        (lambda: OscillationTracker(two_layers()).watch("1", [6]), "0 to 5"),
        (lambda: OscillationTracker(two_layers()).watch("1", []), "indices"),
        (lambda: OscillationTracker(two_layers()).trajectories(), "watch"),
        (lambda: OscillationTracker(two_layers()).frequency("x"), "'x'"),
    ],
)
def test_the_tracker_refuses_bad_input(make, message):
    with pytest.raises(LowbitError, match=message):
        make()
