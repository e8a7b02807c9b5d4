"""``lowbit train CONFIG.yaml``: one training run from a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lowbit.extras import extra

with extra("train", "the lowbit command"):
    import typer

if TYPE_CHECKING:
    from lowbit.training.run_card import RunRecord

Config = Annotated[Path, typer.Argument(help="The YAML run file, e.g. configs/digits_vit_nano.yaml.")]
Out = Annotated[Path | None, typer.Option(help="Folder to write to; results/scratch/<name> if not given.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value: train.epochs=3.")]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="Resume from the checkpoint in the folder, or drop it.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")]


def train(config: Config, out: Out = None, set_: Set = None, resume: Resume = True, device: Device = None) -> None:
    """Train the model of a run file; on several processes: torchrun --nproc-per-node=N -m lowbit train CONFIG."""
    import dataclasses

    from lowbit import paths
    from lowbit.serialization import save
    from lowbit.training import loop, runfile
    from lowbit.training.distributed import processes

    run = runfile.read(config, set_ or ())
    folder = out or (Path(run.train.out) if run.train.out else paths.results() / "scratch" / run.name)
    settings = dataclasses.replace(run.train, out=str(folder))
    with processes(device) as here:
        data = run.load_data()
        model, teacher = run.build_model(data), run.build_teacher(data)
        record = loop.train(model, data, settings, teacher, device=here.device, fresh=not resume)
        if here.first:
            card = record.to_json(folder / "run.json", name=run.name, quant=run.quant, run=run.to_dict())
            summary = {key: card[key] for key in ("name", "train", "final", "seconds", "environment")}
            save(model, folder / "model.safetensors", card=summary)
            _show(run.name, record, folder)
        here.wait()


def _show(name: str, record: "RunRecord", folder: Path) -> None:
    with extra("train", "lowbit train"):
        from rich.console import Console
        from rich.table import Table

    table = Table(title=name)
    columns = ("epoch", "lr", "train_loss", "train_acc", "test_loss", "test_acc", "seconds", "images_per_s")
    formats = ("d", ".2e", ".4f", ".2%", ".4f", ".2%", ".1f", ".0f")
    for column in columns:
        table.add_column(column.replace("images_per_s", "images/s").replace("_", "\n"), justify="right", no_wrap=True)
    rows = record.history
    chosen = rows if len(rows) <= 10 else [rows[round(i * (len(rows) - 1) / 9)] for i in range(10)]
    for row in chosen:
        table.add_row(*("" if row[c] is None else format(row[c], f) for c, f in zip(columns, formats, strict=True)))
    console = Console()
    console.print(table)
    final = record.final
    console.print(
        f"test accuracy {final['test_acc']:.2%} (best {final['best_test_acc']:.2%} in epoch {final['best_epoch']}), "
        f"{record.identity['parameters']:,} parameters, {record.seconds:.0f} s; written to {folder}"
    )
