"""A model whose weights may be factored, and its optimizer, as what can be saved: tensors and JSON values by name.

The optimizer's own `state_dict` counts parameters by their place, and `load_state_dict` casts what it gets to the
parameter's dtype. Places change as factors come and go, and a resumed run is to hold the same bits, so state goes by
name here, and as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.errors import CheckpointError
from abtrain.lowrank.matrix import MatrixShape
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.svd import Factors

# What a param group holds beside its settings.
_PARAMETERS = ("params", "param_names")


def model_state(model: FactoredModel) -> dict[str, Any]:
    """All that `load_model_state` needs. Tensors are the model's own: copy what is to outlive the next step.

    `weights` are all parameters by name, frozen ones too; a weight NAME that is factored is NAME.A (m, k) and NAME.B
    (k, n).
    """
    names = model.parameters()
    return {
        "factored": list(model.records),
        "damping": model.damping,
        "compression": model.compression,
        "weights": {name: parameter.detach() for name, parameter in names.items()},
        "buffers": {name: buffer.detach() for name, buffer in model.model.named_buffers()},
        "optimizer": _optimizer_state(model.optimizer, names),
    }


def check_model_state(model: FactoredModel, state: Mapping[str, Any]) -> None:
    """Makes sure that a state fits.

    Raises:
        CheckpointError: it is that of another model or another optimizer.
    """
    problems = _problems(model, state)
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit: {'; '.join(problems[:5])}. Build the model and the optimizer that it was "
            "saved from"
        )


def load_model_state(model: FactoredModel, state: Mapping[str, Any]) -> None:
    """Makes model and optimizer what they were: shapes, values, param groups and state. The state must fit."""
    weights = state["weights"]
    device = next(iter(model.model.parameters())).device
    pairs = {
        name: Factors(*(weights[f"{name}.{letter}"].to(device, copy=True) for letter in "AB"))
        for name in state["factored"]
    }
    model.reshape(pairs, float(state["damping"]), float(state["compression"]))
    names = model.parameters()
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(weights[name])
        for name, buffer in model.model.named_buffers():
            buffer.copy_(state["buffers"][name])
    _load_optimizer_state(model.optimizer, names, state["optimizer"])


def _optimizer_state(optimizer: Optimizer, names: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    groups = [{key: value for key, value in g.items() if key not in _PARAMETERS} for g in optimizer.param_groups]
    state = {name: dict(optimizer.state[p]) for name, p in names.items() if p in optimizer.state}
    return {"kind": type(optimizer).__name__, "groups": groups, "state": state}


def _load_optimizer_state(optimizer: Optimizer, names: Mapping[str, nn.Parameter], saved: Mapping[str, Any]) -> None:
    for group, settings in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in settings.items():
            known = group.get(key)
            if isinstance(known, Tensor) and isinstance(value, Tensor):
                known.copy_(value)  # a scheduler may hold this very tensor
            else:
                group[key] = tuple(value) if isinstance(known, tuple) else value
    optimizer.state.clear()
    # Only then are step counts where the parameters are.
    moved = {id(p) for g in optimizer.param_groups if g.get("capturable") or g.get("fused") for p in g["params"]}
    for name, held in saved["state"].items():
        parameter = names[name]
        optimizer.state[parameter] = {
            key: _like(parameter, value, id(parameter) in moved) if isinstance(value, Tensor) else value
            for key, value in held.items()
        }


def _like(parameter: nn.Parameter, value: Tensor, moved: bool) -> Tensor:
    """A copy of an item of state where the optimizer wants it, laid out as the parameter if it is of its shape."""
    if value.ndim and value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(parameter.device if value.ndim or moved else "cpu", copy=True)


def _problems(model: FactoredModel, state: Mapping[str, Any]) -> list[str]:
    """Why a state cannot be this model's; empty if it can."""
    wanted, dtypes = _dense_shapes(model), _dense_dtypes(model)
    factored, weights = set(state["factored"]), state["weights"]
    problems = [f"{name} is factored there, but cannot be here" for name in sorted(factored - set(model.names))]
    expected = {name for name in wanted if name not in factored}
    expected |= {f"{name}.{letter}" for name in factored for letter in "AB"}
    if expected != weights.keys():
        odd = sorted(expected ^ weights.keys())
        problems.append(f"parameters differ: {', '.join(odd[:5])}")
    for name, shape in wanted.items():
        if name in weights and tuple(weights[name].shape) != shape:
            problems.append(f"{name} has shape {tuple(weights[name].shape)} there and {shape} here")
    for name, weight in weights.items():
        dtype = dtypes.get(name.removesuffix(".A").removesuffix(".B") if name not in wanted else name)
        if dtype is not None and weight.dtype != dtype:
            problems.append(f"{name} is of {weight.dtype} there and of {dtype} here")
    buffers = {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in model.model.named_buffers()}
    if buffers != {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in state["buffers"].items()}:
        problems.append("buffers differ in names, shapes or dtypes")
    return problems or _factor_problems(wanted, state) + _optimizer_problems(model.optimizer, state)


def _dense_shapes(model: FactoredModel) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(p.shape) for name, p in model.model.named_parameters()}
    for record in model.records.values():
        for key in record.state_keys():
            del shapes[key]
        shapes[record.name] = tuple(record.matrix_shape.tensor)
    return shapes


def _dense_dtypes(model: FactoredModel) -> dict[str, torch.dtype]:
    dtypes = {name: p.dtype for name, p in model.model.named_parameters()}
    return dtypes | {name: record.A.dtype for name, record in model.records.items()}


def _factor_problems(wanted: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in state["factored"]:
        A, B = (tuple(state["weights"][f"{name}.{letter}"].shape) for letter in "AB")
        shape = MatrixShape(torch.Size(wanted[name]))
        if len(A) != 2 or len(B) != 2 or (A[0], B[1]) != (shape.m, shape.n) or A[1] != B[0]:
            problems.append(f"factors {A} and {B} of {name} are not of an ({shape.m}, {shape.n}) matrix")
    return problems


def _optimizer_problems(optimizer: Optimizer, state: Mapping[str, Any]) -> list[str]:
    saved = state["optimizer"]
    if saved["kind"] != type(optimizer).__name__ or len(saved["groups"]) != len(optimizer.param_groups):
        return [
            f"the optimizer is {saved['kind']} with {len(saved['groups'])} param groups there and "
            f"{type(optimizer).__name__} with {len(optimizer.param_groups)} here"
        ]
    problems = []
    for name, held in saved["state"].items():
        weight = state["weights"].get(name)
        if weight is None:
            problems.append(f"the optimizer's state of {name} belongs to another phase")
            continue
        # State of a wrong shape would be taken without a word, and fail later, in the optimizer's step. Adafactor keeps
        # means of rows and of columns, with 1 in the place of a dimension.
        wrong = [key for key, t in held.items() if isinstance(t, Tensor) and t.ndim > 1 and not _fits(t, weight)]
        if wrong and type(optimizer).__module__.startswith("torch.optim"):
            problems.append(f"the optimizer's {', '.join(wrong)} of {name} are not of its shape {tuple(weight.shape)}")
    return problems


def _fits(held: Tensor, weight: Tensor) -> bool:
    """Whether an item of optimizer state can belong to a weight."""
    pairs = zip(held.shape, weight.shape, strict=False)
    return held.ndim == weight.ndim and all(size in (1, whole) for size, whole in pairs)
