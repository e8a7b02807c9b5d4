"""``lowbit again``: a few trainings of a kept journal once more, and whether the same numbers come out.

Their notebooks are executed from the top, with all other trainings taken from the journals, so one row of a table costs
one training and not the whole table.
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
"""What can be asked for beside the names of the arms' arguments."""


@dataclass(frozen=True)
class Row:
    """One training: what it was, and its results as journals hold them, then and now."""

    line: dict[str, Any]
    now: Any

    @property
    def what(self) -> str:
        """Sweep, arm and seed in words."""
        given = {**self.line["arm"], "seed": self.line["seed"]}
        return f"{self.line['sweep']}: " + ", ".join(f"{name}={value}" for name, value in given.items())

    @property
    def differing(self) -> list[tuple[str, Any, Any]]:
        """Name, value then and value now of everything that is not exactly the same."""
        return list(_differing("", self.line["result"], self.now))


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line of a journal, and its trainings.

    Raises:
        LowbitError: no such file, or it holds no training.
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
    """What is to be run, which trainings of each notebook's journal that makes anew, on which machine each journal was
    made (empty: it does not say), and how many trainings all journals have."""

    run: runner.Plan
    chosen: dict[str, list[dict[str, Any]]]
    machines: dict[str, dict[str, Any]]
    there: int

    def elsewhere(self) -> list[str]:
        """One line for each journal that was made on another machine than this one, or does not say on which."""
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
        """Each chosen training beside what it gave in the run, which has passed."""
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
    """Checks what was asked for; nothing has run. Notebooks get the parameters that their journals were made with.

    Args:
        notebook: its name, or a pattern; of several notebooks those take part that have a journal.
        profile: that of the journals.
        file: the journal, of one notebook; None: those that the project keeps.
        wanted: see `pick`, as are
        count: the number over all notebooks, and
        draw: there.
        timeout_minutes: as for `runner.plan`, as is
        out: there; ``results/runs/again``.

    Raises:
        LowbitError: one ``file`` for several notebooks; no journal, one of another notebook or profile, or with
            parameters that the notebook has no more; what `pick` refuses.
    """
    profiles.get(profile)
    books = notebooks.select([notebook])
    if file and len(books) != 1:
        raise LowbitError(f"{notebook!r} means {len(books)} notebooks, and a journal is of one; name that")
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
            f"that journal is of {of} at {at}, not of {book.name} at {profile}: name these, or another --journal"
        )
    if unknown := sorted(set(parameters) - {*book.defaults, "profile"}):
        raise LowbitError(f"that journal was made with {unknown[0]!r}, a parameter that {book.name} has no more")
    return head, lines


def pick(
    lines: Sequence[dict[str, Any]], wanted: Sequence[str], count: int | None = None, draw: int = 0
) -> list[dict[str, Any]]:
    """The trainings that fit all of ``wanted``, each ``name=value``; of these, ``count`` at random.

    Names are those of the arms' arguments, ``seed`` and ``sweep``. ``draw`` is the seed of the choice. Trials of
    learning rates (`lowbit_suite.choose_rates`) are only among them if the sweep is asked for.

    Raises:
        LowbitError: an unknown name, something that is not of that form, nothing that fits.
    """
    found = list(lines)
    if not any(text.startswith("sweep") for text in wanted):
        found = [line for line in lines if not journal.is_trial(line)] or found
    for text in wanted:
        name, equals, value = (part.strip() for part in text.partition("="))
        allowed = [*OWN, *dict.fromkeys(key for line in lines for key in line["arm"])]
        if not equals or name not in allowed:
            raise LowbitError(f"{text!r} is not of the form NAME=VALUE with one of the names {', '.join(allowed)}")
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
    """The trainings that stand."""
    again = {journal.key(line) for line in chosen}
    return [line for line in lines if journal.key(line) not in again]


def compare(chosen: Sequence[dict[str, Any]], made: Sequence[dict[str, Any]]) -> list[Row]:
    """Each chosen training beside what it gives now.

    Raises:
        LowbitError: one was not run, since the notebook does not ask for it any more.
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
