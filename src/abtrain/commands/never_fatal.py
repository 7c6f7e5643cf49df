"""Calls code that only displays or records, and logs its errors instead of raising them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from abtrain.errors import AbtrainError

log = logging.getLogger("abtrain")


class NeverFatal:
    """Calls functions and logs their errors instead of raising them.

    Each part of the program is logged only at its first failure.
    """

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def __call__(self, what: str, call: Callable[..., object], *args: object) -> bool:
        """Calls `call(*args)` and returns whether it succeeded.

        Args:
            what: the name of the part of the program that the call belongs to, for the log.
            call: the function to call with `args`.

        Raises:
            AbtrainError: a request to stop interrupted the call. The call itself has not failed.
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
