"""Warns when a process ends within a round, with a different model on each worker."""

from __future__ import annotations

import atexit
import logging
import weakref

from abtrain.engine.progress import Progress

log = logging.getLogger("abtrain")

_WATCHED: weakref.WeakSet[Progress] = weakref.WeakSet()


def watch(progress: Progress) -> None:
    """Warns when the process ends, if the run still exists then and is within a round."""
    _WATCHED.add(progress)


def forget(progress: Progress) -> None:
    """Stops watching a run."""
    _WATCHED.discard(progress)


@atexit.register
def warn() -> None:
    """Warns of every watched run that is within a round."""
    for progress in list(_WATCHED):
        if progress.within_round:
            log.warning("%s", progress.within_round)
