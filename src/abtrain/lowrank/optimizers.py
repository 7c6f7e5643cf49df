"""Treats all optimizers of a training loop as one, even if some of them contain others.

Users split a model between optimizers (Muon for matrices, AdamW for the rest). They also wrap optimizers: Accelerate
decides whether to step, SAM runs two passes per step, Lookahead averages over several steps. The innermost optimizer
that has a weight changes it, so abtrain registers its hooks on that optimizer.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.lowrank.names import factor_names, weight_name

_DEEPEST = 3
"""The number of levels of lists and dicts in which optimizers inside an optimizer are searched for."""
_NOT_SEARCHED = frozenset({"state", "param_groups", "defaults"})
"""Attributes that every optimizer has and that contain no other optimizers."""
PARAMETERS = ("params", "param_names")
"""The keys of a param group that are not settings."""


class Optimizers:
    """Finds all optimizers of a training loop, and replaces parameters in them.

    Attributes:
        given: a tuple of the optimizers that the user passed.
        all: a tuple of the given optimizers and those inside them, outer ones first.
        acting: a tuple of the optimizers whose steps change weights: for each parameter, the innermost one that has it.
    """

    def __init__(self, given: Optimizer | Sequence[Optimizer]) -> None:
        self.given = (given,) if isinstance(given, Optimizer) else tuple(given)
        self.all = tuple(_inside(self.given, _DEEPEST + 1, set()))
        self._holders = {id(p): optimizer for optimizer in self.all for p in parameters_of(optimizer)}
        holders = {id(optimizer) for optimizer in self._holders.values()}
        self.acting = tuple(optimizer for optimizer in self.all if id(optimizer) in holders)

    @property
    def stateful(self) -> list[Optimizer]:
        """The optimizers that have state of their own. Wrappers that share the state of another one are left out."""
        return list({id(optimizer.state): optimizer for optimizer in self.all}.values())

    def groups(self) -> list[dict[str, Any]]:
        """Returns the param groups of all optimizers. A group that several optimizers share appears once."""
        return list({id(group): group for optimizer in self.all for group in optimizer.param_groups}.values())

    def parameters(self) -> list[nn.Parameter]:
        """Returns all parameters of all optimizers, in the order of their param groups."""
        return list({id(p): p for group in self.groups() for p in group["params"]}.values())

    def steps(self, parameter: Tensor) -> Optimizer | None:
        """Returns the optimizer that changes a parameter, or None if the parameter is in no optimizer."""
        return self._holders.get(id(parameter))

    def replace(
        self, old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]
    ) -> list[tuple[Optimizer, list[dict[str, Any]]]]:
        """Replaces the parameter `old[0]` by `new` in its param groups, and removes the other `old` parameters.

        The param groups stay, so learning rates, weight decay and schedulers keep working.

        Returns:
            One pair for each stateful optimizer: the optimizer, and its states for the `old` parameters ({} if none).
        """
        for group in self.groups():
            if any(parameter is old[0] for parameter in group["params"]):
                _replace_in(group, old, new)
        holders = [self._holders.pop(id(parameter), None) for parameter in old]
        if holders[0] is not None:
            self._holders |= dict.fromkeys(map(id, new), holders[0])
        return [(one, [one.state.pop(parameter, {}) for parameter in old]) for one in self.stateful]


def _replace_in(group: dict[str, Any], old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]) -> None:
    parameters = group["params"]
    names = group.get("param_names") or [""] * len(parameters)
    rows: list[tuple[nn.Parameter, str]] = []
    for parameter, name in zip(parameters, names, strict=True):
        if parameter is old[0]:
            weight = weight_name(name)
            rows += zip(new, (weight,) if len(new) == 1 else factor_names(weight), strict=True)
        elif all(parameter is not one for one in old):
            rows.append((parameter, name))
    # Changed in place, since some optimizers hold references to these lists.
    parameters[:], names[:] = [parameter for parameter, _ in rows], [name for _, name in rows]


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Returns the parameters of one optimizer, in the order of its param groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a param group's settings, without its parameters."""
    return {key: value for key, value in group.items() if key not in PARAMETERS}


def is_of_torch(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer's class is one of PyTorch's own, and not a subclass defined elsewhere."""
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")  # Muon's module is torch.optim itself


def is_a(optimizer: Optimizer, kinds: Sequence[type[Optimizer]]) -> bool:
    """Returns whether an optimizer's class is one of `kinds`, or a subclass that does not override `step`."""
    step = inspect.unwrap(type(optimizer).step)
    return any(isinstance(optimizer, kind) and step is inspect.unwrap(kind.step) for kind in kinds)


def announces_steps(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer runs step hooks. It does so only if its class calls `Optimizer.__init__`."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(type(optimizer).step, "hooked")


def is_nested(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer's hooks are running in a step inside another step of the same optimizer.

    If the `step` of a class calls that of its parent class, PyTorch runs step hooks twice for one step.
    """
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe(1)))
    steps = (one for one in frames if one.f_code is _HOOKED_STEP and one.f_locals.get("self") is optimizer)
    return len(list(islice(steps, 2))) == 2


_HOOKED_STEP = next(
    constant
    for constant in Optimizer.profile_hook_step.__code__.co_consts
    if inspect.iscode(constant) and "pre_hook" in constant.co_varnames
)
"""The code object of the wrapper that PyTorch puts around the `step` of every optimizer."""


def _inside(value: Any, levels: int, seen: set[int]) -> Iterator[Optimizer]:
    """Yields the optimizers found in a value, down to `levels` levels. An optimizer yields itself first."""
    if id(value) in seen or levels < 0:
        return
    if isinstance(value, Optimizer):
        seen.add(id(value))
        yield value
        # The count of levels restarts at each optimizer.
        value, levels = {name: held for name, held in vars(value).items() if name not in _NOT_SEARCHED}, _DEEPEST
    if isinstance(value, Mapping | list | tuple):
        for held in value.values() if isinstance(value, Mapping) else value:
            yield from _inside(held, levels - 1, seen)
