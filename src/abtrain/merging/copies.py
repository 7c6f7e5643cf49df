"""Copies of the weights that optimizers keep: float32 masters of bf16 parameters, slow weights, averages.

An optimizer that steps its own copy, and writes that to the parameter, undoes at its next step whatever a merge has
made of the parameter. So a merge moves the copies as it moves the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizer import LINEAR_MOMENTS, SQUARED_MOMENTS
from abtrain.lowrank.optimizers import parameters_of

log = logging.getLogger("abtrain")

_NEAR = 0.2
"""Of the weights' norm: a copy is less far from them after the first step; what is made of gradients is not."""
_DEEPEST = 4
_Name = tuple[int, str]
"""Of state: the place of its optimizer among all, and its key."""


class WeightCopies:
    """Finds copies of the weights in the state of optimizers, and lets them follow.

    Args:
        model: with its optimizers.
    """

    def __init__(self, model: FactoredModel) -> None:
        self._model = model
        self._seen: set[_Name] = set()
        self._copies: set[_Name] = set()
        self.look()
        self._from_start = frozenset(self._copies)

    def look(self) -> None:
        """Looks at state of a name that was not there before; at little cost where there is none."""
        for place, optimizer in enumerate(self._model.optimizers.all):
            held = {key for state in optimizer.state.values() if isinstance(state, Mapping) for key in state}
            fresh = {key for key in held if isinstance(key, str) and (place, key) not in self._seen}
            for key in fresh - LINEAR_MOMENTS - SQUARED_MOMENTS:
                if _is_copy(optimizer, key):
                    self._copies.add((place, key))
            self._seen |= {(place, key) for key in fresh}

    def renew(self) -> None:
        """Gives new parameters the copies that their optimizer has made of all when it was built."""
        for place, key in self._from_start:
            optimizer = self._model.optimizers.all[place]
            for parameter in parameters_of(optimizer):
                optimizer.state.setdefault(parameter, {}).setdefault(key, parameter.detach().clone())

    def state_dict(self) -> dict[str, Any]:
        """Which state is known, and which of it are copies: places of optimizers, and names."""
        return {"seen": sorted(map(list, self._seen)), "copies": sorted(map(list, self._copies))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with what a `state_dict` knows."""
        self._seen = {(place, key) for place, key in state["seen"]}
        self._copies = {(place, key) for place, key in state["copies"]}

    @contextmanager
    def following(self) -> Iterator[None]:
        """What weights become inside it, their copies become too."""
        if not self._copies:
            yield
            return
        pairs = list(self._pairs())
        before = [parameter.detach().clone() for parameter, _ in pairs]
        yield
        for (parameter, copy), old in zip(pairs, before, strict=True):
            if not torch.equal(parameter, old):
                _follow(copy, old, parameter.detach())

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights and their copies; each copy once, whichever optimizers hand it out."""
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for place, key in sorted(self._copies):
            for parameter, state in self._model.optimizers.all[place].state.items():
                copy = state.get(key) if isinstance(state, Mapping) else None
                if isinstance(copy, Tensor) and copy.shape == parameter.shape:
                    pairs[id(copy)] = (parameter, copy)
        yield from pairs.values()


def _is_copy(optimizer: Optimizer, key: str) -> bool:
    """Whether items of state of this name are near the weights that they belong to."""
    distance = size = 0.0
    for parameter, state in optimizer.state.items():
        held = state.get(key) if isinstance(state, Mapping) else None
        if not isinstance(held, Tensor) or not isinstance(parameter, Tensor):
            continue
        if held.shape != parameter.shape or not held.is_floating_point():
            return False
        weight = parameter.detach().double()
        distance += float((held.to(weight.device).double() - weight).square().sum())
        size += float(weight.square().sum())
    return size > 0 and distance < _NEAR**2 * size


def _follow(copy: Tensor, old: Tensor, new: Tensor) -> None:
    """Moves a copy as its weight was moved. A master, which is finer than its weight, stays one of it."""
    was_master = copy.dtype != old.dtype and torch.equal(copy.to(old.dtype), old)
    copy.add_((new.to(copy.dtype) - old.to(copy.dtype)).to(copy.device))
    if was_master:
        copy.copy_(torch.where(copy.to(new.dtype) == new, copy, new.to(copy.dtype)))


def kept_elsewhere(optimizer: Optimizer) -> str:
    """The attribute in which an optimizer keeps copies of weights beside its parameters' state; empty if none does."""
    weights = parameters_of(optimizer)
    general = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    for name, value in {**vars(optimizer), "state": general}.items():
        if name not in ("param_groups", "defaults") and any(
            tensor.shape == weight.shape and tensor.data_ptr() != weight.data_ptr() and _equal(tensor, weight)
            for tensor in _tensors(value, _DEEPEST)
            for weight in weights
        ):
            return name
    return ""


def _equal(tensor: Tensor, weight: Tensor) -> bool:
    return tensor.is_floating_point() and bool(weight.any()) and torch.equal(tensor.to(weight), weight)


def _tensors(value: Any, levels: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif levels and not isinstance(value, Optimizer):
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for item in items:
            yield from _tensors(item, levels - 1)
