"""``lowbit data list|fetch|verify``."""

from typing import Annotated

from lowbit.extras import extra

with extra("train", "the lowbit command"):
    import typer

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_sets() -> None:
    """List every data set: what it is, where it comes from, and whether it is here."""
    with extra("train", "lowbit data list"):
        from rich.console import Console
        from rich.table import Table

    from lowbit.data import describe

    table = Table(title="data sets")
    frame = describe()
    for column in frame.columns:
        table.add_column(column, overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*("yes" if v is True else "no" if v is False else str(v) for v in row))
    Console().print(table)


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="a name that `lowbit data list` shows")]) -> None:
    """Get a data set ready: download it, or decode its archive into the cache."""
    from lowbit.data import card, load

    known = card(name)
    if known.kind == "folder":
        typer.echo(f"{name} is read from your own folder; {known.note}")
        return
    data = load(name)
    typer.echo(f"{name}: {len(data.train):,} training and {len(data.test):,} test items are ready ({known.kind})")


@app.command()
def verify(names: Annotated[list[str] | None, typer.Argument(help="default: all that have files")] = None) -> None:
    """Compare the files that are here with their published checksums; exit with status 1 if one differs."""
    with extra("train", "lowbit data verify"):
        from rich.console import Console
        from rich.markup import escape

    from lowbit.data.verify import check_files

    console, wrong = Console(), False
    for result in check_files(names):
        color = {"ok": "green", "missing": "yellow", "wrong": "red"}[result.status]
        console.print(f"[{color}]{result.status:8s}[/] {result.data}: {escape(result.detail)}", highlight=False)
        wrong |= result.status == "wrong" or (result.status == "missing" and bool(names))
    if wrong:
        raise typer.Exit(1)
