"""``lowbit bench``."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _benchmarks() -> None:
    """Keeps ``bench training`` a sub-command while there is only one."""


@app.command()
def training(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="vit-d192, resnet18, resnet18-shift, resnet18-shift-small, deit-tiny-ofq, deit-small-ofq, "
            "swin-tiny-ofq or vit-tiny-ofq; repeat for several; default all"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="rounds counted")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; default: torch's own choice")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the results to this file")] = None,
) -> None:
    """One step of quantised training against one step of full precision, interleaved in one process."""
    from lowbit.benchmarks import training as bench
    from lowbit.benchmarks.report import show
    from lowbit.errors import LowbitError

    chosen = model or list(bench.CASES)
    if unknown := sorted(set(chosen) - set(bench.CASES)):
        raise LowbitError(f"--model {unknown[0]!r} is not known; allowed: {', '.join(bench.CASES)}")
    results = bench.run(chosen, repeats=repeats, threads=threads)
    show(results)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(results, indent=1) + "\n")
        typer.echo(f"written: {json_file}")
