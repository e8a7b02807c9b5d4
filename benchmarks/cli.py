"""``lowbit bench``."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True)

Threads = Annotated[list[int] | None, typer.Option(min=1, help="repeat for several numbers of threads; default 1")]
Engines = Annotated[
    list[str] | None,
    typer.Option(help="a name or a pattern such as 'lowbit*'; repeat for several; a name that is not known lists all"),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        help="resnet18, deit-tiny, deit-small, resnet20, vit_nano, kws_resnet or ds_cnn; repeat for several; "
        "default all but deit-small"
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="also write the results to this file, and what they depend on to NAME.machine.json"),
]


@app.command()
def training(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="vit-d192, resnet18, resnet18-shift, resnet18-shift-small, deit-tiny-ofq, deit-small-ofq, "
            "swin-tiny-ofq, vit-tiny-ofq, study-vit, study-qkr, study-vit-64-tokens, study-resnet8 or study-resnet20; "
            "repeat for several; default all"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="rounds counted")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; default: torch's own choice")] = None,
    json_file: JsonFile = None,
) -> None:
    """One step of quantized training against one step of full precision, interleaved in one process."""
    from benchmarks import training as bench
    from benchmarks.report import machine, show
    from lowbit.errors import LowbitError

    chosen = model or list(bench.CASES)
    if unknown := sorted(set(chosen) - set(bench.CASES)):
        raise LowbitError(f"--model {unknown[0]!r} is not known; allowed: {', '.join(bench.CASES)}")
    about = {"machine": machine()}
    results = bench.run(chosen, repeats=repeats, threads=threads)
    show(results)
    _write(json_file, results, about)


@app.command()
def kernels(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="gemv, gemv-cold, m8, m64, m256, deit-s-fc1, resnet-late, resnet-early, conv-256 or conv-64; repeat "
            "for several; default all"
        ),
    ] = None,
    engine: Engines = None,
    threads: Threads = None,
    repeats: Annotated[int, typer.Option(min=3, help="rounds counted")] = 15,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="draw the native kernels against the machine's limits")] = None,
) -> None:
    """Single products and convolutions, each engine in a process of its own: lowbit, torch and the peers installed."""
    from benchmarks import kernels as bench
    from benchmarks import roofline
    from benchmarks.report import machine, show, show_skipped

    counts = _counts(threads)
    about: dict[str, Any] = {"machine": machine()}
    outcome = bench.run(shape, engine, counts, repeats)
    show(outcome.results)
    show_skipped(outcome.skipped)
    about |= {"skipped": outcome.skipped, "facts": outcome.facts}
    if plot is not None or json_file is not None:
        roofs = [roof for count in counts for roof in roofline.measure(count)]
        about |= {"roofline": roofs, "attained": roofline.attained(outcome)}
        for roof in roofs:
            typer.echo("{what}, threads {threads}: {value:.1f} {unit} ({how})".format(**roof))
        if plot is not None:
            typer.echo(f"written: {roofline.save(roofline.draw(outcome, roofs), plot)}")
    _write(json_file, outcome.results, about)


@app.command()
def models(
    model: Models = None,
    engine: Engines = None,
    threads: Threads = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="repeat for several numbers of inputs; default 1")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="rounds counted")] = 15,
    json_file: JsonFile = None,
) -> None:
    """Whole models, each engine in a process of its own: packed models, plans, torch and the peers installed."""
    from benchmarks import models as bench
    from benchmarks.report import machine, show, show_skipped

    about = {"machine": machine()}
    outcome = bench.run(model, engine, _counts(threads), repeats, batches=list(dict.fromkeys(batch or [1])))
    show(outcome.results)
    show_skipped(outcome.skipped)
    _write(json_file, outcome.results, about | {"skipped": outcome.skipped, "facts": outcome.facts})


@app.command()
def start(
    model: Models = None,
    repeats: Annotated[int, typer.Option(min=3, help="rounds counted")] = 9,
    json_file: JsonFile = None,
) -> None:
    """From the start of a process to its first answer, and its peak memory: a question a device asks once."""
    from benchmarks import start as bench
    from benchmarks.report import machine, show

    about = {"machine": machine()}
    results = bench.run(model, repeats)
    show(results)
    _write(json_file, results, about)


@app.command()
def agreement(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="resnet18, deit-tiny, deit-small, resnet20, vit_nano, kws_resnet or ds_cnn; repeat for several; "
            "default all"
        ),
    ] = None,
    bits: Annotated[list[int] | None, typer.Option(min=2, max=4, help="repeat for several; default 2, 3, 4")] = None,
    count: Annotated[int, typer.Option(min=1, help="inputs of models with random weights")] = 64,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="also write the table, and what it depends on to NAME.machine.json")
    ] = None,
) -> None:
    """Not a time: how often a packed model answers like the fake-quantized one it was made of, and why it does not."""
    import pandas as pd
    from rich.console import Console
    from rich.table import Table
    from tqdm.auto import tqdm

    from benchmarks import packed_answers as bench
    from benchmarks.report import machine, write_table

    widths = list(dict.fromkeys(bits or [2, 3, 4]))
    about = {"machine": machine()}
    rows = list(tqdm(bench.run(model, widths, count), desc="models", total=len(model or bench.MODELS) * len(widths)))
    frame = pd.DataFrame(rows)
    table = Table(title="packed and fake-quantized models")
    for column in frame.columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()))
    Console(width=160).print(table)
    if csv_file is not None:
        for written in write_table(csv_file, frame, about):
            typer.echo(f"written: {written}")


def _counts(threads: list[int] | None) -> list[int]:
    return list(dict.fromkeys(threads or [1]))


def _write(path: Path | None, results: list[Any], about: dict[str, Any]) -> None:
    from benchmarks.report import write

    if path is not None:
        for written in write(path, results, about):
            typer.echo(f"written: {written}")
