"""Numbers with units, as people read and write them: rates of links, times, sizes. Decimal units, as tc's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def with_unit(text: str, units: Mapping[str, float]) -> float | None:
    """The value of a text such as `1.5 gbit` in the base of its units; None if the text is no such number."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]+)\s*", text.lower())
    if found is None or found[2] not in units:
        return None
    try:
        value = float(found[1]) * units[found[2]]
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def human_bytes(count: float) -> str:
    """A number of bytes in the largest unit that keeps it at 1 or above, in three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        text = f"{count:.3g}" if count < 999.5 else f"{count:.0f}"
        if float(text) < 1000:
            return f"{text} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:,.0f} TB"
