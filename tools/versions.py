"""Run the fast tests with other versions of torch and of everything else; the table is results/versions.md.

    python tools/versions.py                    # the lowest allowed versions, those of the lock, the newest
    python tools/versions.py torch==2.14.1      # the newest versions that go with this one
    python tools/versions.py newest --python python3.13 --suite

Each gets an environment of its own (several GB where torch is built for CUDA), made by uv and deleted afterwards, and a
row of the table in place of an older one for the same versions.
"""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "results" / "versions.md"
TESTS = [f"tests/{name}" for name in ("quantizers", "nn", "kernels", "engine", "models", "metrics", "training")]
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pydantic")
COLUMNS = ("versions", "Python", *PACKAGES, "passed", "failed", "skipped", "smoke suite", "date")
TITLE = """# Versions

The fast tests of quantizers, layers, kernels, plans, models, metrics and training (`-m "not slow"`), and where it was
run the smoke suite with its comparison (`lowbit run`, `lowbit check`). Written by `tools/versions.py`; rows of
2026-11-28 do not include the tests of plans.

"""


def options(target: str) -> list[str]:
    """Arguments of uv beyond the project's own requirements."""
    if target == "lowest":
        return ["--resolution", "lowest-direct"]
    if target == "lock":
        return ["--constraints", "constraints.txt"]
    return [] if target == "newest" else [target]


def installed(python: Path) -> dict[str, str]:
    """The versions of Python and of `PACKAGES` in the environment of ``python``."""
    names = f"map(importlib.metadata.version, {PACKAGES})"
    code = f"import importlib.metadata, platform; print(platform.python_version(), *{names})"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(("Python", *PACKAGES), found, strict=True))


def test(python: Path, environment: dict[str, str], folder: Path) -> dict[str, int]:
    """Count the tests that passed, failed and were skipped."""
    report = folder / "tests.xml"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", f"--junitxml={report}", *TESTS]
    subprocess.run(command, cwd=ROOT, env=environment)
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        counts["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return counts


def suite(python: Path, environment: dict[str, str], folder: Path) -> str:
    """Run the smoke suite and compare its numbers with the accepted ones; "passed", or the command that failed."""
    for command in (["run", "--fresh"], ["check"]):
        out = ["--profile", "smoke", "--out", folder / "smoke"]
        if subprocess.run([python, "-m", "lowbit", *command, *out], cwd=ROOT, env=environment).returncode:
            return f"{command[0]} failed"
    return "passed"


def row(uv: str, target: str, interpreter: str, with_suite: bool) -> dict[str, str]:
    """Run the tests in a new environment for ``target``, delete the environment, and return the row of the table."""
    with tempfile.TemporaryDirectory(prefix="lowbit-versions-") as name:
        folder = Path(name)
        python = folder / "venv" / "bin" / "python"
        subprocess.run([uv, "venv", "--quiet", "--seed", "--python", interpreter, folder / "venv"], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", python]
        needed = ["-r", "pyproject.toml", "--extra", "test", *options(target)]
        subprocess.run([*install, *needed], cwd=ROOT, check=True)
        # The project itself, since `python -m lowbit` looks for its command among the installed ones.
        subprocess.run([*install, "--no-deps", "--editable", ROOT], check=True)
        found = installed(python)
        print(target, found, flush=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        counts = test(python, environment, folder)
        done = suite(python, environment, folder) if with_suite else "-"
    date = datetime.date.today().isoformat()
    return {"versions": target, **found, **{k: str(n) for k, n in counts.items()}, "smoke suite": done, "date": date}


def write(new: dict[str, str]) -> None:
    """Write ``new`` into the table, in place of an older row for the same versions."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    rows = [dict(zip(COLUMNS, cell, strict=True)) for cell in cells]
    key = ("versions", "Python", "torch")
    rows = [old for old in rows if any(old[k] != new[k] for k in key)] + [new]
    rows.sort(
        key=lambda one: tuple([int(part) for part in one[k].split("+")[0].split(".")] for k in ("torch", "Python"))
    )
    table = [COLUMNS, ["---"] * len(COLUMNS), *([one[column] for column in COLUMNS] for one in rows)]
    TABLE.write_text(TITLE + "".join(f"| {' | '.join(cells)} |\n" for cells in table))


def main() -> int:
    """Try each target and return the exit status: 1 if any test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="lowest, lock, newest, or a requirement such as torch==2.14.1")
    parser.add_argument("--python", default=sys.executable, help="the interpreter; default: the one that runs this")
    parser.add_argument("--suite", action="store_true", help="run the smoke suite too, some ten minutes")
    given = parser.parse_args()
    uv = shutil.which("uv")
    if uv is None:
        parser.error("uv makes the environments: pip install uv")
    failed = False
    for target in given.targets or ["lowest", "lock", "newest"]:
        new = row(uv, target, given.python, given.suite)
        write(new)
        failed |= new["failed"] != "0" or "failed" in new["smoke suite"]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
