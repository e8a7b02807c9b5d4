"""Turn a finished training run into a checkpoint that ships with the project.

``python -m tools.ship results/scratch/digits_resnet20`` stores the model in half precision under
``lowbit/models/checkpoints``, measures what is stored, and writes the run card beside it.
"""

import json
import sys
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.files import write_text
from lowbit.models.zoo import CHECKPOINTS
from lowbit.serialization import load, save
from lowbit_suite.command import plain_errors

LARGEST = 2 * 1024 * 1024  # bytes


def ship(folder: str | Path) -> Path:
    """Ship the run in ``folder``, with run.json and model.safetensors of ``lowbit train``, and return the new file.

    Raises:
        LowbitError: the run is incomplete, or the stored model would be larger than 2 MiB.
    """
    from lowbit.training import RunConfig, evaluate

    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise LowbitError(f"{folder} holds no run.json: it is not the folder of a finished `lowbit train`")
    card = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    card["run"].pop("name", None)
    run = RunConfig.from_dict({"name": card["name"], **card["run"]})
    run.train.__dict__["out"] = None
    target = CHECKPOINTS / f"{run.model['name']}.{run.data['name']}.safetensors"
    kept = {key: card[key] for key in ("name", "run", "final", "seconds", "environment")}
    kept["run"]["train"]["out"] = None  # a folder of one machine
    kept["command"] = f"lowbit train configs/{run.name}.yaml"
    save(load(folder / "model.safetensors"), target, dtype="float16", card=kept)
    if target.stat().st_size > LARGEST:
        size = target.stat().st_size
        target.unlink()
        raise LowbitError(f"{target.name} would have {size:,} bytes; a shipped checkpoint has at most {LARGEST:,}")
    kept["stored"] = {"dtype": "float16", "bytes": target.stat().st_size}
    kept["stored"]["test_acc"] = evaluate(load(target), run.load_data())["acc"]
    write_text(target.with_suffix(".json"), json.dumps(kept, indent=1) + "\n")
    return target


if __name__ == "__main__":
    with plain_errors():
        for given in sys.argv[1:]:
            print(ship(given))
