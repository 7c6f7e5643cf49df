"""The optimizers of a loop, seen as one: several side by side, and those inside others.

People split a model between optimizers (Muon for matrices, AdamW for the rest), and wrap them: Accelerate's decides
whether a step is made, SAM's makes two passes of one, Lookahead's averages over some. What changes the weights is the
innermost optimizer that holds them, whoever calls it: that one is listened to.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_DEEPEST = 3
"""Levels of lists and dicts in which an optimizer may keep others."""
_OWN = frozenset({"state", "param_groups", "defaults"})
"""Attributes that every optimizer has, and in which there are no others."""


class Optimizers:
    """All optimizers that a loop steps by.

    Args:
        given: one, or several of which each has parameters of its own.

    Attributes:
        given: as a tuple.
        all: those given and those inside them, outer ones first.
        acting: of these, those whose steps change weights: for each parameter, the innermost that holds it.
    """

    def __init__(self, given: Optimizer | Sequence[Optimizer]) -> None:
        self.given = (given,) if isinstance(given, Optimizer) else tuple(given)
        self.all = tuple(_reachable(self.given))
        self._holders = {id(p): optimizer for optimizer in self.all for p in parameters_of(optimizer)}
        holders = {id(optimizer) for optimizer in self._holders.values()}
        self.acting = tuple(optimizer for optimizer in self.all if id(optimizer) in holders)

    @property
    def stateful(self) -> list[Optimizer]:
        """Those with a state of their own; of a wrapper that hands out the state of the one inside, the inner one."""
        return list({id(optimizer.state): optimizer for optimizer in self.all}.values())

    @property
    def kinds(self) -> list[str]:
        """Names of their classes."""
        return [f"{type(optimizer).__module__}.{type(optimizer).__qualname__}" for optimizer in self.all]

    def groups(self) -> list[dict[str, Any]]:
        """All param groups, those that several optimizers share once."""
        return list({id(group): group for optimizer in self.all for group in optimizer.param_groups}.values())

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that they hold, in the order of their groups."""
        return list({id(p): p for group in self.groups() for p in group["params"]}.values())

    def steps(self, parameter: Tensor) -> Optimizer | None:
        """The optimizer that changes a parameter; None if there is none."""
        return self._holders.get(id(parameter))

    def group_of(self, parameter: Tensor) -> dict[str, Any]:
        """The param group of a parameter that is held."""
        groups = self._holders[id(parameter)].param_groups
        return next(group for group in groups if any(held is parameter for held in group["params"]))

    def hand_over(self, old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]) -> None:
        """From now on `new` are held by whoever held `old`."""
        holders = [self._holders.pop(id(parameter), None) for parameter in old]
        if holders[0] is not None:
            self._holders |= dict.fromkeys(map(id, new), holders[0])


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of one optimizer, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a param group's settings, without its parameters."""
    return {key: value for key, value in group.items() if key not in PARAMETERS}


PARAMETERS = ("params", "param_names")
"""The keys of a param group that are not settings."""


def is_a(optimizer: Optimizer, kinds: Sequence[type[Optimizer]]) -> bool:
    """Whether an optimizer is of a class, or of one below it that steps in the same way."""
    step = inspect.unwrap(type(optimizer).step)
    return any(isinstance(optimizer, kind) and step is inspect.unwrap(kind.step) for kind in kinds)


def announces_steps(optimizer: Optimizer) -> bool:
    """Whether hooks on an optimizer are called; not where its class leaves out `Optimizer.__init__`."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(type(optimizer).step, "hooked")


def is_nested(optimizer: Optimizer) -> bool:
    """Whether a step of this very optimizer is under way around the one that calls its hooks.

    A class whose `step` calls that of its parent makes two steps of one, as PyTorch's hooks see it.
    """
    frame, found = sys._getframe(1), 0
    while frame is not None and found < 2:
        if frame.f_code is _HOOKED_STEP and frame.f_locals.get("self") is optimizer:
            found += 1
        frame = frame.f_back  # type: ignore[assignment]
    return found > 1


# What PyTorch puts around every `step`: the same code for all optimizers.
_HOOKED_STEP = next(
    constant
    for constant in Optimizer.profile_hook_step.__code__.co_consts
    if inspect.iscode(constant) and "pre_hook" in constant.co_varnames
)


def _reachable(given: Sequence[Optimizer]) -> Iterator[Optimizer]:
    seen: set[int] = set()
    for optimizer in given:
        yield from _inside(optimizer, _DEEPEST, seen)


def _inside(value: Any, levels: int, seen: set[int]) -> Iterator[Optimizer]:
    """The optimizers in a value, itself the first if it is one."""
    if id(value) in seen or levels < 0:
        return
    if isinstance(value, Optimizer):
        seen.add(id(value))
        yield value
        # Each may hold others as deep again.
        for name, held in vars(value).items():
            if name not in _OWN:
                yield from _inside(held, _DEEPEST - 1, seen)
    elif isinstance(value, Mapping):
        for held in value.values():
            yield from _inside(held, levels - 1, seen)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _inside(held, levels - 1, seen)
