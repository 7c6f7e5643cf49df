"""Runs code that only shows or records something, so that its errors never end a run."""

from __future__ import annotations

import logging
from collections.abc import Callable

from abtrain.errors import AbtrainError

log = logging.getLogger("abtrain")


class NeverFatal:
    """Makes calls whose errors are logged, each failing part once, and not raised."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def __call__(self, what: str, call: Callable[..., object], *args: object) -> bool:
        """Calls `call(*args)` and returns whether that succeeded.

        Args:
            what: the part that is named in the log if the call fails.
            call: the function to call with `args`.

        Raises:
            AbtrainError: the call was interrupted by a request to stop, which is not an error of the call.
        """
        try:
            call(*args)
        except AbtrainError:
            raise
        except Exception as error:
            if what not in self._logged:
                self._logged.add(what)
                log.warning("%s failed (%s: %s): the run continues without it", what, type(error).__name__, error)
            return False
        return True
