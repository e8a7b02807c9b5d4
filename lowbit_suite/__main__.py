"""The command ``lowbit``; says what to install where its own packages are missing."""

import sys

from lowbit.errors import MissingExtraError


def main() -> None:
    """Runs the command with the words of the command line."""
    try:
        from lowbit_suite.app import app
    except MissingExtraError as error:
        print(f"lowbit: {error}", file=sys.stderr)
        sys.exit(2)
    app(prog_name="lowbit")


if __name__ == "__main__":
    main()
