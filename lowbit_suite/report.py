"""report.html: one self-contained page about a run; styles and figures are embedded."""

import base64
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lowbit import paths
from lowbit.errors import LowbitError
from lowbit.files import write_text
from lowbit_suite import claims, skip_grammars
from lowbit_suite.accepted import baselines
from lowbit_suite.records.record import show
from lowbit_suite.running.progress import LOOK, clock
from lowbit_suite.running.run_json import Entry, Run

FILE = "report.html"
NOT_STARTED = "not started yet"
"""Reason of a notebook that has not started."""

TONES = {"passed": "good", "skipped": "calm", "not_run": "calm"}
VERDICTS = {
    "reproduced": ("✔", "good"),
    "not reproduced": ("✘", "bad"),
    "inconclusive": ("≈", "calm"),
}
"""Sign and tone of the verdicts of `lowbit_suite.claims`."""
NO_VERDICT = ("○", "calm")
"""Sign and tone of what is not tested, described, or only looked at."""


@dataclass(frozen=True)
class Card:
    """The content of the page about one notebook."""

    entry: Entry
    sign: str
    word: str
    tone: str
    time: str
    parameters: list[tuple[str, str]]
    metrics: list[dict]
    notes: list[str]
    figures: list[tuple[str, str, str]]
    links: list[tuple[str, str]]

    @property
    def differ(self) -> int:
        """How many of its numbers differ from the accepted ones."""
        return sum(metric["tone"] == "bad" for metric in self.metrics) + len(self.notes)

    @property
    def tally(self) -> str:
        """The result of the comparison in words; empty if the numbers were not compared."""
        counts = Counter(metric["verdict"] for metric in self.metrics if metric["verdict"])
        said = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        return f": {said}" if said else ""


def write(run: Run, folder: Path) -> Path:
    """Write ``folder/report.html`` for a run whose outputs are in ``folder``, and return its path."""
    import jinja2

    try:
        baseline, why = baselines.load(run.profile, run.device), ""
    except LowbitError as error:
        baseline, why = None, str(error)
    cards = [_card(entry, run, baseline, folder) for entry in run.notebooks]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lowbit_suite", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        run=run,
        cards=cards,
        baseline=baseline,
        no_baseline=why,
        verdict=_verdict(run),
        differ=sum(card.differ for card in cards),
        costs=_costs(cards),
        papers=_papers(run, folder),
        compared=sum(metric["verdict"] != "" for card in cards for metric in card.metrics),
        total=clock(sum(entry.seconds for entry in run.notebooks if not entry.cached)),
        environment=_environment(run.environment),
    )
    write_text(folder / FILE, page)
    return folder / FILE


def notebook_html(path: Path) -> Path | None:
    """Render an executed notebook as HTML beside it; None if the file is incomplete (after a crash)."""
    skip_grammars()
    import nbformat
    from nbconvert import HTMLExporter

    try:
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.pop("widgets", None)  # they would be shown from the network
        body, _ = HTMLExporter().from_notebook_node(notebook)
        write_text(path.with_suffix(".html"), body)
    except Exception:  # rendering is a convenience: an error here must not change a status
        return None
    return path.with_suffix(".html")


def _verdict(run: Run) -> dict[str, str]:
    total = len(run.notebooks)
    passed = sum(entry.status == "passed" for entry in run.notebooks)
    if any(entry.status == "not_run" and entry.reason == NOT_STARTED for entry in run.notebooks):
        return {"tone": "calm", "sign": "…", "text": f"Not finished: {passed} of {total} passed so far"}
    if run.passed:
        return {"tone": "good", "sign": "✔", "text": f"All {total} notebooks passed" if total > 1 else "Passed"}
    bad: dict[str, int] = {}
    for entry in run.notebooks:
        if entry.status != "passed":
            bad[entry.status.replace("_", " ")] = bad.get(entry.status.replace("_", " "), 0) + 1
    parts = ", ".join(f"{count} {word}" for word, count in bad.items())
    return {"tone": "bad", "sign": "✘", "text": f"{passed} of {total} notebooks passed; {parts}"}


def _card(entry: Entry, run: Run, baseline: baselines.Baseline | None, folder: Path) -> Card:
    links = []
    if entry.output:
        page = Path(entry.output).with_suffix(".html")
        links += [("read it", str(page))] if (folder / page).is_file() else []
        links += [("notebook", entry.output)]
    log = Path("logs") / f"{entry.name}.log"
    if entry.status != "passed" and (folder / log).is_file() and (folder / log).stat().st_size:
        links.append(("log", log.as_posix()))
    rows = {}
    if baseline and entry.status == "passed":
        only = baselines.compare(run, baseline, [entry.name])
        rows = {row.metric: row for row in only}
    metrics = []
    for name, metric in entry.metrics.items():
        row = rows.pop(name, None)
        tone = "" if row is None else "good" if row.verdict == "same" else "calm" if row.ok else "bad"
        before = baseline.notebooks[entry.name].metrics.get(name) if row else None
        metrics.append(
            {
                "name": name,
                "value": show(metric.value),
                "unit": metric.unit,
                "better": {"higher": "higher is better", "lower": "lower is better"}.get(metric.better, ""),
                "accepted": row.accepted if row else "",
                "verdict": row.verdict if row else "",
                "tone": tone,
                "place": _place(metric.value, before) if before else None,
            }
        )
    metrics.sort(key=lambda metric: metric["tone"] != "bad")  # differing numbers first, else in the order of recording
    notes = [f"{row.metric or entry.name}: {row.verdict}. {row.note}" for row in rows.values() if not row.ok]
    shown = entry.status == "passed" or (entry.output and not entry.cached)
    pictures = sorted((folder / "figures" / entry.name).glob("*.png")) if shown else []
    return Card(
        entry,
        LOOK[entry.status][0],
        entry.status.replace("_", " "),
        TONES.get(entry.status, "bad"),
        clock(entry.seconds),
        [(name, _value(value)) for name, value in entry.parameters.items()],
        metrics,
        notes,
        [_figure(picture, entry.name) for picture in pictures],
        links,
    )


def _figure(path: Path, notebook: str) -> tuple[str, str, str]:
    """Name, base64 content and alternative text of a picture."""
    from lowbit_suite.plotting import alt_text  # only where there are pictures: matplotlib takes a while to import

    alt = alt_text(path) or f"figure {path.stem} of {notebook}"
    return path.stem, base64.b64encode(path.read_bytes()).decode(), alt


def _place(value: float, accepted: baselines.Accepted) -> dict[str, float] | None:
    """Position of a number relative to its accepted interval, in percent of a line; None if there is none to draw."""
    slack = baselines.slack(accepted)
    if not math.isfinite(value) or accepted.tolerance == 0:
        return None
    reach = 1.2 * max(slack, abs(value - accepted.value))
    return {
        "low": 50 - 50 * slack / reach,
        "wide": 100 * slack / reach,
        "now": 50 + 50 * (value - accepted.value) / reach,
    }


def _costs(cards: list[Card]) -> dict:
    """The notebooks that ran, slowest first, with bars in percent of the longest time and the largest memory."""
    ran = sorted((card for card in cards if card.entry.seconds), key=lambda card: -card.entry.seconds)
    seconds = max((card.entry.seconds for card in ran), default=1)
    memory = max((card.entry.peak_mb for card in ran), default=1) or 1
    rows = [
        {
            "card": card,
            "seconds": 100 * card.entry.seconds / seconds,
            "memory": 100 * card.entry.peak_mb / memory,
            "why": ("kept: " if card.entry.cached else "ran again: ") + card.entry.why if card.entry.why else "",
        }
        for card in ran
    ]
    return {"rows": rows, "why": any(row["why"] for row in rows)}


def _papers(run: Run, folder: Path) -> dict:
    """The claims as `lowbit claims` last judged them, with links to the evidence if it is near the page."""
    try:
        found, wrong = claims.read(paths.results()), ""
    except LowbitError as error:
        found, wrong = [], str(error)
    rows = []
    for claim in claims.judged(found).values():
        looks = claims.looks(found, claim.id)
        sign, tone = VERDICTS.get(claim.verdict, NO_VERDICT)
        evidence = [claim, *looks]
        rows.append(
            {
                "claim": claim,
                "judgment": claims.judgment(claim, mark=""),
                "sign": sign,
                "tone": tone,
                "parts": [_part(one) for one in evidence],
                "tables": [
                    (Path(table).name, _link(paths.project() / table, folder)) for one in evidence for table in one.runs
                ],
                "notebooks": [
                    entry.name for entry in run.notebooks if any(entry.name in one.command.split() for one in evidence)
                ],
                "commands": [one.command for one in evidence if one.command],
            }
        )
    return {"rows": rows, "wrong": wrong, "page": _link(paths.results() / "claims.md", folder)}


def _part(claim: claims.Claim) -> dict:
    """The statements of a claim, or of a look at it, for a table of the page."""
    data = f"{claim.dataset}, {claim.seeds} seeds" if claim.seeds else ""
    return {
        "title": f"A look at {claim.profile}: {claims.judgment(claim)}" if claim.look else f"At {claim.profile}",
        "data": data,
        "tally": claim.tally,
        "statements": [
            (*VERDICTS.get(one.verdict, NO_VERDICT), one, claims.effect(one), claims.outcome(one))
            for one in claim.statements
        ],
    }


def _link(target: Path, folder: Path) -> str:
    """A relative link from the page in ``folder``; empty if the page is outside the project, since it may be moved."""
    if not folder.resolve().is_relative_to(paths.project()) or not target.is_file():
        return ""
    return Path(os.path.relpath(target, folder)).as_posix()


def _value(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def _environment(facts: dict) -> list[tuple[str, str]]:
    """The environment as pairs of name and value, for reading."""
    lines = []
    for name, value in facts.items():
        if name == "commit" and value:
            value = value[:10]
        if name == "dirty":
            value = {True: "with uncommitted changes", False: "clean", None: None}[value]
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            lines.append(({"memory_gb": "memory (GB)", "dirty": "tree"}.get(name, name), str(value)))
    return lines
