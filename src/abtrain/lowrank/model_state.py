"""Saves and loads a model, whose weights may be factored, and its optimizers, as tensors and JSON values by name.

An optimizer's own `state_dict` numbers the parameters, and its `load_state_dict` casts state to the parameter's dtype.
But the numbers change when weights are factored, and a resumed run must give bitwise the same results as one without
a stop. Therefore this module stores state by name and without casts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.names import factor_names
from abtrain.lowrank.nested import with_tensors
from abtrain.lowrank.optimizers import settings_of
from abtrain.lowrank.svd import Factors
from abtrain.own import own_names, shared_buffers
from abtrain.shards import is_sharded, like, local


def model_state(model: FactoredModel) -> dict[str, Any]:
    """Returns a state for `load_model_state`. Its tensors share memory with the model: copy them before the next step.

    `weights` has all parameters by name, frozen ones too. A factored weight NAME gives NAME.A (m, k) and NAME.B (k, n).
    `own` has the parameters and buffers that workers do not share. `extra` has the results of `get_extra_state`, by
    the modules' names. `sharded` has the names of sharded parameters; their weights and optimizer state are this
    worker's shards. These keys are left out if they have no items.
    """
    names, own = model.parameters(), own_tensors(model)
    extra = {name: module.get_extra_state() for name, module in modules_with_extra_state(model).items()}
    return {
        "factored": list(model.records),
        "damping": model.damping,
        "compression": model.compression,
        "weights": {name: local(parameter) for name, parameter in names.items() if name not in own},
        "buffers": {name: buffer.detach() for name, buffer in shared_buffers(model.model).items()},
        "optimizers": [_optimizer_state(optimizer, names) for optimizer in model.optimizers.all],
        **({"own": own} if own else {}),
        **({"extra": extra} if extra else {}),
        **({"sharded": list(model.sharded)} if model.sharded else {}),
    }


def modules_with_extra_state(model: FactoredModel) -> dict[str, nn.Module]:
    """Returns the modules that define `get_extra_state`, by name."""
    plain = nn.Module.get_extra_state
    modules = model.model.named_modules()
    return {name: one for name, one in modules if getattr(type(one), "get_extra_state", plain) is not plain}


def own_tensors(model: FactoredModel) -> dict[str, Tensor]:
    """Returns the parameters and buffers that workers do not share, by name."""
    own = own_names(model.model)
    tensors = [*model.model.named_parameters(), *model.model.named_buffers()]
    return {name: tensor.detach() for name, tensor in tensors if name in own}


def load_model_state(model: FactoredModel, state: Mapping[str, Any]) -> None:
    """Restores factors, values, param groups and optimizer state. The state must have passed `fit.model_problems`."""
    weights = state["weights"]
    device = next(iter(model.model.parameters())).device
    pairs = {
        name: Factors(*(weights[factor].to(device, copy=True) for factor in factor_names(name)))
        for name in state["factored"]
    }
    model.reshape(pairs, float(state["damping"]), float(state["compression"]))
    names, own = model.parameters(), own_tensors(model)
    with torch.no_grad():
        for name, parameter in names.items():
            if name not in own:
                local(parameter).copy_(weights[name])
        for part, tensors in (("buffers", shared_buffers(model.model)), ("own", own)):
            for name, tensor in tensors.items():
                # Only a cache that had grown may have another shape, and the model fills it again.
                if tensor.shape == state[part][name].shape:
                    tensor.copy_(state[part][name])
    for name, module in modules_with_extra_state(model).items():
        module.set_extra_state(copy.deepcopy(state["extra"][name]))
    for optimizer, saved in zip(model.optimizers.all, state["optimizers"], strict=True):
        if saved["more"]:
            optimizer.load_state_dict({**optimizer.state_dict(), **_with_tuples(saved["more"])})
    # Loaded last, since `load_state_dict` casts state.
    for optimizer, saved in zip(model.optimizers.all, state["optimizers"], strict=True):
        _load_optimizer_state(optimizer, names, saved)


def _optimizer_state(optimizer: Optimizer, names: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    groups = [
        {key: _plain(value) for key, value in settings_of(group).items() if _is_plain(value)}
        for group in optimizer.param_groups
    ]
    known = {id(parameter): name for name, parameter in names.items()}
    owned = [[known.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
    state = {name: optimizer.state[p] for name, p in names.items() if p in optimizer.state}
    general = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    return {
        "kind": type(optimizer).__name__,
        "groups": groups,
        "owned": owned,
        "state": _saved(state),
        "general": _saved(general),
        "more": _saved(more_of(optimizer)),
    }


def _saved(state: Any) -> Any:
    """Returns optimizer state in the form in which it is saved: with marked tuples, and shards of sharded tensors."""
    return _with_marked_tuples(with_tensors(state, lambda tensor: local(tensor) if is_sharded(tensor) else tensor))


_TUPLE = "(tuple)"


def _with_marked_tuples(value: Any) -> Any:
    """Replaces tuples by dicts with one key, since JSON would turn tuples into lists."""
    if isinstance(value, tuple):
        return {_TUPLE: [_with_marked_tuples(item) for item in value]}
    if isinstance(value, Mapping):
        return {key: _with_marked_tuples(item) for key, item in value.items()}
    return [_with_marked_tuples(item) for item in value] if isinstance(value, list) else value


def _with_tuples(value: Any) -> Any:
    """Undoes `_with_marked_tuples`."""
    if isinstance(value, Mapping):
        items = {key: _with_tuples(item) for key, item in value.items()}
        return tuple(items[_TUPLE]) if items.keys() == {_TUPLE} else items
    return [_with_tuples(item) for item in value] if isinstance(value, list) else value


def _is_plain(value: Any) -> bool:
    """Returns whether a setting is plain data. Functions and dtypes are not, and only the constructor sets them."""
    if isinstance(value, Mapping | list | tuple):
        return all(map(_is_plain, value.values() if isinstance(value, Mapping) else value))
    return value is None or isinstance(value, str | bool | Real | Tensor)


def _plain(value: Any) -> Any:
    """Converts NumPy numbers to floats, since a scheduler may compute learning rates in NumPy."""
    known = isinstance(value, bool | int | float) or not isinstance(value, Real)
    return value if known else float(value)


def more_of(optimizer: Optimizer) -> dict[str, Any]:
    """Returns the items of an optimizer's `state_dict` other than `state` and `param_groups`; usually none."""
    hooks = getattr(optimizer, "_optimizer_state_dict_post_hooks", None)
    if type(optimizer).state_dict is Optimizer.state_dict and not hooks:
        return {}
    return {key: value for key, value in optimizer.state_dict().items() if key not in ("state", "param_groups")}


def _load_optimizer_state(optimizer: Optimizer, names: Mapping[str, nn.Parameter], saved: Mapping[str, Any]) -> None:
    for group, settings in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in settings.items():
            known = group.get(key)
            if isinstance(known, Tensor) and isinstance(value, Tensor):
                known.copy_(value)  # a scheduler may hold the same tensor
            else:
                group[key] = tuple(value) if isinstance(known, tuple) else value
    optimizer.state.clear()
    # Only capturable and fused optimizers keep step counts on the parameters' device.
    moved = {id(p) for g in optimizer.param_groups if g.get("capturable") or g.get("fused") for p in g["params"]}
    for name, held in saved["state"].items():
        parameter = names[name]
        copied = partial(_copied, parameter, moved=id(parameter) in moved)
        optimizer.state[parameter] = with_tensors(_with_tuples(held), copied)
    copied = partial(_copied, next(iter(names.values())), moved=False)
    for key, held in saved["general"].items():
        optimizer.state[key] = with_tensors(_with_tuples(held), copied)


def _copied(parameter: nn.Parameter, value: Tensor, moved: bool) -> Tensor:
    """Copies a state tensor to the parameter's device, or a single number to the CPU unless `moved` is true."""
    shape = local(parameter).shape
    if is_sharded(parameter) and value.ndim and value.shape == shape:
        return like(parameter, value.to(parameter.device, copy=True))
    if value.ndim and value.shape == shape:
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(parameter.device if value.ndim or moved else "cpu", copy=True)
