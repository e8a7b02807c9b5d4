"""The suite: runs the course's notebooks, collects their numbers, compares them with the accepted ones, judges claims.

Notebooks use the names below, loaded when first used; `lowbit_suite.records.record` imports nothing heavy.
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
    """Call before importing nbformat or what uses it: saves more than a second in every process of the suite.

    jsonschema builds the grammars of international addresses (package rfc3987_syntax) when it is imported, for a check
    that notebooks do not ask for, and does without where it cannot.
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # to import it is an ImportError then
