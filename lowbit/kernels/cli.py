"""``lowbit pack``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from lowbit.extras import extra

if TYPE_CHECKING:
    import pandas

with extra("train", "the lowbit command"):
    import typer


def pack(
    checkpoint: Annotated[Path, typer.Argument(help="A quantized model, written by lowbit.save or lowbit train.")],
    out: Annotated[Path, typer.Argument(help="The packed model's file.")],
) -> None:
    """Pack a quantized model's weights for the integer kernels, and write it to a file.

    They become 2 to 4 bits each, of first and last layers 8.
    """
    with extra("train", "lowbit pack"):
        from rich.console import Console
        from rich.table import Table

    from lowbit.nn.deploy import pack as pack_model
    from lowbit.nn.deploy import summary
    from lowbit.serialization import load, save

    model = load(checkpoint)
    packed = pack_model(model)
    save(packed, out)
    rows = summary(packed)
    table = Table(title=f"{out}: {out.stat().st_size / 1e6:.2f} MB, the same in float32 {_float_bytes(rows):.2f} MB")
    for column in ("layer", "how", "weights", "bits", "kB"):
        table.add_column(column, justify="left" if column in ("layer", "how") else "right")
    for row in rows.itertuples():
        table.add_row(row.layer, row.how, f"{row.weights:,}", f"{row.bits:g}", f"{row.bytes / 1e3:.1f}")
    Console(width=120).print(table)


def _float_bytes(rows: "pandas.DataFrame") -> float:
    return 4 * rows.weights.sum() / 1e6
