"""Runs and comparisons as JUnit XML, which GitHub, GitLab, Jenkins and others show beside a commit.

The files are always written beside run.json: ``junit.xml`` by ``lowbit run``, one test case per notebook, and
``junit-check.xml`` by ``lowbit check``, one per number. Elements and attributes are those of Jenkins' strict schema,
with the properties first, as Ant's schema wants. The standard library writes them: junitparser puts properties last
and more attributes on the root. Neither removes characters that XML forbids, so `clean` does.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from lowbit.files import write_text
from lowbit_suite.accepted.baselines import Row
from lowbit_suite.records.record import show
from lowbit_suite.running.run_json import Entry, Run

RUN = "junit.xml"
CHECK = "junit-check.xml"

OUTCOMES = {
    "failed": "failure",
    "timeout": "error",
    "killed": "error",
    "oom": "error",
    "not_run": "error",  # not "skipped", which would make a run that was stopped early look green
    "skipped": "skipped",
}
"""The element for a notebook that did not pass: a failure if it was found wrong, an error otherwise."""

ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_run(run: Run, folder: Path) -> Path:
    """Write ``folder/junit.xml``, one test case per notebook."""
    suite = _suite(f"lowbit run {run.profile}", run)
    for entry in run.notebooks:
        case = _case(suite, "notebooks", entry.name, 0.0 if entry.cached else entry.seconds)
        if tag := OUTCOMES.get(entry.status):
            _verdict(case, tag, entry.status, entry.reason)
        ET.SubElement(case, "system-out").text = clean("\n".join(_facts(entry)))
    return _write(suite, folder / RUN)


def write_check(run: Run, rows: Sequence[Row], folder: Path) -> Path:
    """Write ``folder/junit-check.xml``, one test case for each row of `baselines.compare`."""
    suite = _suite(f"lowbit check {run.profile}", run)
    for row in rows:
        case = _case(suite, row.notebook, row.metric or "notebook", 0.0)
        if not row.ok:
            now, accepted = (
                f"{what} {value}" if value else "" for what, value in (("now", row.now), ("accepted", row.accepted))
            )
            _verdict(case, "failure", row.verdict, "; ".join(filter(None, (row.verdict, now, accepted, row.note))))
    return _write(suite, folder / CHECK)


def clean(text: str) -> str:
    """``text`` without color codes, and with U+FFFD for characters that XML forbids (control codes, surrogates)."""
    return FORBIDDEN.sub("\ufffd", ANSI.sub("", text))


def _suite(name: str, run: Run) -> ET.Element:
    suite = ET.Element("testsuite", name=name, timestamp=run.started[:19])  # the schema knows no time zone
    properties = ET.SubElement(suite, "properties")
    for key in ("commit", "python", "torch", "device", "cpu"):
        if value := run.environment.get(key):
            ET.SubElement(properties, "property", name=key, value=clean(str(value)))
    return suite


def _case(suite: ET.Element, group: str, name: str, seconds: float) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=clean(group), name=clean(name), time=f"{seconds:.3f}")


def _verdict(case: ET.Element, tag: str, kind: str, text: str) -> None:
    """Add a verdict: the first line as its message, which lists of failures show, the full text as its body."""
    text = clean(text)
    first = text.partition("\n")[0]
    ET.SubElement(case, tag, {"message": first} if tag == "skipped" else {"type": kind, "message": first}).text = text


def _facts(entry: Entry) -> list[str]:
    lines = [f"{name} = {value!r}" for name, value in entry.parameters.items()]
    lines += [f"recorded {key}: {show(metric.value)} {metric.unit}".rstrip() for key, metric in entry.metrics.items()]
    return [*lines, f"cached: {entry.why}" if entry.cached else f"at most {entry.peak_mb:.0f} MB"]


def _write(suite: ET.Element, path: Path) -> Path:
    cases = suite.findall("testcase")
    count = {tag: str(len(suite.findall(f"testcase/{tag}"))) for tag in ("failure", "error", "skipped")}
    totals = {"tests": str(len(cases)), "failures": count["failure"], "errors": count["error"]}
    totals["time"] = f"{sum(float(case.get('time', '0')) for case in cases):.3f}"
    suite.attrib.update(totals, skipped=count["skipped"])
    root = ET.Element("testsuites", totals)
    root.append(suite)
    ET.indent(root)
    write_text(path, '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n")
    return path
