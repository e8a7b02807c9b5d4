"""Published anchors: the project's file, what it refuses, and the lines for people."""

from pathlib import Path

import pytest
import yaml

from lowbit.errors import LowbitError
from lowbit_suite import claims
from lowbit_suite.claims import anchors

PROJECT = Path(__file__).parents[3] / "notebooks" / anchors.FILE

ENTRY = {
    "id": "made-2",
    "claims": ["D5"],
    "method": "made",
    "network": "ResNet-20",
    "data": "CIFAR-10",
    "bits": "W2A2",
    "value": 90.5,
    "unit": "% top-1",
    "full_precision": 92.25,
    "recipe": "200 epochs",
    "source": "A. Author, Table 1",
    "checked": True,
    "note": "read in the README",
}
UNCHECKED = ENTRY | {
    "id": "unseen",
    "value": None,
    "unit": None,
    "full_precision": None,
    "checked": False,
    "note": "could not be read",
}
FINDING = ENTRY | {
    "id": "found",
    "bits": None,
    "value": None,
    "unit": None,
    "full_precision": None,
    "finding": "It moves.",
}


def written(folder, *entries):
    path = folder / anchors.FILE
    path.write_text(yaml.safe_dump(list(entries)))
    return path


@pytest.fixture(scope="module")
def project():
    return anchors.load(PROJECT)


def test_the_projects_anchors_belong_to_claims_that_exist(project):
    known = set(claims_by_id())
    assert {id for anchor in project for id in anchor.claims} <= known


def claims_by_id():
    tree = yaml.safe_load((PROJECT.parent / claims.FILE).read_text(encoding="utf-8"))
    return [claim["id"] for claim in tree["claims"]]


def test_every_number_was_read_in_a_source_that_it_names(project):
    numbers = [anchor for anchor in project if anchor.value is not None]
    assert len(numbers) > 20
    assert all(anchor.checked and anchor.source and anchor.note for anchor in numbers)
    shares = [anchor for anchor in numbers if anchor.unit == "% top-1"]
    assert all(50 < anchor.value < 100 for anchor in shares)


def test_no_entry_repeats_another(project):
    seen = [(one.method, one.network, one.data, one.bits, one.unit, one.recipe, one.source) for one in project]
    assert len(set(seen)) == len(seen)


def test_lines_of_the_file_are_short_enough():
    assert max(map(len, PROJECT.read_text(encoding="utf-8").splitlines())) <= 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valu": 1.0}, "entry 'made-2': valu: Extra inputs"),
        ({"value": "90.5"}, "entry 'made-2': value: .*number"),
        ({"value": float("nan")}, "entry 'made-2': value: .*finite"),
        ({"claims": []}, "entry 'made-2': claims: "),
        ({"claims": "D5"}, "entry 'made-2': claims: .*list"),
        ({"bits": "2"}, "entry 'made-2': bits: .*pattern"),
        ({"source": " "}, "entry 'made-2': source: "),
        ({"note": ""}, "entry 'made-2': note: "),
        ({"checked": "yes"}, "entry 'made-2': checked: .*boolean"),
        ({"checked": False}, "entry 'made-2': .*not checked has neither"),
        ({"finding": "It moves."}, "entry 'made-2': .*either a value or a finding"),
        ({"value": None, "unit": None}, "entry 'made-2': .*either a value or a finding"),
        ({"unit": None}, "entry 'made-2': .*value and unit go together"),
        ({"id": "Made 2"}, "entry 'Made 2': id: .*pattern"),
        ({"id": 2}, "entry 1: id: .*string"),
    ],
)
def test_wrong_entries_are_refused_by_name_and_key(tmp_path, change, message):
    with pytest.raises(LowbitError, match=message):
        anchors.load(written(tmp_path, ENTRY | change))


@pytest.mark.parametrize(
    "key", ["id", "claims", "method", "network", "data", "bits", "recipe", "source", "checked", "note"]
)
def test_a_missing_key_is_named(tmp_path, key):
    with pytest.raises(LowbitError, match=f"{key}: Field required"):
        anchors.load(written(tmp_path, {name: value for name, value in ENTRY.items() if name != key}))


def test_a_finding_has_no_full_precision(tmp_path):
    with pytest.raises(LowbitError, match=r"entry 'found': .*full_precision needs a value"):
        anchors.load(written(tmp_path, FINDING | {"full_precision": 92.25}))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(LowbitError, match=r"no anchors\.yaml"):
        anchors.load(tmp_path / anchors.FILE)
    (path := tmp_path / anchors.FILE).write_text("- [")
    with pytest.raises(LowbitError, match="not YAML"):
        anchors.load(path)
    path.write_text("id: made")
    with pytest.raises(LowbitError, match="list of entries"):
        anchors.load(path)
    with pytest.raises(LowbitError, match="entry 1: "):
        anchors.load(written(tmp_path, "made"))
    with pytest.raises(LowbitError, match="more than one entry has the id 'made-2'"):
        anchors.load(written(tmp_path, ENTRY, ENTRY))


def test_markdown_is_a_titled_table_with_escaped_pipes_and_its_sources(tmp_path):
    entries = [ENTRY | {"method": "a | b", "value": 69.508}, ENTRY | {"id": "more", "source": "B. Author,\nTable 2"}]
    again = ENTRY | {"id": "again", "bits": None, "full_precision": None}
    lines = anchors.markdown("D5", anchors.load(written(tmp_path, *entries, again)))
    assert anchors.TITLE in lines[0]
    assert lines[1] == ""
    assert lines[2].startswith("| method | network |")
    assert lines[3].count("---") == lines[2].count("|") - 1
    assert lines[4:] == [
        "| a \\| b | ResNet-20 | CIFAR-10 | W2A2 | 69.508 % top-1 | 92.25 | 200 epochs | [1] |",
        "| made | ResNet-20 | CIFAR-10 | W2A2 | 90.5 % top-1 | 92.25 | 200 epochs | [2] |",
        "| made | ResNet-20 | CIFAR-10 |  | 90.5 % top-1 |  | 200 epochs | [1] |",
        "",
        "- [1] A. Author, Table 1.",
        "- [2] B. Author, Table 2.",
    ]


def test_markdown_lists_findings_and_what_was_not_checked_without_numbers(tmp_path):
    lines = anchors.markdown("D5", anchors.load(written(tmp_path, FINDING, UNCHECKED)))
    assert lines[1:] == [
        "",
        "- made; ResNet-20: It moves. (A. Author, Table 1)",
        "",
        "- Not listed: made; ResNet-20, CIFAR-10: could not be read.",
    ]


def test_a_claim_without_anchors_has_no_lines(tmp_path):
    assert anchors.markdown("D1", anchors.load(written(tmp_path, ENTRY))) == []


def test_markdown_reads_the_projects_file_by_itself(monkeypatch):
    monkeypatch.setenv("LOWBIT_PROJECT", str(PROJECT.parents[1]))
    text = "\n".join(anchors.markdown("O5"))
    assert "64.33 % top-1" in text
    assert "ICML 2023" in text
