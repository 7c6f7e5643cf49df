"""Parses and formats link rates, times and sizes with decimal units."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from abtrain.errors import ConfigurationError

Value = TypeVar("Value")

RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
SIZES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def with_unit(text: str, units: Mapping[str, float]) -> float | None:
    """Returns the value of a string such as `1.5 gbit` in base units; None if it cannot be parsed."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in units:
        return None
    try:
        value = float(found[1]) * units[found[2]]
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def parse_rate(text: str) -> float:
    """Parses a link rate such as `100mbit`, `2.5gbit` or `56kbit` into bits per second.

    Raises:
        ConfigurationError: the string is not a rate above 0.
    """
    value = with_unit(text, RATES)
    if value is None or value <= 0:
        raise ConfigurationError(
            f"rate {text!r} cannot be read: use a number above 0 with kbit, mbit or gbit, such as 100mbit"
        )
    return value


def parse_seconds(text: str) -> float:
    """Parses a time such as `0.5ms`, `80us` or `2s` into seconds.

    Raises:
        ConfigurationError: the string is not a time of at least 0.
    """
    value = with_unit(text, TIMES)
    if value is None:
        raise ConfigurationError(f"time {text!r} cannot be read: use a number with us, ms or s, such as 0.5ms")
    return value


def parse_size(text: str) -> float:
    """Parses a size such as `500MB` or `1.5GB` into bytes.

    Raises:
        ConfigurationError: the string is not a size of at least 0.
    """
    value = with_unit(text, SIZES)
    if value is None:
        raise ConfigurationError(f"size {text!r} cannot be read: use a number with B, kB, MB, GB or TB, such as 500MB")
    return value


def parse_all(texts: Iterable[str], parse: Callable[[str], Value], problems: list[str]) -> list[Value]:
    """Returns the parsed values of valid strings, and appends a message for each invalid one to `problems`."""
    values = []
    for text in texts:
        try:
            values.append(parse(text))
        except ConfigurationError as error:
            problems += error.problems
    return values


def format_rate(rate: float) -> str:
    """Formats bits per second in kbit, mbit or gbit with up to four digits: 95.6mbit."""
    unit = next((unit for unit in ("gbit", "mbit") if rate >= 0.99995 * RATES[unit]), "kbit")
    return f"{rate / RATES[unit]:.4g}{unit}"


def human_bytes(count: float) -> str:
    """Formats a number of bytes with three digits, in the largest unit that keeps it at 1 or above."""
    for unit in ("B", "kB", "MB", "GB"):
        text = f"{count:.3g}" if count < 999.5 else f"{count:.0f}"
        if float(text) < 1000:
            return f"{text} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def spread(mean: float | None, deviation: float | None) -> str:
    """Formats a mean with its standard deviation; the mean alone if there is no deviation, and `-` without a mean."""
    if mean is None:
        return "-"
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


@dataclass(frozen=True)
class TimeUnit:
    """A unit of time, with its name in the plural and its length in seconds."""

    name: str
    seconds: int

    def figure(self, seconds: float) -> str:
        """Formats a time in this unit, without its name: with two decimals below 100, and without decimals above."""
        value = seconds / self.seconds
        return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"

    def text(self, seconds: float) -> str:
        """Formats a time in this unit, followed by its name."""
        return f"{self.figure(seconds)} {self.name}"


def unit_of(seconds: float) -> TimeUnit:
    """Returns the largest unit in which a time is at least 2, or seconds if it is shorter."""
    units = [TimeUnit("days", 86400), TimeUnit("hours", 3600), TimeUnit("minutes", 60), TimeUnit("seconds", 1)]
    return next((unit for unit in units if seconds >= 2 * unit.seconds), units[-1])
