"""Processes that start at once: forked from one that has already imported torch, which takes seconds."""

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
    """Returns a context of `multiprocessing` whose processes are forked from one that runs on one thread.

    Libraries read the number of threads when they are imported.
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
