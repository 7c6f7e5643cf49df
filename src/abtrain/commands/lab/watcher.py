"""Removes a lab when its process ends for any reason.

The program `python -m abtrain.commands.lab.watcher PREFIX` waits for the end of its standard input, which only the
process of the lab holds open.
"""

from __future__ import annotations

import contextlib
import sys
import time

from abtrain.commands.lab import namespaces
from abtrain.errors import LabError

_SETTLE_SECONDS = 0.3  # a command that the dead process had started may still add a namespace


def main(prefix: str) -> None:
    """Waits for the end of the lab's process, and removes the lab."""
    orderly = sys.stdin.buffer.read() != b""
    with contextlib.suppress(LabError):  # the next lab tries again
        namespaces.remove_lab(prefix)
        if not orderly:
            time.sleep(_SETTLE_SECONDS)
            namespaces.remove_lab(prefix)


if __name__ == "__main__":
    main(sys.argv[1])
