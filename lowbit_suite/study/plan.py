"""What the study trains: ``notebooks/study.yaml``, spelled out into single trainings."""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MinLen
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from lowbit import paths, yamls
from lowbit.errors import LowbitError
from lowbit.training.runfile import RunConfig, apply_change

FILE = "study.yaml"

Positive = Annotated[int, Ge(1)]


class Phase(BaseModel):
    """Epochs that follow a training, from its end with its optimizer's moments, each phase from the same point.

    Attributes:
        arm: the name of its row in the table.
        epochs: how many.
        lr: constant learning rate; lowered for all phases of an arm where the rule of annealing asks for it.
        boundary: of confidence-guided annealing; None lets all weights move.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arm: str
    epochs: Positive
    lr: float
    boundary: float | None = None


class Arm(BaseModel):
    """One way to train, with the bit widths, budgets and seeds at which the table has it.

    Attributes:
        name: in the table, where it is not the name in the plan: the same arm at other widths, of another rank.
        bits: widths; each is put into ``quant.weight.bits``, and into ``quant.activation.bits`` where the activation
            has ``bits: same``. 32 means full precision.
        quant: as in a run file, without the bits.
        train: changes to the table's ``train``.
        epochs, seeds: those of the table's that this arm has; None is all.
        phases: see `Phase`; at the longest budget only.
        rank: arms of a lower rank come first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    bits: Annotated[list[Positive], MinLen(1)]
    quant: dict[str, Any] | None = None
    train: dict[str, Any] = {}
    epochs: list[Positive] | None = None
    seeds: list[Annotated[int, Ge(0)]] | None = None
    phases: list[Phase] = []
    rank: int = 0


class Table(BaseModel):
    """Arms that are compared with each other.

    Attributes:
        title: what is compared, for people.
        claims: the claims that need it.
        run: model, data, teacher and train of a run file; ``epochs`` and ``seed`` are filled in.
        epochs: budgets, ascending; each has a schedule of its own.
        seeds: every arm runs with each.
        grid: the weight method through whose levels an arm in full precision is tracked, or None.
        source: what is trained first, ``data`` and ``train`` as in a run file; its network goes on with a new head.
        detector: arguments of `lowbit.models.detector`: the trained classifier becomes the trunk of a detector instead.
        cycle: a place in the run file, ``data.speaker``, and the values that seeds 0, 1, 2, ... have there in turn; a
            column of the table.
        rank: added to that of its arms.
        arms: by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    claims: list[str]
    run: dict[str, Any]
    epochs: Annotated[list[Positive], MinLen(1)]
    seeds: Annotated[list[Annotated[int, Ge(0)]], MinLen(1)]
    grid: dict[str, Any] | None = None
    source: dict[str, dict[str, Any]] | None = None
    detector: dict[str, Any] | None = None
    cycle: dict[str, Annotated[list[Any], MinLen(1)]] = {}
    rank: int = 0
    arms: dict[str, Arm]

    @field_validator("epochs")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        if sorted(set(value)) != value:
            raise ValueError(f"budgets should ascend, each once, not {value}")
        return value


@dataclass(frozen=True)
class Training:
    """One arm of one table at one bit width, with one budget and one seed.

    Attributes:
        table, arm, bits, epochs, seed: which.
        run: the run file's content, complete.
        phases: what follows it.
        grid: see `Table`.
        source: the run file's content of what is trained first, or None.
        detector: see `Table`.
        columns: further columns of its rows: what `Table.cycle` gave this seed.
        rank: of the arm.
    """

    table: str
    arm: str
    bits: int
    epochs: int
    seed: int
    run: dict[str, Any]
    phases: tuple[Phase, ...] = ()
    grid: dict[str, Any] | None = None
    source: dict[str, Any] | None = None
    detector: dict[str, Any] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    rank: int = 0

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """What tells it from all other trainings."""
        return self.table, self.arm, self.bits, self.epochs, self.seed

    @property
    def block(self) -> tuple[str, int, int]:
        """The trainings that are compared pair by pair: same table, budget and seed."""
        return self.table, self.epochs, self.seed

    @property
    def length(self) -> int:
        """Epochs in all, with those of the phases and of what is trained first."""
        first = 0 if self.source is None else self.source["train"]["epochs"]
        return first + self.epochs + sum(phase.epochs for phase in self.phases)

    @property
    def digest(self) -> str:
        """Changes whenever anything that is trained changes."""
        plain = [self.run, [phase.model_dump() for phase in self.phases], self.grid]
        plain += [self.source, self.detector] if self.source or self.detector else []
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        bits = "" if self.bits == 32 else f" {self.bits} bits,"
        return f"{self.table}: {self.arm},{bits} {self.epochs} epochs, seed {self.seed}"

    def config(self) -> RunConfig:
        """The checked run file."""
        return RunConfig.from_dict(copy.deepcopy(self.run))

    def source_config(self) -> RunConfig | None:
        """The checked run file of what is trained first, or None."""
        return None if self.source is None else RunConfig.from_dict(copy.deepcopy(self.source))


def file() -> Path:
    """The plan of the project."""
    return paths.require_project() / "notebooks" / FILE


def load(path: Path | None = None) -> dict[str, Table]:
    """The tables of the plan.

    Raises:
        LowbitError: no plan, or one that is not valid; the message names the place.
    """

    path = path or file()
    try:
        tree = yamls.load(path.read_text(encoding="utf-8"), path.name)
        return {name: Table(**table) for name, table in tree.items()}
    except OSError as error:
        raise LowbitError(f"cannot read the study's plan {path.name}: {error.strerror}") from None
    except (AttributeError, TypeError) as error:
        raise LowbitError(f"{path.name} is no plan of the study: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise LowbitError(f"{path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def trainings(tables: dict[str, Table]) -> Iterator[Training]:
    """Every training of the plan, table by table, in the order of seeds, budgets and arms.

    Raises:
        LowbitError: an arm that is no valid run.
    """
    for name, table in tables.items():
        for seed in table.seeds:
            for epochs in table.epochs:
                for arm_name, arm in table.arms.items():
                    if epochs in (arm.epochs or table.epochs) and seed in (arm.seeds or table.seeds):
                        for bits in arm.bits:
                            yield _training(name, table, arm.name or arm_name, arm, bits, epochs, seed)


def _training(name: str, table: Table, arm_name: str, arm: Arm, bits: int, epochs: int, seed: int) -> Training:
    run = copy.deepcopy(table.run) | {"name": name, "quant": copy.deepcopy(arm.quant)}
    run["train"] = {**run.get("train", {}), **arm.train, "epochs": epochs, "seed": seed}
    if run["quant"] is not None:
        apply_change(run, f"quant.weight.bits={bits}")
        if (run["quant"].get("activation") or {}).get("bits") == "same":
            apply_change(run, f"quant.activation.bits={bits}")
    columns = {}
    for place, values in table.cycle.items():
        columns[place.rpartition(".")[2]] = value = values[seed % len(values)]
        apply_change(run, f"{place}={value}")
    source = None
    if table.source is not None:
        source = run | {part: copy.deepcopy(table.source[part]) for part in ("data", "train")}
        source["train"]["seed"] = seed
    phases = tuple(arm.phases) if epochs == table.epochs[-1] else ()
    made = Training(
        name,
        arm_name,
        bits,
        epochs,
        seed,
        run,
        phases,
        table.grid,
        source,
        table.detector,
        columns,
        table.rank + arm.rank,
    )
    try:
        made.config()
        made.source_config()
    except LowbitError as error:
        raise LowbitError(f"{FILE}: {made}: {error}") from None
    return made
