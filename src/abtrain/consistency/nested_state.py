"""Synchronizes optimizer state with any structure: nested dicts and lists, quantized values, row and column statistics.

Some workers may have no state for a parameter. If those that do have the same structure, with only real floating-point
tensors and numbers, all workers get the average of the tensors and the largest value of each number. Otherwise, entries
may depend on each other, as quantized values depend on their scales. All workers then copy the whole state of the first
worker that has any for this parameter.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from abtrain.comm.buckets import exact_average
from abtrain.comm.communicator import Communicator
from abtrain.consistency.agreement import gather_json, largest, share
from abtrain.errors import a_or_an
from abtrain.lowrank.optimizer import State

_AVERAGED = {str(dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


class _Item(NamedTuple):
    """A value in a state, the dict or list that contains it, and its key or index in that container.

    `path` has a pair for each level: `k` and the key in a dict, or `i` and the index in a list.
    """

    holder: Any
    key: Any
    value: Any
    path: list[tuple[str, Any]]


_Slot = tuple[State, list[int]]
"""This worker's state for a parameter, and the ranks that already had state for it."""


@torch.no_grad()
def equalize_nested(states: Sequence[State], parameters: Sequence[nn.Parameter], comm: Communicator) -> None:
    """Makes optimizer state equal on all workers, in place. Collective over the world.

    `states` has a dict for each parameter, empty if this worker has no state. All workers pass the same parameters.
    """
    # The form of a state, in types that JSON preserves: the path and the kind of each item.
    forms = [[[[list(step) for step in item.path], _kind(item.value)] for item in _items(state)] for state in states]
    distinct = [form for i, form in enumerate(forms) if form not in forms[:i]]
    gathered = gather_json(comm, {"forms": distinct, "of": [distinct.index(form) for form in forms]})
    averaged, taken = list[_Slot](), list[_Slot]()
    for place, (state, parameter) in enumerate(zip(states, parameters, strict=True)):
        theirs = [row["forms"][row["of"][place]] for row in gathered]
        holders = [rank for rank, form in enumerate(theirs) if form]
        if not holders:
            continue
        form = theirs[holders[0]]
        if theirs[comm.rank] != form:
            _build(state, form, parameter)
        one_form = all(theirs[rank] == form for rank in holders)
        real = all(kind[0] == "number" or (kind[0] == "tensor" and kind[1] in _AVERAGED) for _, kind in form)
        (averaged if one_form and real else taken).append((state, holders))
    _average(averaged, comm)
    _take_first_holder(taken, comm)


def _average(slots: Sequence[_Slot], comm: Communicator) -> None:
    """Averages tensors over the workers that have the state, and sets each single number to the largest value."""
    tensors, numbers = _of_kind("tensor", slots), _of_kind("number", slots)
    held = [item.value if comm.rank in holders else torch.zeros_like(item.value) for item, holders in tensors]
    for (item, holders), mean in zip(tensors, exact_average(held, comm), strict=True):
        item.value.copy_(mean * (comm.topology.world_size / len(holders)))
    if numbers:
        mine = [float(item.value) if comm.rank in holders else -torch.inf for item, holders in numbers]
        for (item, _), value in zip(numbers, largest(comm, mine), strict=True):
            set_number(item.holder, item.key, value)


def _take_first_holder(slots: Sequence[_Slot], comm: Communicator) -> None:
    """Copies each state from the first worker that has it to all workers."""
    tensors, numbers = _of_kind("tensor", slots), _of_kind("number", slots)
    share(comm, [item.value for item, _ in tensors], [holders[0] for _, holders in tensors])
    values = [torch.tensor([float(item.value)], dtype=torch.float64) for item, _ in numbers]
    share(comm, values, [holders[0] for _, holders in numbers])
    for (item, _), value in zip(numbers, values, strict=True):
        set_number(item.holder, item.key, value.item())


def _of_kind(kind: str, slots: Sequence[_Slot]) -> list[tuple[_Item, list[int]]]:
    """Returns the items of one kind (`tensor` or `number`), each with the ranks that have the state."""
    return [(item, holders) for state, holders in slots for item in _items(state) if _kind(item.value)[0] == kind]


def _items(holder: Any, path: Sequence[tuple[str, Any]] = ()) -> Iterator[_Item]:
    """Yields all values in nested dicts and lists. Dicts are read in the order of their keys, not of insertion."""
    pairs = sorted(holder.items(), key=lambda pair: repr(pair[0])) if isinstance(holder, dict) else enumerate(holder)
    for key, value in pairs:
        here = [*path, ("k" if isinstance(holder, dict) else "i", key)]
        if isinstance(value, dict | list):
            yield from _items(value, here)
        else:
            yield _Item(holder, key, value, here)


def _kind(value: Any) -> list[Any]:
    """Returns a value's kind and type. A real tensor without dimensions, such as a step count, is a single number."""
    if isinstance(value, Tensor) and (value.ndim or value.is_complex()):
        return ["tensor", str(value.dtype), list(value.shape)]
    if isinstance(value, Tensor):
        return ["number", str(value.dtype), value.device.type]
    if is_python_number(value):
        return ["number", type(value).__name__, ""]
    return ["constant", repr(tuple(value) if isinstance(value, tuple) else value)]


def is_python_number(value: object) -> bool:
    """Returns whether a value is an int or a float. Booleans do not count."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def set_number(holder: Any, key: Any, value: float) -> None:
    """Sets the number at `key` to `value`. The number keeps its type: int, float or tensor."""
    held = holder[key]
    if isinstance(held, Tensor):
        held.fill_(value)
    else:
        holder[key] = type(held)(value)


def _build(state: State, form: list[Any], parameter: nn.Parameter) -> None:
    """Replaces a state by one with the form that another worker reported, with placeholders as values."""
    state.clear()
    for path, kind in form:
        holder: Any = state
        for (_, key), (following, _) in pairwise(path):
            holder = _enter(holder, key, {} if following == "k" else [])
        _enter(holder, path[-1][1], _placeholder(kind, parameter))


def _enter(holder: Any, key: Any, value: Any) -> Any:
    """Returns the value at `key`; if there is none, first stores `value` there. Lists are filled in order of index."""
    if isinstance(holder, list):
        if key == len(holder):
            holder.append(value)
        return holder[key]
    return holder.setdefault(key, value)


def _placeholder(kind: list[Any], parameter: nn.Parameter) -> Any:
    match kind:
        case ["constant", text]:
            return ast.literal_eval(text)
        case ["number", name, ""]:
            return 0 if name == "int" else 0.0
    dtype = getattr(torch, kind[1].removeprefix("torch."))
    if kind[0] == "number":
        return torch.zeros((), dtype=dtype, device="cpu" if kind[2] == "cpu" else parameter.device)
    if kind[2] == list(parameter.shape):
        # With the parameter's memory layout, which fused optimizers require.
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(kind[2], dtype=dtype, device=parameter.device)


def cannot_be_shared(states: Mapping[Any, Any]) -> str:
    """Describes a value in `optimizer.state` that can be neither equalized nor saved; empty if there is none."""
    general = {key: value for key, value in states.items() if not isinstance(key, Tensor)}
    for state in [general, *(value for key, value in states.items() if isinstance(key, Tensor))]:
        if not isinstance(state, dict):
            return f"{a_or_an(type(state).__name__)} instead of a dict for a parameter"
        for item in _items(state):
            if not _is_data(item.value):
                return f"{item.path[-1][1]!r} ({a_or_an(type(item.value).__name__)})"
            odd = [key for step, key in item.path if step == "k" and not isinstance(key, str | int | float | None)]
            if odd:
                return f"a key that is {a_or_an(type(odd[0]).__name__)}"
    return ""


def _is_data(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_nested
    if isinstance(value, tuple):
        return all(not isinstance(item, Tensor) and _is_data(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
