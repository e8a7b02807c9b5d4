"""The suite: runs the course's notebooks, collects their numbers, compares them with the accepted ones, judges claims.

Notebooks use the names below. Each is loaded on first use; `lowbit_suite.records.record` imports nothing heavy.
"""

import sys
from typing import TYPE_CHECKING

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["claims", "parameters", "plotting"],
    submod_attrs={
        "records.rates": ["best_rates", "choose_rates"],
        "records.record": ["record", "skip"],
        "records.sweeps": ["sweep"],
        "records.tables": ["save_table"],
    },
)

if TYPE_CHECKING:
    from lowbit_suite import claims, parameters, plotting
    from lowbit_suite.records.rates import best_rates, choose_rates
    from lowbit_suite.records.record import record, skip
    from lowbit_suite.records.sweeps import sweep
    from lowbit_suite.records.tables import save_table


def skip_grammars() -> None:
    """Save more than a second of import time; call this before importing nbformat or a package that uses it.

    On import, jsonschema builds the grammars of international addresses (package rfc3987_syntax) for a check that
    notebooks do not need. It works without that package.
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # importing it now raises ImportError
