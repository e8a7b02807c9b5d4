"""Engines for test_processes.py; a spawned process imports this file, so nothing heavy."""

import os
import time

from benchmarks.processes import Built


def working(seconds=0.001):
    return Built(lambda: time.sleep(seconds), calls=2, facts={"threads": os.environ["OMP_NUM_THREADS"]})


def unbuildable():
    import a_package_that_nobody_has  # noqa: F401


def dying():
    turns = iter(range(10_000))
    return Built(lambda: next(turns) > 4 and os.kill(os.getpid(), 9))


def failing():
    turns = iter(range(10_000))

    def step():
        if next(turns) > 4:
            raise ValueError("enough")

    return Built(step)


def hanging():
    time.sleep(600)
