"""What counts as the same execution, part by part."""

import pytest

from lowbit.data import verify
from lowbit_suite import notebooks
from lowbit_suite.running import fingerprint

FACTS = {
    "library": {"a.py": "1", "b.py": "2"},
    "data": {"": {"data/words": "1"}, "cifar10": {"big.tar": "2"}, "fsdd": {"fsdd.zip": "3"}},
    "versions": {"numpy": "2.0", "python": "3.11.9"},
    "device": {"device": "cpu", "gpu": None},
}


@pytest.fixture
def parts(project):
    def make(code="1", given=None, facts=FACTS, threads=1, before=None, parameters="seed = 0"):
        path = project.add("a", code, parameters=parameters)
        return fingerprint.fingerprint(notebooks.read(path), given or {}, facts, threads, before or {})

    return make


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"code": "2"}, "the notebook's code"),
        ({"given": {"seed": 1}}, "the parameters (seed)"),
        ({"threads": 2}, "the number of threads"),
        ({"before": {"first": "x"}}, "the notebooks before it (first)"),
        (
            {"facts": {**FACTS, "library": {"a.py": "1", "b.py": "3", "c.py": "4"}}},
            "the library or the suite (b.py, c.py)",
        ),
        ({"facts": {**FACTS, "versions": {"numpy": "2.1", "python": "3.11.9"}}}, "the installed versions (numpy)"),
        ({"facts": {**FACTS, "device": {"device": "cuda", "gpu": "x"}}}, "the device (device, gpu)"),
        ({"facts": {**FACTS, "data": {**FACTS["data"], "": {"data/words": "2"}}}}, "the data (data/words)"),
    ],
)
def test_each_part_counts_and_is_named(parts, change, said):
    assert fingerprint.differing(parts(), parts()) == ""
    assert fingerprint.differing(parts(), parts(**change)) == said


def test_a_value_given_and_the_same_default_are_one(parts):
    assert parts(given={"seed": 0}) == parts()
    assert parts(given={"seed": 0.0}) != parts()
    assert parts(given={"seed": False}) != parts()


def test_a_data_set_counts_where_code_or_parameters_name_it(parts):
    other = {**FACTS, "data": {**FACTS["data"], "cifar10": {}}}
    for made in (
        {"code": "load('cifar10')"},
        {"given": {"name": "cifar10"}, "parameters": "name = 'fsdd'"},
        {"given": {"name": ["fsdd", "cifar10"]}, "parameters": "name = []"},
    ):
        assert fingerprint.differing(parts(**made), parts(**made, facts=other)) == "the data (big.tar)"
    for made in ({}, {"code": "load('cifar10-jpeg')"}):
        assert fingerprint.differing(parts(**made), parts(**made, facts=other)) == ""


def test_many_changes_are_counted():
    before, now = {"library": {}}, {"library": {f"{i}.py": "" for i in range(9)}}
    assert fingerprint.differing(before, now, now) == "the library or the suite (0.py, 1.py, 2.py, and 6 more)"


def test_the_library_is_all_its_files():
    found = fingerprint.library()
    assert "lowbit_suite/running/fingerprint.py" in found
    assert {"lowbit/models/checkpoints/resnet20.digits.safetensors", "lowbit/kernels/csrc/avx2.c"} <= set(found)
    assert not any("__pycache__" in name for name in found)


def test_versions_are_those_of_requirements_and_of_theirs():
    found = fingerprint.versions("3.11.9")
    assert found["python"] == "3.11.9"
    assert {"torch", "numpy", "papermill", "nbformat", "sympy"} <= set(found)  # the last two are required by others
    assert "pytest" not in found and "lowbit" not in found


def test_data_is_known_by_its_contents(project, tmp_path, monkeypatch):
    archives = tmp_path / "archives"
    archives.mkdir()
    monkeypatch.setenv("LOWBIT_DATA", str(archives))
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words.csv").write_text("a")
    (archives / "fsdd.zip").write_bytes(b"one")
    first = verify.state()
    assert list(first[""]) == ["data/words.csv"]
    assert list(first["fsdd"]) == ["fsdd.zip"] and first["bccd"] == {}
    (archives / "fsdd.zip").write_bytes(b"one")  # another date, the same contents
    assert verify.state() == first
    (archives / "fsdd.zip").write_bytes(b"two")
    (tmp_path / "data" / "words.csv").write_text("b")
    second = verify.state()
    assert second["fsdd"] != first["fsdd"] and second[""] != first[""]


def test_an_unchanged_archive_is_not_read_twice(project, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_DATA", str(tmp_path))
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "fsdd.zip").write_bytes(b"one")
    first = verify.state()
    read = []
    monkeypatch.setattr(verify, "sha256", lambda path: read.append(path.name))
    assert verify.state() == first
    assert read == []
