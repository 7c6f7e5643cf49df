"""Numbers with units, as people read and write them: rates of links, times, sizes. Decimal units, as tc's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from abtrain.errors import ConfigurationError

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


def parse_rate(text: str) -> float:
    """Bits per second of a text such as `100mbit`, `2.5gbit` or `56kbit`.

    Raises:
        ConfigurationError: the text is no rate above 0.
    """
    value = with_unit(text, RATES)
    if value is None or value <= 0:
        raise ConfigurationError(
            f"rate {text!r} cannot be read: use a number above 0 with kbit, mbit or gbit, such as 100mbit"
        )
    return value


def parse_seconds(text: str) -> float:
    """Seconds of a text such as `0.5ms`, `80us` or `2s`.

    Raises:
        ConfigurationError: the text is no time of at least 0.
    """
    value = with_unit(text, TIMES)
    if value is None:
        raise ConfigurationError(f"time {text!r} cannot be read: use a number with us, ms or s, such as 0.5ms")
    return value


def format_rate(rate: float) -> str:
    """Bits per second in the unit that suits them, in at most four digits: 95.6mbit."""
    unit = next((unit for unit in ("gbit", "mbit") if rate >= 0.99995 * RATES[unit]), "kbit")
    return f"{rate / RATES[unit]:.4g}{unit}"


def human_bytes(count: float) -> str:
    """A number of bytes in the largest unit that keeps it at 1 or above, in three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        text = f"{count:.3g}" if count < 999.5 else f"{count:.0f}"
        if float(text) < 1000:
            return f"{text} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:,.0f} TB"
