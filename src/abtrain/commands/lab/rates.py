"""Rates that a lab can give to a link."""

from __future__ import annotations

from abtrain.commands.units import format_rate, parse_rate
from abtrain.errors import ConfigurationError

LOWEST, HIGHEST = 100 * 10**3, 100 * 10**9
"""Bits per second between which a link can be shaped sensibly."""


def parse_link_rate(text: str) -> int:
    """Whole bits per second of a text such as `100mbit`.

    Raises:
        ConfigurationError: the text is no rate, or one that no link of a lab can have.
    """
    rate = round(parse_rate(text))
    if not LOWEST <= rate <= HIGHEST:
        raise ConfigurationError(f"rate {text!r} is out of range: use {format_rate(LOWEST)} to {format_rate(HIGHEST)}")
    return rate
