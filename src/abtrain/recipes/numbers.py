"""Checks settings that must be numbers in a range. Imports no torch."""

from __future__ import annotations

import math
from typing import TypeGuard

MOST = 2**53
"""Doubles represent all whole numbers up to this one exactly."""


def whole_number_problems(name: str, value: object, least: int) -> list[str]:
    """Returns a list of one message if a setting is not a whole number of at least `least`, otherwise an empty list."""
    if isinstance(value, bool) or not isinstance(value, int):
        return [f"{name}={value!r} is not a whole number: use one of at least {least}"]
    if value > MOST:
        return [f"{name} is too large: use at most {MOST}"]
    return [] if value >= least else [f"{name}={value} is too small: use at least {least}"]


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Returns whether a value is a finite number. A whole number must be at most `MOST`; booleans are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= MOST if isinstance(value, int) else math.isfinite(value)


def number_problems(name: str, value: object, above: float) -> list[str]:
    """Returns a list of one message if a setting is not a finite number above `above`, otherwise an empty list."""
    if not is_finite_number(value) or value <= above:
        return [f"{name}={value!r} is not a finite number above {above}: use one"]
    return []


def share_problems(name: str, value: object, below: float | None = None) -> list[str]:
    """Returns a list of one message if a setting is not from 0 to 1, or from 0 to less than `below`; otherwise []."""
    range_ = "from 0 to 1" if below is None else f"from 0 to less than {below}"
    if not is_finite_number(value):
        return [f"{name}={value!r} is not a finite number: use one {range_}"]
    inside = 0 <= value <= 1 if below is None else 0 <= value < below
    return [] if inside else [f"{name}={value} is out of range: use a number {range_}"]
