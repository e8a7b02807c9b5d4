"""The ``lowbit`` command: joins the commands of the library, the suite and the developers' tools.

Exit status: 0 success, 1 a notebook or check did not pass, 2 wrong arguments or input (one line on stderr).
"""

import sys
from pathlib import Path

from lowbit.extras import extra

with extra("train", "the lowbit command"):
    import typer

    from lowbit.data import cli as data
    from lowbit.engine import cli as engine
    from lowbit.kernels import cli as kernels
    from lowbit.training import cli as training
    from lowbit_suite import cli as suite
    from lowbit_suite.command import NAMES, Group
    from lowbit_suite.study import cli as study

app = typer.Typer(
    cls=Group,
    context_settings=NAMES,
    help="Low-bit training, taught and checked: notebooks, runs, data and benchmarks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


COMMANDS = (
    suite.run,
    suite.check,
    suite.accept,
    suite.report,
    suite.claims,
    suite.again,
    suite.course,
    suite.doctor,
    training.train,
    kernels.pack,
    engine.export,
)
GROUPS = {
    "data": (data.app, "The data sets: list, fetch and verify them."),
    "study": (study.app, "The long trainings that decide the claims."),
    "new": (suite.new, "Create a notebook or a quantizer to start from."),
}
SOURCES = Path(__file__).resolve().parent.parent

if (SOURCES / "pyproject.toml").exists():  # a source tree: the developers' tools are not part of a wheel
    sys.path.append(str(SOURCES))
    from benchmarks import cli as benchmarks
    from tools import cli as tools

    COMMANDS += (tools.mutate,)
    GROUPS["bench"] = (benchmarks.app, "Benchmarks: ratios measured in one run.")

for command in COMMANDS:
    app.command()(command)
for name, (group, about) in GROUPS.items():
    app.add_typer(group, name=name, help=about)
