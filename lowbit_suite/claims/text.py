"""Formats the judged claims for ``results/claims.md`` and for the notebooks that show them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit import paths
from lowbit.errors import LowbitError
from lowbit_suite import profiles
from lowbit_suite.claims import anchors, verdicts
from lowbit_suite.claims.conditions import Check
from lowbit_suite.claims.verdicts import Claim, Statement, effect, judgment, outcome
from lowbit_suite.records import journal

if TYPE_CHECKING:
    from IPython.display import Image, Markdown

LEGEND = (
    "The study's effect by length of training: mean with 95 % interval, hollow below five seeds; a dot is one pair of "
    "trainings, a dotted line the margin"
)
"""What the study's figures show."""

INTRODUCTION = """\
# The claims, judged

Made by `lowbit claims` from the tables of the study, which are long trainings of networks that have learned, and by
nothing else. {method}.

- **Conditions.** Each claim names conditions that its trainings have to meet, written down before they ran: the
  full-precision twin has learned, and the weights had time to move. A statement is *not tested* while its trainings
  have not been run or a condition fails, whatever its numbers say. *Not tested* is no verdict on the paper. Where a
  length of training turned out too short for its condition, it was lengthened; `notebooks/claims.yaml` lists that.
- **Verdicts.** The *primary* statements, in bold, decide. A claim is reproduced if all of them are, and not reproduced
  if one is not. Secondary and descriptive statements stand beside them and change no verdict; those marked *ours* are
  controls and caveats that the paper does not have. Of many statements one fails by chance more easily than one alone,
  so those that fail are corrected by Holm's test over the primary statements of the claim; where that changes the
  verdict, the corrected one is in brackets.
- **Detectable.** The smallest true effect that the design would have detected in four of five repetitions (two-sided
  test of 5 %). An effect that is smaller may exist and stay unseen.
- **Looks.** The notebooks' own trainings are short: tens to hundreds of steps. They show effects with intervals and
  where these point, for readers with an hour. A look tests the regime of short training, not the paper, and passes no
  verdict. It is open where the interval allows both, or with fewer than five seeds, and mixed where its statements
  point both ways.
- **{untrained_claims}.** This claim trains no network, so the tables of `desk` judge it.
"""


def write(claims: Sequence[Claim], folder: Path) -> tuple[Path, Path]:
    """Write ``claims.json`` and ``claims.md`` to ``folder``; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_text = folder / "claims.json", folder / "claims.md"
    verdicts.save(claims, as_json)
    as_text.write_text(markdown(claims), encoding="utf-8")
    return as_json, as_text


def markdown(claims: Sequence[Claim]) -> str:
    """The claims as Markdown: a table, then for each claim its statements, conditions, evidence and looks."""
    judged = verdicts.judged(claims)
    profiles = list(dict.fromkeys(claim.profile for claim in claims if claim.look))
    main = next(iter(judged.values())).profile
    method = next(iter(judged.values())).method
    elsewhere = [claim.id for claim in judged.values() if claim.profile != main]
    text = INTRODUCTION.format(method=method[:1].upper() + method[1:], untrained_claims=", ".join(elsewhere))
    lines = text.splitlines() if elsewhere else text.splitlines()[:-1]
    head = ["claim", "says", f"verdict at {main}", "first primary statement", *(f"look at {name}" for name in profiles)]
    lines += ["", *_row(*head), "|" + "---|" * len(head)]
    for claim in judged.values():
        looks = {look.profile: look for look in verdicts.looks(claims, claim.id)}
        cells = [_cell(looks.get(name)) for name in profiles]
        where = "" if claim.profile == main else f" (at {claim.profile})"
        lines += _row(claim.id, claim.claim, judgment(claim) + where, effect(claim.first), *cells)
    for claim in judged.values():
        lines += ["", f"## {claim.id}: {claim.claim}", "", f"{claim.paper}. At {claim.profile}: {judgment(claim)}."]
        lines += ["", *statements(claim), *conditions(claim), *_evidence(claim), *_published(claim)]
        for look in verdicts.looks(claims, claim.id):
            lines += ["", f"### Look at {claim.id} at {look.profile}", ""]
            lines += [f"{look.dataset or 'No data'}: {judgment(look)}.", "", *statements(look), *_evidence(look)]
    lines += study_costs()
    for name in profiles:
        lines += costs(name)
    return "\n".join(lines) + "\n"


def _published(claim: Claim) -> list[str]:
    """The published anchors of the claim; empty if the project has no file of them."""
    lines = anchors.markdown(claim.id) if (paths.notebooks() / anchors.FILE).is_file() else []
    return ["", *lines] if lines else []


def statements(claim: Claim) -> list[str]:
    """The statements of a claim as the lines of a table."""
    head = ["statement", "effect", "points to" if claim.look else "verdict", "detectable", "test"]
    lines = [*_row(*head), "|" + "---|" * len(head)]
    for one in claim.statements:
        says = f"**{one.says}**" if one.role == "primary" else one.says
        says += " (ours)" if one.ours else ""
        lines += _row(says, effect(one), outcome(one), detectable(one), one.note)
    return lines


def detectable(judged: Statement) -> str:
    """The smallest effect that the design detects, in words; empty if nothing was measured."""
    return "" if judged.detectable is None else f"{judged.detectable:.2g} {judged.unit}".strip()


def conditions(claim: Claim) -> list[str]:
    """The conditions of a claim with the measured numbers, as lines of a list; empty without conditions."""
    met = {True: "met", False: "**not met**"}
    lines = [f"- {met[check.met]}: {check.says}{_scope(check, claim)}" for check in claim.conditions]
    return ["", "Conditions, written down before the runs:", "", *lines] if lines else []


def _scope(check: Check, claim: Claim) -> str:
    """Name the statements that a condition concerns, unless it concerns all: one may be met where its like is not."""
    under = [statement.says for statement in claim.statements if check in statement.conditions]
    if len(under) == len(claim.statements):
        return ""
    few = "; ".join(f"*{says}*" for says in under)
    return f". For {few}" if len(under) <= 2 else f". For {len(under)} of the {len(claim.statements)} statements"


def _row(*cells: object) -> list[str]:
    return ["| " + " | ".join(str(cell) for cell in cells) + " |"]


def _cell(look: Claim | None) -> str:
    return f"{judgment(look)} ({look.tally})" if look else ""


def _evidence(claim: Claim) -> list[str]:
    lines = []
    for table in claim.runs:
        card = (link := _link(table)).with_suffix(".json")
        lines += ["", f"Rows: [{table}]({link}), run card: [{card.name}]({card})."]
    if (drawn := paths.results() / figure(claim.id)).exists() and claim.profile == profiles.STUDY:
        from lowbit_suite.plotting import alt_text

        lines += ["", f"![{alt_text(drawn)}]({figure(claim.id)})", "", f"{LEGEND}."]
    elif pictures := _pictures(claim):
        lines += ["", "Pictures: " + ", ".join(f"[{path.name}]({path.as_posix()})" for path in pictures)]
    if claim.command:
        lines += ["", f"Again: `{claim.command}`"]
    for path, command in claim.again.items():
        lines += [
            "",
            f"Each training, with its result and its seconds: [{path}]({_link(path)}). One again: `{command}`",
        ]
    return lines


def figure(id: str) -> str:
    """The place of a claim's figure from the study in ``results/``, whether it is drawn yet or not."""
    return f"figures/{profiles.STUDY}/{id}.png"


def _pictures(claim: Claim) -> list[Path]:
    """The figures of the notebooks that made the claim's tables; from ``results/``."""
    numbers = dict.fromkeys(Path(table).name[:3] for table in claim.runs)  # "02_"
    folder = paths.results() / "figures" / claim.profile
    return [path.relative_to(paths.results()) for number in numbers for path in sorted(folder.glob(f"{number}*.png"))]


def study_costs() -> list[str]:
    """The trainings and hours of the study's tables, as lines of a section; empty without tables."""
    rows = []
    for path in sorted((paths.results() / "tables" / profiles.STUDY).glob("*.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        kinds = ", ".join(f"{count} on {kind}" for kind, count in card["kinds"].items())
        rows += _row(path.stem, card["settings"]["trainings"], f"{card['core_hours']:.1f}", kinds)
    if not rows:
        return []
    return [
        "",
        "## What the study's trainings cost",
        "",
        "Each ran on one core. Trainings that are compared with each other (same table, length and seed) ran on the",
        "same kind of processor, which is named by its fastest arithmetic.",
        "",
        *_row("table", "trainings", "core hours", "processors"),
        "|---|---|---|---|",
        *rows,
    ]


def costs(profile: str) -> list[str]:
    """The cost of the trainings in a profile's journals, as lines of a section; empty without journals."""
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


def show(*ids: str, folder: Path | None = None) -> None:
    """Display the last results of ``lowbit claims`` on these claims: verdict, conditions, looks, the study's figures.

    Args:
        ids: ids of claims, such as ``"D1"``.
        folder: folder of ``claims.json``; None takes the results, or the project's if ``LOWBIT_RESULTS`` has none.

    Raises:
        LowbitError: the file has no judgment of a claim.
    """
    from IPython.display import display

    display(*outputs(*ids, folder=folder))


def outputs(*ids: str, folder: Path | None = None) -> "list[Markdown | Image]":
    """What `show` displays: one text, in which each figure of the study follows the table that it draws."""
    from IPython.display import Image, Markdown

    from lowbit_suite.plotting import alt_text

    everything = verdicts.read(folder or paths.recorded("claims.json").parent)
    judged = verdicts.judged(everything)
    shown: list[Markdown | Image] = []
    lines: list[str] = []
    for id in ids:
        if id not in judged:
            there = ", ".join(judged) or "none"
            raise LowbitError(f"results/claims.json has no claim {id!r} (it has {there}); 'lowbit claims' writes it")
        claim, (first, *others) = judged[id], verdicts.looks(everything, id) or [None]
        lines += ["", f"**{id}: {claim.claim}.** At {claim.profile}: {judgment(claim)}.", ""]
        if claim.runs:
            lines += [*statements(claim), *conditions(claim), *_source(claim)]
        else:
            lines += [f"None of its {len(claim.statements)} statements is tested yet: the study has not trained them."]
        if (drawn := paths.recorded(figure(id))).exists():
            text = "\n".join([*lines, "", f"{LEGEND}."])
            shown += [Markdown(text.lstrip()), Image(drawn.read_bytes(), width=700, alt=alt_text(drawn))]
            lines = []
        if first:
            lines += ["", f"*A look at {first.profile} ({first.dataset}):* {judgment(first)}.", "", *statements(first)]
            lines += _source(first)
        lines += [
            line for look in others for line in ("", f"*A look at {look.profile} ({look.dataset}):* {_cell(look)}.")
        ]
    return [*shown, Markdown("\n".join(lines).lstrip())] if lines else shown


def _source(claim: Claim) -> list[str]:
    return ["", f"From {', '.join(f'`{table}`' for table in claim.runs)}; again: `{claim.command}`"]
