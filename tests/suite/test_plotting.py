"""The course's drawings put what they are given where they say."""

import itertools
import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.formatters import DisplayFormatter
from matplotlib.colors import to_rgb

from lowbit import metrics, quantizers
from lowbit_suite import plotting


@pytest.fixture
def ax():
    plt.switch_backend("agg")
    plotting.use_style()
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_matrix_writes_every_number(ax):
    plotting.matrix(ax, torch.tensor([[1.0, -2.5], [0.25, 0.0]]))
    assert sorted(text.get_text() for text in ax.texts) == ["-2.50", "0.00", "0.25", "1.00"]


def test_an_empty_range_does_not_break_the_colors(ax):
    plotting.matrix(ax, torch.zeros(2, 2))


def test_weights_on_grid_marks_levels_shares_and_thresholds(ax):
    weight = torch.tensor([-0.5, -0.5, -0.5, 0.5])
    plotting.weights_on_grid(ax, torch.tensor([-0.4, -0.7, -0.1, 0.9]), weight)
    share = ax.figure.axes[1]
    x, y = share.lines[0].get_data()
    assert x.tolist() == [-0.5, 0.5] and y.tolist() == [75, 25]
    assert [line.get_xdata()[0] for line in ax.lines] == [0.0]


def test_trajectory_shows_only_thresholds_in_view(ax):
    plotting.trajectory(ax, [0.4, 0.6, 0.4], [0, 1, 0], [-1.5, 0.5, 7.0])
    assert [line.get_ydata()[0] for line in ax.lines[:-2]] == [0.5]


def test_number_line_has_a_row_for_each_set(ax):
    plotting.number_line(ax, {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([-1.0])})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]


def test_boxes_stand_around_their_objects_in_the_color_and_with_the_mark_of_their_class(ax):
    edges = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 3.0, 3.0]])
    plotting.boxes(ax, torch.zeros(3, 10, 20), edges, torch.tensor([2, 0]))
    assert [patch.get_bbox().extents.tolist() for patch in ax.patches] == edges.tolist()
    assert [patch.get_edgecolor()[:3] for patch in ax.patches] == [to_rgb(plotting.PARTS[k]) for k in (2, 0)]
    marks = [(line.get_marker(), *line.get_xydata()[0].tolist()) for line in ax.lines]
    assert marks == [(plotting.part(2).marker, 4, 8), (plotting.part(0).marker, 3, 3)]
    assert ax.images[0].get_extent() == [0, 20, 10, 0] and not ax.texts
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 20), (10, 0))


def test_predicted_boxes_are_dashed_and_carry_their_scores(ax):
    boxes, labels = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([1])
    plotting.boxes(ax, torch.zeros(3, 10, 20), boxes, labels, scores=torch.tensor([0.875]))
    assert [patch.get_linestyle() for patch in ax.patches] == ["--"]
    assert [text.get_text() for text in ax.texts] == ["0.88"]


def test_dots_have_a_row_a_group_from_the_top_with_mean_and_interval(ax):
    plotting.dots(ax, {"a": [1.0, 2.0, 3.0], "b": [5.0, float("nan")], "c": []}, {"b": plotting.look("lsq")})
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"] and ax.get_ylim() == (2.5, -0.5)
    means = [line for line in ax.lines if line.get_marker() in ("o", "D")]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in means] == [(2.0, 0), (5.0, 1)]
    (low, high) = ax.collections[0].get_segments()[0][:, 0]
    assert (low, high) == pytest.approx(metrics.interval([1.0, 2.0, 3.0])[1:])


def test_a_front_goes_in_steps_to_the_right_edge(ax):
    ax.set(xscale="log", xlim=(10, 1000))
    plotting.front(ax, [300, 40], [70, 60])
    x, y = ax.lines[0].get_data()
    assert list(x) == [40, 300, 1000] and list(y) == [60, 70, 70]
    assert [f"{tick:g}" for tick in ax.get_xticks()] == ["10", "20", "30", "50", "100", "200", "300", "500", "1000"]


def test_named_front_names_what_is_on_it_and_full_precision(ax):
    rows = [("lsq", 2, 60.0, 10.0, True), ("pot", 2, 50.0, 10.0, False), ("full precision", 32, 60.0, 90.0, False)]
    table = pd.DataFrame(rows, columns=["method", "bits", "mean", "kB", "on"])
    plotting.named_front(ax, table, "kB", "on")
    assert [text.get_text().strip() for text in ax.texts] == ["lsq 2", "full precision"]
    assert {line.get_marker() for line in ax.lines} >= {"D", "*"} and "v" not in {
        line.get_marker() for line in ax.lines
    }


def test_save_goes_to_the_runs_folder(ax, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CONTEXT", json.dumps({"figures": str(tmp_path / "figures")}))
    assert plotting.save(ax.figure, "name") is None, "a notebook would show it as the cell's output"
    assert (tmp_path / "figures" / "name.png").read_bytes().startswith(b"\x89PNG")


def test_alt_text_is_in_the_file(ax, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CONTEXT", json.dumps({"figures": str(tmp_path)}))
    plotting.save(ax.figure, "name", alt="Accuracy in % against bits: α rises, β falls.")
    assert plotting.alt_text(tmp_path / "name.png") == "Accuracy in % against bits: α rises, β falls."
    plotting.save(ax.figure, "plain")
    assert plotting.alt_text(tmp_path / "plain.png") is None


def test_alt_text_goes_with_the_output_of_a_notebook(ax, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CONTEXT", json.dumps({"figures": str(tmp_path)}))
    shown = []
    monkeypatch.setattr(plotting, "get_ipython", lambda: "a notebook")
    monkeypatch.setattr(plotting, "display", shown.append)
    plotting.save(ax.figure, "plain")
    assert not shown and plt.fignum_exists(ax.figure.number)
    plotting.save(ax.figure, "name", alt="A < B.")
    data, metadata = DisplayFormatter().format(shown[0])
    assert data["image/png"] and metadata["image/png"]["alt"] == "A < B."
    assert not plt.fignum_exists(ax.figure.number), "plt.show() would show it a second time"


def test_a_recorded_figure_has_its_facts_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOWBIT_RESULTS", str(tmp_path))
    shown = []
    monkeypatch.setattr(plotting, "display", lambda *given: shown.extend(given))
    plotting.recorded("desk", "02_figure", "02_table")
    assert not shown and capsys.readouterr().out.count("\n") == 1
    (tmp_path / "figures" / "desk").mkdir(parents=True)
    (tmp_path / "tables" / "desk").mkdir(parents=True)
    figure, _ = plt.subplots()
    figure.savefig(tmp_path / "figures" / "desk" / "02_figure.png")
    plt.close(figure)
    settings = {"profile": "desk", "dataset": "digits", "model_name": "resnet8", "epochs": 7, "seeds": [0, 1]}
    about = {"settings": settings, "command": "lowbit run 02"}
    (tmp_path / "tables" / "desk" / "02_table.json").write_text(json.dumps(about))
    rows = 'method,epoch,"accuracy, %"\nfull precision,1,9\nfull precision,7,61\nfull precision,7,62\nlsq,7,10\n'
    (tmp_path / "tables" / "desk" / "02_table.csv").write_text(rows)
    plotting.recorded("desk", "02_figure", "02_table")
    facts = "digits, resnet8, 7 epochs, 2 seeds, full-precision twin 61.5 % (accuracy)"
    assert shown[1].data == f"*Recorded at desk size: {facts}. Command: lowbit run 02*"
    assert shown[0].alt == shown[1].data.strip("*")


def test_seaborn_draws_the_interval_that_is_judged(ax):
    values = [1.0, 2.0, 4.0, 8.0, 9.0]
    sns.pointplot(pd.DataFrame({"x": "a", "y": values}), x="x", y="y", errorbar=plotting.interval, ax=ax)
    drawn = sorted({y for line in ax.lines for y in line.get_ydata() if math.isfinite(y)})
    assert np.allclose(drawn, sorted(metrics.interval(values)))


def test_one_seed_has_no_interval(ax):
    sns.pointplot(pd.DataFrame({"x": ["a"], "y": [1.0]}), x="x", y="y", errorbar=plotting.interval, ax=ax)
    assert {y for line in ax.lines for y in line.get_ydata() if math.isfinite(y)} == {1.0}


def test_the_text_of_trials_counts_the_arms_that_chose_each_rate():
    rows = [("a", 2, 1.0, 70.0, True), ("b", 2, 1.0, 50.0, True), ("a", 3, 0.3, 60.0, True), ("b", 3, 1.0, 40.0, True)]
    twice = pd.DataFrame([*rows, *rows], columns=["method", "bits", "lr_factor", "mAP, %", "chosen"])  # two seeds each
    twice.loc[len(twice)] = ["b", 3, 0.3, float("nan"), False]
    text = plotting.describe_trials(twice, "method", "bits", "mAP, %").removeprefix(plotting.LEARNING_RATES)
    results = "Results lie between 40.0 and 70.0 (mAP, %)."
    assert text == f" {results} Chosen multiples of the default rate: 0.3 (1 arm), 1 (3 arms)."


@pytest.mark.parametrize("panel", [None, "bits"])
def test_learning_rates_ring_what_was_chosen(panel):
    rows = [
        ("a", 2, 0.3, 60.0, False),
        ("a", 2, 1.0, 70.0, True),
        ("b", 3, 0.3, 50.0, True),
        ("b", 3, 1.0, float("nan"), False),
    ]
    rates = pd.DataFrame(rows, columns=["method", "bits", "lr_factor", "accuracy, %", "chosen"])
    figure = plotting.learning_rates(rates, "method", panel)
    rings = [
        xy
        for ax in figure.axes
        for line in ax.lines
        if line.get_markersize() == 13
        for xy in line.get_xydata().tolist()
    ]
    assert rings == [[1.0, 70.0], [0.3, 50.0]]
    assert len(figure.axes) == (2 if panel else 1)
    plt.close(figure)


def test_trials_are_shown_with_their_text_or_said_to_be_none(monkeypatch, capsys):
    saved, shown = [], []
    monkeypatch.setattr(plotting, "save", lambda figure, name, alt: saved.append((name, alt)))
    monkeypatch.setattr(plotting, "display", shown.append)
    rows = [("a", 0.3, 60.0, False), ("a", 1.0, 70.0, True)]
    rates = pd.DataFrame(rows, columns=["method", "lr_factor", "accuracy, %", "chosen"])
    plotting.show_trials(rates[1:], "02_learning_rates", "method")
    assert (saved, shown) == ([], []) and "every arm trains at 1 of its own rate" in capsys.readouterr().out
    plotting.show_trials(rates, "02_learning_rates", "method")
    text = f"{plotting.LEARNING_RATES} Results lie between 60.0 and 70.0 (accuracy, %). "
    assert saved == [("02_learning_rates", text + "Chosen multiples of the default rate: 1 (1 arm).")]
    assert shown[0]["lr_factor"].tolist() == [1.0]
    plt.close("all")


def test_methods_at_each_width_stand_in_the_same_row_in_every_panel():
    rows = [("full precision", 32, 70), ("binary", 1, 50), ("lsq", 2, 60), ("lsq", 3, 66), ("pot", 3, 40)]
    table = pd.DataFrame(rows, columns=["method", "bits", "mean"]).assign(low=lambda t: t["mean"] - 1, high=71)
    figure = plotting.methods_at_each_width(table, hollow=[("lsq", 3)])
    two, three = figure.axes
    assert [label.get_text() for label in two.get_yticklabels()] == ["pot", "binary", "lsq"]
    points = [
        [(*line.get_xydata()[0], line.get_fillstyle()) for line in ax.lines if line.get_markersize() == 9]
        for ax in (two, three)
    ]
    assert points == [[(50, 1, "full"), (60, 2, "full")], [(66, 2, "none"), (40, 0, "full")]]
    plt.close(figure)


@pytest.mark.parametrize("arms", [2, 11, 14])
def test_learning_rates_can_be_told_apart(arms):
    rows = [(f"method {i}", x, 50.0 + i, x == 1) for i in range(arms) for x in (0.3, 1.0)]
    figure = plotting.learning_rates(
        pd.DataFrame(rows, columns=["method", "lr_factor", "accuracy, %", "chosen"]), "method"
    )
    (ax,), (legend,) = figure.axes, figure.legends
    looks = {(line.get_color(), line.is_dashed()) for line in ax.lines if line.get_markersize() != 13}
    assert len(looks) == arms
    box = legend.get_window_extent(figure.canvas.get_renderer())
    assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    plt.close(figure)


def test_apart_worked_by_hand():
    """Two in one place go half the distance each; a third that is near is pushed along, one that is far stays."""
    assert plotting.apart([5.0, 5.0], 2).tolist() == [4, 6]
    assert plotting.apart([9.0, 0.0, 0.0, 1.0], 1).tolist() == pytest.approx([9, -2 / 3, 1 / 3, 4 / 3])


@given(st.lists(st.integers(-50, 50), max_size=20), st.integers(0, 9))
def test_apart_keeps_order_distance_and_what_is_apart_already(values, least):
    placed = plotting.apart(values, least)
    order = np.argsort(values, kind="stable")
    assert (np.diff(placed[order]) >= least - 1e-9).all()
    assert sum(placed) == pytest.approx(sum(values), abs=1e-6)
    assert plotting.apart(placed, least) == pytest.approx(placed, abs=1e-6)


# Linear RGB as people with protanopia, deuteranopia and tritanopia see it (Machado, Oliveira and Fernandes 2009).
VISION = {
    "full": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(color):
    c = np.array(to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast_with_white(color):
    """WCAG 2.1, section 1.4.11 asks for 3 where a line carries meaning."""
    return 1.05 / (linear(color) @ [0.2126, 0.7152, 0.0722] + 0.05)


def lab(light):
    """CIE 1976 L*a*b* of linear RGB, white point D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(light, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_contrast_worked_by_hand():
    assert contrast_with_white("black") == pytest.approx(21) and contrast_with_white("white") == pytest.approx(1)


SHADES = [look for count in (1, 4, 12) for look in plotting.looks(range(1, count + 1)).values()]


@pytest.mark.parametrize("color", sorted({*plotting.PARTS, *(look.color for look in plotting.METHODS.values())}))
def test_each_color_stands_out_from_white(color):
    assert contrast_with_white(color) >= 3


def test_shades_stand_out_from_white():
    assert min(contrast_with_white(look.color) for look in SHADES) >= 3


@pytest.mark.parametrize("vision", VISION)
def test_the_methods_colors_differ_with_any_color_vision(vision):
    seen = {color: lab(VISION[vision] @ linear(color)) for color in {look.color for look in plotting.METHODS.values()}}
    for one, two in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[two]) >= 12, f"{one} and {two} look alike"


def test_every_method_has_a_look_of_its_own_without_color():
    assert set(quantizers.names()) <= set(plotting.METHODS)
    grids = ("mid-rise", "mid-tread")  # drawn with none of the methods whose looks they share
    markers = [look.marker for name, look in plotting.METHODS.items() if name not in grids]
    assert len(markers) == len(set(markers))
    unlike = list(plotting.looks(range(1, 13)).values())
    assert len({(look.marker, look.dashes) for look in unlike}) == 12


def test_every_part_has_a_mark_of_its_own_without_color():
    assert len({plotting.part(index).marker for index in range(len(plotting.PARTS))}) == len(plotting.PARTS)


@pytest.mark.parametrize("name", ["s3", "S3", "S3, 2 bits", "s3 2 bits", "S3 {-1, 0, 1}"])
def test_a_method_is_found_by_each_of_its_names(name):
    assert plotting.look(name) == plotting.METHODS["s3"]


def test_names_that_are_no_methods():
    with pytest.raises(KeyError, match="no look for 'kmeans'"):
        plotting.look("kmeans")
    looks = plotting.looks([32, 4, "lsq", 2])
    assert list(looks) == [32, 4, "lsq", 2]
    assert looks[32] == plotting.METHODS["full precision"] and looks["lsq"] == plotting.METHODS["lsq"]
    assert looks[4] != looks[2] and not {looks[4].color, looks[2].color} & {
        look.color for look in plotting.METHODS.values()
    }


def test_a_table_leaves_out_empty_columns_and_has_a_dash_in_an_empty_cell():
    frame = pd.DataFrame({"arm": ["a", "b"], "mean": [1.236, np.nan], "low": np.nan, "seeds": [1, 2]})
    shown = plotting.table(frame)
    assert shown.values.tolist() == [["a", 1.24, 1], ["b", "–", 2]]
    assert "nan" not in (shown.to_html() + str(shown)).lower()
    assert frame["mean"].iloc[0] == 1.236 and "low" in frame, "the recorded table stays as it is"
