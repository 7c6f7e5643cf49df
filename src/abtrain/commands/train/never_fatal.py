"""Runs code that only shows or records a run, and never lets it end the run."""

from __future__ import annotations

import logging
from collections.abc import Callable

from abtrain.errors import AbtrainError

log = logging.getLogger("abtrain")


class Aside:
    """Makes calls whose errors are told, each kind of them once, and change nothing for training."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, what: str, call: Callable[..., object], *args: object) -> bool:
        """Calls, and says whether that went well.

        Args:
            what: fails, for the message.
            call: with `args`.
        """
        try:
            call(*args)
        except AbtrainError:
            raise  # a request to stop may come at any time, and is none of the call's own errors
        except Exception as error:
            if what not in self._told:
                self._told.add(what)
                log.warning("%s failed (%s: %s): the run goes on without it", what, type(error).__name__, error)
            return False
        return True
