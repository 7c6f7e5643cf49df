"""Rates of links: bits per second, and how people write them."""

from __future__ import annotations

import re

_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
LOWEST, HIGHEST = 100 * 10**3, 100 * 10**9
"""Bits per second between which a link can be shaped sensibly."""


def parse_rate(text: str) -> int:
    """Bits per second of a rate such as 100mbit, 2.5gbit or 500kbit.

    Raises:
        ValueError: the text is no such rate, or one that no link here can have.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"rate {text!r} cannot be read: use a number with kbit, mbit or gbit, such as 100mbit")
    rate = round(float(found[1]) * _UNITS[found[2]])
    if not LOWEST <= rate <= HIGHEST:
        raise ValueError(f"rate {text!r} is out of range: use {format_rate(LOWEST)} to {format_rate(HIGHEST)}")
    return rate


def format_rate(rate: float) -> str:
    """Bits per second in the unit that suits them, in at most four digits: 95.6mbit."""
    unit = next((unit for unit in ("gbit", "mbit") if rate >= 0.99995 * _UNITS[unit]), "kbit")
    return f"{rate / _UNITS[unit]:.4g}{unit}"
