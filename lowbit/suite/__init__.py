"""The suite: runs the course's notebooks, collects their numbers, compares them with the accepted ones.

`lowbit.suite.record` is what notebooks call; it imports nothing heavy. The rest serves the commands
``lowbit run``, ``lowbit check``, ``lowbit accept`` and ``lowbit doctor``.
"""

import sys


def skip_grammars() -> None:
    """Call before importing nbformat or what uses it: saves more than a second in every process of the suite.

    jsonschema builds the grammars of international addresses (package rfc3987_syntax) when it is imported, for a check
    that notebooks do not ask for, and does without where it cannot.
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # to import it is an ImportError then
