"""Measurements: how weights move in training, what a model costs, and which conclusions the seeds support.

The names below are loaded on first use, so that the command line starts quickly.
"""

from typing import TYPE_CHECKING

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "costs": ["cost", "totals", "training_memory"],
        "freezing": ["FreezingTracker", "FrozenFrom"],
        "misestimation": ["query_key_misestimation"],
        "oscillation": ["OscillationState", "OscillationTracker", "oscillation_step"],
        "pareto": ["pareto_front"],
        "thresholds": ["boundary_density", "reach", "spacings"],
        "statistics": ["Effect", "interval", "paired_difference", "summarize", "verdict"],
    },
)

if TYPE_CHECKING:
    from lowbit.metrics.costs import cost, totals, training_memory
    from lowbit.metrics.freezing import FreezingTracker, FrozenFrom
    from lowbit.metrics.misestimation import query_key_misestimation
    from lowbit.metrics.oscillation import OscillationState, OscillationTracker, oscillation_step
    from lowbit.metrics.pareto import pareto_front
    from lowbit.metrics.statistics import Effect, interval, paired_difference, summarize, verdict
    from lowbit.metrics.thresholds import boundary_density, reach, spacings
