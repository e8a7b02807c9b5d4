"""Progress of a run: a live table on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from lowbit_suite.running.run_json import Entry, Run

LOOK = {
    "passed": ("✔", "green"),
    "failed": ("✘", "bold red"),
    "timeout": ("⏱", "bold red"),
    "killed": ("☠", "bold red"),
    "oom": ("▣", "bold red"),
    "skipped": ("↷", "yellow"),
    "not_run": ("○", "yellow"),
}
"""Sign and style for each status, always shown with the word."""


class Progress:
    """Shows a run on ``console``; `silent` creates one that shows nothing."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.began: dict[str, float] = {}
        self.place: dict[str, str] = {}
        self.done: dict[str, Entry] = {}
        self.names: list[str] = []
        self.before: Mapping[str, float] = {}
        self.spinner = Spinner("dots")

    @classmethod
    def silent(cls) -> "Progress":
        """A progress display that shows nothing."""
        return cls(None)

    @property
    def live(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self.console is not None and self.console.is_terminal

    @contextlib.contextmanager
    def showing(self, names: Sequence[str], seconds_before: Mapping[str, float]) -> Iterator[None]:
        """Keep the display running; ``seconds_before`` (earlier times by name) allows an estimate of the time left."""
        self.names, self.before = list(names), seconds_before
        if not self.live:
            yield
            return
        with Live(get_renderable=self._table, console=self.console, refresh_per_second=8, transient=True):
            yield

    def started(self, name: str, why: str = "") -> None:
        """A notebook has started; ``why`` is the reason why no earlier result is reused."""
        self.began[name] = time.monotonic()
        if self.console and not self.live:
            usual = f" (took {clock(self.before[name])} before)" if name in self.before else ""
            line = f"{name}: started{f', {why}' if why else ''}{usual}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def at(self, name: str, place: str) -> None:
        """Show the current place in a notebook."""
        self.place[name] = place

    def ended(self, entry: Entry) -> None:
        """A notebook has ended."""
        self.done[entry.name] = entry
        if self.console and not self.live:
            how = "cached" if entry.cached else f"{entry.seconds:.1f} s, {entry.peak_mb:.0f} MB"
            reason = f": {entry.reason}" if entry.reason else ""
            line = f"{entry.name}: {entry.status.replace('_', ' ')} ({how}){reason}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        now = time.monotonic()
        table = Table(box=None, padding=(0, 1), expand=False)
        for title in ("", "notebook", "", "time"):
            table.add_column(title, justify="right" if title == "time" else "left")
        for name in self.names:
            if entry := self.done.get(name):
                sign, style = LOOK[entry.status]
                table.add_row(
                    f"[{style}]{sign}", name, f"[{style}]{entry.status.replace('_', ' ')}", clock(entry.seconds)
                )
            elif name in self.began:
                took = now - self.began[name]
                of = f" of ~{clock(self.before[name])}" if name in self.before else ""
                table.add_row(self.spinner, name, self.place.get(name) or "starting", clock(took) + of)
            else:
                usual = f"~{clock(self.before[name])}" if name in self.before else ""
                table.add_row("[dim]·", f"[dim]{name}", "[dim]waiting", f"[dim]{usual}")
        left = self._seconds_left(now)
        table.caption = f"{len(self.done)} of {len(self.names)} done" + (
            f", about {clock(left)} of work left" if left else ""
        )
        return table

    def _seconds_left(self, now: float) -> float | None:
        """Work left, estimated from earlier times; None if one of them is unknown."""
        left = 0.0
        for name in self.names:
            if name not in self.done:
                if name not in self.before:
                    return None
                left += max(0.0, self.before[name] - (now - self.began.get(name, now)))
        return left


def summary(run: Run) -> Table:
    """The table at the end of a run."""
    table = Table(title=f"lowbit run, profile {run.profile}", title_justify="left")
    table.add_column("notebook", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("seconds", justify="right")
    table.add_column("peak MB", justify="right")
    table.add_column("metrics", justify="right")
    table.add_column("reason", overflow="fold")
    from rich.text import Text

    for entry in run.notebooks:
        sign, style = LOOK[entry.status]
        status = Text(f"{sign} {entry.status.replace('_', ' ')}{' (cached)' if entry.cached else ''}", style)
        cells = (f"{entry.seconds:.1f}", f"{entry.peak_mb:.0f}", str(len(entry.metrics)))
        table.add_row(entry.name, status, *cells, Text(entry.reason))
    return table


def clock(seconds: float) -> str:
    """Seconds as ``m:ss``, or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
