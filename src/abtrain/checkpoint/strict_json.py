"""JSON that was not written here: what the format leaves open is refused, and so is what JSON does not have."""

from __future__ import annotations

import json
import math
from typing import Any

MOST_DIGITS = 4000
"""Of a whole number: Python refuses to read many more from a file."""


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is none, or not UTF-8; or it has NaN or Infinity, a number too large for Python, the same key
            twice in an object, or too many levels.
    """
    try:
        return json.loads(
            data.decode(),
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_without_repetition,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS + 1:
        raise ValueError(f"a number has {len(text)} digits: at most {MOST_DIGITS} are read")
    return int(text)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return content
