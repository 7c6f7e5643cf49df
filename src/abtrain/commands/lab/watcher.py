"""Removes a lab when its process ends for any reason.

The program is started as `python -m abtrain.commands.lab.watcher PREFIX`. Only the process of the lab keeps the
program's standard input open. When the input ends, the process has ended, and the program removes the lab.
"""

from __future__ import annotations

import contextlib
import sys
import time

from abtrain.commands.lab import namespaces
from abtrain.errors import LabError

_SETTLE_SECONDS = 0.3  # a command that the ended process had started may still add a namespace


def main(prefix: str) -> None:
    """Waits until the lab's process has ended, and removes the lab."""
    orderly = sys.stdin.buffer.read() != b""
    with contextlib.suppress(LabError):  # the next lab tries again
        namespaces.remove_lab(prefix)
        if not orderly:
            time.sleep(_SETTLE_SECONDS)
            namespaces.remove_lab(prefix)


if __name__ == "__main__":
    main(sys.argv[1])
