"""Checks data that another process wrote. A check is a function that yields a message for each problem with a value.

    step = whole(0, 20)
    list(step("step", 21))   # ["step is 21, not a whole number from 0 to 20"]

`mapping`, `by_name`, `each` and `row` build a check of a container from checks of its items.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from numbers import Real
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from abtrain.errors import CheckpointError, a_or_an

Check = Callable[[str, Any], Iterator[str]]
"""(name of the value in messages, value) -> one message for each problem."""

POSITIVE = sys.float_info.min
"""The lower bound for numbers that must be positive."""

_LARGEST: Any = sys.float_info.max
_MOST_LISTED = 4
_MOST_CHARACTERS = 60
_MALFORMED = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
    SafetensorError,
)
# PyTorch raises a plain RuntimeError if the CPU has no memory left, or if another worker is lost.
_NOT_THE_DATA = ("DefaultCPUAllocator: ", "out of memory", "/gloo/")


def whole(low: int, high: int) -> Check:
    return _one(lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}")


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    least = " above 0" if low == POSITIVE else f" of at least {low:g}" if low > -math.inf else ""
    most = f" and at most {high:g}" if high < math.inf else ""
    return _one(lambda value: is_number(value) and low <= value <= high, f"a finite number{least}{most}")


def text() -> Check:
    return _one(lambda value: isinstance(value, str), "a string")


def one_of(*choices: str | bool | None) -> Check:
    """Builds a check that a value equals one of the choices and has its type: 1 is not True."""
    known = " or ".join(map(repr, choices))
    return _one(lambda value: any(type(value) is type(one) and value == one for one in choices), known)


def tensor(shape: Sequence[int | None] | None = None, dtype: torch.dtype | None = None) -> Check:
    """Builds a check of a dense tensor outside the meta device. None stands for any shape, size or dtype."""

    def fits(value: object) -> bool:
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type == "meta":
            return False
        wanted = value.shape if shape is None else shape
        sizes_fit = all(want in (None, size) for size, want in zip(value.shape, wanted, strict=False))
        return dtype in (None, value.dtype) and len(wanted) == value.ndim and sizes_fit

    kind = "" if dtype is None else f" of {dtype}"
    size = "" if shape is None else f" of shape {str(tuple(shape)).replace('None', 'any')}"
    return _one(fits, f"a dense tensor{kind}{size}")


def like(layout: Tensor, dtype: torch.dtype | None = None) -> Check:
    """Builds a check of a dense tensor with the shape of `layout` and with `dtype` (None: the dtype of `layout`)."""
    return tensor(layout.shape, dtype or layout.dtype)


def anything(place: str, value: Any) -> Iterator[str]:
    return iter(())


def data(place: str, value: Any) -> Iterator[str]:
    """Checks that a value has only dicts, lists and tuples of dense tensors, numbers, strings, booleans and None."""
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, list | tuple):
        for item in value:
            yield from data(place, item)
    elif isinstance(value, Tensor):
        yield from tensor()(place, value)
    elif not (value is None or isinstance(value, str | Real)):
        yield f"{place} contains {said(value)}, which cannot be saved"


def maybe(check: Check) -> Check:
    """Builds a check that accepts None, and every value that the given check accepts."""
    return lambda place, value: iter(()) if value is None else check(place, value)


def mapping(known: Mapping[str, Check], required: Collection[str] | None = None) -> Check:
    """Builds a check of a dict. Its keys must be among those of `known`, and include `required` (None: all of them)."""

    def check(place: str, value: Any) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield f"{place} is {said(value)}, not a dict"
            return
        needed = known if required is None else required
        yield from (f"{place} lacks {said(key)}" for key in needed if key not in value)
        for key, item in value.items():
            if isinstance(key, str) and key in known:
                yield from known[key](f"{place}/{key}", item)
            else:
                yield f"{place} has {said(key)}, which is not a known key"

    return check


def by_name(check: Check) -> Check:
    """Builds a check of a dict whose keys are strings and whose values pass the given check."""

    def of_all(place: str, value: Any) -> Iterator[str]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            yield f"{place} is {said(value)}, not a dict whose keys are strings"
            return
        for key, item in value.items():
            yield from check(f"{place}/{ascii(key[:_MOST_CHARACTERS])[1:-1]}", item)

    return of_all


def each(check: Check) -> Check:
    """Builds a check of a list or tuple whose items all pass the given check."""

    def of_all(place: str, value: Any) -> Iterator[str]:
        if isinstance(value, list | tuple):
            yield from row(*[check] * len(value))(place, value)
        else:
            yield f"{place} is {said(value)}, not a list"

    return of_all


def row(*checks: Check) -> Check:
    """Builds a check of a list or tuple with one item for each given check: item i must pass check i."""

    def of_all(place: str, value: Any) -> Iterator[str]:
        if not isinstance(value, list | tuple) or len(value) != len(checks):
            yield f"{place} is {said(value)}, not a list of length {len(checks)}"
            return
        for i, (check, item) in enumerate(zip(checks, value, strict=True)):
            yield from check(f"{place}/{i}", item)

    return of_all


def also(check: Check, holds: Callable[[Any], bool], what: str) -> Check:
    """Adds the condition `holds(value)` to a check. The message for values that violate it is "PLACE is not WHAT"."""

    def both(place: str, value: Any) -> Iterator[str]:
        problems = list(check(place, value))
        yield from problems
        if not problems and not holds(value):
            yield f"{place} is not {what}"

    return both


def is_number(value: object) -> bool:
    """Returns whether a value is a finite real number; booleans do not count as numbers."""
    # No conversion: a whole number may be too large for a float.
    return isinstance(value, int | float | Real) and not isinstance(value, bool) and bool(abs(value) <= _LARGEST)


def said(value: object) -> str:
    """Returns a short description of any value, for use in a message. Never raises an error."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, list | tuple | Mapping):
        return f"{a_or_an(type(value).__name__)} of length {len(value)}"
    if isinstance(value, int) and abs(value) > 10**_MOST_CHARACTERS:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, str) and len(value) > _MOST_CHARACTERS:
        return f"{value[:_MOST_CHARACTERS]!a}..."
    if value is None or isinstance(value, str | int | float):
        return ascii(value)
    return a_or_an(type(value).__name__)


def told_names(names: Sequence[str]) -> str:
    """Returns names as text for a message: the first four names, and the number of further names."""
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return f"{', '.join(names[:_MOST_LISTED])}{more}"


def first_problems(*stages: Callable[[], Iterator[str]]) -> list[str]:
    """Runs stages of checks until one finds problems, and returns at most four. A stage may rely on earlier stages."""
    found = (list(islice(stage(), _MOST_LISTED)) for stage in stages)
    return next(filter(None, found), [])


@contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Turns errors caused by malformed data into a CheckpointError, whose message is `what` and the error's text.

    abtrain's own errors, and errors from a lack of memory or a lost worker, are raised unchanged.
    """
    try:
        yield
    except _MALFORMED as error:
        if not blames_data(error):
            raise
        raise CheckpointError(f"{what} ({brief(error)})") from error


def blames_data(error: Exception) -> bool:
    """Returns whether malformed data can have caused an error, rather than a lack of memory or a lost worker."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, _MALFORMED)
    other = isinstance(error, torch.OutOfMemoryError | torch.distributed.DistError)
    return not other and not any(words in str(error) for words in _NOT_THE_DATA)


def brief(error: Exception) -> str:
    """Returns an error's type and the first line of its message, cut after 200 characters."""
    return f"{type(error).__name__}: {ascii(str(error).partition(chr(10))[0][:200])[1:-1]}"


def _one(holds: Callable[[Any], bool], what: str) -> Check:
    def check(place: str, value: Any) -> Iterator[str]:
        if not holds(value):
            yield f"{place} is {said(value)}, not {what}"

    return check
