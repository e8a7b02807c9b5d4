"""``lowbit mutate``: put deliberate faults into a copy of the project, one at a time, and run the tests.

The faults are listed in ``tests/mutations.yaml``: a name, the file, the text to replace (which has to occur exactly
once), the replacement, and the tests to run. A fault that no test notices has *survived*: a gap in the tests. The tests
run without the fault first, because tests that fail without it notice nothing.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowbit import paths, yamls
from lowbit.errors import LowbitError

FILE = "tests/mutations.yaml"
LIMIT = 900  # seconds that the tests of one fault may take
LEFT_OUT = ("build", "results")  # what is made; of the results only the baselines are read by tests


@dataclass(frozen=True)
class Mutation:
    """One deliberate fault.

    Attributes:
        name: the fault in a few words.
        file: path in the project.
        old, new: the text and its replacement.
        tests: arguments of pytest; the fault is caught if one of these tests fails.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """The result of a mutation: caught by a test, survived, or an error."""

    mutation: Mutation
    status: Literal["caught", "survived", "error"]
    noticed_by: str = ""


def load(root: Path | None = None) -> list[Mutation]:
    """Load the project's list of faults and check it against the sources.

    Raises:
        LowbitError: there is no list, an entry lacks a key, or a text does not occur exactly once.
    """

    root = root or paths.project()
    file = root / FILE
    if not file.is_file():
        raise LowbitError(f"there is no {FILE} in {root}; the deliberate faults are listed there")
    entries = yamls.load(file.read_text(encoding="utf-8"), file.name)
    mutations = [_entry(i, entry) for i, entry in enumerate(entries, 1)]
    for mutation in mutations:
        if any(mutation.name == other.name for other in mutations if other is not mutation):
            raise LowbitError(f"{FILE}: two faults are called {mutation.name!r}")
        source = root / mutation.file
        found = source.read_text(encoding="utf-8").count(mutation.old) if source.is_file() else 0
        if found != 1:
            raise LowbitError(
                f"{FILE}: the old text of {mutation.name!r} occurs {found} times in {mutation.file}, not once; bring "
                "the entry up to date with the source"
            )
        for test in mutation.tests:
            if not (root / test.split("::")[0]).exists():
                raise LowbitError(f"{FILE}: {mutation.name!r} asks {test}, which does not exist")
    return mutations


def _entry(number: int, entry: Any) -> Mutation:
    wanted = set(Mutation.__dataclass_fields__)
    if not isinstance(entry, dict) or set(entry) != wanted:
        raise LowbitError(f"{FILE}: entry {number} should have just the keys {', '.join(sorted(wanted))}")
    tests = entry["tests"]
    return Mutation(**{**entry, "tests": (tests,) if isinstance(tests, str) else tuple(tests)})


def pick(mutations: Sequence[Mutation], names: Sequence[str]) -> list[Mutation]:
    """The mutations whose name contains one of ``names``, ignoring case; all if ``names`` is empty.

    Raises:
        LowbitError: one of ``names`` occurs in no mutation's name.
    """
    for name in names:
        if not any(name.lower() in mutation.name.lower() for mutation in mutations):
            known = "; ".join(mutation.name for mutation in mutations)
            raise LowbitError(f"no deliberate fault is called {name!r}; there are: {known}")
    return [m for m in mutations if not names or any(name.lower() in m.name.lower() for name in names)]


def run(mutations: Sequence[Mutation], root: Path | None = None) -> Iterator[Outcome]:
    """Try the mutations one by one in a copy of the project, and yield their outcomes."""
    root = root or paths.project()
    with tempfile.TemporaryDirectory(prefix="lowbit-mutate-") as scratch:
        copy = Path(scratch)
        # Compiled kernels go along, unless a fault is put into their sources.
        stale = ["*.so"] if any(Path(mutation.file).suffix in (".c", ".h") for mutation in mutations) else []
        copy_project(root, copy, *stale)
        sound: dict[tuple[str, ...], Outcome] = {}
        for mutation in mutations:
            if mutation.tests not in sound:
                sound[mutation.tests] = _ask(mutation, copy)
            if (control := sound[mutation.tests]).status != "survived":
                yield Outcome(mutation, "error", f"its tests fail without the fault: {control.noticed_by}")
                continue
            changed = copy / mutation.file
            text = changed.read_text(encoding="utf-8")
            changed.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            try:
                yield _ask(mutation, copy)
            finally:
                changed.write_text(text, encoding="utf-8")


def copy_project(root: Path, folder: Path, *without: str) -> None:
    """Copy into ``folder`` what the tests of the project in ``root`` read, without files that match ``without``."""
    parts = [path for path in root.iterdir() if path.name[0] != "." and path.name not in LEFT_OUT]
    for source in [*parts, root / "results" / "baselines"]:
        target = folder / source.relative_to(root)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", *without))
        elif source.exists():
            shutil.copy2(source, target)


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table of results/mutations.md."""
    caught = sum(outcome.status == "caught" for outcome in outcomes)
    lines = [
        "# Deliberate faults, and who noticed\n",
        f"Written by `lowbit mutate --write`, which puts each fault of `{FILE}` into a copy of the project and",
        f"asks its tests, first without the fault and then with it. {caught} of {len(outcomes)} caught.\n",
        "| fault | file | outcome | noticed first by |",
        "|---|---|---|---|",
    ]
    for outcome in outcomes:
        cells = (outcome.mutation.name, outcome.mutation.file, outcome.status, outcome.noticed_by.replace("|", "\\|"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ask(mutation: Mutation, copy: Path) -> Outcome:
    environment = {**os.environ, "PYTHONPATH": str(copy), "LOWBIT_PROJECT": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *mutation.tests]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return Outcome(mutation, "caught", f"no end within {LIMIT} s")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return Outcome(mutation, "survived")
    if done.returncode == 1 and failed:
        return Outcome(mutation, "caught", failed[1])
    if done.returncode == 2 and failed:  # the tests cannot even be collected
        return Outcome(mutation, "caught", failed[1])
    if done.returncode < 0:
        return Outcome(mutation, "caught", f"{signal.Signals(-done.returncode).name} ended the tests")
    tail = " ".join((done.stdout + done.stderr).split()[-30:])
    return Outcome(mutation, "error", f"pytest ended with {done.returncode}: {tail}")
