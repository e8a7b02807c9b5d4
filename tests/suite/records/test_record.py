import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from lowbit.errors import LowbitError
from lowbit_suite.records.record import Skipped, complain, decode, record, skip


@pytest.fixture
def lines(tmp_path, monkeypatch):
    path = tmp_path / "record.jsonl"
    monkeypatch.setenv("LOWBIT_CONTEXT", json.dumps({"records": str(path)}))
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3), (0.25, 0.25), (True, 1), (np.float32(0.5), 0.5), (np.array([7]), 7), (torch.tensor(1.5), 1.5)],
)
def test_one_number_of_any_kind_is_written_and_returned(lines, capsys, value, number):
    assert record("a/b-c.d_1", value, unit="%", better="higher") is value
    assert lines() == [{"name": "a/b-c.d_1", "value": number, "unit": "%", "better": "higher"}]
    assert capsys.readouterr().out == f"a/b-c.d_1 = {number} %\n"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_survive_strict_json(lines, value):
    record("x", value)
    written = lines()[0]["value"]
    assert isinstance(written, str)
    assert repr(decode(written)) == repr(value)


@pytest.mark.parametrize("value", ["0.5", None, 1j, [1], np.zeros(2), torch.zeros(0), {}])
def test_what_is_not_one_number_is_refused(lines, value):
    with pytest.raises(LowbitError, match="needs one number"):
        record("x", value)


@pytest.mark.parametrize("name", ["", "1a", "a b", "a/", "a//b", "é", "a" * 101, 3])
def test_bad_names_are_refused(name):
    with pytest.raises(LowbitError, match="is not a valid name"):
        record(name, 1)


def test_unknown_direction_is_refused():
    with pytest.raises(LowbitError, match=r"'lowest'.*'higher', 'lower', 'equal'"):
        record("x", 1, better="lowest")


def test_nothing_is_written_outside_a_run(tmp_path, monkeypatch):
    monkeypatch.delenv("LOWBIT_CONTEXT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert record("x", 2) == 2
    assert list(tmp_path.iterdir()) == []


def test_importing_it_is_light():
    code = (
        "import sys, lowbit_suite.records.record; print({'torch', 'papermill', 'pandas', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_complaint_is_a_line_of_its_own_and_a_skip_ends_the_cell(lines):
    complain("a thread died")
    with pytest.raises(Skipped, match="no data"):
        skip("no data")
    assert lines() == [{"complaint": "a thread died"}]
