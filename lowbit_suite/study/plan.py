"""The study's plan: ``notebooks/study.yaml``, expanded into single trainings."""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from lowbit import paths, yamls
from lowbit.errors import LowbitError
from lowbit.training.runfile import RunConfig, apply_change

FILE = "study.yaml"

Positive = Annotated[int, Ge(1)]


class Phase(BaseModel):
    """Epochs that follow a training. Each phase starts from its end, with its optimizer's moments.

    Attributes:
        arm: the name of the phase's row in the table.
        epochs: number of epochs.
        lr: constant learning rate; lowered for all phases of an arm if the rule of annealing requires it.
        boundary: boundary range of confidence-guided annealing; None lets all weights move.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arm: str
    epochs: Positive
    lr: float
    boundary: float | None = None


class Arm(BaseModel):
    """One way to train, with its bit widths, budgets and seeds.

    Attributes:
        name: the name in the table, if it differs from the name in the plan; for one arm with widths of several ranks.
        bits: bit widths; each sets ``quant.weight.bits``, and also ``quant.activation.bits`` if the activation has
            ``bits: same``. 32 means full precision.
        quant: as in a run file, without the bits.
        train: changes to the table's ``train``.
        epochs, seeds: the subset of the table's that this arm has; None for all.
        phases: see `Phase`; at the longest budget only.
        first: changes to ``train`` of the table's ``source``. In a table without a source the network is first trained
            in full precision, for as many epochs, with these changes to the table's ``train``, and then quantized.
            None quantizes the initialized network.
        columns: further columns of the arm's rows.
        rank: arms of a lower rank run first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str | None = None
    bits: Annotated[list[Positive], MinLen(1)]
    quant: dict[str, Any] | None = None
    train: dict[str, Any] = {}
    epochs: list[Positive] | None = None
    seeds: list[Annotated[int, Ge(0)]] | None = None
    phases: list[Phase] = []
    first: dict[str, Any] | None = None
    columns: dict[str, str] = {}
    rank: int = 0


class Tune(BaseModel):
    """Learning rates for single arms of a table, chosen on validation data; `lowbit_suite.study.tuning` has the rule.

    It adds two tables. ``<table>_rates`` has the trials. ``<table>_tuned`` has the arms at their chosen rates, with the
    table's seeds and its longest budget.

    Attributes:
        claims: the claims that need these tables.
        arms: names of the arms to tune.
        factors: multiples of an arm's common rate to try, ascending; 1 is among them.
        further: how many multiples may be added beyond these, one by one, while the best is at the edge.
        hold_out: fraction of the training split on which a trial is scored; it trains on the rest.
        epochs: budget of a trial.
        seeds: seeds of the trials; they differ from the table's.
        rank: rank of both tables.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    claims: list[str]
    arms: Annotated[list[str], MinLen(1)]
    factors: Annotated[list[Annotated[float, Gt(0)]], MinLen(3)]
    further: Annotated[int, Ge(0)] = 2
    hold_out: Annotated[float, Gt(0), Lt(1)]
    epochs: Positive
    seeds: Annotated[list[Annotated[int, Ge(0)]], MinLen(1)]
    rank: int = 0

    @field_validator("factors")
    @classmethod
    def _ascending(cls, value: list[float]) -> list[float]:
        if sorted(set(value)) != value or 1 not in value:
            raise ValueError(f"factors should ascend, each once, with the common rate, 1, among them, not {value}")
        return value


class Correlation(BaseModel):
    """A further table, computed from a table's rows: for each seed a rank correlation over the arms.

    Attributes:
        table: name of the further table.
        column: name of its column with the correlation.
        of: the two columns to rank.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str
    column: str
    of: tuple[str, str]


class Table(BaseModel):
    """Arms that are compared with each other.

    Attributes:
        title: a readable title of the comparison.
        claims: the claims that need the table.
        run: model, data, teacher and train of a run file; ``epochs`` and ``seed`` are filled in.
        epochs: budgets, ascending; each has a schedule of its own.
        later: the budgets that only show the course of an effect: one rank later than those that are judged.
        seeds: random seeds; every arm runs with each.
        grid: the weight method through whose levels an arm in full precision is tracked, or None.
        source: the source task, ``data`` and ``train`` as in a run file; its network continues with a new head.
        track_source: whether to record the share of low-bit weights that are frozen in the source task's last epoch.
        detector: arguments of `lowbit.models.detector`: the trained classifier becomes the trunk of a detector instead.
        cycle: a place in the run file, such as ``data.speaker``, and its values for seeds 0, 1, 2, ... in turn; it
            becomes a column of the table.
        rank: added to the rank of each arm.
        only: the kind of processor, as `lowbit_suite.study.queue.kind` names it, that its trainings wait for; None for
            any.
        arms: the arms by name.
        tune: see `Tune`, or None.
        correlation: see `Correlation`, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    claims: list[str]
    run: dict[str, Any]
    epochs: Annotated[list[Positive], MinLen(1)]
    later: list[Positive] = []
    seeds: Annotated[list[Annotated[int, Ge(0)]], MinLen(1)]
    grid: dict[str, Any] | None = None
    source: dict[str, dict[str, Any]] | None = None
    track_source: bool = False
    detector: dict[str, Any] | None = None
    cycle: dict[str, Annotated[list[Any], MinLen(1)]] = {}
    rank: int = 0
    only: Literal["cuda", "bf16", "avx512", "avx2", "other"] | None = None
    arms: dict[str, Arm]
    tune: Tune | None = None
    correlation: Correlation | None = None

    @field_validator("epochs")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        if sorted(set(value)) != value:
            raise ValueError(f"budgets should ascend, each once, not {value}")
        return value

    @field_validator("later")
    @classmethod
    def _budgets(cls, value: list[int], info: ValidationInfo) -> list[int]:
        epochs = info.data.get("epochs", value)
        if unknown := [budget for budget in value if budget not in epochs]:
            raise ValueError(f"the table has no budget of {unknown[0]} epochs; it has {', '.join(map(str, epochs))}")
        return value

    @field_validator("source")
    @classmethod
    def _whole(cls, value: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
        if value is not None and set(value) != {"data", "train"}:
            raise ValueError(f"it needs 'data' and 'train' and nothing else, not {', '.join(value) or 'nothing'}")
        return value

    @field_validator("tune")
    @classmethod
    def _of_the_table(cls, value: Tune | None, info: ValidationInfo) -> Tune | None:
        if value is not None and {"arms", "seeds"} <= set(info.data):  # otherwise they have been refused already
            arms, judged = info.data["arms"], info.data["seeds"]
            if unknown := [name for name in value.arms if name not in arms]:
                raise ValueError(f"the table has no arm {unknown[0]!r}; it has {', '.join(arms)}")
            if both := sorted({*value.seeds} & {*judged}):
                raise ValueError(f"seed {both[0]} is also judged; a rate chosen with it would fit its luck")
        return value


class Derived(Table):
    """A table that a `Tune` adds to another one.

    Attributes:
        common: name of the other table, whose arms share one rate.
        factors: multiples of that rate, each a trial; empty for the table at the chosen rates.
        further: see `Tune`.
    """

    common: str
    factors: list[float] = []
    further: int = 0


@dataclass(frozen=True)
class Training:
    """One arm of one table at one bit width, with one budget and one seed.

    Attributes:
        table, arm, bits, epochs, seed: its place in the plan.
        run: the complete content of a run file.
        phases: the phases that follow it.
        grid: see `Table`.
        source: the complete run file of the source task, or None.
        detector, track_source, only: see `Table`.
        columns: further columns of its rows: the arm's, the seed's value of `Table.cycle`, and a tuned rate.
        rank: rank of table, arm and budget.
        common: in tables that a `Tune` adds, the table with the common rate.
        trial: whether it is one of the trainings that a rate is chosen by.
        factor: multiple of the common rate; None in tables with a common rate, and while it is not chosen.
        same: the equal training of the common table, which runs in its place; or None.
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
    common: str | None = None
    trial: bool = False
    factor: float | None = None
    same: "Training | None" = None
    track_source: bool = False
    only: str | None = None

    @property
    def key(self) -> tuple[str | int | float, ...]:
        """Its unique key: table, arm, bits, epochs, seed, and the factor if it has one."""
        key = self.table, self.arm, self.bits, self.epochs, self.seed
        return key if self.factor is None else (*key, self.factor)

    @property
    def block(self) -> tuple[str | int, ...]:
        """The group that is compared: same table, budget and seed; for trials, same table, budget and arm."""
        return (self.table, self.epochs, self.arm, self.bits) if self.trial else (self.table, self.epochs, self.seed)

    @property
    def waits(self) -> bool:
        """Whether it waits for the choice of its learning rate."""
        return self.common is not None and self.factor is None

    @property
    def moves(self) -> bool:
        """Whether it carries a network from one task to another."""
        return self.source is not None and self.source["data"] != self.run["data"]

    @property
    def length(self) -> int:
        """Number of epochs, including its phases and its source task."""
        first = 0 if self.source is None else self.source["train"]["epochs"]
        return first + self.epochs + sum(phase.epochs for phase in self.phases)

    @property
    def digest(self) -> str:
        """A fingerprint of its settings, which changes with any of them."""
        plain = [self.run, [phase.model_dump() for phase in self.phases], self.grid]
        plain += [self.source, self.detector] if self.source or self.detector else []
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        bits = "" if self.bits == 32 else f" {self.bits} bits,"
        rate = "" if self.factor is None else f", {self.factor:g} times the common rate"
        return f"{self.table}: {self.arm},{bits} {self.epochs} epochs, seed {self.seed}{rate}"

    def config(self) -> RunConfig:
        """The checked run file."""
        return RunConfig.from_dict(copy.deepcopy(self.run))

    def source_config(self) -> RunConfig | None:
        """The checked run file of the source task, or None."""
        return None if self.source is None else RunConfig.from_dict(copy.deepcopy(self.source))


def file() -> Path:
    """Path of the project's plan."""
    return paths.project() / "notebooks" / FILE


def load(path: Path | None = None) -> dict[str, Table]:
    """The tables of the plan; those that a `Tune` adds come last.

    Raises:
        LowbitError: there is no plan, or it is not valid; the message names the place.
    """

    path = path or file()
    try:
        tree = yamls.load(path.read_text(encoding="utf-8"), path.name)
        tables = {name: Table(**table) for name, table in tree.items()}
    except OSError as error:
        raise LowbitError(f"cannot read the study's plan {path.name}: {error.strerror}") from None
    except (AttributeError, TypeError) as error:
        raise LowbitError(f"{path.name} is no plan of the study: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise LowbitError(f"{path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    derived = [_derived(name, table, table.tune) for name, table in tables.items() if table.tune is not None]
    added = [name for tables_of_one in derived for name in tables_of_one]
    added += [table.correlation.table for table in tables.values() if table.correlation is not None]
    for name in added:
        if name in tables or added.count(name) > 1:
            raise LowbitError(
                f"{path.name}: 'tune' or 'correlation' adds a table {name!r} to one of that name; rename it"
            )
    return {name: table for one in [tables, *derived] for name, table in one.items()}


def chosen(tables: dict[str, Table], names: Iterable[str]) -> dict[str, Table]:
    """The tables with these names; without any, all.

    Raises:
        LowbitError: the plan has no table of such a name.
    """
    if unknown := sorted(set(names) - set(tables)):
        raise LowbitError(f"the study has no table {unknown[0]!r}; it has {', '.join(tables)}")
    return {name: tables[name] for name in names} or tables


def _derived(name: str, table: Table, tune: Tune) -> dict[str, Table]:
    """The two tables that ``tune`` adds to ``table``."""
    plain: dict[str, Any] = {"epochs": None, "seeds": None, "phases": [], "rank": 0}
    data = table.run.get("data")
    validation = data | {"hold_out": tune.hold_out} if isinstance(data, dict) else data  # otherwise the run is refused
    shared: dict[str, Any] = dict(table) | {"claims": tune.claims, "rank": tune.rank, "common": name}
    shared |= {"later": [], "tune": None, "correlation": None}
    shared["arms"] = {arm: table.arms[arm].model_copy(update=plain) for arm in tune.arms}
    trials = {
        "title": f"Trials that choose learning rates for {name}_tuned, scored on a part of the training split",
        "run": table.run | {"data": validation},
        "epochs": [tune.epochs],
        "seeds": tune.seeds,
        "factors": tune.factors,
        "further": tune.further,
    }
    tuned = {"title": f"{table.title}; each arm at its own learning rate", "epochs": table.epochs[-1:]}
    return {f"{name}_rates": Derived(**shared | trials), f"{name}_tuned": Derived(**shared | tuned)}


def trainings(tables: dict[str, Table]) -> Iterator[Training]:
    """Every training of the plan, table by table, in the order of seeds, budgets and arms.

    Trainings at a chosen rate still wait for it here; `lowbit_suite.study.tuning.trainings` adds it from the journals.

    Raises:
        LowbitError: an arm is not a valid run.
    """
    for name, table in tables.items():
        for seed in table.seeds:
            for epochs in table.epochs:
                for arm_name, arm in table.arms.items():
                    if epochs in (arm.epochs or table.epochs) and seed in (arm.seeds or table.seeds):
                        for bits in arm.bits:
                            made = _training(name, table, arm.name or arm_name, arm, bits, epochs, seed)
                            factors = table.factors if isinstance(table, Derived) else ()
                            yield from [at_rate(made, factor) for factor in factors] or [made]


def at_rate(training: Training, factor: float) -> Training:
    """A training at a multiple of its learning rate, with two more columns: ``lr_factor`` and ``lr``."""
    lr = training.config().train.lr * factor
    changed = {} if factor == 1 else {"lr": lr}  # unchanged, so that the run equals that of the common table
    run = training.run | {"train": training.run["train"] | changed}
    columns = training.columns | {"lr_factor": factor, "lr": lr}
    return _checked(replace(training, run=run, columns=columns, factor=factor))


def _training(name: str, table: Table, arm_name: str, arm: Arm, bits: int, epochs: int, seed: int) -> Training:
    run = copy.deepcopy(table.run) | {"name": name, "quant": copy.deepcopy(arm.quant)}
    run["train"] = {**run.get("train", {}), **arm.train, "epochs": epochs, "seed": seed}
    if run["quant"] is not None:
        apply_change(run, f"quant.weight.bits={bits}")
        if (run["quant"].get("activation") or {}).get("bits") == "same":
            apply_change(run, f"quant.activation.bits={bits}")
    columns: dict[str, Any] = dict(arm.columns)
    for place, values in table.cycle.items():
        columns[place.rpartition(".")[2]] = value = values[seed % len(values)]
        apply_change(run, f"{place}={value}")
    source = None
    if table.source is not None:
        source = run | {part: copy.deepcopy(table.source[part]) for part in ("data", "train")}
        source["train"] |= {**(arm.first or {}), "seed": seed}
    elif arm.first is not None:
        source = run | {"quant": None, "train": table.run.get("train", {}) | arm.first}
        source["train"] |= {"epochs": epochs, "seed": seed}
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
        table.rank + arm.rank + (epochs in table.later),
        common=table.common if isinstance(table, Derived) else None,
        trial=isinstance(table, Derived) and bool(table.factors),
        track_source=table.track_source,
        only=table.only,
    )
    return _checked(made)


def _checked(training: Training) -> Training:
    try:
        training.config()
        training.source_config()
    except LowbitError as error:
        raise LowbitError(f"{FILE}: {training}: {error}") from None
    return training
