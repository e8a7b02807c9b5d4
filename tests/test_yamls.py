"""YAML 1.2's words and numbers, and one error for everything that is no YAML."""

import math

import pytest
import yaml

from lowbit import paths, yamls
from lowbit.errors import LowbitError


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("-010", -10), ("0o10", 8), ("0x1F", 31), ("+7", 7), ("1e-3", 1e-3), ("1.e5", 1e5), (".5", 0.5),
     ("yes", "yes"), ("No", "No"), ("on", "on"), ("off", "off"), ("12:30", "12:30"), ("1_000", "1_000"), ("y", "y"),
     ("2024-01-01", "2024-01-01"), ("0b1", "0b1"), ("true", True), ("False", False), ("null", None), ("~", None),
     ("", None), ('"010"', "010"), ("[010, yes, 1e3]", [10, "yes", 1000.0]), ("-.inf", -math.inf), ("e3", "e3")],
)  # fmt: skip
def test_words_and_numbers(text, value):
    found = yamls.load(text, "a file")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["[", "a: b: c", "9" * 5000, "[" * 3000, "!!python/name:os.system", "{a: 1, a: 2}", "{? [1]: 2}", "\0"]
)
def test_what_is_no_yaml_is_one_error_with_a_name(text):
    with pytest.raises(LowbitError, match=r"^the file") as refused:
        yamls.load(text, "the file")
    assert "\n" not in str(refused.value)


def test_the_projects_own_files_say_what_they_said():
    for path in sorted(paths.notebooks().glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        assert yamls.load(text, path.name) == yaml.safe_load(text)
