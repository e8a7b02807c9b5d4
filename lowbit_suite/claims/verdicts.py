"""What is said of a claim: verdicts where it is judged, directions where trainings are only looked at."""

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
"""What a look says where a judgment would give the verdict."""

MIXED = "mixed"
"""The direction of a look whose statements point both ways."""


@dataclass(frozen=True)
class Statement:
    """One comparison, with its outcome.

    Attributes:
        says: the statement in words.
        verdict: one of `VERDICTS`.
        effect: mean difference a - b; None without evidence, or where checks hold or do not.
        interval: its bounds of 95 %, or None.
        unit: of the effect.
        seeds: how many pairs there are.
        table: path of the rows, relative to the project; None if there is no such file.
        note: why there is no evidence, or what the test was.
        of: what ``seeds`` counts: seeds, speakers, or rounds of a timing.
        role: a claim's verdict is that of its primary statements; secondary ones are listed beside them.
        ours: a control or caveat of this project's own, not a statement of the paper.
        direction: where a look points; empty for a verdict.
        detectable: the smallest effect that the design detects in four of five cases, in ``unit``.
        corrected: the verdict by Holm's test over the primary statements; empty where that changes nothing.
        conditions: what had to be true of the trainings, with what was found.
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
        """The conditions that keep it from being tested."""
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
    """For each journal of trainings (a path in the project) a command that trains one of its rows once more."""
    statements: list[Statement] = field(default_factory=list)
    corrected: str = ""
    """The verdict after the correction for several primary statements (see `correct`)."""
    look: bool = False
    """Whether it shows effects only and passes no verdict."""
    direction: str = ""
    """Of a look: where its statements point."""

    @property
    def weakened(self) -> bool:
        """Whether the correction makes another verdict of it."""
        return self.corrected not in ("", self.verdict)

    @property
    def primary(self) -> list[Statement]:
        """The statements that decide."""
        return [one for one in self.statements if one.role == "primary"]

    @property
    def first(self) -> Statement:
        """The statement that stands for the claim in a table: the first primary one; of a look, the first."""
        return next(iter(self.primary or self.statements))

    @property
    def conditions(self) -> list[Check]:
        """The conditions of all its statements, each once."""
        return list(dict.fromkeys(check for one in self.statements for check in one.conditions))

    @property
    def tally(self) -> str:
        """How many of its statements have which verdict or direction, in words."""
        counts = Counter(one.direction or one.verdict for one in self.statements)
        order = [*VERDICTS, *DIRECTIONS.values()]
        return ", ".join(f"{counts[word]} {word.removeprefix('points ')}" for word in order if counts[word])


def combine(verdicts: Sequence[str]) -> str:
    """The verdict on a claim from those on its primary statements.

    One that is not reproduced decides; all have to be reproduced for the claim to be. Where one is not tested, neither
    is the claim. Without evidence for any there is none for the claim; all else is inconclusive.
    """
    if "not reproduced" in verdicts:
        return "not reproduced"
    for word in ("no evidence", "reproduced"):
        if set(verdicts) == {word}:
            return word
    return "not tested" if "not tested" in verdicts else "inconclusive"


def correct(verdicts: Sequence[str], p_values: Sequence[float | None], error: float = 0.05) -> list[str]:
    """The verdicts on the primary statements of a claim, those that fail corrected for their number by Holm's test.

    If a claim that is true has several statements, one of them fails more often than ``error`` allows, by the seeds
    drawn. A statement that fails stays "not reproduced" only if Holm's step-down test over all measured ones rejects
    it as well. All of them holding needs no correction: it takes the luck of every one.

    Args:
        verdicts: on the statements, each by its own interval.
        p_values: against each (`lowbit.metrics.statistics.p_against`); None for one without an interval, which is no
            matter of chance.
        error: the chance that any true statement is rejected.
    """
    measured = [i for i, p in enumerate(p_values) if p is not None]
    rejected = dict(zip(measured, holm([p_values[i] for i in measured], error), strict=True))
    return [
        "inconclusive" if verdict == "not reproduced" and not rejected.get(i, True) else verdict
        for i, verdict in enumerate(verdicts)
    ]


def aim(directions: Sequence[str]) -> str:
    """Where a look at a claim points, from the directions of its statements; `MIXED` where they point both ways."""
    to, against, undecided = DIRECTIONS.values()
    found = set(directions) - {""}
    if {to, against} <= found:
        return MIXED
    return next((word for word in (against, undecided, to) if word in found), undecided)


def judgment(claim: Claim, mark: str = "**") -> str:
    """The verdict between marks, and the corrected one where it differs; of a look its direction."""
    if claim.look:
        return claim.direction or claim.verdict
    more = f" (corrected: {claim.corrected})" if claim.weakened else ""
    return f"{mark}{claim.verdict}{mark}{more}"


def effect(judged: Statement) -> str:
    """The effect with interval and seeds, in words; empty where nothing was measured."""
    if judged.effect is None:
        return ""
    if judged.interval is None:
        return f"{judged.effect:+.3g} {judged.unit}".strip()
    low, high = judged.interval
    return str(Effect(judged.effect, low, high, judged.seeds, unit=judged.unit, of=judged.of))


def outcome(judged: Statement) -> str:
    """The verdict on a statement, or where a look at it points, in words."""
    more = f" (corrected: {judged.corrected})" if judged.corrected else ""
    return (judged.direction or judged.verdict) + more


def save(claims: Sequence[Claim], path: Path) -> None:
    """Writes claims for `read`."""
    from lowbit_suite.running.run_json import write_json

    write_json(path, [asdict(claim) for claim in claims])


def read(folder: Path) -> list[Claim]:
    """The claims that ``lowbit claims`` left in ``folder``; none where there is no ``claims.json``.

    Raises:
        LowbitError: a file that this version has not written.
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
            f"{path.name} is not that of this version ({error}): make it again with 'lowbit claims'"
        ) from None


def _claim(item: dict) -> Claim:
    statements = [
        Statement(**{**one, "conditions": [Check(**check) for check in one.get("conditions", ())]})
        for one in item["statements"]
    ]
    return Claim(**{**item, "look": item["look"], "statements": statements})  # older files have no looks


def judged(claims: Sequence[Claim]) -> dict[str, Claim]:
    """The claims that were judged and not only looked at, by id."""
    return {claim.id: claim for claim in claims if not claim.look}


def looks(claims: Sequence[Claim], id: str) -> list[Claim]:
    """The looks at one claim, one a profile."""
    return [claim for claim in claims if claim.look and claim.id == id]
