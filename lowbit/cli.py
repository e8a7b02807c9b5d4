"""The ``lowbit`` command: each part of the library brings its own commands, this file puts them together.

Exit status: 0 all is well, 1 something asked for did not pass, 2 a mistake in what was given (one line on stderr).
"""

import functools
import sys
from collections.abc import Callable

import typer

from lowbit.benchmarks import cli as benchmarks
from lowbit.data import cli as data
from lowbit.errors import LowbitError
from lowbit.kernels import cli as kernels
from lowbit.suite import cli as suite
from lowbit.suite.study import cli as study
from lowbit.training import cli as training

app = typer.Typer(
    help="Low-bit training, taught and checked: notebooks, runs, data and benchmarks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _plain_errors(command: Callable) -> Callable:
    """Turns a `LowbitError` into its message and exit status 2."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except LowbitError as error:
            print(f"lowbit: {error}", file=sys.stderr)
            raise typer.Exit(2) from None

    return wrapped


OF_SUITE = (suite.run, suite.check, suite.accept, suite.claims, suite.again, suite.mutate, suite.doctor)
for command in (*OF_SUITE, training.train, kernels.pack):
    app.command()(_plain_errors(command))
app.add_typer(data.app, name="data", help="The data sets: what is there, where it comes from, is it whole.")
app.add_typer(benchmarks.app, name="bench", help="Benchmarks: ratios measured in one run.")
app.add_typer(study.app, name="study", help="The long trainings by which the claims are judged.")
app.add_typer(suite.new, name="new", help="A notebook or a quantiser to start from.")
for group in (data.app, benchmarks.app, study.app, suite.new):
    for info in group.registered_commands:
        info.callback = _plain_errors(info.callback)
