"""Processes that start at once: forked from one that has imported torch and more already, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerContext

_ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}

# The first optimizer of a process imports torch._dynamo.
_IMPORTED = [
    "abtrain.engine.ab_training",
    "abtrain.commands.train.launch",
    "sklearn.datasets",
    "sklearn.model_selection",
    "torch._dynamo",
]


def context() -> ForkServerContext:
    """Of `multiprocessing`; the process that is forked is started with the first of its processes.

    It has one thread, as libraries read the number when they are imported.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(_IMPORTED)
    before = dict(os.environ)
    os.environ.update(_ONE_THREAD)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return forks
