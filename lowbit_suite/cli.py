"""The commands of the suite; ``lowbit_suite.app`` puts them under the one command ``lowbit``.

Exit codes: 0 success; 1 a notebook did not pass, or a number differs; 2 the command cannot be carried out
(a `LowbitError`, which ``lowbit_suite.app`` prints); 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from pathlib import Path
from typing import Annotated

import typer

from lowbit.errors import LowbitError

ProfileOption = Annotated[str, typer.Option("--profile", help="Size of the runs: smoke, embedded, desk, gpu or paper.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run.", show_default="results/runs/<profile>")
]


def run(
    notebooks: Annotated[
        list[str] | None, typer.Argument(metavar="[NOTEBOOK]...", help="Names, globs or paths; default: all.")
    ] = None,
    profile: ProfileOption = "smoke",
    jobs: Annotated[int, typer.Option("-j", "--jobs", help="Notebooks at a time.")] = 1,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Execute every notebook, even those that passed and have not changed.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run and keep the notebooks that it finished.")
    ] = False,
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "-p", "--parameter", metavar="[NOTEBOOK:]NAME=VALUE", help="Set a parameter (YAML scalar or list)."
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="MIN", help="Minutes a notebook may take.", show_default="profile"),
    ] = None,
    executor: Annotated[
        str, typer.Option("--executor", metavar="WHERE", help="'local', or 'dask://HOST:PORT' for a Dask cluster.")
    ] = "local",
    out: OutOption = None,
) -> None:
    """Execute notebooks, each in its own process; write run.json, executed copies, report.html and junit.xml.

    An earlier pass is kept if the code, parameters, data, versions, device and lowbit/ are still the same.

    Exit code 0: every notebook passed, or was skipped and is listed under may_skip in notebooks/profiles.yaml.

    Exit code 1: a notebook did not pass, or none passed.

    Exit code 2: the arguments are wrong and nothing ran, or the results could not be written.

    Exit codes 130 and 143: stopped by Ctrl-C or SIGTERM.
    """
    from rich.console import Console

    from lowbit import paths
    from lowbit_suite import report
    from lowbit_suite.running import runner
    from lowbit_suite.running.progress import Progress, summary
    from lowbit_suite.running.run_json import show_path

    paths.project()  # a command outside every project stops here
    plan = runner.plan(
        notebooks or (),
        profile,
        assignments=parameters or (),
        jobs=jobs,
        fresh=fresh,
        resume=resume,
        timeout_minutes=timeout,
        executor=executor,
        out=out,
    )
    code = 0
    try:
        done = runner.execute(plan, progress=Progress(Console(stderr=True)))
    except runner.Interrupted as stop:
        done, code = stop.run, 128 + stop.signum
    console = wide_console()
    console.print(summary(done))
    console.print(f"report: {show_path(plan.folder / report.FILE)}", soft_wrap=True, highlight=False)
    raise typer.Exit(code or (0 if done.fulfills(plan.profile) else 1))


def report(profile: ProfileOption = "smoke", out: OutOption = None) -> None:
    """Write report.html and junit.xml of the last run again, even if it was killed or is still running."""
    from lowbit_suite import report as page
    from lowbit_suite.running import junit, run_json, runner

    folder = out or runner.run_folder(profile)
    done = run_json.load(folder)
    _same_profile(done.profile, profile)
    for path in (page.write(done, folder), junit.write_run(done, folder)):
        typer.echo(f"wrote {run_json.show_path(path)}")


def check(
    notebooks: Annotated[
        list[str] | None, typer.Argument(metavar="[NOTEBOOK]...", help="Only these notebooks.")
    ] = None,
    profile: ProfileOption = "smoke",
    out: OutOption = None,
) -> None:
    """Compare the numbers of the last run with the accepted ones; exit 1 on any difference."""
    from lowbit import paths
    from lowbit_suite import profiles
    from lowbit_suite.accepted import baselines
    from lowbit_suite.running import junit, run_json, runner

    paths.project()  # a command outside every project stops here
    folder = out or runner.run_folder(profile)
    done = run_json.load(folder)
    _same_profile(done.profile, profile)
    baseline = baselines.load(profile, done.device)
    chosen = baselines.pick(notebooks, done, baseline)
    rows = baselines.compare(done, baseline, chosen, profiles.get(profile))
    junit.write_check(done, rows, folder)
    console = wide_console()
    console.print(_table(f"lowbit check, profile {profile}, {done.device}", rows, ("now", "accepted")))
    bad, better = sum(not row.ok for row in rows), sum(row.verdict == "improved" for row in rows)
    commit, dirty = (done.environment.get("commit") or "unknown")[:10], done.environment.get("dirty")
    console.print(f"the run began {done.started}, at commit {commit}{' with changes' * bool(dirty)}", highlight=False)
    verdict = f"{bad} of {len(rows)} differ" if bad else f"all {len(rows)} agree"
    if better:
        verdict += f"; {better} improved beyond the tolerance ('lowbit accept' makes them the new baseline)"
    console.print(verdict, highlight=False)
    if absent := sum(row.verdict == "missing" for row in rows):
        ran = " ".join(entry.name for entry in done.notebooks)
        console.print(f"the run does not have {absent} of them: 'lowbit check {ran}' leaves these out", highlight=False)
    if bad:
        commit = (baseline.environment.get("commit") or "unknown")[:10]
        console.print(f"the baseline was accepted {baseline.accepted[:10]} at commit {commit}", highlight=False)
    raise typer.Exit(1 if bad else 0)


def accept(
    profile: ProfileOption = "smoke",
    seeds: Annotated[
        int,
        typer.Option("--seeds", min=1, help="Run notebooks with N seeds in all; sets the tolerances."),
    ] = 1,
    jobs: Annotated[int, typer.Option("-j", "--jobs", help="Notebooks at a time.")] = 1,
    pool: Annotated[
        bool,
        typer.Option("--pool", help="The run comes from another machine: widen the intervals, replace nothing."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Write without asking.")] = False,
    out: OutOption = None,
) -> None:
    """Show how the last run would change the baseline, and make it the new baseline.

    For profiles larger than smoke, its tables, trainings and main figures are copied to results/ for 'lowbit claims'.
    """
    from rich.console import Console

    from lowbit import paths
    from lowbit_suite.accepted import baselines, evidence, repeats
    from lowbit_suite.running import run_json, runner
    from lowbit_suite.running.progress import Progress

    paths.project()  # a command outside every project stops here
    folder = out or runner.run_folder(profile)
    done = run_json.load(folder)
    _same_profile(done.profile, profile)
    file = baselines.path(profile, done.device)
    old = baselines.load(profile, done.device) if file.exists() else None
    if pool and seeds > 1:
        raise LowbitError("--pool adds a finished run, --seeds runs the notebooks again here: give only one of them")
    baselines.propose(done, old, pool=pool)  # refuse a bad run before spending hours on other seeds
    try:
        others = repeats.repeat(done, seeds, folder, jobs=jobs, progress=Progress(Console(stderr=True)))
    except runner.Interrupted as stop:
        raise typer.Exit(128 + stop.signum) from None
    new = baselines.propose(done, old, others, pool=pool)
    rows = baselines.changes(old, new)
    kept = [] if pool else evidence.changed(done, folder)
    console = wide_console()
    same = not rows and old and old.notebooks == new.notebooks
    if same:
        console.print("the baseline already holds exactly these numbers", highlight=False)
        if not kept:
            return
    else:
        console.print(_table(f"lowbit accept, profile {profile}, {done.device}", rows, ("new", "old")))
    for path in kept:
        console.print(f"{'changes' if path.exists() else 'new'}: {run_json.show_path(path)}", highlight=False)
    if done.environment.get("dirty"):
        console.print(
            "the source tree had uncommitted changes during this run; the baseline will say so", highlight=False
        )
    what = [] if same else [run_json.show_path(file)]
    what += [f"{len(kept)} files of tables, trainings and figures"] if kept else []
    if not yes and not typer.confirm(f"write {' and '.join(what)}?"):
        raise typer.Exit(1)
    if kept:
        evidence.keep(done, folder)
    if not same:
        baselines.save(new)
    console.print(f"wrote {' and '.join(what)}", highlight=False, soft_wrap=True)


def again(
    notebook: Annotated[str, typer.Argument(help="A name, or a pattern such as '*' for all with a journal.")],
    rows: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=VALUE]...", help="Only trainings with these, such as seed=3."),
    ] = None,
    profile: ProfileOption = "desk",
    count: Annotated[int | None, typer.Option("--random", metavar="N", min=1, help="Pick N of them at random.")] = None,
    draw: Annotated[int, typer.Option("--draw", help="Random seed of --random.")] = 0,
    journal: Annotated[
        Path | None,
        typer.Option(
            "--journal", help="Journal of the earlier run.", show_default="results/journals/<profile>/<notebook>.jsonl"
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="MIN", help="Minutes a notebook may take.", show_default="profile"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run.", show_default="results/runs/again")
    ] = None,
) -> None:
    """Repeat some trainings of a table and read the others from the journal; exit 1 if any number differs at all.

    Another processor may round sums differently, and training amplifies the difference. Use 'lowbit check' there.
    """
    from rich.console import Console
    from rich.table import Table

    from lowbit import paths
    from lowbit_suite.accepted import again as rerun
    from lowbit_suite.running import runner
    from lowbit_suite.running.progress import Progress, summary
    from lowbit_suite.running.run_json import show_path

    paths.project()  # a command outside every project stops here
    plan = rerun.plan(notebook, profile, journal, rows or (), count, draw, timeout_minutes=timeout, out=out)
    console = wide_console()
    console.print(f"{sum(map(len, plan.chosen.values()))} of {plan.there} trainings will run again", highlight=False)
    try:
        done = runner.execute(plan.run, progress=Progress(Console(stderr=True)))
    except runner.Interrupted as stop:
        raise typer.Exit(128 + stop.signum) from None
    if not done.fulfills(plan.run.profile):
        console.print(summary(done))
        raise typer.Exit(1)
    table = Table(title=f"lowbit again, profile {profile}, {done.device}", title_justify="left")
    for head in ("notebook", "training", "", "differs: then, now"):
        table.add_column(head, overflow="fold")
    found = plan.compare()
    for row in found:
        said = "; ".join(f"{name}: {then!s:.20}, {now!s:.20}" for name, then, now in row.differing[:4])
        more = f" and {len(row.differing) - 4} more" if len(row.differing) > 4 else ""
        table.add_row(row.line["notebook"], row.what, "✘ differs" if row.differing else "✔ the same", said + more)
    console.print(table)
    same = sum(not row.differing for row in found)
    console.print(f"{same} of {len(found)} exactly the same", highlight=False)
    for line in plan.elsewhere() if same < len(found) else ():
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"the run: {show_path(plan.run.folder)}", highlight=False, soft_wrap=True)
    names = " ".join(plan.chosen)
    check = f"lowbit check {names} --profile {profile} --out {show_path(plan.run.folder)}"
    console.print(f"to compare its numbers with the accepted ones: {check}", highlight=False, soft_wrap=True)
    raise typer.Exit(0 if same == len(found) else 1)


def claims(
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of a run: look at its tables and write nothing.")
    ] = None,
) -> None:
    """Judge the papers' claims by the tables in results/, and write claims.json and claims.md there.

    The tables of the study decide. A claim that trains no network is judged at desk. The notebooks' tables, which
    'lowbit accept' copies there, are looks: they show effects and give no verdict.
    """
    from rich.table import Table
    from rich.text import Text

    from lowbit import paths
    from lowbit_suite import claims as judged
    from lowbit_suite.running import run_json
    from lowbit_suite.running.run_json import show_path

    paths.project()  # a command outside every project stops here
    if out:
        return _claims_of(run_json.load(out), out)
    found = judged.judge_all()
    profiles = list(dict.fromkeys(claim.profile for claim in found if claim.look))
    table = Table(title=f"lowbit claims, profile {judged.MAIN}", title_justify="left")
    for head in ("", "claim", "verdict", "first statement", *(f"look at {name}" for name in profiles)):
        table.add_column(head, overflow="fold", no_wrap=not head)
    styles = {"reproduced": "green", "not reproduced": "red", "inconclusive": "yellow"}
    for claim in judged.judged(found).values():
        where = "" if claim.profile == judged.MAIN else f" (at {claim.profile})"
        verdict = Text(judged.judgment(claim, "") + where, styles.get(claim.verdict, "dim"))
        looks = {look.profile: judged.judgment(look) for look in judged.looks(found, claim.id)}
        first = judged.effect(claim.first)
        table.add_row(claim.id, claim.claim, verdict, first, *(looks.get(name, "") for name in profiles))
    console = wide_console()
    console.print(table)
    for path in judged.write(found, paths.results()):
        console.print(f"wrote {show_path(path)}", highlight=False, soft_wrap=True)


def _claims_of(run, folder: Path) -> None:
    """Print the verdict on each statement that the tables of a run decide, or the direction of a look."""
    from rich.table import Table

    from lowbit_suite import claims as judged

    found = [claim for claim in judged.judge_run(run.profile, folder) if claim.verdict != "no evidence"]
    if not found:
        raise LowbitError(f"the run in {folder} has no table that a claim uses; notebooks 02 to 15 and 18 write them")
    table = Table(title=f"lowbit claims, the run in {folder}, profile {run.profile}", title_justify="left")
    for head in ("", "statement", "effect", "outcome"):
        table.add_column(head, overflow="fold")
    for claim in found:
        for statement in claim.statements:
            table.add_row(claim.id, statement.says, judged.effect(statement), judged.outcome(statement))
    wide_console().print(table)


def _told(files: list[Path]) -> None:
    from lowbit_suite.running.run_json import show_path

    for file in files:
        typer.echo(f"wrote {show_path(file)}")


new = typer.Typer(no_args_is_help=True)
"""``lowbit new``."""


@new.command("notebook")
def new_notebook(
    name: Annotated[str, typer.Argument(help="Two unused digits, _ and a topic: 17_my_topic.")],
    execute: Annotated[bool, typer.Option(help="Run it and store its outputs.")] = True,
) -> None:
    """Write a working notebook that passes the course's tests, as a start for a new topic."""
    from lowbit_suite import new as skeletons
    from lowbit_suite.running.run_json import show_path

    made = skeletons.notebook(name, execute=execute)
    _told(made)
    path = show_path(made[0])
    typer.echo(f"after each change: python -m tools.tidy {path}")
    typer.echo(f"when it is done:   lowbit run {made[0].stem} && lowbit accept --seeds 5, and a line in README.md")


@new.command("quantizer")
def new_quantizer(
    name: Annotated[str, typer.Argument(help="Name of the file and the method: my_method.")],
) -> None:
    """Write a working quantizer with its test, as a start for a new method."""
    from lowbit_suite import new as skeletons

    made = skeletons.quantizer(name)
    _told(made)
    test = f"tests/quantizers/{made[1].name}"
    typer.echo(
        f"after each change: python -m pytest {test} tests/quantizers tests/nn/test_convert.py -k {made[0].stem}"
    )


def course(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An empty or new folder.")],
) -> None:
    """Copy the notebooks, their data and the accepted results into a new folder."""
    from lowbit_suite.course import unpack

    unpack(folder)
    typer.echo(f"the course is in {folder}: cd {folder} && lowbit run 00_start_here, or jupyter lab notebooks")


def doctor() -> None:
    """Show what this machine has, what is missing, and what to do about it."""
    from rich.table import Table
    from rich.text import Text

    from lowbit_suite.doctor import examine

    table = Table(title="lowbit doctor", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    looks = {"ok": ("✔", "green"), "missing": ("✘ missing", "bold red"), "note": ("· note", "yellow")}
    for finding in examine():
        sign, style = looks[finding.state]
        table.add_row(Text(sign, style), Text(finding.what), Text(finding.found), Text(finding.advice))
    wide_console().print(table)


def wide_console():
    """A console on standard output; in a file or a pipe it is wide enough for every table."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def _same_profile(found: str, asked: str) -> None:
    if found != asked:
        raise LowbitError(f"that run has profile {found!r}, not {asked!r}: give --profile {found}")


def _table(title: str, rows: list, heads: tuple[str, str]):
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for head in ("notebook", "metric", "verdict", *heads, "note"):
        table.add_column(head, overflow="fold", no_wrap=head == "verdict")
    styles = dict.fromkeys(("new", "changed", "dropped", "skipped"), "yellow") | {"same": "green", "improved": "cyan"}
    for row in rows:
        style = styles.get(row.verdict, "") if row.ok else "bold red"
        verdict = Text(f"{'✔' if row.ok else '✘'} {row.verdict}", style)
        table.add_row(row.notebook, row.metric, verdict, row.now, row.accepted, Text(row.note))
    return table
