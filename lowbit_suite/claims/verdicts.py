"""Verdicts on judged claims, and directions of looks."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.metrics.statistics import Effect, holm
from lowbit_suite.claims.conditions import Check

LOOK = "look"
VERDICTS = ("reproduced", "not reproduced", "inconclusive", "not tested", "no evidence", "descriptive", LOOK)
DIRECTIONS = {"reproduced": "points to the claim", "not reproduced": "points against it", "inconclusive": "open"}
"""The direction that a look gives in place of each verdict."""

MIXED = "mixed"
"""The direction of a look whose statements disagree."""


@dataclass(frozen=True)
class Statement:
    """One comparison, with its outcome.

    Attributes:
        says: the statement in words.
        verdict: one of `VERDICTS`.
        effect: mean difference a - b; None without evidence, and for statements that have checks instead.
        interval: its 95 % confidence interval, or None.
        unit: of the effect.
        seeds: number of pairs.
        table: path of the rows, relative to the project; None if there is no such file.
        note: the reason why there is no evidence, or the test that was used.
        of: the things that ``seeds`` counts: seeds, speakers, or rounds of a timing.
        role: a claim's verdict is that of its primary statements; secondary ones are listed beside them.
        ours: whether it is a control or caveat of this project and not a statement of the paper.
        direction: direction of a look; empty for a verdict.
        detectable: the smallest effect that the design detects in four of five cases, in ``unit``.
        corrected: the verdict by Holm's test over the primary statements; empty if that changes nothing.
        conditions: the conditions on the trainings, with the measured numbers.
    """

    says: str
    verdict: str
    effect: float | None = None
    interval: tuple[float, float] | None = None
    unit: str = ""
    seeds: int = 0
    table: str | None = None
    note: str = ""
    of: str = "seeds"
    role: str = "secondary"
    ours: bool = False
    direction: str = ""
    detectable: float | None = None
    corrected: str = ""
    conditions: list[Check] = field(default_factory=list)

    @property
    def unmet(self) -> list[Check]:
        """The conditions that are not met; with any, the statement is not tested."""
        return [check for check in self.conditions if not check.met]


@dataclass(frozen=True)
class Claim:
    """A claim with its statements; `first` gives ``effect``, ``unit`` and ``interval``."""

    id: str
    claim: str
    paper: str
    verdict: str
    profile: str
    effect: float | None
    unit: str
    interval: tuple[float, float] | None
    method: str
    dataset: str
    seeds: int
    runs: list[str]
    command: str
    again: dict[str, str] = field(default_factory=dict)
    """For each journal of trainings (a path in the project), a command that repeats one of its trainings."""
    statements: list[Statement] = field(default_factory=list)
    corrected: str = ""
    """The verdict after the correction for several primary statements (see `correct`)."""
    look: bool = False
    """Whether it only shows effects and gives no verdict."""
    direction: str = ""
    """The direction of a look."""

    @property
    def weakened(self) -> bool:
        """Whether the correction changes the verdict."""
        return self.corrected not in ("", self.verdict)

    @property
    def primary(self) -> list[Statement]:
        """The statements that decide."""
        return [one for one in self.statements if one.role == "primary"]

    @property
    def first(self) -> Statement:
        """The statement that represents the claim in a table: the first primary one, or the first of a look."""
        return next(iter(self.primary or self.statements))

    @property
    def conditions(self) -> list[Check]:
        """The conditions of all its statements, each once."""
        return list(dict.fromkeys(check for one in self.statements for check in one.conditions))

    @property
    def tally(self) -> str:
        """The number of statements with each verdict or direction, in words."""
        counts = Counter(one.direction or one.verdict for one in self.statements)
        order = [*VERDICTS, *DIRECTIONS.values()]
        return ", ".join(f"{counts[word]} {word.removeprefix('points ')}" for word in order if counts[word])


def combine(verdicts: Sequence[str]) -> str:
    """The verdict on a claim from the verdicts on its primary statements.

    The claim is not reproduced if one statement is not, and reproduced if all are. It is not tested if one statement is
    not tested. It has no evidence if no statement has any. In all other cases it is inconclusive.
    """
    if "not reproduced" in verdicts:
        return "not reproduced"
    for word in ("no evidence", "reproduced"):
        if set(verdicts) == {word}:
            return word
    return "not tested" if "not tested" in verdicts else "inconclusive"


def correct(verdicts: Sequence[str], p_values: Sequence[float | None], error: float = 0.05) -> list[str]:
    """Correct the verdicts on a claim's primary statements for multiple testing, by Holm's test.

    If a true claim has several statements, the chance that at least one fails is larger than ``error``. So a failing
    statement stays "not reproduced" only if Holm's step-down test over all measured statements rejects it too. A claim
    whose statements all hold needs no correction, since chance would have to favor every one of them.

    Args:
        verdicts: the verdicts on the statements, each from its own interval.
        p_values: p-value against each statement (`lowbit.metrics.statistics.p_against`); None for a statement without
            an interval, which does not depend on chance.
        error: the probability that any true statement is rejected.
    """
    measured = [i for i, p in enumerate(p_values) if p is not None]
    rejected = dict(zip(measured, holm([p_values[i] for i in measured], error), strict=True))
    return [
        "inconclusive" if verdict == "not reproduced" and not rejected.get(i, True) else verdict
        for i, verdict in enumerate(verdicts)
    ]


def aim(directions: Sequence[str]) -> str:
    """The direction of a look, from the directions of its statements; `MIXED` if they disagree."""
    to, against, undecided = DIRECTIONS.values()
    found = set(directions) - {""}
    if {to, against} <= found:
        return MIXED
    return next((word for word in (against, undecided, to) if word in found), undecided)


def judgment(claim: Claim, mark: str = "**") -> str:
    """The verdict between marks, with the corrected one if it differs; for a look, its direction."""
    if claim.look:
        return claim.direction or claim.verdict
    more = f" (corrected: {claim.corrected})" if claim.weakened else ""
    return f"{mark}{claim.verdict}{mark}{more}"


def effect(judged: Statement) -> str:
    """The effect with interval and seeds, in words; empty if nothing was measured."""
    if judged.effect is None:
        return ""
    if judged.interval is None:
        return f"{judged.effect:+.3g} {judged.unit}".strip()
    low, high = judged.interval
    return str(Effect(judged.effect, low, high, judged.seeds, unit=judged.unit, of=judged.of))


def outcome(judged: Statement) -> str:
    """The verdict on a statement, or the direction of a look at it, in words."""
    more = f" (corrected: {judged.corrected})" if judged.corrected else ""
    return (judged.direction or judged.verdict) + more


def save(claims: Sequence[Claim], path: Path) -> None:
    """Write claims to a file that `read` reads."""
    from lowbit_suite.running.run_json import write_json

    write_json(path, [asdict(claim) for claim in claims])


def read(folder: Path) -> list[Claim]:
    """Read the claims that ``lowbit claims`` wrote to ``folder``; empty without a ``claims.json``.

    Raises:
        LowbitError: another version wrote the file.
    """
    path = folder / "claims.json"
    if not path.exists():
        return []
    try:
        found = [_claim(item) for item in json.loads(path.read_text(encoding="utf-8"))]
        if unknown := {one.verdict for claim in found for one in (claim, *claim.statements)} - set(VERDICTS):
            raise ValueError(f"no verdict is called {', '.join(sorted(unknown))}")
        return found
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LowbitError(
            f"{path.name} was not written by this version ({error}): write it again with 'lowbit claims'"
        ) from None


def _claim(item: dict) -> Claim:
    statements = [
        Statement(**{**one, "conditions": [Check(**check) for check in one.get("conditions", ())]})
        for one in item["statements"]
    ]
    return Claim(**{**item, "look": item["look"], "statements": statements})  # older files have no looks


def judged(claims: Sequence[Claim]) -> dict[str, Claim]:
    """The judged claims by id, without the looks."""
    return {claim.id: claim for claim in claims if not claim.look}


def looks(claims: Sequence[Claim], id: str) -> list[Claim]:
    """The looks at one claim, one per profile."""
    return [claim for claim in claims if claim.look and claim.id == id]
