"""``lowbit again``: repeats a few trainings of a journal and checks that they give the same numbers.

Their notebooks run from the top and read all other trainings from the journals, so one row of a table costs one
training and not the whole table.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit_suite import notebooks, profiles
from lowbit_suite.notebooks import Notebook, parse_value
from lowbit_suite.records import journal
from lowbit_suite.running import runner

OWN = ("sweep", "seed")
"""Names that a selection may use besides the arms' arguments."""


@dataclass(frozen=True)
class Row:
    """One training with its result in the old journal (``line``) and in the new one (``now``)."""

    line: dict[str, Any]
    now: Any

    @property
    def what(self) -> str:
        """Sweep, arm and seed in words."""
        given = {**self.line["arm"], "seed": self.line["seed"]}
        return f"{self.line['sweep']}: " + ", ".join(f"{name}={value}" for name, value in given.items())

    @property
    def differing(self) -> list[tuple[str, Any, Any]]:
        """Name, old value and new value of every number that is not exactly the same."""
        return list(_differing("", self.line["result"], self.now))


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the first line of a journal, and its trainings.

    Raises:
        LowbitError: the file is missing or holds no training.
    """
    lines = journal.read(path)
    if len(lines) < 2:
        raise LowbitError(
            f"{path} holds no training; 'lowbit run' leaves a journal in journals/ of the run's folder, and the "
            "project keeps some in results/journals"
        )
    return lines[0], lines[1:]


@dataclass(frozen=True)
class Again:
    """A plan to repeat trainings.

    Attributes:
        run: the plan of the notebooks to run.
        chosen: the trainings to repeat, by notebook.
        machines: the machine on which each notebook's journal was made; empty if the journal does not say.
        there: number of trainings in all journals.
    """

    run: runner.Plan
    chosen: dict[str, list[dict[str, Any]]]
    machines: dict[str, dict[str, Any]]
    there: int

    def elsewhere(self) -> list[str]:
        """One line for each journal that was made on another machine, or does not name its machine."""
        here, said = journal.machine(), []
        for name in self.chosen:
            then = self.machines[name]
            if not then:
                said.append(f"{name}: its journal does not say on which processor it was made")
            elif then != here:
                was, now = ({key: _words(of.get(key)) for key in {**then, **here}} for of in (then, here))
                parts = [f"{key} {was[key]}, here {now[key]}" for key in was if was[key] != now[key]]
                said.append(f"{name} was made on another machine: {'; '.join(parts)}")
        return said

    def compare(self) -> list[Row]:
        """Compare each chosen training with its result in the run, which has to have passed."""
        made = {name: read(self.run.folder / journal.place(name))[1] for name in self.chosen}
        return [row for name, lines in self.chosen.items() for row in compare(lines, made[name])]


def plan(
    notebook: str,
    profile: str,
    file: Path | None,
    wanted: Sequence[str],
    count: int | None = None,
    draw: int = 0,
    *,
    timeout_minutes: float | None = None,
    out: Path | None = None,
) -> Again:
    """Check the arguments and plan the run. Notebooks get the parameters with which their journals were made.

    Args:
        notebook: a name or a pattern; of several matching notebooks, those with a journal are used.
        profile: the profile of the journals.
        file: the journal of a single notebook; None takes the journals in ``results/journals``.
        wanted: selects trainings, see `pick`.
        count: number of trainings to choose at random over all notebooks; None takes all.
        draw: random seed of that choice.
        timeout_minutes: see `runner.plan`.
        out: folder of the run; None is ``results/runs/again``.

    Raises:
        LowbitError: ``file`` is given for several notebooks; the journal is missing, belongs to another notebook or
            profile, or has parameters that the notebook no longer has; or `pick` refuses the selection.
    """
    profiles.get(profile)
    books = notebooks.select([notebook])
    if file and len(books) != 1:
        raise LowbitError(f"{notebook!r} matches {len(books)} notebooks, but a journal belongs to one; name that one")
    if len(books) > 1:
        books = [book for book in books if journal.kept(profile, book.name).exists()] or books[:1]
    found = {book.name: _journal(book, profile, file or journal.kept(profile, book.name)) for book in books}
    lines = [{**line, "notebook": name} for name, (_, there) in found.items() for line in there]
    picked = pick(lines, wanted, count, draw)
    chosen = {name: [line for line in picked if line["notebook"] == name] for name in found}
    chosen = {name: some for name, some in chosen.items() if some}
    folder = out or runner.run_folder("again")
    run = runner.plan(list(chosen), profile, fresh=True, timeout_minutes=timeout_minutes, out=folder)
    heads = {name: found[name][0] for name in chosen}
    parameters = {name: head.get("parameters", {}) for name, head in heads.items()}
    standing = {name: without(found[name][1], some) for name, some in chosen.items()}
    machines = {name: head.get("machine", {}) for name, head in heads.items()}
    return Again(replace(run, parameters=parameters, trainings=standing), chosen, machines, len(lines))


def _journal(book: Notebook, profile: str, file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line and the trainings of a notebook's journal."""
    head, lines = read(file)
    parameters = head.get("parameters", {})
    of, at = head.get("notebook"), parameters.get("profile", profile)
    if (of, at) != (book.name, profile):
        raise LowbitError(
            f"that journal belongs to {of} at {at}, not to {book.name} at {profile}: give those, or another --journal"
        )
    if unknown := sorted(set(parameters) - {*book.defaults, "profile"}):
        raise LowbitError(
            f"that journal has the parameter {unknown[0]!r}, which {book.name} no longer has; make a new journal"
        )
    return head, lines


def pick(
    lines: Sequence[dict[str, Any]], wanted: Sequence[str], count: int | None = None, draw: int = 0
) -> list[dict[str, Any]]:
    """The trainings that match all of ``wanted``, each ``name=value``; of these, ``count`` at random.

    Allowed names are the arms' arguments, ``seed`` and ``sweep``. ``draw`` is the random seed of the choice. Trials of
    learning rates (`lowbit_suite.choose_rates`) are included only if ``wanted`` names their sweep.

    Raises:
        LowbitError: an item of ``wanted`` has an unknown name or another form, or no training matches.
    """
    found = list(lines)
    if not any(text.startswith("sweep") for text in wanted):
        found = [line for line in lines if not journal.is_trial(line)] or found
    for text in wanted:
        name, equals, value = (part.strip() for part in text.partition("="))
        allowed = [*OWN, *dict.fromkeys(key for line in lines for key in line["arm"])]
        if not equals or name not in allowed:
            raise LowbitError(f"{text!r} does not have the form NAME=VALUE with one of the names {', '.join(allowed)}")
        values = [_of(line, name) for line in found]
        found = [line for line in found if name in OWN or name in line["arm"] if _fits(_of(line, name), text, value)]
        if not found:
            there = ", ".join(dict.fromkeys(map(str, values)))
            raise LowbitError(f"no training has {text}; there are {there}")
    if count is not None and count < len(found):
        chosen = sorted(random.Random(draw).sample(range(len(found)), count))
        found = [found[number] for number in chosen]
    return found


def without(lines: Sequence[dict[str, Any]], chosen: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trainings that are not repeated."""
    again = {journal.key(line) for line in chosen}
    return [line for line in lines if journal.key(line) not in again]


def compare(chosen: Sequence[dict[str, Any]], made: Sequence[dict[str, Any]]) -> list[Row]:
    """Compare each chosen training with its new result.

    Raises:
        LowbitError: a training was not run, since the notebook no longer has it.
    """
    now = {journal.key(line): line["result"] for line in made}
    if missing := [line for line in chosen if journal.key(line) not in now]:
        raise LowbitError(f"the notebook no longer trains {Row(missing[0], None).what}: its sweeps have changed")
    return [Row(line, now[journal.key(line)]) for line in chosen]


def _of(line: Mapping[str, Any], name: str) -> Any:
    return line[name] if name in OWN else line["arm"].get(name)


def _fits(found: Any, text: str, value: str) -> bool:
    return str(found) == value or found == parse_value(text, value)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _differing(name: str, then: Any, now: Any):
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*then, *now)):
            yield from _differing(f"{name}, {key}" if name else key, then.get(key), now.get(key))
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, (one, other) in enumerate(zip(then, now, strict=True)):
            yield from _differing(f"{name} [{number}]".lstrip(), one, other)
    elif then != now and not (_is_nan(then) and _is_nan(now)):
        yield name, then, now


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
