"""The cells that check a reader's answers: right ones pass, wrong ones do not, missing ones are asked for."""

import math
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

import lowbit
import lowbit.functional as F
from lowbit import metrics, paths
from lowbit.models.speech import LogMel
from lowbit.quantizers import get


def checking_cell(notebook: str) -> str:
    cells = nbformat.read(paths.notebooks() / f"{notebook}.ipynb", as_version=4).cells
    return next(c.source for c in reversed(cells) if c.cell_type == "code" and "both right" in c.source)


def power(x):
    low = 2.0 ** np.floor(np.log2(x))
    return low if x - low <= 2 * low - x else 2 * low


def trailing_run(gates):
    return 2 ** len("".join(map(str, gates)).split("0")[-1])


def overlap(a, b):
    width, height = (max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def dominates(p, q):
    return p[0] <= q[0] and p[1] >= q[1] and p != q


def overlap_without_max(a, b):
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def left_of_a_third(x, y, z):
    r = np.corrcoef([x, y, z])
    return (r[0, 1] - r[0, 2] * r[1, 2]) / ((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2)) ** 0.5


RIGHT = {
    "00_start_here": {"values": lambda b: 2**b, "largest_level": lambda b: (2**b - 1) / 2**b},
    "01_quantization_basics": {"nearest_power": power, "lsq_thresholds": [-1.5, -0.5, 0.5]},
    "02_zero_free_shifting": {
        "largest_weight": lambda b: 2 ** (2 ** (b - 1) - 1),
        "most_information_of_s3": lambda b: math.log2(2**b - 1),
    },
    "03_weight_freezing": {
        "steps_until_flip": lambda d, lr, g: d / (lr * g),
        "frozen_if_random": lambda r, T: (1 - r) ** T,
    },
    "04_sign_scale_decomposition": {"size_of": trailing_run, "all_open": [0.25, 0.5, 0.75]},
    "05_low_variance_init_and_transfer": {
        "random_walk": lambda lr, g, n: lr * g * n**0.5,
        "sigma_for_half_within": lambda d: d / 0.6745,
    },
    "06_detection": {"iou": overlap, "precisions": [1, 0.5, 2 / 3]},
    "07_speech": {
        "window_samples": lambda rate: rate * 40 // 1000,
        "frames": lambda rate: 1 + rate // (rate * 40 // 1000 // 2),
    },
    "08_shift_networks_compared": {
        "shipped_bytes": lambda n, b, r: (n * b + 32 * r) / 8,
        "left": 100 * 50_000 / 1_050_000,
    },
    "09_weight_oscillation": {"frequency": lambda d: 2 * min(d % 1, 1 - d % 1), "turns": 2},
    "10_statsq": {
        "scale_growth": lambda n, k: (n - 1 + k) / n,
        "levels": lambda b: [(2 * i + 1 - 2**b) / 2**b for i in range(2**b)],
    },
    "11_query_key_reparameterization": {
        "mac_ratio": lambda heads, width, tokens: heads * (width + tokens) / (2 * width + tokens),
        "jump": lambda step, s: step * s,
    },
    "12_confidence_guided_annealing": {
        "may_move": lambda bits, br: (2**bits - 1) * 2 * br / 2**bits,
        "travel": lambda steps, lr, scale, bits: steps * lr / (scale / 2 ** (bits - 1)),
    },
    "13_ofq_ladder": {
        "half_width": lambda a, b, t: t * np.subtract(a, b).std(ddof=1) / len(a) ** 0.5,
        "block_ratio": lambda heads, ratio: (heads + 2 + 2 * ratio) / (4 + 2 * ratio),
    },
    "14_where_the_papers_meet": {
        "ranges": lambda b: (2**b - 1, 2 ** (2 ** (b - 1) - 1)),
        "outer_share": lambda r, s: math.erfc(s * (1 + r) / 2 / math.sqrt(2)),
    },
    "15_shift_kernel": {
        "packed_bytes": lambda n, k, bits: -(-n // 16) * 16 * (-(-k // 64) * 64) * bits // 8,
        "zero_becomes": lambda S, exponent_bits: 2.0 ** (S - (2 ** (exponent_bits - 1) - 1)),
    },
    "16_deploy": {
        "fold": lambda scale, gamma, beta, mean, variance, eps: (
            scale * gamma / (variance + eps) ** 0.5,
            beta - gamma * mean / (variance + eps) ** 0.5,
        ),
        "layer_bytes": lambda n, k, bits: -(-n // 16) * 16 * (-(-k // 64) * 64) * bits // 8 + 8 * n,
    },
    "17_what_a_bit_costs": {
        "front": lambda points: [not any(dominates(p, q) for p in points) for q in points],
        "speedup": lambda ours, float32: np.median(np.divide(float32, ours)),
    },
    "18_open_questions": {
        "effects": lambda a, b, c, d: ((a + b - c - d) / 2, (a + c - b - d) / 2, a - b - c + d),
        "partial_correlation": left_of_a_third,
    },
}
WRONG = [
    ("00_start_here", {"values": lambda b: 2 * b}),
    ("00_start_here", {"largest_level": lambda b: 1.0}),
    ("01_quantization_basics", {"nearest_power": lambda x: 2.0 ** np.round(np.log2(x))}),
    ("01_quantization_basics", {"lsq_thresholds": [-0.5, 0.5, 1.5]}),
    ("01_quantization_basics", {"lsq_thresholds": [-0.5, 0.5]}),
    ("02_zero_free_shifting", {"largest_weight": lambda b: 2 ** (b - 1)}),
    ("02_zero_free_shifting", {"most_information_of_s3": lambda b: b}),
    ("03_weight_freezing", {"steps_until_flip": lambda d, lr, g: d / g}),
    ("03_weight_freezing", {"frozen_if_random": lambda r, T: 1 - r * T}),
    ("04_sign_scale_decomposition", {"size_of": lambda gates: 2 ** sum(gates)}),
    ("04_sign_scale_decomposition", {"all_open": [0.75, 0.5, 0.25]}),
    ("05_low_variance_init_and_transfer", {"random_walk": lambda lr, g, n: lr * g * n}),
    ("05_low_variance_init_and_transfer", {"sigma_for_half_within": lambda d: d}),
    ("06_detection", {"iou": overlap_without_max}),
    ("06_detection", {"precisions": [1, 0.5, 1]}),
    ("07_speech", {"window_samples": lambda rate: 320}),
    ("07_speech", {"frames": lambda rate: rate // (rate * 40 // 1000 // 2)}),
    ("08_shift_networks_compared", {"shipped_bytes": lambda n, b, r: n * b / 8}),
    ("08_shift_networks_compared", {"left": 5.0}),
    ("09_weight_oscillation", {"frequency": lambda d: 2 * d}),
    ("09_weight_oscillation", {"turns": 5}),
    ("10_statsq", {"scale_growth": lambda n, k: k}),
    ("10_statsq", {"levels": lambda b: [i / 2 ** (b - 1) for i in range(-(2 ** (b - 1)), 2 ** (b - 1))]}),
    ("11_query_key_reparameterization", {"mac_ratio": lambda heads, width, tokens: heads / 2}),
    ("11_query_key_reparameterization", {"jump": lambda step, s: s}),
    ("12_confidence_guided_annealing", {"may_move": lambda bits, br: 2 * br}),
    ("12_confidence_guided_annealing", {"travel": lambda steps, lr, scale, bits: steps * lr / scale}),
    ("13_ofq_ladder", {"half_width": lambda a, b, t: t * np.subtract(a, b).std() / len(a) ** 0.5}),
    (
        "13_ofq_ladder",
        {"half_width": lambda a, b, t: t * (np.var(a, ddof=1) + np.var(b, ddof=1)) ** 0.5 / len(a) ** 0.5},
    ),
    ("13_ofq_ladder", {"block_ratio": lambda heads, ratio: heads / 2}),
    ("14_where_the_papers_meet", {"ranges": lambda b: (2**b - 1, 2 ** (b - 1))}),
    ("14_where_the_papers_meet", {"outer_share": lambda r, s: math.erfc(s * r / math.sqrt(2))}),
    ("15_shift_kernel", {"packed_bytes": lambda n, k, bits: -(-n * k * bits // 8)}),
    ("15_shift_kernel", {"zero_becomes": lambda S, exponent_bits: 0.0}),
    ("15_shift_kernel", {"zero_becomes": lambda S, exponent_bits: 2.0 ** (S - 15)}),
    ("16_deploy", {"fold": lambda s, gamma, beta, mean, var, eps: (s * gamma / (var + eps) ** 0.5, beta - mean)}),
    ("16_deploy", {"fold": lambda s, gamma, beta, mean, var, eps: (s * gamma / var**0.5, beta)}),
    ("16_deploy", {"layer_bytes": lambda n, k, bits: n * k * bits // 8 + 8 * n}),
    (
        "17_what_a_bit_costs",
        {"front": lambda points: [not any(p[0] < q[0] and p[1] > q[1] for p in points) for q in points]},
    ),
    (
        "17_what_a_bit_costs",
        {"front": lambda points: [sum(p[0] <= q[0] and p[1] >= q[1] for p in points) == 1 for q in points]},
    ),
    ("17_what_a_bit_costs", {"speedup": lambda ours, float32: np.median(float32) / np.median(ours)}),
    ("17_what_a_bit_costs", {"speedup": lambda ours, float32: np.median(np.divide(ours, float32))}),
    ("18_open_questions", {"effects": lambda a, b, c, d: (a + b - c - d, a + c - b - d, a - b - c + d)}),
    ("18_open_questions", {"effects": lambda a, b, c, d: ((a + b - c - d) / 2, (a + c - b - d) / 2, a - b + c - d)}),
    ("18_open_questions", {"partial_correlation": lambda x, y, z: np.corrcoef(x, y)[0, 1]}),
]


def run(notebook, answers):
    imported = {"np": np, "torch": torch, "F": F, "math": math, "box_iou": box_iou, "LogMel": LogMel, "get": get}
    exec(checking_cell(notebook), {**imported, "lowbit": lowbit, "metrics": metrics, **answers})


def test_every_notebook_with_exercises_is_here():
    """Or has a test file of its own, as `lowbit new notebook` writes one."""
    own = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_[0-9][0-9]_*.py")}
    assert set(RIGHT) | own == {path.stem for path in paths.notebooks().glob("[0-9][0-9]_*.ipynb")}


@pytest.mark.parametrize("notebook", RIGHT)
def test_right_answers_pass(notebook, capsys):
    run(notebook, RIGHT[notebook])
    assert capsys.readouterr().out == "both right\n"


@pytest.mark.parametrize(("notebook", "wrong"), WRONG)
def test_wrong_answers_do_not(notebook, wrong):
    with pytest.raises(AssertionError, match="not yet"):
        run(notebook, RIGHT[notebook] | wrong)


@pytest.mark.parametrize("notebook", RIGHT)
def test_missing_answers_are_asked_for(notebook, capsys):
    name = next(iter(RIGHT[notebook]))
    run(notebook, RIGHT[notebook] | {name: lambda *_: ...})
    assert "write your answers" in capsys.readouterr().out
