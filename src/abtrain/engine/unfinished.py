"""Warns when a process ends within a round, with a different model on each worker."""

from __future__ import annotations

import atexit
import logging
import weakref
from typing import Protocol

log = logging.getLogger("abtrain")


class Run(Protocol):
    """The part of a run that this module needs."""

    @property
    def within_round(self) -> str:
        """A warning if the model is this worker's own and was not saved; empty if it is not."""
        ...


_RUNS: weakref.WeakSet[Run] = weakref.WeakSet()


def watch(run: Run) -> None:
    """Lets a run be asked when the process ends, if it is still there."""
    if not _RUNS:
        atexit.unregister(tell)
        atexit.register(tell)
    _RUNS.add(run)


def forget(run: Run) -> None:
    """The run is closed: what was to be said has been."""
    _RUNS.discard(run)


def tell() -> None:
    """Says what becomes of the runs of this process."""
    for run in list(_RUNS):
        why = run.within_round
        if why:
            log.warning("%s", why)
