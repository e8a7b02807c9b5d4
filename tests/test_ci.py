"""The workflow for CI asks for nothing that is not here, and installs what tests would otherwise be skipped for."""

import ast
import re
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[1]
PACKAGES = {  # Ubuntu's package for each program that a test looks for
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "g++": "g++",
    "git": "git",
    "qemu-aarch64": "qemu-user",
    "mount": "mount",
}
# On the image of ubuntu-latest already: github.com/actions/runner-images, images/ubuntu/Ubuntu2404-Readme.md
BROUGHT = {"chromium", "google-chrome", "node"}


@pytest.fixture(scope="module")
def job():
    (found,) = yaml.safe_load((PROJECT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    return found


def targets():
    return set(re.findall(r"^([a-z]+):(?!=)", (PROJECT / "Makefile").read_text(), re.M))


def scripts(job):
    return "\n".join(step.get("run", "") for step in job["steps"])


def test_every_make_target_exists(job):
    matrix = job["strategy"]["matrix"]
    asked = {*matrix["target"], *(item["target"] for item in matrix["include"])}
    assert {"test", "suite", "lint"} <= asked <= targets()
    assert re.findall(r"make (\S.*?\}\})", scripts(job)) == ["${{ matrix.target }}"]


def test_variables_given_to_make_are_those_that_it_reads(job):
    (line,) = re.findall(r"make \$\{\{.*\}\}(.*)", scripts(job))
    given = re.findall(r"([A-Z_]+)=", line)
    assert given and all(re.search(rf"^{name} \?=", (PROJECT / "Makefile").read_text(), re.M) for name in given)


def programs():
    """What the tests look for by ``shutil.which("...")``."""
    for path in (PROJECT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "shutil.which":
                yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def test_programs_that_tests_look_for_are_installed(job):
    (line,) = re.findall(r"apt-get install (.*)", scripts(job))
    looked_for = set(programs()) - BROUGHT
    assert {"aarch64-linux-gnu-gcc", "qemu-aarch64"} <= looked_for
    assert looked_for <= set(PACKAGES), "say in PACKAGES which package of Ubuntu has it, and install that in ci.yml"
    assert {"g++", *(PACKAGES[name] for name in looked_for)} <= set(line.split())


def test_the_python_versions_are_supported_ones(job):
    import tomllib

    lowest = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    versions = job["strategy"]["matrix"]["python"]
    assert all(isinstance(version, str) for version in versions), "an unquoted 3.10 would be 3.1"
    assert min(versions, key=lambda text: tuple(map(int, text.split(".")))) == lowest


def test_reports_come_back_from_failed_runs_too_and_nothing_may_be_written(job):
    (upload,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/upload-artifact")]
    assert "!cancelled()" in upload["if"] and "results/runs/" in upload["with"]["path"]
    assert yaml.safe_load((PROJECT / ".github/workflows/ci.yml").read_text())["permissions"] == {"contents": "read"}


def test_the_hooks_run_what_is_installed_here():
    hooks = [
        hook
        for repo in yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
        if repo["repo"] == "local"
    ]
    assert {"ruff-check", "ruff-format", "notebooks"} <= {hook["id"] for hook in hooks}
    files = [word for hook in hooks for word in hook["entry"].split() if word.endswith(".py")]
    assert files and all((PROJECT / name).is_file() for name in files)
