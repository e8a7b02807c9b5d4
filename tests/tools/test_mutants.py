"""Random mutants: what is drawn, what is left out, and what is said of those that nobody notices."""

import ast
import textwrap

import pytest
import yaml

from lowbit.errors import LowbitError
from tools import mutants
from tools.mutation import run

SOURCE = '''
"""1 + 1 in a text is no code."""
def f(a: "int < 3" = -1, b=True):
    """A docstring: a < b."""
    if not b and a <= 2:  # a < 2
        raise ValueError(f"a={a + 1}")
    return a * 3 if "é" < "f" else a // 2
'''


def mutated(text):
    return {(old, new, text[:at] + new + text[at + len(old) :]) for at, old, new in mutants.candidates(text)}


def test_every_token_that_computes_is_changed_and_no_text():
    found = mutated(SOURCE)
    assert {(old, new) for old, new, _ in found} == {
        ("-", ""), ("1", "2"), ("True", "False"), ("not ", ""), ("and", "or"), ("<=", "<"), ("2", "3"), ("*", "/"),
        ("3", "4"), ("<", "<="), ("//", "*"),
    }  # fmt: skip
    for _, _, text in found:
        ast.parse(text)
        assert '"""A docstring: a < b."""' in text and '"int < 3"' in text and "# a < 2" in text and "a={a + 1}" in text
    assert any('é" <= "f' in text for _, _, text in found)


def test_all_of_the_library_s_mutants_can_be_parsed():
    for mutant in mutants.draw(300, 0):
        ast.parse(mutant.new)
        assert mutant.new != mutant.old


@pytest.fixture
def small(tmp_path, monkeypatch):
    files = {
        "lowbit/metrics/sums.py": "def plus(a, b):\n    return a + b\n\n\ndef unused(a, b):\n    return a - b\n",
        "tests/metrics/test_sums.py": """
            import sys
            sys.path.insert(0, __file__.rsplit("/", 3)[0] + "/lowbit/metrics")
            from sums import plus
            def test_plus(): assert plus(2, 3) == 5
            """,
        "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['slow: slow']\n",
        "notebooks/profiles.yaml": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.setenv("LOWBIT_PROJECT", str(tmp_path))
    return tmp_path


def test_survivors_are_told_and_harmless_ones_are_not_drawn(small):
    status = {outcome.mutation.name: outcome.status for outcome in run(mutants.draw(2, 0, ("metrics",)))}
    assert status == {
        "lowbit/metrics/sums.py:2: + -> -: return a + b": "caught",
        "lowbit/metrics/sums.py:6: - -> +: return a - b": "survived",
    }
    entry = {"file": "lowbit/metrics/sums.py", "line": "return a - b", "change": "- -> +", "reason": "nobody calls it"}
    (small / mutants.HARMLESS).write_text(yaml.safe_dump([entry]))
    (left,) = mutants.draw(1, 0, ("metrics",))
    assert "return a + b" in left.name
    with pytest.raises(LowbitError, match="count=2: there are 1 mutants"):
        mutants.draw(2, 0, ("metrics",))


def test_what_a_module_s_own_tests_miss_is_left_to_its_folder_s(small):
    tests = small / "tests" / "metrics"
    (tests / "test_other.py").write_text((tests / "test_sums.py").read_text())
    (tests / "test_sums.py").write_text("import pytest\n@pytest.mark.slow\ndef test_slow(): assert False\n")
    assert [outcome.status for outcome in run(mutants.draw(2, 0, ("metrics",)))] == ["error", "error"]
    (tests / "test_other.py").write_text((tests / "test_other.py").read_text().replace("import plus", "import *"))
    found = {outcome.mutation.name[-5:]: outcome for outcome in mutants.try_all(mutants.draw(2, 0, ("metrics",)))}
    assert found["a + b"].status == "caught" and "test_other.py" in found["a + b"].noticed_by
    assert found["a - b"].status == "survived"


def test_a_module_asks_its_own_tests_or_its_folder_s(small):
    assert mutants.tests_of("lowbit/metrics/sums.py", small) == ("tests/metrics/test_sums.py", "-m", "not slow")
    assert mutants.tests_of("lowbit/metrics/other.py", small)[0] == "tests/metrics"
