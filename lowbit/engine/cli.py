"""``lowbit export``."""

from pathlib import Path
from typing import Annotated

from lowbit.extras import extra

with extra("train", "the lowbit command"):
    import typer


def export(
    model: Annotated[Path, typer.Argument(help="A packed or quantized model, written by lowbit.save or lowbit pack.")],
    out: Annotated[Path, typer.Argument(help="The plan's file; lowbit-run runs it without Python.")],
) -> None:
    """Write a packed model as a plan, which C code runs in one call.

    A quantized model is packed first. The model's file must say the shape of its input.
    """
    from lowbit.engine import plan
    from lowbit.errors import LowbitError
    from lowbit.nn.deploy import made_up
    from lowbit.nn.deploy import pack as pack_model
    from lowbit.nn.packed import PackedLayer
    from lowbit.serialization import load

    loaded = load(model)
    if not any(isinstance(module, PackedLayer) for module in loaded.modules()):
        loaded = pack_model(loaded)
    if made_up(loaded) is None:
        raise LowbitError(
            f"{model} does not say the shape of its input; in Python: lowbit.plan(model, example).save(path)"
        )
    made = plan(loaded)
    made.save(out)
    typer.echo(
        f"{out}: {out.stat().st_size / 1e6:.2f} MB, {len(made.operations())} operations, "
        f"{made.inputs} -> {made.outputs} numbers, works in {made.arena_bytes / 1e6:.2f} MB"
    )
