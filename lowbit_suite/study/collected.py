"""The study's tables: ``results/tables/study/<table>.csv``, made from the journals alone."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lowbit import paths
from lowbit.errors import LowbitError
from lowbit_suite.study import plan, queue, tuning
from lowbit_suite.study.plan import Correlation, Derived, Table, Training
from lowbit_suite.study.queue import Done


def folder() -> Path:
    """The folder of the tables."""
    return paths.results() / "tables" / "study"


def write(tables: Sequence[str] = ()) -> list[Path]:
    """Write every table of the plan that has a finished training, or only these ``tables``, and return the files.

    Each table gets a run card: its plan, the number of trainings on each kind of processor, commits, versions, and the
    command.
    """
    held = plan.load()
    lines = queue.done(held)
    everything = tuning.trainings(held, lines)
    ended = queue.current(everything, lines)
    tried = tuning.choices(held, lines).values()
    written = []
    for name, table in plan.chosen(held, tables).items():
        trainings = [training for training in everything if training.table == name]
        if isinstance(table, Derived) and table.factors:
            of_table = [choice for choice in tried if choice.trials[0].table == name]
            chosen = [line for choice in of_table for line in tuning.marked(choice, ended)]
        else:
            chosen = choose(trainings, ended)
        if not chosen:
            continue
        card = _card(name, table, trainings, chosen)
        written += _save(name, frame(chosen), card)
        if table.correlation is not None:
            arms = {(training.arm, training.bits) for training in trainings}
            seeds = correlations(frame(chosen), table.correlation, len(arms))
            written += _save(table.correlation.table, seeds, card) if len(seeds) else []
    return written


def _save(name: str, rows: pd.DataFrame, card: dict) -> list[Path]:
    folder().mkdir(parents=True, exist_ok=True)
    path = folder() / f"{name}.csv"
    rows.to_csv(path, index=False, float_format="%.6g")
    text = json.dumps({"table": name, "rows": len(rows)} | card, indent=1) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    return [path, path.with_suffix(".json")]


def correlations(rows: pd.DataFrame, wanted: Correlation, arms: int) -> pd.DataFrame:
    """The rank correlation of two columns over the arms, for each budget and seed; NaN if a column is constant.

    Args:
        rows: the rows of the table.
        wanted: the columns, and the name of the correlation.
        arms: the number of arms; budgets and seeds with fewer rows are left out.

    Raises:
        LowbitError: no such column.
    """
    if missing := [name for name in wanted.of if name not in rows]:
        raise LowbitError(
            f"{plan.FILE}: {wanted.table}: no row has a column {missing[0]!r}; {', '.join(rows)} are there"
        )
    made = []
    for (epochs, seed), group in rows.groupby(["epochs", "seed"], sort=False):
        one, other = (group[column].rank() for column in wanted.of)
        if len(group.dropna(subset=list(wanted.of))) == arms:
            made.append({"epochs": epochs, "seed": seed, "arms": arms, wanted.column: one.corr(other)})
    return pd.DataFrame(made)


def choose(trainings: list[Training], ended: dict[queue.Key, list[Done]]) -> list[Done]:
    """One line per training. All lines of a block are from one kind of processor, the one with most lines.

    Ties go to the kind with the older first line.
    """
    blocks: dict[tuple, list[Done]] = {}
    for training in trainings:
        blocks.setdefault(training.block, []).extend(ended.get(training.key, []))
    chosen = []
    for lines in blocks.values():
        counts = Counter(line.kind for line in lines)
        if counts:
            most = max(counts, key=lambda name: counts[name])
            chosen += {line.key: line for line in reversed(lines) if line.kind == most}.values()
    order = {training.key: place for place, training in enumerate(trainings)}
    return sorted(chosen, key=lambda line: order[line.key])


def frame(lines: list[Done]) -> pd.DataFrame:
    """One row per training, and one for each of its phases."""
    return pd.DataFrame([{**row, "kind": line.kind} for line in lines for row in line.line["rows"]])


def _card(name: str, table: Table, trainings: list[Training], chosen: list[Done]) -> dict:
    needed = [table.common, f"{table.common}_rates"] if isinstance(table, Derived) and not table.factors else []
    return {
        "settings": {
            "profile": "study",
            "dataset": table.run["data"]["name"],
            "trainings": f"{len(chosen)} of {len(trainings)}",
            **table.model_dump(exclude={"arms"}),
        },
        "command": " ".join(["lowbit study run", *(f"--table {table}" for table in (*needed, name))]),
        "core_hours": round(sum(line.seconds for line in chosen) / 3600, 2),
        "kinds": dict(Counter(line.kind for line in chosen)),
        "commits": sorted({str(line.line["commit"]) for line in chosen}),
        "torch": sorted({str(line.line["torch"]) for line in chosen}),
    }
