"""report.html: what the page says of a run, read back from its HTML."""

import json
import re
import subprocess
import sys

import pytest
from bs4 import BeautifulSoup

from lowbit_suite import report
from lowbit_suite.accepted import baselines
from lowbit_suite.accepted.baselines import Accepted, AcceptedNotebook, Baseline
from lowbit_suite.running.run_json import Entry, Metric, Run

CLAIM = {
    "id": "X1",
    "claim": "<i>less</i> is more",
    "paper": "ours",
    "verdict": "not tested",
    "profile": "study",
    "effect": 1.0,
    "unit": "points",
    "interval": [0.5, 1.5],
    "method": "m",
    "dataset": "digits",
    "seeds": 5,
    "runs": ["results/tables/study/t.csv"],
    "command": "lowbit study run",
    "look": False,
    "statements": [
        {"says": "a beats b", "verdict": "reproduced", "effect": 1.0, "interval": [0.5, 1.5], "unit": "%", "seeds": 5},
        {"says": "a beats c", "verdict": "not tested", "note": "the twin reaches 40 %", "role": "primary"},
    ],
}
OLD = json.dumps([{key: value for key, value in CLAIM.items() if key != "look"} | {"verdict": "not reproduced"}])
"""From before there were looks: what it calls a verdict may be of short trainings."""
LOOK = CLAIM | {
    "verdict": "look",
    "profile": "desk",
    "look": True,
    "direction": "points against it",
    "runs": ["results/tables/desk/00_t.csv", "results/tables/desk/gone.csv"],
    "command": "lowbit run 00_a --profile desk",
    "statements": [
        {
            "says": "a beats d",
            "verdict": "look",
            "direction": "points against it",
            "effect": -1.0,
            "interval": [-2, 0],
            "seeds": 5,
        }
    ],
}


@pytest.fixture
def page(project):
    """A function that writes the report of some entries and reads it back."""

    def write(*entries, folder=None):
        folder = folder or project.results / "runs" / "smoke"
        run = Run("smoke", "2030-01-02T03:04:05+00:00", {"device": "cpu"}, list(entries))
        return BeautifulSoup(report.write(run, folder).read_text(), "html.parser")

    return write


@pytest.fixture
def accepted(project):
    """A baseline for 00_a: a number known to within 2, and one that has to be exact."""
    metrics = {"score": Accepted(90.0, 2.0, "%", "higher", "m"), "count": Accepted(3, 0.0, "", "equal", "m")}
    baselines.save(Baseline("smoke", "cpu", "2030-01-01", {}, {"00_a": AcceptedNotebook({}, metrics)}))


def entry(score, **fields):
    metrics = {"count": Metric(3), "score": Metric(score, "%", "higher")}
    return Entry("00_a", "passed", metrics=metrics, **fields)


def words(tag):
    return " ".join(tag.get_text(" ").split())


def test_everything_is_inside_the_page(page, project):
    figures = project.results / "runs" / "smoke" / "figures" / "00_a"
    figures.mkdir(parents=True)
    (figures / "dot.png").write_bytes(b"dot")
    found = page(entry(90.0))
    assert [image["src"] for image in found.find_all("img")] == ["data:image/png;base64,ZG90"]
    assert found.find("img").parent["href"] == "figures/00_a/dot.png"  # to look at it in full size
    assert not found.find_all(["script", "link", "iframe"])
    assert "url(" not in found.find("style").text and "@import" not in found.find("style").text
    assert found.find("meta", attrs={"name": "viewport"})


def test_internal_links_lead_somewhere(page, project):
    (project.results / "claims.json").parent.mkdir(exist_ok=True)
    (project.results / "claims.json").write_text(json.dumps([CLAIM]))
    found = page(entry(90.0, seconds=3.0), Entry("01_b c", "failed", "boom", seconds=1.0))
    targets = [link["href"][1:] for link in found.find_all("a") if link["href"].startswith("#")]
    ids = {tag["id"] for tag in found.find_all(id=True)}
    assert {"00_a", "01_b%20c", "costs", "claims", "machine"} <= set(targets)
    assert {target.replace("%20", " ") for target in targets} <= ids


def test_slowest_and_largest_come_with_bars(page):
    found = page(
        Entry("00_a", "passed", seconds=10.0, peak_mb=400.0, why="the parameters changed"),
        Entry("01_b", "passed", seconds=40.0, peak_mb=100.0, cached=True, why="all as before"),
        Entry("02_c", "skipped", "no GPU"),
    )
    rows = found.find(id="costs").find("tbody").find_all("tr")
    assert [words(row) for row in rows] == [
        "01_b 0:40 (earlier) 100 MB kept: all as before",
        "00_a 0:10 400 MB ran again: the parameters changed",
    ]
    widths = [[re.fullmatch("width: (.*)%", bar["style"])[1] for bar in row.select(".bar")] for row in rows]
    assert widths == [["100.0", "25.0"], ["25.0", "100.0"]]


def test_nothing_ran_so_there_are_no_bars(page):
    found = page(Entry("02_c", "skipped", "no GPU"))
    assert found.find(id="costs") is None
    assert "0 of 1 notebooks passed; 1 skipped" in words(found.find("h1"))


def test_what_differs_is_said_at_the_top_in_the_grid_and_first_in_the_table(page, accepted):
    found = page(entry(80.0))
    assert "1 difference from the accepted numbers" in words(found.find("header"))
    assert "≠ 1 differs" in words(found.select_one(".grid"))
    numbers = found.select_one("details.numbers")
    assert numbers.has_attr("open")
    assert words(numbers.summary) == "2 numbers: 1 worse, 1 same"
    first, second = (words(row) for row in numbers.find("tbody").find_all("tr"))
    assert (first, second) == ("score higher is better 80 % 90 ± 2 % ✘ worse", "count 3 3 ✔ same")


def test_numbers_are_drawn_beside_their_interval(page, accepted):
    (drawing,) = page(entry(91.0)).find_all("svg")  # the exact number has no interval
    band, marker = drawing.find("rect"), drawing.find_all("line")[-1]
    low, high = float(band["x"]), float(band["x"]) + float(band["width"])
    assert low == pytest.approx(100 - high, abs=0.02)  # around the middle, which is 90
    assert (float(marker["x1"]) - 50) / (high - 50) == pytest.approx(0.5, abs=0.01)  # 1 of 2
    assert drawing["aria-label"] == "same: now 91, accepted 90 ± 2 %"
    (outside,) = page(entry(60.0)).find_all("svg")
    assert 0 <= float(outside.find_all("line")[-1]["x1"]) < float(outside.find("rect")["x"])


def test_agreement_is_said_too_and_for_what(page, accepted):
    assert "All 2 numbers agree with those accepted 2030-01-01." in words(page(entry(90.0)).find("header"))
    head = words(page(entry(90.0), Entry("01_b", "failed", "boom")).find("header"))
    assert "All 2 numbers of the notebooks that passed agree" in head


def test_a_number_that_is_none_is_not_drawn(page, accepted):
    found = page(entry(float("nan")))
    assert not found.find_all("svg")
    assert "✘ not a number" in words(found.find("article"))


def test_claims_come_with_verdict_interval_looks_and_evidence(page, project):
    table = project.results / "tables" / "desk" / "00_t.csv"
    table.parent.mkdir(parents=True)
    table.write_text("seed\n")
    (project.results / "claims.json").write_text(json.dumps([CLAIM, LOOK]))
    (project.results / "claims.md").write_text("# claims")
    claims = page(entry(90.0)).find(id="claims")
    (shown,) = [words(claim) for claim in claims.select("details.claim")]
    assert (
        "X1 <i>less</i> is more ours; At study: 1 reproduced, 1 not tested; A look at desk: points against it" in shown
    )
    assert "○ not tested At study" in shown
    assert "a beats b +1.00 % (95 % interval +0.50 ... +1.50, 5 seeds) ✔ reproduced" in shown
    assert "a beats c the twin reaches 40 % ○ not tested" in shown
    assert "a beats d -1.0 (95 % interval -2.0 ... +0.0, 5 seeds) ○ points against it" in shown
    assert "Again: lowbit study run Again: lowbit run 00_a --profile desk" in shown
    links = {words(link): link["href"] for link in claims.find_all("a")}
    assert links == {"all of it as text": "../../claims.md", "00_t.csv": "../../tables/desk/00_t.csv", "00_a": "#00_a"}


def test_a_page_outside_the_project_has_no_links_out_of_its_folder(page, project, tmp_path_factory):
    (project.results / "tables" / "desk").mkdir(parents=True)
    (project.results / "tables" / "desk" / "00_t.csv").touch()
    (project.results / "claims.json").write_text(json.dumps([CLAIM]))
    found = page(entry(90.0), folder=tmp_path_factory.mktemp("elsewhere"))
    assert found.find(id="claims") and not [link for link in found.find_all("a") if ".." in link["href"]]


@pytest.mark.parametrize("text", ["{", '[{"id": "X1"}]', "[1]", "null", json.dumps([CLAIM | {"verdict": "true"}]), OLD])
def test_broken_claims_are_told_and_break_nothing(page, project, text):
    project.results.mkdir()
    (project.results / "claims.json").write_text(text)
    found = page(entry(90.0))
    assert "claims.json was not written by this version" in words(found.find(id="claims"))
    assert "✔ passed" in words(found.find("article"))


def test_without_claims_the_page_does_not_mention_them(page):
    found = page(entry(90.0))
    assert found.find(id="claims") is None and "#claims" not in str(found)


def test_nbformat_is_loaded_without_the_grammars_it_does_not_need():
    code = "from lowbit_suite import skip_grammars; skip_grammars(); import sys, nbconvert, papermill, nbformat; "
    code += "nbformat.validate(nbformat.v4.new_notebook()); print('lark' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
