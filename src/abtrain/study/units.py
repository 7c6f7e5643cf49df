"""Numbers with units, as people write them on a command line."""

from __future__ import annotations

import math
import re

from abtrain.errors import ConfigurationError

_RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def rate_of(text: str) -> float:
    """Bits per second of a text such as `100mbit`, `1gbit` or `56kbit` (decimal units, as tc's).

    Raises:
        ConfigurationError: no rate above 0.
    """
    value = _with_unit(text, _RATES)
    if value is None or value <= 0:
        raise ConfigurationError(f"{text!r} is not a rate above 0: write one as 100mbit or 1gbit")
    return value


def seconds_of(text: str) -> float:
    """Seconds of a text such as `0.5ms`, `80us` or `2s`.

    Raises:
        ConfigurationError: no time of at least 0.
    """
    value = _with_unit(text, _TIMES)
    if value is None:
        raise ConfigurationError(f"{text!r} is not a time: write one as 0.5ms, 80us or 2s")
    return value


def _with_unit(text: str, units: dict[str, float]) -> float | None:
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]+)\s*", text.lower())
    if match is None or match[2] not in units:
        return None
    try:
        value = float(match[1]) * units[match[2]]
    except ValueError:
        return None
    return value if math.isfinite(value) else None
