"""Rates of links that a lab can shape: bits per second, and how people write them."""

from __future__ import annotations

from abtrain.commands.units import RATES, with_unit

LOWEST, HIGHEST = 100 * 10**3, 100 * 10**9
"""Bits per second between which a link can be shaped sensibly."""


def parse_rate(text: str) -> int:
    """Bits per second of a rate such as 100mbit, 2.5gbit or 500kbit.

    Raises:
        ValueError: the text is no such rate, or one that no link here can have.
    """
    value = with_unit(text, RATES)
    if value is None:
        raise ValueError(f"rate {text!r} cannot be read: use a number with kbit, mbit or gbit, such as 100mbit")
    rate = round(value)
    if not LOWEST <= rate <= HIGHEST:
        raise ValueError(f"rate {text!r} is out of range: use {format_rate(LOWEST)} to {format_rate(HIGHEST)}")
    return rate


def format_rate(rate: float) -> str:
    """Bits per second in the unit that suits them, in at most four digits: 95.6mbit."""
    unit = next((unit for unit in ("gbit", "mbit") if rate >= 0.99995 * RATES[unit]), "kbit")
    return f"{rate / RATES[unit]:.4g}{unit}"
