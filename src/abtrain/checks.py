"""Checks of data that another process wrote. A check yields one message for each thing that is wrong with a value.

    step = whole(0, 20)
    list(step("step", 21))   # ["step is 21, not a whole number from 0 to 20"]

Checks of parts make checks of the whole: `mapping`, `by_name`, `each`, `row`, `maybe`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from abtrain.errors import CheckpointError

Check = Callable[[str, Any], Iterator[str]]
"""Takes the place of a value, for the message, and the value."""

POSITIVE = sys.float_info.min
"""The lowest bound of a number that must not be 0."""

_LARGEST: Any = sys.float_info.max
_MOST_TOLD = 5
_MOST_CHARACTERS = 60
# PyTorch has no errors of their own for a CPU without memory, and for a peer that is gone.
_NOT_THE_DATA = ("DefaultCPUAllocator: ", "out of memory", "/gloo/")
_MALFORMED = (
    KeyError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)


def whole(low: int, high: int) -> Check:
    return _one(lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}")


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    range_ = "" if (low, high) == (-math.inf, math.inf) else f" from {low:g} to {high:g}"
    return _one(lambda value: is_number(value) and low <= value <= high, f"a finite number{range_}")


def text() -> Check:
    return _one(lambda value: isinstance(value, str), "a string")


def one_of(*choices: str | bool | None) -> Check:
    """One of these very values: 1 is not True."""
    known = " or ".join(map(repr, choices))
    return _one(lambda value: any(type(value) is type(one) and value == one for one in choices), known)


def tensor(shape: Sequence[int | None] | None = None, dtype: torch.dtype | None = None) -> Check:
    """A dense tensor with values; None stands for any shape, any size and any dtype."""

    def fits(value: object) -> bool:
        return (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and value.device.type != "meta"
            and (dtype is None or value.dtype == dtype)
            and (shape is None or _agree(value.shape, shape))
        )

    kind = "" if dtype is None else f" of {dtype}"
    size = "" if shape is None else f" of shape {str(tuple(shape)).replace('None', 'any')}"
    return _one(fits, f"a dense tensor{kind}{size}")


def like(layout: Tensor, dtype: torch.dtype | None = None) -> Check:
    """A tensor of the shape and dtype (or of another `dtype`) of this one."""
    return tensor(layout.shape, layout.dtype if dtype is None else dtype)


def anything(place: str, value: Any) -> Iterator[str]:
    return iter(())


def data(place: str, value: Any) -> Iterator[str]:
    """Dicts, lists and tuples, however nested, of dense tensors, numbers, strings, booleans and None."""
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, list | tuple):
        for item in value:
            yield from data(place, item)
    elif isinstance(value, Tensor):
        yield from tensor()(place, value)
    elif not (value is None or isinstance(value, str | Real)):
        yield f"{place} holds {said(value)}, not data"


def maybe(check: Check) -> Check:
    """None, or what passes the check."""
    return lambda place, value: iter(()) if value is None else check(place, value)


def mapping(known: Mapping[str, Check], required: Collection[str] | None = None) -> Check:
    """A dict of these keys and no others; `required`: the keys that it must have (None: all)."""

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
                yield f"{place} has {said(key)}, which does not belong there"

    return check


def by_name(check: Check) -> Check:
    """A dict of any strings, each with a value that passes the check."""

    def of_all(place: str, value: Any) -> Iterator[str]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            yield f"{place} is {said(value)}, not a dict of strings"
            return
        for key, item in value.items():
            yield from check(f"{place}/{key[:_MOST_CHARACTERS]}", item)

    return of_all


def each(check: Check) -> Check:
    """A list of what passes the check."""

    def of_all(place: str, value: Any) -> Iterator[str]:
        if not isinstance(value, list | tuple):
            yield f"{place} is {said(value)}, not a list"
            return
        for i, item in enumerate(value):
            yield from check(f"{place}/{i}", item)

    return of_all


def row(*checks: Check) -> Check:
    """A list of as many items as there are checks."""

    def of_all(place: str, value: Any) -> Iterator[str]:
        if not isinstance(value, list | tuple) or len(value) != len(checks):
            yield f"{place} is {said(value)}, not a list of {len(checks)}"
            return
        for i, (check, item) in enumerate(zip(checks, value, strict=True)):
            yield from check(f"{place}/{i}", item)

    return of_all


def also(check: Check, holds: Callable[[Any], bool], what: str) -> Check:
    """Combines a check with a condition that only makes sense once the check has passed."""

    def both(place: str, value: Any) -> Iterator[str]:
        problems = list(check(place, value))
        yield from problems
        if not problems and not holds(value):
            yield f"{place} is not {what}"

    return both


def is_number(value: object) -> bool:
    """Whether this is a finite real number; True and False are none."""
    # Compared as it is: a whole number may be too large to become a float.
    return isinstance(value, int | float | Real) and not isinstance(value, bool) and bool(abs(value) <= _LARGEST)


def said(value: object) -> str:
    """A value for a message: never long, and never an error, whatever the value is."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, list | tuple | Mapping):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**_MOST_CHARACTERS:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, str) and len(value) > _MOST_CHARACTERS:
        return f"{value[:_MOST_CHARACTERS]!a}..."
    if value is None or isinstance(value, str | int | float):
        return ascii(value)
    return f"a {type(value).__name__}"


def first_problems(*stages: Callable[[], Iterator[str]]) -> list[str]:
    """The first few problems of the first stage that has any: a stage may rely on those before it."""
    for stage in stages:
        problems = list(islice(stage(), _MOST_TOLD))
        if problems:
            return problems
    return []


@contextmanager
def as_checkpoint_error(what: str) -> Iterator[None]:
    """Turns errors that malformed data causes into one that says so. Errors of abtrain and lack of memory pass through.

    Raises:
        CheckpointError: `what`, and the error.
    """
    try:
        yield
    except _MALFORMED as error:
        if not blames_data(error):
            raise
        raise CheckpointError(f"{what} ({brief(error)})") from error


def blames_data(error: Exception) -> bool:
    """Whether malformed data can have caused an error: it tells neither of lack of memory nor of a lost worker."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, _MALFORMED)
    other = isinstance(error, torch.OutOfMemoryError | torch.distributed.DistError)
    return not other and not any(words in str(error) for words in _NOT_THE_DATA)


def brief(error: Exception) -> str:
    """The kind of an error and the beginning of its first line."""
    return f"{type(error).__name__}: {ascii(str(error).partition(chr(10))[0][:200])[1:-1]}"


def _one(holds: Callable[[Any], bool], what: str) -> Check:
    def check(place: str, value: Any) -> Iterator[str]:
        if not holds(value):
            yield f"{place} is {said(value)}, not {what}"

    return check


def _agree(shape: Iterable[int], wanted: Sequence[int | None]) -> bool:
    sizes = tuple(shape)
    return len(sizes) == len(wanted) and all(want in (None, size) for size, want in zip(sizes, wanted, strict=True))


_MOST_TOLD = 4


def told_names(names: Sequence[str]) -> str:
    """Names for a message: the first four, and how many more there are."""
    more = f" and {len(names) - _MOST_TOLD} more" if len(names) > _MOST_TOLD else ""
    return f"{', '.join(names[:_MOST_TOLD])}{more}"
