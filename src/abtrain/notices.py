"""Shows the library's warnings on standard error, with its name, in programs that have not set up logging."""

from __future__ import annotations

import logging
import sys


class _LastResort(logging.Handler):
    """Prints records that no other handler would show. Python's own last resort would leave out who warns."""

    def emit(self, record: logging.LogRecord) -> None:
        if not is_set_up():
            print(f"abtrain: {record.getMessage()}", file=sys.stderr, flush=True)


def is_set_up() -> bool:
    """Returns whether the program handles the library's log records itself."""
    log: logging.Logger | None = logging.getLogger("abtrain")
    while log is not None:
        if any(not isinstance(handler, _LastResort) for handler in log.handlers):
            return True
        log = log.parent if log.propagate else None
    return False


def show_by_default() -> None:
    """Adds the handler of last resort to the library's logger."""
    logging.getLogger("abtrain").addHandler(_LastResort(logging.WARNING))
