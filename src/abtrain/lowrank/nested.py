"""Finds and replaces the tensors in nested dicts, lists and tuples."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any, depth: int = sys.maxsize) -> Iterator[Tensor]:
    """Yields all tensors in nested dicts, lists and tuples, down to `depth` levels. A tensor yields itself."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item, depth - 1)


def with_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Returns a copy of nested dicts, lists and tuples with `change(tensor)` in place of every tensor."""
    if isinstance(value, dict):
        return {key: with_tensors(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_tensors(item, change) for item in value)
    return change(value) if isinstance(value, Tensor) else value
