"""Rates and times of a command line."""

from __future__ import annotations

from abtrain.commands.units import RATES, TIMES, with_unit
from abtrain.errors import ConfigurationError


def rate_of(text: str) -> float:
    """Bits per second of a text such as `100mbit`, `1gbit` or `56kbit` (decimal units, as tc's).

    Raises:
        ConfigurationError: no rate above 0.
    """
    value = with_unit(text, RATES)
    if value is None or value <= 0:
        raise ConfigurationError(f"{text!r} is not a rate above 0: write one as 100mbit or 1gbit")
    return value


def seconds_of(text: str) -> float:
    """Seconds of a text such as `0.5ms`, `80us` or `2s`.

    Raises:
        ConfigurationError: no time of at least 0.
    """
    value = with_unit(text, TIMES)
    if value is None:
        raise ConfigurationError(f"{text!r} is not a time: write one as 0.5ms, 80us or 2s")
    return value
