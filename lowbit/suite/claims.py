"""``lowbit claims``: what the recorded tables say about each claim, and nothing else does.

``claims.yaml`` beside this file holds the claims as statements. A statement is judged from the rows of a table that a
notebook saved by `lowbit.save_table` (one row a measurement, with its seed), not from a verdict written down anywhere.
Where there is no such table the verdict is *no evidence*.
"""

import csv
import itertools
import json
import math
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit import paths
from lowbit.errors import LowbitError
from lowbit.metrics.statistics import Effect, interval, paired_difference, verdict
from lowbit.suite import journal, profiles

if TYPE_CHECKING:
    import pandas
    from IPython.display import Markdown

FILE = Path(__file__).with_name("claims.yaml")
MAIN = "desk"
"""The profile whose tables decide; the others are a second judgement beside it."""

METHOD = (
    "paired differences by seed (by speaker where each is left out in turn), mean with Student's t interval of 95 %; "
    "at least 5 of them decide"
)
ERROR = 0.05
"""What intervals leave outside: a statement's its own; corrected, those of all statements of a claim together."""

VERDICTS = ("reproduced", "not reproduced", "inconclusive", "no evidence")
KEYS = {
    "says",
    "table",
    "each",
    "a",
    "b",
    "value",
    "b_value",
    "times",
    "pair",
    "expected",
    "margin",
    "unit",
    "all",
    "log",
}


@dataclass(frozen=True)
class Statement:
    """One comparison, with what came of it.

    Attributes:
        says: the statement in words.
        verdict: reproduced, not reproduced, inconclusive or no evidence.
        effect: mean difference a - b; None without evidence, or where nothing is measured but holds or does not.
        interval: its bounds of 95 %, or None.
        unit: of the effect.
        seeds: how many decided.
        table: path of the rows, relative to the project; None if there is no such file.
        note: why there is no evidence, or what the test was.
        of: what ``seeds`` counts: seeds, speakers, or rounds of a timing.
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


@dataclass(frozen=True)
class Claim:
    """A claim and the judgement of its statements, the first of which gives ``effect``, ``unit`` and ``interval``."""

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
    """The verdict where, of m statements, only an interval of 1 - 5 %/m speaks against the claim (see `correct`)."""

    @property
    def weakened(self) -> bool:
        """Whether the correction makes another verdict of it."""
        return self.corrected not in ("", self.verdict)


def load(file: Path = FILE) -> list[dict[str, Any]]:
    """The claims as written down, each statement with the `each` combinations spelt out.

    Raises:
        LowbitError: an entry with unknown or missing keys.
    """
    import yaml

    claims = yaml.safe_load(file.read_text(encoding="utf-8"))
    for claim in claims:
        claim["statements"] = [one for item in claim["statements"] for one in _spelt_out(claim["id"], item)]
    return claims


def _spelt_out(claim: str, item: dict[str, Any]) -> list[dict[str, Any]]:
    needed = {"says", "table"} | ({"all"} if "all" in item else {"a", "value", "expected", "unit"})
    if unknown := sorted(set(item) - KEYS) + sorted(needed - set(item)):
        raise LowbitError(f"claim {claim}: a statement has unknown or lacks keys: {', '.join(unknown)}")
    each = item.get("each", {})
    made = []
    for values in itertools.product(*each.values()):
        chosen = dict(zip(each, values, strict=True))
        made.append({k: v.format(**chosen) if k in ("says", "a", "b") else v for k, v in item.items() if k != "each"})
    return made


def judge(profile: str = MAIN, folder: Path | None = None, file: Path = FILE) -> list[Claim]:
    """Every claim, judged by the tables of ``profile`` in ``folder`` (``results/tables`` of the project).

    Raises:
        LowbitError: a table that lacks a column which a statement names, or rows without their pair.
    """
    folder = (folder or paths.results() / "tables") / profile
    return [_judge(claim, profile, folder) for claim in load(file)]


def judge_run(profile: str, folder: Path, file: Path = FILE) -> list[Claim]:
    """`judge` for the tables of one run, of ``profile`` and in ``folder``, whether accepted or not."""
    return [_judge(claim, profile, folder / "tables") for claim in load(file)]


def judge_all(folder: Path | None = None, file: Path = FILE) -> dict[str, list[Claim]]:
    """`judge` for `MAIN`, and for each other profile that has tables in ``folder``."""
    folder = folder or paths.results() / "tables"
    others = [name for name in profiles.NAMES if name != MAIN and any((folder / name).glob("*.csv"))]
    return {name: judge(name, folder, file) for name in (MAIN, *others)}


def _judge(claim: dict[str, Any], profile: str, folder: Path) -> Claim:
    statements = [_decide(item, folder) for item in claim["statements"]]
    measured = sum(statement.interval is not None for statement in statements)
    strict = [  # a wider interval lets none fail that held
        _decide(item, folder, 1 - ERROR / max(measured, 1)).verdict if one.verdict == "not reproduced" else one.verdict
        for item, one in zip(claim["statements"], statements, strict=True)
    ]
    cards = [_card(folder, item["table"]) for item in claim["statements"]]
    cards = [card for card in cards if card]
    main = statements[0]
    return Claim(
        id=claim["id"],
        claim=claim["claim"],
        paper=claim["paper"],
        verdict=combine([statement.verdict for statement in statements]),
        profile=profile,
        effect=main.effect,
        unit=main.unit,
        interval=main.interval,
        method=METHOD,
        dataset=", ".join(dict.fromkeys(str(card["settings"].get("dataset", "none")) for card in cards)),
        seeds=min((statement.seeds for statement in statements if statement.table), default=0),
        runs=list(dict.fromkeys(statement.table for statement in statements if statement.table)),
        command="; ".join(dict.fromkeys(card["command"] for card in cards)),
        again=_again(cards, folder),
        corrected=correct([one.verdict for one in statements], strict),
        statements=statements,
    )


def _again(cards: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    found = {}
    for card in cards:
        notebook = card["command"].removeprefix("lowbit run ").split()[0]
        path = journal.kept(folder.name, notebook)
        trainings = [line for line in journal.read(path)[1:] if not journal.is_trial(line)]
        if not trainings or _shown(path) in found:
            continue
        with (folder / f"{card['table']}.csv").open(encoding="utf-8", newline="") as file:
            columns = set(next(csv.reader(file)))
        one = max(reversed(trainings), key=lambda line: _alike(line, columns))  # of the sweep that made the table
        row = {name: value for name, value in one["arm"].items() if name != "lr_factor"} | {"seed": one["seed"]}
        words = [notebook, *(f"{name}={value}" for name, value in row.items())]
        words += [] if folder.name == MAIN else ["--profile", folder.name]
        found[_shown(path)] = shlex.join(["lowbit", "again", *words])
    return found


def _alike(line: dict[str, Any], columns: set[str]) -> int:
    rows = line["result"] if isinstance(line["result"], list) else [line["result"]]
    names = {*line["arm"], *(name for row in rows for name in row)}
    return len(names & columns) - len(names - columns)


def combine(verdicts: list[str]) -> str:
    """The verdict on a claim from those on its statements.

    One that is not reproduced decides; all have to be reproduced for the claim to be; without evidence for any there is
    none for the claim; all else is inconclusive.
    """
    if all(verdict == "no evidence" for verdict in verdicts):
        return "no evidence"
    if "not reproduced" in verdicts:
        return "not reproduced"
    return "reproduced" if set(verdicts) == {"reproduced"} else "inconclusive"


def correct(verdicts: list[str], strict: list[str]) -> str:
    """`combine`, with Bonferroni's correction of what speaks against the claim.

    If a claim that is true has m statements, each has its own chance to fail by the seeds drawn, so one of them fails
    more often than 5 % allow. Here one that fails decides only if it also does by the interval of 1 - 5 %/m. That all
    of them hold needs no correction: it takes the luck of every one.

    Args:
        verdicts: on the statements, each by its own interval of 95 %.
        strict: the same by the wider interval.
    """
    if "not reproduced" in strict:
        return "not reproduced"
    return combine(["inconclusive" if verdict == "not reproduced" else verdict for verdict in verdicts])


def _decide(item: dict[str, Any], folder: Path, confidence: float = 1 - ERROR) -> Statement:
    import pandas

    path = _file(folder, f"{item['table']}.csv")
    if not path.is_file():
        return Statement(item["says"], "no evidence", note=f"there is no table {item['table']}")
    shown = _shown(path)
    frame = pandas.read_csv(path)
    if "all" in item:
        column = _column(_rows(frame, item["a"], item) if "a" in item else frame, item["all"], item)
        holds = bool(len(column)) and bool(column.astype(bool).all())
        note = f"{int(column.astype(bool).sum())} of {len(column)} checks hold"
        return Statement(item["says"], "reproduced" if holds else "not reproduced", table=shown, note=note)
    pair = _pair(frame, item)
    a = _values(frame, item["a"], item["value"], pair, item)
    if a is None:
        return Statement(item["says"], "no evidence", table=shown, note=f"no row fits {item['a']}")
    if "b" in item or "b_value" in item:
        b = _values(frame, item.get("b", item["a"]), item.get("b_value", item["value"]), pair, item)
        if b is None:
            return Statement(item["says"], "no evidence", table=shown, note=f"no row fits {item['b']}")
        effect = paired_difference(a, b, confidence, unit=item["unit"])
    else:
        effect = Effect(*interval(a.tolist(), confidence), n=len(a), unit=item["unit"])
    margin = item.get("margin", 0.0)
    said = verdict(effect, item["expected"], margin)
    note = f"expected: {item['expected']}" + (f", margin {margin:g}" if margin else "")
    bounds = None if effect.n == 1 else (effect.low, effect.high)
    of = {"repeat": "rounds", "speaker": "speakers"}.get(pair, "seeds")
    return Statement(item["says"], said, effect.mean, bounds, item["unit"], effect.n, shown, note, of)


def _shown(path: Path) -> str:
    return str(path.relative_to(paths.project())) if path.is_relative_to(paths.project()) else path.name


def _values(frame: "pandas.DataFrame", rows: str, value: str | list[str], pair: str, item: dict[str, Any]):
    """One number a seed: the mean over its rows and over the columns, if there are several; None without rows."""
    chosen = _rows(frame, rows, item)
    if chosen.empty:
        return None
    columns = [_column(chosen, name, item) for name in ([value] if isinstance(value, str) else value)]
    mean = sum(columns) / len(columns) * item.get("times", 1)
    if item.get("log"):  # ratios, as of times, multiply
        mean = mean.map(math.log)
    return mean.groupby(_column(chosen, pair, item)).mean()


def _pair(frame: "pandas.DataFrame", item: dict[str, Any]) -> str:
    """The column whose values are the pairs: of several named, the first that has more than one value."""
    named = item.get("pair", "seed")
    columns = [named] if isinstance(named, str) else named
    return next((name for name in columns if _column(frame, name, item).nunique() > 1), columns[-1])


def _rows(frame: "pandas.DataFrame", rows: str, item: dict[str, Any]) -> "pandas.DataFrame":
    try:
        return frame.query(rows)
    except Exception as error:  # pandas raises half a dozen kinds
        raise LowbitError(f"{item['table']}: {rows!r} cannot be asked of it: {error}") from None


def _column(frame: "pandas.DataFrame", name: str, item: dict[str, Any]):
    if name not in frame.columns:
        raise LowbitError(f"{item['table']} has no column {name!r}; it has {', '.join(frame.columns)}")
    return frame[name]


def _file(folder: Path, name: str) -> Path:
    """In ``folder``, or in the folders of the notebooks that a run has there."""
    return next(iter([*folder.glob(name), *folder.glob(f"*/{name}")]), folder / name)


def _card(folder: Path, table: str) -> dict[str, Any] | None:
    path = _file(folder, f"{table}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write(claims: list[Claim], folder: Path) -> tuple[Path, Path]:
    """Writes ``claims.json`` and ``claims.md`` to ``folder``; returns both paths."""
    from lowbit.suite.runfile import write_json

    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_text = folder / "claims.json", folder / "claims.md"
    write_json(as_json, [asdict(claim) for claim in claims])
    as_text.write_text(markdown(claims), encoding="utf-8")
    return as_json, as_text


def read(folder: Path) -> list[Claim]:
    """The claims that `write` left in ``folder``; none where there is no ``claims.json``.

    Raises:
        LowbitError: a file that `write` has not written.
    """
    path = folder / "claims.json"
    if not path.exists():
        return []
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        found = [Claim(**{**item, "statements": [Statement(**one) for one in item["statements"]]}) for item in tree]
        if unknown := {one.verdict for claim in found for one in (claim, *claim.statements)} - set(VERDICTS):
            raise ValueError(f"no verdict is called {', '.join(sorted(unknown))}")
        return found
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LowbitError(
            f"{path.name} is not that of this version ({error}): make it again with 'lowbit claims'"
        ) from None


def markdown(claims: list[Claim]) -> str:
    """The claims for people: a table, then for each claim and profile its statements, rows, run card and command."""
    by_profile = {
        name: {c.id: c for c in claims if c.profile == name} for name in dict.fromkeys(c.profile for c in claims)
    }
    main, *others = by_profile
    lines = [
        "# The claims, judged",
        "",
        f"Made by `lowbit claims` from the tables of the profile {main}. {METHOD[0].upper()}{METHOD[1:]}.",
        "A claim is reproduced if all its statements are, and not reproduced if one is not. What is written here is",
        "true of small networks, few images and short trainings; see the run cards.",
        "Of many statements one fails by chance more easily than one alone. *Corrected* for that (Bonferroni), of m",
        "statements of a claim one that fails decides only if it does so by an interval of 1 - 5 %/m as well; this",
        "verdict stands in brackets where it is another one.",
        *(f"The column *at {name}* is a second judgement, from the tables of that profile." for name in others),
        "",
        "| claim | says | verdict | first statement | data | seeds |" + "".join(f" at {name} |" for name in others),
        "|---|---|---|---|---|---|" + "---|" * len(others),
    ]
    for claim in by_profile[main].values():
        cells = [
            claim.id,
            claim.claim,
            judgement(claim),
            effect(claim.statements[0]),
            claim.dataset,
            claim.seeds or "",
        ]
        cells += [judgement(by_profile[name][claim.id], mark="") for name in others]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    for claim in by_profile[main].values():
        lines += [
            "",
            f"## {claim.id}: {claim.claim}",
            "",
            f"{claim.paper}. {judgement(claim)}.",
            "",
            *_evidence(claim),
        ]
        for name in others:
            other = by_profile[name][claim.id]
            lines += [
                "",
                f"### {claim.id} at {name}",
                "",
                f"{other.dataset or 'no data'}. {judgement(other)}.",
                "",
                *_evidence(other),
            ]
    for name in by_profile:
        lines += costs(name)
    return "\n".join(lines) + "\n"


def _evidence(claim: Claim) -> list[str]:
    lines = _statements(claim)
    for table in claim.runs:
        card = (link := _link(table)).with_suffix(".json")
        lines += ["", f"Rows: [{table}]({link}), run card: [{card.name}]({card})."]
    if pictures := _pictures(claim):
        lines += ["", "Pictures: " + ", ".join(f"[{path.name}]({path.as_posix()})" for path in pictures)]
    if claim.command:
        lines += ["", f"Again: `{claim.command}`"]
    for path, command in claim.again.items():
        lines += [
            "",
            f"Each training, with its result and its seconds: [{path}]({_link(path)}). One again: `{command}`",
        ]
    return lines


def _pictures(claim: Claim) -> list[Path]:
    """The figures kept of the notebooks that made its tables, from ``results/claims.md``."""
    numbers = dict.fromkeys(Path(table).name[:3] for table in claim.runs)  # "02_"
    folder = paths.results() / "figures" / claim.profile
    return [path.relative_to(paths.results()) for number in numbers for path in sorted(folder.glob(f"{number}*.png"))]


def costs(profile: str) -> list[str]:
    """What the trainings in the journals of a profile took, as the lines of a section; none without journals."""
    rows = []
    for path in sorted(journal.kept(profile, "any").parent.glob("*.jsonl")):
        lines = journal.read(path)[1:]
        trials = [line for line in lines if journal.is_trial(line)]
        minutes = sum(line["seconds"] for line in lines) / 60
        rows.append(f"| {path.stem} | {len(trials)} | {len(lines) - len(trials)} | {minutes:.0f} |")
    if not rows:
        return []
    return [
        "",
        f"## What the trainings at {profile} cost",
        "",
        "Where trials are listed, each arm's learning rate was chosen first: at the same multiples of its own rate, on",
        "a validation part of the training split, with a seed that is not judged; the test split was not looked at.",
        "Every training ran on one core.",
        "",
        "| notebook | trials | judged trainings | core minutes |",
        "|---|---|---|---|",
        *rows,
    ]


def _link(path: str) -> Path:
    """From ``results/claims.md``."""
    return Path(path).relative_to("results") if path.startswith("results/") else Path(path)


def _statements(claim: Claim) -> list[str]:
    lines = ["| statement | effect | verdict | test |", "|---|---|---|---|"]
    for statement in claim.statements:
        lines.append(f"| {statement.says} | {effect(statement)} | {statement.verdict} | {statement.note} |")
    return lines


def show(*ids: str, folder: Path | None = None) -> "Markdown":
    """What ``lowbit claims`` last wrote about these claims, for a notebook: verdict, statements, rows and command.

    Args:
        ids: such as ``"D1"``.
        folder: with ``claims.json``; the results, or the project's own where ``LOWBIT_RESULTS`` has none.

    Raises:
        LowbitError: a claim that is not judged there.
    """
    from IPython.display import Markdown

    everything = read(folder or paths.recorded("claims.json").parent)
    judged = {claim.id: claim for claim in everything if claim.profile == MAIN}
    lines = []
    for id in ids:
        if id not in judged:
            there = ", ".join(judged) or "none"
            raise LowbitError(f"results/claims.json has no claim {id!r} (it has {there}); 'lowbit claims' writes it")
        claim = judged[id]
        lines += ["", f"**{id}: {claim.claim}.** At {claim.profile}: {judgement(claim)}.", "", *_statements(claim)]
        if claim.runs:
            lines += ["", f"From {', '.join(f'`{table}`' for table in claim.runs)}; again: `{claim.command}`"]
        for other in everything:
            if other.id == id and other.profile != MAIN:
                lines += ["", f"At {other.profile} ({other.dataset}): {judgement(other)}."]
    return Markdown("\n".join(lines).lstrip())


def judgement(claim: Claim, mark: str = "**") -> str:
    """The verdict between marks, and the corrected one where it differs."""
    more = f" (corrected: {claim.corrected})" if claim.weakened else ""
    return f"{mark}{claim.verdict}{mark}{more}"


def effect(judged: Statement) -> str:
    """What was measured, with interval and seeds, in words; empty where nothing was."""
    if judged.effect is None:
        return ""
    if judged.interval is None:
        return f"{judged.effect:+.3g} {judged.unit}".strip()
    low, high = judged.interval
    return str(Effect(judged.effect, low, high, judged.seeds, unit=judged.unit, of=judged.of))
