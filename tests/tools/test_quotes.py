"""Numbers in prose and the records that they are bound to."""

import json
import re

import pytest

from lowbit import paths
from lowbit.errors import LowbitError
from lowbit_suite import claims
from tools import quotes

PROSE = [paths.project() / "README.md", paths.project() / "CONTRIBUTING.md"]
UNIT = r"(?:%|‰|×|x\b|[mµnu]?s\b|sec|min(?:ute)?s?\b|[KMG]i?B\b|times\b|percent|points?\b|fold\b|faster|slower|smaller)"
MEASURED = re.compile(rf"(?<![\w.])[-−+]?(?:\d[\d.,]*\s?\\?{UNIT}|\d+[.,]\d+)", re.IGNORECASE)
NOT_MEASURED = {
    "Python 3.11",
    "waits 60 s",
    "some 5 GB",
    "at most 2 MiB",
    "torch.compile 2.11",
    "under torch.compile 2.11",
}
"""Versions, sizes of downloads, limits."""


def unbound(text):
    """Numbers with a unit or a decimal point that no comment binds; links, code and what is known are left out."""
    for known in NOT_MEASURED:
        text = text.replace(known, "")
    text = re.sub(r"[-−+]?\d[\d.,]*<!--=.*?-->", "", text, flags=re.DOTALL)
    text = quotes.VERDICTS.sub("", text)
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv \d{4}\.\d{5}", " ", text, flags=re.DOTALL)
    return MEASURED.findall(text)


@pytest.fixture
def results(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"engine": "x, y", "ratio": 1.256}, {"engine": "z", "ratio": 2}]))
    (tmp_path / "b.csv").write_text("method,seed,accuracy\nlsq,0,90.0\nlsq,1,91.0\npot,0,80.0\n")
    return tmp_path


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_every_quoted_number_is_as_recorded(path):
    found = quotes.find(path.read_text())
    assert [quote for quote in found if quote.shown != quote.recorded] == []


def test_the_readme_quotes_measurements():
    assert len(quotes.find(PROSE[0].read_text())) >= 5


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_no_measured_number_is_without_a_record(path):
    assert unbound(path.read_text()) == []


@pytest.mark.parametrize("smuggled", [
    "reaches 91 %", "reaches 91.3", "91,3 points", "takes 5 ms", "3× faster", "12 MB", "2 times", "$91\\%$", "in 40 s",
    "| LSQ | 0.913 |",
])  # fmt: skip
def test_an_unbound_number_is_noticed(smuggled):
    assert unbound(f"The network {smuggled} here.")


def test_a_changed_digit_is_noticed_and_mended(results):
    text = (
        "1.26<!--= a.json; engine=x, y; ratio; .2f --> times\n90.5<!--= b.csv;\n method=lsq; mean accuracy; .1f --> %"
    )
    assert all(quote.shown == quote.recorded for quote in quotes.find(text, results))
    wrong = text.replace("1.26", "1.25").replace("90.5", "90.6")
    assert [(q.shown, q.recorded) for q in quotes.find(wrong, results)] == [("1.25", "1.26"), ("90.6", "90.5")]
    assert quotes.refresh(wrong, results) == text
    (results / "a.json").write_text(json.dumps([{"engine": "x, y", "ratio": 1.5}]))
    assert quotes.find(text, results)[0].recorded == "1.50"


def claim(profile, verdict, *statements, **more):
    return claims.Claim(
        "D1", "zero is no use", "A", verdict, profile, None, "", None, "", "", 5, [], "", {}, list(statements), **more
    )


def test_the_table_of_verdicts_follows_the_claims(tmp_path):
    fails = claims.Statement("it holds", "not reproduced", -1.0, (-2.0, 0.0), "points", 5, role="primary")
    aside = claims.Statement("so does that", "reproduced")
    to = claims.Statement("it holds", "look", direction="points to the claim")
    written = [
        claim("study", "not reproduced", fails, aside, corrected="inconclusive"),
        claim("desk", "look", to, look=True, direction="points to the claim"),
    ]
    claims.write(written, tmp_path)
    text = "Before\n<!-- verdicts -->\nold\n<!-- /verdicts -->\nafter\n"
    table = "| | claim | at `study` | effect | looks |\n|---|---|---|---|---|\n"
    table += "| D1 | zero is no use | not reproduced† (0 of 1) | -1.0 points (95 % interval -2.0 ... +0.0, 5 seeds) "
    table += "| `desk`: points to the claim (1 to the claim) |\n"
    assert [(q.shown, q.recorded) for q in quotes.find(text, tmp_path)] == [("old\n", table)]
    assert quotes.refresh(text, tmp_path) == text.replace("old\n", table)
    claims.write([claim("study", "not tested", fails), claim("desk", "reproduced", aside)][:1], tmp_path)
    assert "| not tested | -1.0 points" in quotes.verdicts(tmp_path)
    claims.write([claim("desk", "reproduced", aside, fails)], tmp_path)
    assert "| **reproduced** (0 of 1), at `desk` |" in quotes.verdicts(tmp_path)


def test_the_readme_has_a_verdict_for_every_claim():
    (table,) = (quote.shown for quote in quotes.find(PROSE[0].read_text()) if quote.binding == "verdicts")
    assert re.findall(r"^\| ([A-Z]\d) ", table, re.MULTILINE) == [claim["id"] for claim in claims.load()]
    assert "no evidence" not in table


def passed_on_the_untested(text, judged):
    """The lines of README or claims.md that pass a verdict on a claim, or on a statement, whose conditions fail."""
    claims_, says = [], []
    for claim in judged:
        claims_ += [f"| {claim.id} |"] * any(one.unmet for one in claim.primary)
        says += [one.says for one in claim.statements if one.unmet]
    about = [
        line for line in text.splitlines() if line.startswith(tuple(claims_)) or any(words in line for words in says)
    ]
    return [line for line in about if re.search(r"(not |\*)reproduced", line)]


def test_nothing_is_said_to_be_refuted_by_networks_that_have_not_learned():
    judged = list(claims.judged(claims.read(paths.results())).values())
    for path in (PROSE[0], paths.results() / "claims.md"):
        text = path.read_text()
        assert passed_on_the_untested(text, judged) == []
        wrong = text.replace("not tested", "not reproduced")
        assert passed_on_the_untested(wrong, judged) or not any(one.unmet for c in judged for one in c.primary)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("a.json", "has to be 'FILE"),
        ("none.json; engine=z; ratio; .2f", "has to be 'FILE"),
        ("a.json; engine=w; ratio; .2f", "fits 0 rows"),
        ("a.json; ratio; .2f", "fits 2 rows"),
        ("a.json; engine=z; speed; .2f", "whose columns are engine, ratio"),
        ("a.json; engine=z; ratio; .2q", "Unknown format"),
        ("a.json; engine=z; engine; .2f", "mean"),
    ],
)
def test_a_broken_binding_is_refused(results, binding, message):
    with pytest.raises(LowbitError, match=message):
        quotes.find(f"1<!--= {binding} -->", results)
