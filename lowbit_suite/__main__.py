"""The command ``lowbit``; it says what to install if packages that it needs are missing."""

import sys

from lowbit.errors import MissingExtraError


def main() -> None:
    """Run the command with the arguments of the command line."""
    try:
        from lowbit_suite.app import app
    except MissingExtraError as error:
        print(f"lowbit: {error}", file=sys.stderr)
        sys.exit(2)
    app(prog_name="lowbit")


if __name__ == "__main__":
    main()
