"""Behavior that all commands share: one line for each ordinary error, ``-h`` and ``--version`` on every command.

Exit status: 0 success, 1 a notebook or check did not pass (or the output was closed), 2 wrong arguments or input,
130 stopped by Ctrl-C.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lowbit.errors import LowbitError

NAMES = {"help_option_names": ["-h", "--help"]}
"""The ``context_settings`` of a `Group`; its commands inherit them."""


class Group(TyperGroup):
    """A group of commands; pass it as ``cls`` to `typer.Typer`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        _add_version(self)

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, standalone_mode: bool = True, **more: Any
    ) -> Any:
        """Run the command and exit with its status; without ``standalone_mode`` return it or raise the error."""
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **more)
        degrade()
        try:
            status = super().main(args, prog_name, standalone_mode=False, **more) or 0
            sys.stdout.flush()
        except BrokenPipeError:  # from `| head`; without this the interpreter would report it again on exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 1
        except Exception as error:
            status = _told(error)
        sys.exit(status)


def _add_version(command: Any) -> None:
    """Add the option ``--version`` to a command and all its subcommands."""
    if not any("--version" in parameter.opts for parameter in command.params):
        command.params.append(_version_option())
    for below in getattr(command, "commands", {}).values():
        _add_version(below)


def _version_option() -> Any:
    """The option, built by typer from an annotation, since typer's own classes change between releases."""

    def show(asked: bool) -> None:
        if asked:
            from lowbit import __version__

            print(f"lowbit {__version__}")
            raise typer.Exit

    about = typer.Option("--version", is_eager=True, callback=show, help="Show the version and exit.")
    maker = typer.Typer(add_completion=False)

    @maker.command()
    def command(version: Annotated[bool, about] = False) -> None:
        """Never called."""

    (option,) = typer.main.get_command(maker).params
    option.expose_value = False  # the commands do not take it as an argument
    return option


def degrade() -> None:
    """Print "?" for characters that the output cannot encode (an ASCII terminal) instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and not (stream.encoding or "").lower().startswith("utf"):
            stream.reconfigure(errors="replace")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Do the same for a module that runs on its own: an ordinary error prints one line and exits with status 2."""
    degrade()
    try:
        yield
    except (LowbitError, OSError) as error:
        sys.exit(_told(error))


def _told(error: Exception) -> int:
    """Print an ordinary error in one line on standard error and return the exit status; raise all others."""
    kind = type(error).__name__
    if kind == "NoArgsIsHelpError":
        print(error.ctx.get_help())
        return 2
    if kind == "Abort":
        stopped = isinstance(error.__context__ or error.__cause__, KeyboardInterrupt)
        print("lowbit: stopped" if stopped else "lowbit: no answer; nothing was changed", file=sys.stderr)
        return 130 if stopped else 1
    if hasattr(error, "format_message"):  # wrong arguments on the command line
        context = getattr(error, "ctx", None)
        hint = f" (see '{context.command_path} -h')" if context else ""
        text = error.format_message() + hint
    elif isinstance(error, LowbitError):
        text = str(error)
    elif isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("lowbit"):
        text = f"this command needs {error.name.partition('.')[0]}: pip install 'lowbit[course]'"
    elif isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        text = f"{place}{error.strerror or error}; give a path that exists and that you may read and write"
    else:
        raise error
    print("lowbit:", "; ".join(filter(None, map(str.strip, text.splitlines()))), file=sys.stderr)
    return 2
