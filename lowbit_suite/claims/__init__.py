"""``lowbit claims``: judges each claim by the recorded tables, and by nothing else.

``notebooks/claims.yaml`` holds the claims as statements and conditions, written down before the runs. A statement is
judged from the rows of a saved table (one row per measurement, with its seed) at the profile `MAIN`, the study's long
trainings. It is *not tested* unless its conditions hold: a network that has not learned says nothing about a claim.
The notebooks' own short trainings are *looks*: they show effects with intervals and give no verdict.
"""

import csv
import itertools
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit import paths, yamls
from lowbit.errors import LowbitError
from lowbit.metrics.statistics import EXPECTED, detectable, p_against, verdict
from lowbit_suite import profiles
from lowbit_suite.claims import conditions, measuring
from lowbit_suite.claims.text import markdown, outputs, show, write
from lowbit_suite.claims.verdicts import (
    DIRECTIONS,
    LOOK,
    Claim,
    Statement,
    aim,
    combine,
    correct,
    effect,
    judged,
    judgment,
    looks,
    outcome,
    read,
)
from lowbit_suite.records import journal

__all__ = [
    "FILE", "MAIN", "Claim", "Statement", "aim", "combine", "correct", "effect", "judge", "judge_all", "judge_run",
    "judged", "judgment", "load", "looks", "markdown", "outcome", "outputs", "read", "show", "write",
]  # fmt: skip

FILE = "claims.yaml"
"""File name, in the folder of the notebooks."""
MAIN = profiles.STUDY
"""The profile whose tables decide; the tables of other profiles are looks."""

METHOD = (
    "paired differences by seed (by speaker where each is left out in turn), mean with Student's t interval of 95 %; "
    "at least 5 of them decide"
)
UNTRAINED = "no training of the study yet"

KEYS = {
    "says", "table", "each", "a", "b", "value", "b_value", "times", "pair", "expected", "margin", "unit", "all", "log",
    "role", "ours", "at", "slope", "descriptive", "conditions",
}  # fmt: skip
"""The keys of a statement; the comments of claims.yaml explain each."""


def load(file: Path | None = None) -> list[dict[str, Any]]:
    """Read the claims; each statement has its `each` combinations expanded and all its conditions.

    Raises:
        LowbitError: an entry has unknown, missing or contradictory keys, or a claim has no primary statement.
    """
    file = file or paths.notebooks() / FILE
    if not file.is_file():
        raise LowbitError(f"there is no {FILE} in {file.parent}: run inside the project, or set LOWBIT_PROJECT to it")
    tree = yamls.load(file.read_text(encoding="utf-8"), file.name)
    named, claims = tree.get("conditions", {}), tree["claims"]
    for claim in claims:
        common = conditions.parse(claim["id"], claim.get("conditions", []), named)
        for kind in ("statements", "looks"):
            claim[kind] = [one for item in claim.get(kind, []) for one in _spelled_out(claim["id"], item)]
        for item in claim["statements"]:
            item["conditions"] = [*common, *conditions.parse(claim["id"], item.get("conditions", []), named)]
        if not any(item.get("role") == "primary" for item in claim["statements"]):
            raise LowbitError(f"claim {claim['id']} has no primary statement: give one of them 'role: primary'")
    return claims


def _spelled_out(claim: str, item: dict[str, Any]) -> list[dict[str, Any]]:
    needed = {"says", "table"} | ({"all"} if "all" in item else {"a", "value", "unit"})
    needed |= set() if item.get("descriptive") or "all" in item else {"expected"}
    if unknown := sorted(set(item) - KEYS) + sorted(needed - set(item)):
        raise LowbitError(f"claim {claim}: a statement has unknown or missing keys: {', '.join(unknown)}")
    for key, allowed in (("role", ("primary", "secondary")), ("expected", EXPECTED)):
        if key in item and item[key] not in allowed:
            raise LowbitError(f"claim {claim}: {key} {item[key]!r} is not allowed; give one of {', '.join(allowed)}")
    if ("slope" in item and ("at" in item or "b" not in item)) or (
        item.get("descriptive") and item.get("role") == "primary"
    ):
        raise LowbitError(
            f"claim {claim}: {item['says']!r} contradicts itself: a slope needs a and b at all budgets, and a "
            "descriptive statement decides nothing; drop 'at' or 'slope', 'descriptive' or 'role: primary'"
        )
    each = item.get("each", {})
    texts = ("says", "a", "b", "at")
    made = []
    for values in itertools.product(*each.values()):
        chosen = dict(zip(each, values, strict=True))
        made.append({k: v.format(**chosen) if k in texts else v for k, v in item.items() if k != "each"})
    return made


def judge(profile: str = MAIN, folder: Path | None = None, file: Path | None = None) -> list[Claim]:
    """Every claim, judged or looked at by the tables in ``folder`` (``results/tables`` of the project).

    Args:
        profile: `MAIN` judges each claim at the profile that claims.yaml gives it, `MAIN` by default; any other
            profile gives looks at the claims that are not judged there.
        folder: with a folder of tables for each profile.
        file: the claims.

    Raises:
        LowbitError: a table lacks a column that a statement names, or has rows without their pair.
    """
    folder = folder or paths.results() / "tables"
    if profile != MAIN:
        there = [claim for claim in load(file) if claim.get("profile", MAIN) != profile]
        return [_look(claim, profile, folder / profile) for claim in there if _looked_at(claim)]
    return [_judge(claim, folder / claim.get("profile", MAIN)) for claim in load(file)]


def judge_run(profile: str, folder: Path, file: Path | None = None) -> list[Claim]:
    """The tables of one run, of ``profile`` and in ``folder``, accepted or not: judged, or looked at as in `judge`."""
    tables = folder / "tables"
    here, others = [], []
    for claim in load(file):
        (here if claim.get("profile", MAIN) == profile else others).append(claim)
    return [_judge(claim, tables, profile) for claim in here] + [
        _look(claim, profile, tables) for claim in others if _looked_at(claim)
    ]


def judge_all(folder: Path | None = None, file: Path | None = None) -> list[Claim]:
    """All claims judged, followed by the looks at each other profile that has a table of theirs in ``folder``."""
    folder = folder or paths.results() / "tables"
    others = [name for name in reversed(profiles.NAMES) if any((folder / name).glob("*.csv"))]  # the larger first
    found = [claim for name in (MAIN, *others) for claim in judge(name, folder, file)]
    return [claim for claim in found if not (claim.look and claim.verdict == "no evidence")]


def _looked_at(claim: dict[str, Any]) -> list[dict[str, Any]]:
    """The statements of a look; a claim that trains no network has the same ones as for its judgment."""
    return claim["looks"] or (claim["statements"] if "profile" in claim else [])


def _look(claim: dict[str, Any], profile: str, folder: Path) -> Claim:
    statements = [_look_at(item, folder) for item in _looked_at(claim)]
    primary = [one for one in statements if one.role == "primary"]
    there = any(one.verdict == LOOK for one in statements)
    return _claim(
        claim,
        _looked_at(claim),
        statements,
        folder,
        profile,
        verdict=LOOK if there else "no evidence",
        look=True,
        direction=aim([one.direction for one in primary or statements]) if there else "",
    )


def _judge(claim: dict[str, Any], folder: Path, profile: str | None = None) -> Claim:
    profile = profile or claim.get("profile", MAIN)
    items = claim["statements"]
    pairs = [_decide(item, folder, growing=profile == MAIN) for item in items]
    primary = [i for i, item in enumerate(items) if item.get("role") == "primary"]
    verdicts = [pairs[i][0].verdict for i in primary]
    corrected = correct(verdicts, [pairs[i][1] for i in primary])
    statements = [one for one, _ in pairs]
    for i, before, after in zip(primary, verdicts, corrected, strict=True):
        if after != before:
            statements[i] = replace(statements[i], corrected=after)
    return _claim(claim, items, statements, folder, profile, verdict=combine(verdicts), corrected=combine(corrected))


def _claim(
    claim: dict[str, Any],
    items: Sequence[dict[str, Any]],
    statements: list[Statement],
    folder: Path,
    profile: str,
    **more: Any,
) -> Claim:
    tables = dict.fromkeys(item["table"] for item in items)
    cards = [card for card in (measuring.card(folder, table) for table in tables) if card]
    first = next((one for one in statements if one.role == "primary"), statements[0])
    commands = dict.fromkeys(card["command"] for card in cards if "command" in card)
    return Claim(
        id=claim["id"],
        claim=claim["claim"],
        paper=claim["paper"],
        profile=profile,
        effect=first.effect,
        unit=first.unit,
        interval=first.interval,
        method=METHOD,
        dataset=", ".join(dict.fromkeys(str(card.get("settings", {}).get("dataset", "none")) for card in cards)),
        seeds=min((one.seeds for one in statements if one.seeds), default=0),
        runs=list(dict.fromkeys(one.table for one in statements if one.table)),
        command="; ".join(commands) or ("lowbit study run" if profile == MAIN else ""),
        again=_again(cards, folder),
        statements=statements,
        **more,
    )


def _decide(item: dict[str, Any], folder: Path, growing: bool) -> tuple[Statement, float | None]:
    """The judged statement, and the p-value against it: 1 if it does not fail, None if no interval judged it."""
    measured = measuring.measure(item, folder, growing)
    found = measured.effect
    checks = [
        conditions.check(one, folder, item["table"], found.n if found else 0) for one in item.get("conditions", [])
    ]
    unmet = [check.says for check in checks if not check.met]
    p_value = None
    if measured.missing:
        said = "not tested" if growing else "no evidence"
    elif unmet:
        said = "not tested"
    elif item.get("descriptive"):
        said = "descriptive"
    elif found is None:
        said = "reproduced" if measured.holds else "not reproduced"
    else:
        said = verdict(found, item["expected"], item.get("margin", 0.0))
        failed = said == "not reproduced"
        p_value = p_against(found, item["expected"], item.get("margin", 0.0)) if failed else 1.0
    why = [f"{UNTRAINED}: {measured.missing}" if growing else measured.missing] if measured.missing else unmet
    return _statement(item, measured, said, why, conditions=checks), p_value


def _look_at(item: dict[str, Any], folder: Path) -> Statement:
    measured = measuring.measure(item, folder)
    if measured.missing:
        return _statement(item, measured, "no evidence", [measured.missing])
    if measured.effect is None:
        said = "reproduced" if measured.holds else "not reproduced"
    elif item.get("descriptive"):
        said = "inconclusive"
    else:
        said = verdict(measured.effect, item["expected"], item.get("margin", 0.0))
    return _statement(item, measured, LOOK, [], direction=DIRECTIONS[said])


def _statement(item: dict[str, Any], measured: measuring.Measured, said: str, why: list[str], **more: Any) -> Statement:
    found, margin = measured.effect, item.get("margin", 0.0)
    expected = (
        f"expected: {item['expected']}" + (f", margin {margin:g}" if margin else "") if "expected" in item else ""
    )
    measure = "slope over log2 of the steps" if "slope" in item else ""
    note = "; ".join(filter(None, [*why, measure, expected, measured.note]))
    common = {"role": item.get("role", "secondary"), "ours": item.get("ours", False), "table": measured.table}
    if found is None:
        return Statement(item["says"], said, unit=item.get("unit", ""), note=note, **common, **more)
    several = found.n > 1
    return Statement(
        item["says"],
        said,
        effect=found.mean,
        interval=(found.low, found.high) if several else None,
        unit=found.unit,
        seeds=found.n,
        note=note,
        of=found.of,
        detectable=detectable(found) if several else None,
        **common,
        **more,
    )


def _again(cards: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    """For each journal of the notebooks that made the tables, a command that repeats one of its trainings."""
    found = {}
    for card in cards:
        command = card.get("command", "")
        if not command.startswith("lowbit run "):
            continue
        notebook = command.split()[2]
        path = journal.kept(folder.name, notebook)
        trainings = [line for line in journal.read(path)[1:] if not journal.is_trial(line)]
        if not trainings or measuring.show_path(path) in found:
            continue
        with (folder / f"{card['table']}.csv").open(encoding="utf-8", newline="") as file:
            columns = set(next(csv.reader(file)))
        one = max(reversed(trainings), key=lambda line: _alike(line, columns))  # of the sweep that made the table
        row = {name: value for name, value in one["arm"].items() if name != "lr_factor"} | {"seed": one["seed"]}
        words = [notebook, *(f"{name}={value}" for name, value in row.items())]
        words += [] if folder.name == "desk" else ["--profile", folder.name]  # the default of 'lowbit again'
        found[measuring.show_path(path)] = shlex.join(["lowbit", "again", *words])
    return found


def _alike(line: dict[str, Any], columns: set[str]) -> int:
    rows = line["result"] if isinstance(line["result"], list) else [line["result"]]
    names = {*line["arm"], *(name for row in rows for name in row)}
    return len(names & columns) - len(names - columns)
