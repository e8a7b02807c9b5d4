"""The picture of a claim: its effects at each length of training are those that the statement would be judged by."""

import numpy as np
import pandas as pd
import pytest

from lowbit_suite import claims
from lowbit_suite.study import collected, figures


def table(budgets=((3, 5), (10, 5), (39, 4)), arms=(("LSQ", 0.0), ("StatsQ", 0.5)), name="ofq"):
    """StatsQ is better by 0.5 times log2(epochs), with a little noise that differs from seed to seed."""
    rows = [
        {
            "arm": arm,
            "bits": 2,
            "epochs": epochs,
            "steps": 781 * epochs,
            "seed": seed,
            "accuracy, %": 60 + seed + (gain * np.log2(epochs) + 0.1 * seed) * (arm == "StatsQ"),
        }
        for epochs, seeds in budgets
        for arm, gain in arms
        for seed in range(seeds)
    ]
    collected.folder().mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(collected.folder() / f"{name}.csv", index=False)


def claim(id="O2"):
    return next(one for one in claims.load() if one["id"] == id)


def test_effects_at_each_length(project):
    table()
    (item,) = [one for one in claim()["statements"] if one.get("role") == "primary"]
    frame = figures.effects(item, collected.folder())
    assert frame.steps.tolist() == [2343, 7810, 30459] and frame.n.tolist() == [5, 5, 4]
    expected = [0.5 * np.log2(epochs) + shift for epochs, shift in ((3, 0.2), (10, 0.2), (39, 0.15))]
    assert frame["mean"].tolist() == pytest.approx(expected)
    half = 2.776445 * 0.1 * np.std(range(5), ddof=1) / 5**0.5
    assert (frame["mean"] - frame.low)[0] == pytest.approx(half, rel=1e-4)


def test_a_picture_shows_every_effect_and_the_line_of_none(project):
    table()
    figure = figures.draw(claim(), collected.folder())
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2,343", "7,810", "30,459"]
    assert any(list(line.get_ydata()) == [0, 0] for line in ax.lines)  # no effect
    few = [line for line in ax.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in few] == [[30459]]
    assert "slope for each doubling: +0.5 (95 %" in figure.legends[0].get_texts()[0].get_text()


def test_two_seeds_are_shown_as_dots_and_have_no_interval(project):
    table(((3, 5), (10, 2)))
    figure = figures.draw(claim(), collected.folder())
    (ax,) = figure.axes
    dots = {line.get_xdata()[0]: list(line.get_ydata()) for line in ax.lines if line.get_marker() == "."}
    assert [len(dots[steps]) for steps in (2343, 7810)] == [5, 2]
    assert dots[7810] == pytest.approx([0.5 * np.log2(10), 0.5 * np.log2(10) + 0.1])
    (intervals,) = ax.containers[0].lines[2]
    assert [part[0, 0] for part in intervals.get_segments() if len(part)] == [2343]


def test_one_training_at_the_papers_length_is_a_star_and_changes_nothing_else(project):
    table()
    without = figures.draw(claim(), collected.folder())
    table(((300, 1),), name="ofq_anchor")
    figure = figures.draw(claim(), collected.folder())
    (ax,) = figure.axes
    (star,) = [line for line in ax.lines if line.get_marker() == "*"]
    assert star.get_xydata().tolist() == [[781 * 300, pytest.approx(0.5 * np.log2(300))]]
    said = [[text.get_text() for text in one.legends[0].get_texts()] for one in (without, figure)]
    assert said[1] == [*said[0], figures.ANCHOR]


def test_claims_without_a_row_have_no_picture(project):
    assert figures.write() == []
    table(arms=(("LSQ", 0.0),))
    assert figures.write() == []
    table()
    assert figures.write() == [figures.picture("O2")] and figures.picture("O2").stat().st_size > 5000


def test_a_notebook_shows_the_picture_with_its_text(project):
    table()
    judged = [one for one in claims.judge_all() if one.id == "O2"]
    claims.write(judged, project.results)
    (text,) = claims.outputs("O2")
    assert "by length of training" not in text.data
    figures.write()
    text, picture = claims.outputs("O2")
    assert "The study's effect by length of training: mean with 95 % interval" in text.data
    assert f"![{picture.alt}](figures/study/O2.png)" in claims.markdown(claims.judge_all())
    assert picture.data == figures.picture("O2").read_bytes()
    said = "StatsQ is more accurate than LSQ at 2 bits: +2.79 points (95 % interval +2.59 ... +3.00, 4 seeds)"
    assert picture.alt == f"Effects of O2 against training steps. {said} after 30,459 steps."
