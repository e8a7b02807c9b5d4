"""JUnit XML as continuous integration reads it: read back with a parser that is not ours, and against the schema."""

import xml.etree.ElementTree as ET

import junitparser
import pytest

from lowbit_suite.accepted.baselines import Row
from lowbit_suite.running import junit
from lowbit_suite.running.run_json import STATUSES, Entry, Metric, Run


@pytest.fixture
def run():
    result = Run("smoke", "2030-01-02T03:04:05+00:00", {"python": "3.11.2", "device": "cpu", "commit": None})
    for number, status in enumerate(STATUSES):
        reason = "" if status == "passed" else f"{status}: <b>&\x1b[31mred\x1b[0m \x00\x0b\ud800 😀\nsecond line"
        result.notebooks.append(Entry(f"{number:02}_{status}", status, reason, seconds=1.5, peak_mb=100.4))
    result.notebooks[0].metrics["accuracy"] = Metric(float("nan"), "%")
    result.notebooks[0].parameters = {"seed": 0, "name": "a\x07b"}
    return result


def test_each_notebook_is_a_test_case_with_its_outcome(run, tmp_path):
    (suite,) = junitparser.JUnitXml.fromfile(str(junit.write_run(run, tmp_path)))
    assert (suite.name, suite.timestamp) == ("lowbit run smoke", "2030-01-02T03:04:05")
    assert (suite.tests, suite.failures, suite.errors, suite.skipped, suite.time) == (7, 1, 4, 1, 10.5)
    found = {case.name: [type(result).__name__ for result in case.result] for case in suite}
    assert found == {
        "00_passed": [],
        "01_failed": ["Failure"],
        "02_timeout": ["Error"],
        "03_killed": ["Error"],
        "04_oom": ["Error"],
        "05_skipped": ["Skipped"],
        "06_not_run": ["Error"],
    }
    passed, failed, *_ = suite
    assert (failed.classname, failed.time) == ("notebooks", 1.5)
    (result,) = failed.result
    assert result.type == "failed"
    assert result.message == "failed: <b>&red \ufffd\ufffd\ufffd 😀"
    assert result.text == result.message + "\nsecond line"
    assert passed.system_out == "seed = 0\nname = 'a\\x07b'\nrecorded accuracy: nan %\nat most 100 MB"


def test_the_totals_are_those_that_a_fresh_count_gives(run, tmp_path):
    read = junitparser.JUnitXml.fromfile(str(junit.write_run(run, tmp_path)))
    before = [(part.tests, part.failures, part.errors, part.time) for part in (read, *read)]
    (suite,) = read
    skipped = suite.skipped
    read.update_statistics()
    assert before == [(part.tests, part.failures, part.errors, part.time) for part in (read, *read)]
    assert skipped == suite.skipped == 1


def test_elements_and_attributes_are_those_that_jenkins_allows(run, tmp_path):
    root = ET.parse(junit.write_run(run, tmp_path)).getroot()
    assert (root.tag, set(root.attrib)) == ("testsuites", {"tests", "failures", "errors", "time"})
    (suite,) = root
    assert set(suite.attrib) == {"name", "tests", "failures", "errors", "skipped", "time", "timestamp"}
    assert [item.tag for item in suite] == ["properties", *["testcase"] * len(STATUSES)]
    assert {item.get("name"): item.get("value") for item in suite[0]} == {"python": "3.11.2", "device": "cpu"}
    order = ["skipped", "error", "failure", "system-out"]
    for case in suite.findall("testcase"):
        tags = [item.tag for item in case]
        assert tags == sorted(tags, key=order.index)
        assert set(case.attrib) == {"classname", "name", "time"}


def test_what_was_taken_from_an_earlier_run_cost_no_time(tmp_path):
    entry = Entry("a", "passed", cached=True, why="all as before", seconds=99.0)
    (suite,) = junitparser.JUnitXml.fromfile(str(junit.write_run(Run("smoke", "2030-01-02", {}, [entry]), tmp_path)))
    (case,) = suite
    assert (suite.time, case.time, case.system_out) == (0.0, 0.0, "cached: all as before")


def test_each_compared_number_is_a_test_case(run, tmp_path):
    rows = [
        Row("00_a", "accuracy", "worse", False, "70 %", "90 ± 2 %"),
        Row("00_a", "count", "same", True, "3", "3"),
        Row("01_b", "", "missing", False, note="the run does not have it"),
    ]
    path = junit.write_check(run, rows, tmp_path)
    (suite,) = junitparser.JUnitXml.fromfile(str(path))
    assert (suite.name, suite.tests, suite.failures) == ("lowbit check smoke", 3, 2)
    worse, same, missing = suite
    assert (worse.classname, worse.name, worse.result[0].message) == (
        "00_a",
        "accuracy",
        "worse; now 70 %; accepted 90 ± 2 %",
    )
    assert same.result == []
    assert (missing.name, missing.result[0].message) == ("notebook", "missing; the run does not have it")
