import pytest

from lowbit import environment
from lowbit_suite import doctor


def test_a_missing_package_is_told_with_what_to_do(monkeypatch):
    real = environment.version
    monkeypatch.setattr(environment, "version", lambda name: None if name == "timm" else real(name))
    (finding,) = [item for item in doctor.examine() if item.what == "timm"]
    assert (finding.state, finding.found) == ("missing", "not installed")
    assert finding.advice.startswith("pip install 'timm")


def test_an_unmatched_version_is_told(monkeypatch):
    real = environment.version
    monkeypatch.setattr(environment, "version", lambda name: "0.19.0" if name == "torchvision" else real(name))
    (finding,) = [item for item in doctor.examine() if item.what == "torchvision"]
    assert finding.state == "missing"
    assert "matched set" in finding.advice


def kernels_line():
    (found,) = (finding for finding in doctor.examine() if finding.what == "compiled kernels")
    return found


@pytest.mark.parametrize(
    "name, value, state",
    [("LOWBIT_NATIVE", "0", "note"), ("LOWBIT_ISA", "mmx", "missing")],
)
def test_what_is_wrong_with_the_kernels_is_said(monkeypatch, name, value, state):
    from lowbit.kernels import native

    if name == "LOWBIT_ISA" and not native.available():
        pytest.skip("there are no compiled kernels here")
    monkeypatch.setenv(name, value)
    native._load.cache_clear()
    try:
        found = kernels_line()
        assert found.state == state and name in found.found + found.advice
    finally:
        native._load.cache_clear()
