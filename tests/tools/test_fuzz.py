"""`make fuzz` needs clang, and says so. A run for real, half an hour long, is a job of each night."""

import pytest

from lowbit.errors import LowbitError
from tools import fuzz


def test_without_clang_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz.shutil, "which", lambda name: None)
    with pytest.raises(LowbitError, match="no clang is here: install it"):
        fuzz.program(tmp_path)


def test_a_compiler_that_cannot_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz.shutil, "which", lambda name: "false")
    with pytest.raises(LowbitError, match="clang builds no fuzzer here"):
        fuzz.program(tmp_path)
