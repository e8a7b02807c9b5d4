"""The version stands in one place, and a release refuses a tag that does not fit."""

import tomllib
from pathlib import Path

import pytest
import yaml

import lowbit
from tools import version

ROOT = Path(__file__).parents[2]


def test_the_version_is_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lowbit.__version__"}
    assert version.version() == lowbit.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == lowbit.__version__


@pytest.mark.parametrize(
    "tag, said",
    [("v0.2.0", ""), ("0.2.0", "has to be v0.2.0"), ("v0.1.0", "has to be v0.2.0"), ("v0.3.0", "no section [0.3.0]")],
)
def test_a_tag_has_to_fit(tmp_path, tag, said):
    (tmp_path / "lowbit").mkdir()
    held = "0.3.0" if tag == "v0.3.0" else "0.2.0"
    (tmp_path / "lowbit" / "__init__.py").write_text(f'"""Doc."""\n\n__version__ = "{held}"\n')
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [0.2.0]\n")
    found = version.flaw(tag, tmp_path)
    assert said in found and bool(found) == bool(said)


def test_the_release_builds_with_what_is_here():
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["needs"] == ["sdist", "wheels"]
    assert all("permissions" not in job for name, job in jobs.items() if name != "publish")
    assert any("python tools/version.py" in step.get("run", "") for step in jobs["sdist"]["steps"])
    wheels = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert wheels["environment"]["LOWBIT_BUILD_KERNELS"] == "1"
