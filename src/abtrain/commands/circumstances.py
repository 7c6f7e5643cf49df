"""Describes the software and the hardware of this machine, on which results depend."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version

from abtrain.version import __version__


def versions() -> dict[str, str]:
    """Returns the versions of abtrain, torch and Python."""
    return {"abtrain": __version__, "torch": version("torch"), "python": platform.python_version()}


def hardware() -> dict[str, str | int | None]:
    """Returns the platform and the number of cores."""
    return {"platform": platform.platform(), "cores": os.cpu_count()}


def versions_note(found: Iterable[str | None]) -> str:
    """Returns a note that lists the versions of abtrain that computed the results in a table.

    Args:
        found: the version that computed each result; None if it is unknown. The note is empty if all are equal.
    """
    known = sorted({each or "unknown" for each in found})
    return f"The results come from several versions of abtrain: {', '.join(known)}." if len(known) > 1 else ""
