"""State of any form made alike on all workers: lists, dicts, codes of few bits, rows and columns in place of a matrix.

Where all workers that have state of a parameter have it in the same form, and it is real numbers throughout, it becomes
their average. Else the items belong together in a way that nobody here knows, such as codes and their scales: then all
take the whole of it from the first worker that has some.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from abtrain.comm.averages import exact_average
from abtrain.comm.communicator import Communicator
from abtrain.consistency.agreement import gather_json, share
from abtrain.lowrank.optimizer import State

Path = tuple[tuple[str, Any], ...]
Form = list[Any]
"""Of one parameter's state, in words that JSON can hold: for each item its path, and what it is."""

_AVERAGED = {str(dtype) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


class _Item(NamedTuple):
    """A value in a state, its place, and where that is.

    Attributes:
        holder: the dict or list that it is in.
        key: its place there.
        path: for each level, `k` or `i` (a dict's key, a list's index) and the key.
    """

    holder: Any
    key: Any
    path: Path

    @property
    def value(self) -> Any:
        return self.holder[self.key]


class _Slot(NamedTuple):
    """A parameter's state on all workers.

    Attributes:
        state: of this worker; in the form of the others, too, once they are known.
        holders: the workers that have some.
        averaged: whether theirs are averaged, and not taken from the first of them.
    """

    state: State
    holders: list[int]
    averaged: bool


@torch.no_grad()
def equalize_nested(states: Sequence[State], parameters: Sequence[nn.Parameter], comm: Communicator) -> None:
    """Makes states alike, in place. Collective over the world.

    Args:
        states: one for each parameter; empty where this worker has none.
        parameters: whose they are, the same on all workers.
        comm: of this worker.
    """
    forms = [_form(state) for state in states]
    distinct = [form for i, form in enumerate(forms) if form not in forms[:i]]
    gathered = gather_json(comm, {"forms": distinct, "of": [distinct.index(form) for form in forms]})
    slots = []
    for place, (state, parameter) in enumerate(zip(states, parameters, strict=True)):
        theirs = [row["forms"][row["of"][place]] for row in gathered]
        holders = [rank for rank, form in enumerate(theirs) if form]
        if not holders:
            continue
        form = theirs[holders[0]]
        averaged = all(theirs[rank] == form for rank in holders) and all(_is_real(kind) for _, kind in form)
        if theirs[comm.rank] != form:
            _build(state, form, parameter)
        slots.append(_Slot(state, holders, averaged))
    _average([slot for slot in slots if slot.averaged], comm)
    _follow([slot for slot in slots if not slot.averaged], comm)


def _average(slots: Sequence[_Slot], comm: Communicator) -> None:
    tensors, numbers = _split(slots)
    held = [item.value if comm.rank in slot.holders else torch.zeros_like(item.value) for slot, item in tensors]
    for (slot, item), mean in zip(tensors, exact_average(held, comm), strict=True):
        item.value.copy_(mean * (comm.topology.world_size / len(slot.holders)))
    if numbers:
        lowest = -torch.inf
        mine = [_number(item.value) if comm.rank in slot.holders else lowest for slot, item in numbers]
        values = torch.tensor(mine, dtype=torch.float64).to(comm.device)
        comm.all_reduce(values, op="max")
        for (_, item), value in zip(numbers, values.tolist(), strict=True):
            _set(item, value)


def _follow(slots: Sequence[_Slot], comm: Communicator) -> None:
    tensors, numbers = _split(slots)
    share(comm, [item.value for _, item in tensors], [slot.holders[0] for slot, _ in tensors])
    if numbers:
        values = torch.tensor([_number(item.value) for _, item in numbers], dtype=torch.float64).view(-1, 1)
        share(comm, list(values), [slot.holders[0] for slot, _ in numbers])
        for (_, item), value in zip(numbers, values.flatten().tolist(), strict=True):
            _set(item, value)


def _split(slots: Sequence[_Slot]) -> tuple[list[tuple[_Slot, _Item]], list[tuple[_Slot, _Item]]]:
    """The tensors in the states, and the single numbers."""
    items = [(slot, item) for slot in slots for item in _items(slot.state)]
    tensors = [pair for pair in items if isinstance(pair[1].value, Tensor) and not _is_count(pair[1])]
    numbers = [pair for pair in items if _is_number(pair[1].value) or _is_count(pair[1])]
    return tensors, numbers


def _items(holder: Any, path: Path = ()) -> Iterator[_Item]:
    """Yields the values in a state, in an order that does not depend on how it was built."""
    pairs = sorted(holder.items(), key=lambda pair: repr(pair[0])) if isinstance(holder, dict) else enumerate(holder)
    for key, value in pairs:
        here = (*path, ("k" if isinstance(holder, dict) else "i", key))
        if isinstance(value, dict | list):
            yield from _items(value, here)
        else:
            yield _Item(holder, key, here)


def _form(state: State) -> Form:
    return [[[list(step) for step in item.path], _kind(item)] for item in _items(state)]


def _kind(item: _Item) -> Any:
    value = item.value
    if _is_count(item) or _is_number(value):
        tensor = isinstance(value, Tensor)
        return ["number", str(value.dtype) if tensor else type(value).__name__, value.device.type if tensor else ""]
    if isinstance(value, Tensor):
        return ["tensor", str(value.dtype), list(value.shape)]
    return ["constant", repr(tuple(value) if isinstance(value, tuple) else value)]


def _is_real(kind: Any) -> bool:
    return kind[0] == "number" or (kind[0] == "tensor" and kind[1] in _AVERAGED)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(item: _Item) -> bool:
    """Whether a tensor is one number, such as a count of steps."""
    value = item.value
    return isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex()


def _number(value: Any) -> float:
    return float(value)


def _set(item: _Item, value: float) -> None:
    held = item.value
    if isinstance(held, Tensor):
        held.fill_(value)
    else:
        item.holder[item.key] = type(held)(value)


def _build(state: State, form: Form, parameter: nn.Parameter) -> None:
    """Gives a state the form that another worker's has, its values still without a meaning."""
    state.clear()
    for path, kind in form:
        holder: Any = state
        for (_, key), (following, _) in pairwise(path):
            holder = _enter(holder, key, {} if following == "k" else [])
        _enter(holder, path[-1][1], _blank(kind, parameter))


def _enter(holder: Any, key: Any, value: Any) -> Any:
    """Returns the value at a place; if there is none, `value` is put there. Lists fill in order of index."""
    if isinstance(holder, list):
        if key == len(holder):
            holder.append(value)
        return holder[key]
    return holder.setdefault(key, value)


def _blank(kind: Any, parameter: nn.Parameter) -> Any:
    if kind[0] == "constant":
        return ast.literal_eval(kind[1])
    if kind[0] == "number":
        if kind[2]:
            device = "cpu" if kind[2] == "cpu" else parameter.device
            return torch.zeros((), dtype=_dtype(kind[1]), device=device)
        return 0 if kind[1] == "int" else 0.0
    if kind[2] == list(parameter.shape):
        # Laid out as the parameter is: fused optimizers go by it.
        return torch.zeros_like(parameter, dtype=_dtype(kind[1]), requires_grad=False)
    return torch.zeros(kind[2], dtype=_dtype(kind[1]), device=parameter.device)


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return dtype


def cannot_be_shared(states: Mapping[Any, Any]) -> str:
    """Names a value in an optimizer's states that can be neither equalized nor saved; empty if there is none."""
    for key, state in states.items():
        if isinstance(key, Tensor) and not isinstance(state, dict):
            return f"a {type(state).__name__} in the place of a dict for a parameter"
        for item in _items(state) if isinstance(state, dict) else ():
            if not _is_data(item.value):
                return f"{item.path[-1][1]!r} (a {type(item.value).__name__})"
            odd = next((key for step, key in item.path if step == "k" and not isinstance(key, str | int | float)), None)
            if odd is not None:
                return f"a key that is a {type(odd).__name__}"
    return ""


def _is_data(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_nested
    if isinstance(value, tuple):
        return all(not isinstance(item, Tensor) and _is_data(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
