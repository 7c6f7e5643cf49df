"""Makes optimizer state and loss scale equal on all workers before gradients are averaged again.

Workers that apply the same gradient stay equal only if their optimizers hold the same state, and averaged gradients
are right only if all were scaled alike. Groups that trained on their own leave with both of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.comm.averages import exact_average, sent_by_average
from abtrain.comm.communicator import Communicator
from abtrain.comm.traffic import Calls, Traffic
from abtrain.consistency.nested_state import equalize_nested
from abtrain.consistency.settings import HYPERPARAMETERS
from abtrain.lowrank.optimizer import LINEAR_MOMENTS, SQUARED_MOMENTS, State
from abtrain.lowrank.optimizer_fit import SCHEDULED
from abtrain.lowrank.optimizers import Optimizers, settings_of

_TENSOR, _NUMBER, _NESTED = "tensor", "number", "nested"
_KEY_BYTES = 512
"""What the names of an optimizer's state may take when workers compare them."""


def equalize_optimizers(optimizers: Optimizers, parameters: Sequence[nn.Parameter], comm: Communicator) -> None:
    """Gives all workers the same state for `parameters`, in place. Collective over the world.

    Tensors become the average over the workers that trained the parameter and have one; single numbers, such as step
    counts, become the largest of any worker (a gradient scaler may have skipped steps in some groups). State of another
    form is levelled by `abtrain.consistency.nested_state`. Settings of param groups that are state
    become the largest too.
    """
    if comm.topology.world_size == 1 or not parameters:
        return
    for optimizer in optimizers.stateful:
        _equalize_state(optimizer, parameters, comm)
    _equalize_settings(optimizers, comm)


@dataclass(frozen=True)
class OptimizerShape:
    """The state that an optimizer keeps for each parameter.

    Args:
        tensors: of the parameter's shape; AdamW's are its two moments.
        numbers: single ones; AdamW's is its step count.
    """

    tensors: int = 2
    numbers: int = 1


def sent_by_equalize_optimizers(
    parameters: Sequence[Tensor], trained: Sequence[Tensor], shape: OptimizerShape
) -> Calls:
    """The calls of `equalize_optimizers` of one optimizer of PyTorch's.

    Args:
        parameters: by their shapes.
        trained: those of them for which some worker has state.
        shape: of the optimizer's state.
    """
    if not parameters:
        return ()
    slots = len(parameters) * (shape.tensors + shape.numbers)
    # Which worker holds which, in int64, and the single numbers, in float64.
    table = (Traffic("all_reduce", "world", slots * torch.int64.itemsize),) * 2 if slots else ()
    moments = [tensor for tensor in trained for _ in range(shape.tensors)]
    return (Traffic("all_gather", "world", _KEY_BYTES), *table, *sent_by_average(moments))


@torch.no_grad()
def _equalize_state(optimizer: Optimizer, parameters: Sequence[nn.Parameter], comm: Communicator) -> None:
    # What a frozen factor's state says is old: this worker did not train it.
    states: list[State] = [optimizer.state.get(p, {}) if p.requires_grad else {} for p in parameters]
    general: dict[Any, Any] = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    kinds = _agree_on_keys(states, parameters, comm, nested=bool(general))
    if _NESTED in kinds.values():
        equalize_nested([*states, general], [*parameters, parameters[0]], comm)
        for parameter, state in zip(parameters, states, strict=True):
            if state:
                optimizer.state[parameter] = state
        optimizer.state.update(general)
        return
    slots = [(place, key) for place in range(len(parameters)) for key in kinds]
    values = torch.tensor([_number(states[place].get(key)) for place, key in slots], dtype=torch.float64)
    holders = torch.tensor([states[place].get(key) is not None for place, key in slots], dtype=torch.int64)
    values, holders = values.to(comm.device), holders.to(comm.device)
    comm.all_reduce(holders)
    comm.all_reduce(values, op="max")

    held = [(slot, count) for slot, count in zip(slots, holders.tolist(), strict=True) if count]
    tensors = [(slot, count) for slot, count in held if kinds[slot[1]] == _TENSOR]
    local = [_local(states[place].get(key), parameters[place]) for (place, key), _ in tensors]
    averages = exact_average(local, comm)
    for ((place, key), count), average in zip(tensors, averages, strict=True):
        # `exact_average` divides by all workers.
        _set(optimizer.state[parameters[place]], key, average * (comm.topology.world_size / count), parameters[place])
    numbers = dict(zip(slots, values.tolist(), strict=True))
    for (place, key), _ in held:
        if kinds[key] == _NUMBER:
            parameter = parameters[place]
            like = next((s[key] for s in optimizer.state.values() if key in s), None)
            like = _new_number(optimizer, parameter) if like is None else like
            _set_number(optimizer.state[parameter], key, numbers[place, key], like)


def _equalize_settings(optimizers: Optimizers, comm: Communicator) -> None:
    """Some optimizers count steps, or estimate a rate, in their param groups. PyTorch's own do not."""
    groups = {id(g): g for o in optimizers.all if not type(o).__module__.startswith("torch.") for g in o.param_groups}
    slots = [
        (group, key)
        for group in groups.values()
        for key, value in sorted(settings_of(group).items())
        if key not in HYPERPARAMETERS | SCHEDULED and (_is_number(value) or _is_single(value))
    ]
    if slots:
        values = torch.tensor([_number(group[key]) for group, key in slots], dtype=torch.float64).to(comm.device)
        comm.all_reduce(values, op="max")
        for (group, key), value in zip(slots, values.tolist(), strict=True):
            _set_number(group, key, value, group[key])


def equalize_grad_scaler(scaler: torch.amp.GradScaler, comm: Communicator) -> None:
    """Gives all workers the largest loss scale of any, in place.

    If it is too large for one of them, all lower it together, at the cost of a skipped step each time. The lowest one
    would follow a worker whose gradients always overflow, and make those of the others vanish.
    """
    state = scaler.state_dict()
    if not state:  # a scaler that is not enabled
        return
    ends = torch.tensor([state["scale"], -state["_growth_tracker"]], dtype=torch.float32).to(comm.device)
    comm.all_reduce(ends, op="max")
    state["scale"], state["_growth_tracker"] = ends[0].item(), int(-ends[1].item())
    scaler.load_state_dict(state)


def _agree_on_keys(
    states: Sequence[State], parameters: Sequence[nn.Parameter], comm: Communicator, nested: bool
) -> dict[str, str]:
    """The keys of any state of any worker, sorted, each with its kind.

    Args:
        states: one for each of the parameters.
        parameters: whose they are.
        comm: of this worker.
        nested: whether this worker has state of another form beside these.
    """
    mine: dict[str, str] = {"": _NESTED} if nested else {}
    for state, parameter in zip(states, parameters, strict=True):
        for key, value in state.items():
            kind = _kind(key, value, parameter)
            if not kind or mine.get(key) == _NESTED:
                continue
            # Of a parameter that is one number, moments and counts look alike: others tell, if any do.
            if parameter.ndim or kind == _NESTED:
                mine[key] = kind
            else:
                mine.setdefault(key, kind)
    text = json.dumps(mine).encode()
    if len(text) > _KEY_BYTES:
        text = json.dumps({"": _NESTED}).encode()
    row = torch.zeros(_KEY_BYTES, dtype=torch.uint8)
    row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = comm.all_gather(row.to(comm.device)).cpu()
    everyone: dict[str, str] = {}
    for other in rows:
        for key, kind in json.loads(bytes(other.tolist()).rstrip(b"\0")).items():
            # Where forms differ, the more general way serves all.
            everyone[key] = kind if everyone.get(key, kind) == kind else _NESTED
    return dict(sorted(everyone.items()))


def _kind(key: Any, value: object, parameter: nn.Parameter) -> str:
    """Returns the kind of an item of state; empty for None."""
    if value is None:
        return ""
    if _is_number(value) or (isinstance(value, Tensor) and not value.ndim and (key == "step" or parameter.ndim)):
        return _NUMBER
    if not isinstance(value, Tensor) or not isinstance(key, str) or key == "step":
        return _NESTED
    if not value.ndim:
        return _TENSOR if key in LINEAR_MOMENTS | SQUARED_MOMENTS else _NUMBER
    return _TENSOR if value.shape == parameter.shape and value.dtype == parameter.dtype else _NESTED


def _is_number(value: object) -> bool:
    """Whether a value is one number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_single(value: object) -> bool:
    """Whether a value is a tensor of one real number."""
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()


def _number(value: object) -> float:
    """A single number as a float; what is none does not matter."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else 0.0
    return float(value) if isinstance(value, int | float) else 0.0


def _local(value: object, parameter: nn.Parameter) -> Tensor:
    """This worker's part of an average: zeros where it has none."""
    return value if isinstance(value, Tensor) else torch.zeros_like(parameter, requires_grad=False)


def _set(state: State, key: str, value: Tensor, parameter: nn.Parameter) -> None:
    known = state.get(key)
    if isinstance(known, Tensor):
        known.copy_(value)
    else:
        # Laid out as the parameter is: fused optimizers go by it.
        state[key] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def _new_number(optimizer: Optimizer, parameter: nn.Parameter) -> Tensor:
    """Returns an empty number as PyTorch's optimizers keep it, for a worker whose own state was dropped."""
    for group in optimizer.param_groups:
        if any(held is parameter for held in group["params"]):
            beside = group.get("fused") or group.get("capturable")
            return torch.zeros((), device=parameter.device if beside else "cpu")
    return torch.zeros(())


def _set_number(state: State, key: str, value: float, like: object) -> None:
    known = state.get(key)
    if isinstance(known, Tensor):
        known.fill_(value)
    elif isinstance(like, Tensor):
        state[key] = torch.full_like(like, value)
    else:
        state[key] = type(like)(value) if isinstance(like, int | float) else value
