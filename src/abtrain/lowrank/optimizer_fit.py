"""Checks whether saved settings and state of an optimizer fit the optimizer in the training loop. Changes nothing.

For PyTorch's own optimizers, a new optimizer with the saved settings (the twin) updates a tiny parameter once. The
twin's state shows how the saved state must look. For others, only param groups and learning rates are checked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.checks import (
    Check,
    anything,
    blames_data,
    brief,
    first_problems,
    is_number,
    mapping,
    number,
    one_of,
    row,
    said,
    text,
    whole,
)
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.names import factor_names, weight_name
from abtrain.lowrank.optimizers import PARAMETERS, is_of_torch, settings_of

SCHEDULED = frozenset({"initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"})
"""Settings that schedulers add to param groups. A scheduler may be built before or after a state is loaded."""
_MAY_DIFFER = frozenset({"foreach", "fused"})
"""Settings that select an implementation with the same state. `capturable` does not: it moves step counts to a GPU."""
_MOST = 2**31 - 1
_SIDE = 2
"""The size of the twin's parameter in each dimension. State of size 1 in a dimension has size 1 for any parameter."""


def optimizer_problems(model: FactoredModel, state: Mapping[str, Any], layout: Mapping[str, Tensor]) -> list[str]:
    """Returns messages that explain why a state does not fit a model's optimizers; an empty list if it fits.

    The state must have passed `MODEL_STATE`. `layout` has the shapes and dtypes of all its parameters, by name.
    """
    ours, saved = model.optimizers.all, state["optimizers"]
    if len(saved) != len(ours):
        return [f"the state has {len(saved)} optimizers, but the training loop has {len(ours)}"]
    return [problem for pair in zip(ours, saved, strict=True) for problem in _problems(model, *pair, layout)]


def _problems(
    model: FactoredModel, optimizer: Optimizer, saved: Mapping[str, Any], layout: Mapping[str, Tensor]
) -> list[str]:
    if saved["kind"] != type(optimizer).__name__ or len(saved["groups"]) != len(optimizer.param_groups):
        return [
            f"the optimizer is {said(saved['kind'])} with {len(saved['groups'])} param groups in the state, but "
            f"{type(optimizer).__name__} with {len(optimizer.param_groups)} in the training loop"
        ]
    strange = [name for name in saved["state"] if name not in layout]
    of_torch = is_of_torch(optimizer)
    return first_problems(
        lambda: _group_problems(model, optimizer, saved["owned"]),
        lambda: iter([f"the optimizer's state for {said(name)} belongs to no parameter here" for name in strange[:1]]),
        lambda: _setting_problems(optimizer, saved["groups"], of_torch),
        lambda: _state_problems(model, optimizer, saved, layout) if of_torch else iter(()),
    )


def _group_problems(model: FactoredModel, optimizer: Optimizer, owned: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yields a message for the first param group whose parameters differ from the saved ones."""
    weights = {factor: name for name in model.names for factor in factor_names(name)}
    known = {id(p): weights.get(name, name) for name, p in model.parameters().items()}
    for place, (group, saved) in enumerate(zip(optimizer.param_groups, owned, strict=False)):
        ours = {known.get(id(p), "") for p in group["params"]}
        theirs = {weights.get(name, name) for name in saved}
        if ours != theirs:
            one = min(ours ^ theirs)
            there, here = ("is", "is not") if one in theirs else ("is not", "is")
            yield f"{said(one)} {there} in param group {place} of the state, but {here} in it now: use the same groups"
            return


def _setting_problems(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], of_torch: bool) -> Iterator[str]:
    """Checks all settings of PyTorch's optimizers, but only the learning rates of others."""
    for place, (group, settings) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        ours = {key: _setting(key, value) for key, value in settings_of(group).items() if of_torch or key == "lr"}
        scheduled = {key: partial(_rate, group.get(key)) for key in SCHEDULED if of_torch}
        # Training loops, and optimizers that wrap this one, may add keys.
        rest: dict[str, Check] = dict.fromkeys(settings.keys() - {*PARAMETERS}, _added if of_torch else anything)
        known: dict[str, Check] = {**rest, **ours, **scheduled}
        yield from mapping(known, required=ours.keys() - scheduled.keys())(f"param group {place}", settings)


def _added(place: str, value: Any) -> Iterator[str]:
    """Checks that a setting added by the training loop is a number, a string, a boolean or None."""
    if isinstance(value, Tensor):
        yield from _rate(None, place, value)
    elif not (value is None or isinstance(value, bool | str) or is_number(value)):
        yield f"{place} is {said(value)}, not a number, a string, a boolean or None"


def _setting(key: str, known: Any) -> Check:
    """Returns a check for the saved value of a setting whose present value is `known`."""
    if key in _MAY_DIFFER:
        return one_of(None, True, False)
    if known is None or isinstance(known, bool):
        return one_of(known)
    if isinstance(known, Tensor) or key == "lr":
        return partial(_rate, known)
    if isinstance(known, tuple | list):
        return row(*(_setting(f"{key}/{i}", item) for i, item in enumerate(known)))
    if isinstance(known, str):
        return text()
    # A schedule may turn 0 or 1 into a fraction.
    if isinstance(known, int) and known > 1:
        return whole(1, _MOST)
    return number() if is_number(known) else anything


def _rate(known: Any, place: str, value: Any) -> Iterator[str]:
    """Checks a learning rate or another number. If it and `known` are both tensors, their shapes must be equal."""
    if not isinstance(value, Tensor):
        yield from number()(place, value)
    elif not value.is_floating_point() or value.numel() != 1 or not bool(torch.isfinite(value)):
        yield f"{place} is {said(value)}, not a finite number"
    elif isinstance(known, Tensor) and value.shape != known.shape:
        yield f"{place} is {said(value)}, not of shape {tuple(known.shape)}"


def _state_problems(
    model: FactoredModel, optimizer: Optimizer, saved: Mapping[str, Any], layout: Mapping[str, Tensor]
) -> Iterator[str]:
    kind, device = type(optimizer), next(model.model.parameters()).device

    @cache
    def example(place: int, ndim: int, dtype: torch.dtype) -> Mapping[str, Any]:
        """Returns a twin's state after a step with the saved settings; empty if the present settings raise an error."""
        ones = torch.ones((_SIDE,) * ndim, dtype=dtype, device=device)
        try:
            _step(kind, settings_of(optimizer.param_groups[place]), ones.clone())
        except Exception as error:
            if not blames_data(error):
                raise
            return {}
        return _step(kind, saved["groups"][place], ones)

    group_of = {id(p): place for place, group in enumerate(optimizer.param_groups) for p in group["params"]}
    places = {name: group_of[id(p)] for name, p in model.parameters().items() if id(p) in group_of}
    # A weight and its factors are in the same group.
    places |= {weight_name(name): place for name, place in places.items()}
    for name, weight in layout.items():
        place = places.get(name, places.get(weight_name(name)))
        if place is None:
            continue
        try:
            wanted = example(place, max(weight.ndim, 1), weight.dtype)
        except Exception as error:
            if not blames_data(error):
                raise
            yield f"param group {place}: {kind.__name__} cannot step with the saved settings: {brief(error)}"
            return
        held = saved["state"].get(name)
        if held:
            yield from (f"the optimizer's state for {name} lacks {key}" for key in wanted.keys() - held.keys())
            yield from (
                f"the optimizer's {said(key)} for {name} does not fit shape {tuple(weight.shape)}: it is {said(value)}"
                for key, value in held.items()
                if not _fits(value, weight, wanted.get(key))
            )


def _step(kind: type[Optimizer], settings: Mapping[str, Any], ones: Tensor) -> Mapping[str, Any]:
    accepted = inspect.signature(kind).parameters
    known: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items() if key in accepted
    }
    # Rounding may make a schedule end below 0.
    parameter, known["lr"] = nn.Parameter(ones), abs(settings["lr"])
    parameter.grad = torch.ones_like(ones)
    twin = kind([parameter], **known)
    twin.step()
    return dict(twin.state[parameter])


def _fits(held: Any, weight: Tensor, wanted: Any) -> bool:
    """Returns whether a saved value can be optimizer state for a weight. `wanted` is the twin's value, or None."""
    if not isinstance(held, Tensor):
        return not isinstance(wanted, Tensor) and (wanted is None or (is_number(held) and held >= 0))
    if held.layout != torch.strided or held.device.type == "meta":
        return False
    if not isinstance(wanted, Tensor):
        pairs = zip(held.shape, weight.shape, strict=False)
        return wanted is None and (held.ndim < 2 or (held.ndim == weight.ndim and all(s in (1, w) for s, w in pairs)))
    if wanted.ndim == 0:
        # Step counts and similar numbers.
        return held.numel() == 1 and held.is_floating_point() and bool(torch.isfinite(held)) and float(held) >= 0
    shape = [size if side == _SIDE else 1 for side, size in zip(wanted.shape, weight.shape, strict=False)]
    return held.dtype == wanted.dtype and list(held.shape) == shape
