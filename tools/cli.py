"""The commands of the tools, which only a source tree has."""

from typing import Annotated

import typer

from lowbit.errors import LowbitError


def mutate(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only faults whose name contains one of these.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Also write the whole table to results/mutations.md.")] = False,
) -> None:
    """Put deliberate faults into a copy of the project, one at a time; exit 1 if one goes unnoticed by the tests."""
    from rich.table import Table
    from rich.text import Text
    from tqdm.auto import tqdm

    from lowbit import paths
    from lowbit.files import write_text
    from lowbit_suite.cli import wide_console
    from lowbit_suite.running.run_json import show_path
    from tools import mutation

    paths.project()  # a command outside every project stops here
    if write and names:
        raise LowbitError(f"--write is for the whole table; {names[0]!r} picks a part of it")
    chosen = mutation.pick(mutation.load(), names or ())
    outcomes = list(tqdm(mutation.run(chosen), total=len(chosen), desc="deliberate faults", unit="fault"))
    table = Table(title="lowbit mutate", title_justify="left")
    for head in ("fault", "file", "outcome", "noticed first by"):
        table.add_column(head, overflow="fold", no_wrap=head == "outcome")
    for outcome in outcomes:
        caught = outcome.status == "caught"
        status = Text(f"{'✔' if caught else '✘'} {outcome.status}", "green" if caught else "bold red")
        table.add_row(outcome.mutation.name, outcome.mutation.file, status, outcome.noticed_by)
    console = wide_console()
    console.print(table)
    caught = sum(outcome.status == "caught" for outcome in outcomes)
    console.print(f"{caught} of {len(outcomes)} deliberate faults caught", highlight=False)
    if write:
        write_text(path := paths.results() / "mutations.md", mutation.markdown(outcomes))
        console.print(f"wrote {show_path(path)}", highlight=False)
    raise typer.Exit(0 if caught == len(outcomes) else 1)
