"""Makes optimizer state and the loss scale equal on all workers before gradients are averaged again.

Workers that apply the same gradients keep equal weights only if their optimizers have the same state. The average of
gradients is correct only if all workers scale the loss equally. Groups that trained separately differ in both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.comm.buckets import exact_average, sent_by_average_over_world
from abtrain.comm.communicator import Calls, Communicator, Traffic
from abtrain.comm.topology import Topology
from abtrain.consistency.agreement import gather_json, largest
from abtrain.consistency.nested_state import equalize_nested, is_python_number, set_number
from abtrain.consistency.settings import HYPERPARAMETERS
from abtrain.lowrank.optimizer import LINEAR_MOMENTS, SQUARED_MOMENTS, State
from abtrain.lowrank.optimizer_fit import SCHEDULED
from abtrain.lowrank.optimizers import Optimizers, is_of_torch, settings_of

_TENSOR, _NUMBER, _NESTED = "tensor", "number", "nested"
_KEY_BYTES = 512
"""The number of bytes in which each worker sends the keys of its optimizer's state to the others."""


def equalize_optimizers(optimizers: Optimizers, parameters: Sequence[nn.Parameter], comm: Communicator) -> None:
    """Gives all workers the same optimizer state for `parameters`, in place. Collective over the world.

    A tensor becomes the average over the workers that trained its parameter and have this tensor. A single number, such
    as a step count in the state or in a param group, becomes the largest on any worker: a gradient scaler may have
    skipped steps in some groups. `abtrain.consistency.nested_state` equalizes state with another structure.
    """
    if comm.topology.world_size == 1 or not parameters:
        return
    for optimizer in optimizers.stateful:
        _equalize_state(optimizer, parameters, comm)
    _equalize_settings(optimizers, comm)


@dataclass(frozen=True)
class OptimizerShape:
    """Counts the tensors and the single numbers in the optimizer state for one parameter. The defaults fit AdamW."""

    tensors: int = 2
    numbers: int = 1


def sent_by_equalize_optimizers(
    parameters: Sequence[Tensor], trained: Sequence[Tensor], shape: OptimizerShape, topology: Topology
) -> Calls:
    """Returns the collective calls that `equalize_optimizers` makes for one of PyTorch's optimizers.

    `trained` contains the parameters for which at least one worker has state. Only the shapes of tensors matter.
    """
    if not parameters:
        return ()
    slots = len(parameters) * (shape.tensors + shape.numbers)
    # The numbers of workers that have each value, in int64, and the single numbers, in float64.
    table = (Traffic("all_reduce", "world", slots * torch.int64.itemsize),) * 2 if slots else ()
    moments = [tensor for tensor in trained for _ in range(shape.tensors)]
    return (Traffic("all_gather", "world", _KEY_BYTES), *table, *sent_by_average_over_world(moments, topology))


def used_by_equalize_optimizers(trained: Sequence[Tensor], shape: OptimizerShape) -> int:
    """Returns the bytes of temporary tensors in `equalize_optimizers`: a copy of the state of the `trained` tensors."""
    return shape.tensors * sum(tensor.nbytes for tensor in trained)


@torch.no_grad()
def _equalize_state(optimizer: Optimizer, parameters: Sequence[nn.Parameter], comm: Communicator) -> None:
    # State for a frozen factor is out of date, because this worker did not train the factor.
    states: list[State] = [optimizer.state.get(p, {}) if p.requires_grad else {} for p in parameters]
    general: dict[Any, Any] = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    kinds = _agree_on_keys(states, parameters, comm, nested=bool(general))
    if _NESTED in kinds.values():
        equalize_nested([*states, general], [*parameters, parameters[0]], comm)
        optimizer.state.update({p: state for p, state in zip(parameters, states, strict=True) if state} | general)
        return
    slots = [(parameter, state, key) for parameter, state in zip(parameters, states, strict=True) for key in kinds]
    holders = torch.tensor([state.get(key) is not None for _, state, key in slots], dtype=torch.int64)
    holders = holders.to(comm.device)
    comm.all_reduce(holders)
    numbers = largest(comm, [_number(state.get(key)) for _, state, key in slots])
    tensors = []
    for (parameter, state, key), count, number in zip(slots, holders.tolist(), numbers, strict=True):
        if count and kinds[key] == _TENSOR:
            tensors.append((parameter, key, state.get(key), count))
        elif count:
            known = optimizer.state[parameter]
            if known.get(key) is None:
                known[key] = _blank_number(optimizer, parameter, key)
            set_number(known, key, number)
    local = [own if isinstance(own, Tensor) else torch.zeros_like(p, requires_grad=False) for p, _, own, _ in tensors]
    for (parameter, key, _, count), average in zip(tensors, exact_average(local, comm), strict=True):
        known = optimizer.state[parameter]
        if not isinstance(known.get(key), Tensor):
            # With the parameter's memory layout, which fused optimizers require.
            known[key] = torch.empty_like(parameter, requires_grad=False)
        # `exact_average` divides by the number of all workers.
        known[key].copy_(average * (comm.topology.world_size / count))


def _equalize_settings(optimizers: Optimizers, comm: Communicator) -> None:
    """Sets step counts and other state in param groups to the largest values. PyTorch's optimizers have none there."""
    groups = {id(g): g for o in optimizers.all if not is_of_torch(o) for g in o.param_groups}
    slots = [
        (group, key)
        for group in groups.values()
        for key, value in sorted(settings_of(group).items())
        if key not in HYPERPARAMETERS | SCHEDULED and (is_python_number(value) or _is_single(value))
    ]
    values = largest(comm, [_number(group[key]) for group, key in slots]) if slots else []
    for (group, key), value in zip(slots, values, strict=True):
        set_number(group, key, value)


def equalize_grad_scaler(scaler: torch.amp.GradScaler, comm: Communicator) -> None:
    """Sets the loss scale of every worker to the largest one, in place.

    If gradients overflow with this scale on one worker, all workers skip the step and lower the scale. The smallest
    scale could be that of a worker whose gradients always overflow, and would make the other workers' gradients vanish.
    """
    state = scaler.state_dict()
    if not state:  # the scaler is disabled
        return
    scale, tracker = largest(comm, [state["scale"], -state["_growth_tracker"]], torch.float32)
    scaler.load_state_dict(state | {"scale": scale, "_growth_tracker": int(-tracker)})


def _agree_on_keys(
    states: Sequence[State], parameters: Sequence[nn.Parameter], comm: Communicator, nested: bool
) -> dict[str, str]:
    """Returns the sorted keys in all workers' states, each with the kind of its values: tensor, number or nested.

    `nested` is True if this worker also has state that belongs to no parameter.
    """
    mine: dict[str, str] = {"": _NESTED} if nested else {}
    of_scalars: dict[str, str] = {}
    for state, parameter in zip(states, parameters, strict=True):
        for key, value in state.items():
            kind = _kind(key, value, parameter)
            # For a parameter without dimensions, moments look like step counts: other parameters decide, if any.
            kinds = mine if parameter.ndim or kind == _NESTED else of_scalars
            if kind:
                # If kinds differ, `equalize_nested` handles both.
                kinds[key] = kind if kinds.get(key, kind) == kind else _NESTED
    mine = of_scalars | mine
    if len(json.dumps(mine)) > _KEY_BYTES:
        mine = {"": _NESTED}
    everyone: dict[str, str] = {}
    for keys in gather_json(comm, mine, _KEY_BYTES):
        for key, kind in keys.items():
            everyone[key] = kind if everyone.get(key, kind) == kind else _NESTED
    return dict(sorted(everyone.items()))


def _kind(key: Any, value: object, parameter: nn.Parameter) -> str:
    """Returns the kind of a value in the state for a parameter; an empty string if the value is None."""
    if value is None:
        return ""
    if is_python_number(value) or (isinstance(value, Tensor) and not value.ndim and (key == "step" or parameter.ndim)):
        return _NUMBER
    if not isinstance(value, Tensor) or not isinstance(key, str) or key == "step":
        return _NESTED
    if not value.ndim:
        return _TENSOR if key in LINEAR_MOMENTS | SQUARED_MOMENTS else _NUMBER
    return _TENSOR if value.shape == parameter.shape and value.dtype == parameter.dtype else _NESTED


def _is_single(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()


def _number(value: Any) -> float:
    """Returns a single number as a float. Any other value gives -inf, which does not change the largest number."""
    return float(value) if is_python_number(value) or _is_single(value) else -torch.inf


def _blank_number(optimizer: Optimizer, parameter: nn.Parameter, key: str) -> Any:
    """Returns a placeholder for the number at `key`, with the type that this number has for other parameters."""
    like = next((state[key] for state in optimizer.state.values() if state.get(key) is not None), None)
    if like is not None:
        return torch.zeros_like(like) if isinstance(like, Tensor) else like
    # No parameter has this number if the state was dropped. PyTorch's optimizers create such a tensor.
    group = next((g for g in optimizer.param_groups if any(held is parameter for held in g["params"])), {})
    return torch.zeros((), device=parameter.device if group.get("fused") or group.get("capturable") else "cpu")
