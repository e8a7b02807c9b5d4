"""report.html: one page about a run, complete in itself: styles and figures are inside, nothing is fetched."""

import base64
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.suite import baselines
from lowbit.suite.progress import LOOK, clock
from lowbit.suite.record import show
from lowbit.suite.runfile import Entry, Run, write_text

FILE = "report.html"
NOT_STARTED = "not started yet"
"""The reason of a notebook whose turn has not come."""

TONES = {"passed": "good", "skipped": "calm", "not_run": "calm"}


@dataclass(frozen=True)
class Card:
    """What the page says about one notebook."""

    entry: Entry
    sign: str
    word: str
    tone: str
    time: str
    parameters: list[tuple[str, str]]
    metrics: list[dict]
    notes: list[str]
    figures: list[tuple[str, str]]
    links: list[tuple[str, str]]


def write(run: Run, folder: Path) -> Path:
    """Writes ``folder/report.html`` for a run whose outputs lie in ``folder``, and returns its path."""
    import jinja2

    try:
        baseline, why = baselines.load(run.profile, run.device), ""
    except LowbitError as error:
        baseline, why = None, str(error)
    cards = [_card(entry, run, baseline, folder) for entry in run.notebooks]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lowbit.suite", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    differ = sum(metric["tone"] == "bad" for card in cards for metric in card.metrics)
    differ += sum(len(card.notes) for card in cards if card.entry.status == "passed")
    page = environment.get_template("report.html.j2").render(
        run=run,
        cards=cards,
        baseline=baseline,
        no_baseline=why,
        verdict=_verdict(run),
        differ=differ,
        recorded=sum(len(card.entry.metrics) for card in cards),
        total=clock(sum(entry.seconds for entry in run.notebooks if not entry.cached)),
        environment=_environment(run.environment),
    )
    write_text(folder / FILE, page)
    return folder / FILE


def notebook_html(path: Path) -> Path | None:
    """Renders an executed notebook beside itself; None where the file is not a whole notebook (after a crash)."""
    import nbformat
    from nbconvert import HTMLExporter

    try:
        body, _ = HTMLExporter().from_notebook_node(nbformat.read(path, as_version=4))
        write_text(path.with_suffix(".html"), body)
    except Exception:  # a rendering is a convenience: whatever goes wrong here must not change a status
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
        metrics.append(
            {
                "name": name,
                "value": show(metric.value),
                "unit": metric.unit,
                "better": {"higher": "higher is better", "lower": "lower is better"}.get(metric.better, ""),
                "accepted": row.accepted if row else "",
                "verdict": row.verdict if row else "",
                "tone": tone,
            }
        )
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
        [(picture.stem, base64.b64encode(picture.read_bytes()).decode()) for picture in pictures],
        links,
    )


def _value(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def _environment(facts: dict) -> list[tuple[str, str]]:
    """The environment as pairs of words, shortest reading first."""
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
