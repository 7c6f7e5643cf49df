"""Copies of the weights that optimizers keep: float32 masters of bf16 parameters, slow weights, averages.

An optimizer that steps its own copy, and writes that to the parameter, undoes at its next step whatever a merge has
made of the parameter. So a merge moves the copies as it moves the weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from abtrain.comm.averages import exact_average
from abtrain.comm.communicator import Communicator
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizer import LINEAR_MOMENTS, SQUARED_MOMENTS
from abtrain.lowrank.optimizers import parameters_of

log = logging.getLogger("abtrain")

_COSINE, _LONGEST = 0.7, 2.0
"""A copy has the direction of the weights and about their length; what is made of gradients has neither."""
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

    def look(self) -> bool:
        """Looks at state of a name that was not there before; at little cost where there is none.

        Returns:
            Whether there was any.
        """
        found = False
        for place, optimizer in enumerate(self._model.optimizers.all):
            held = {key for state in optimizer.state.values() if isinstance(state, Mapping) for key in state}
            fresh = {key for key in held if isinstance(key, str) and (place, key) not in self._seen}
            for key in fresh:
                is_copy = False if key in LINEAR_MOMENTS | SQUARED_MOMENTS else _is_copy(optimizer, key)
                found = True
                if is_copy:
                    self._copies.add((place, key))
                # Of weights that are all zero nothing can be said yet.
                if is_copy is not None:
                    self._seen.add((place, key))
        return found

    @property
    def names(self) -> str:
        """The places and keys of all copies, as one word."""
        return " ".join(f"{place}/{key}" for place, key in sorted(self._copies))

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
        """Moves the copies as the weights are moved inside it."""
        if not self._copies:
            yield
            return
        pairs = list(self._pairs())
        before = [parameter.detach().clone() for parameter, _ in pairs]
        yield
        for (parameter, copy), old in zip(pairs, before, strict=True):
            if not torch.equal(parameter, old):
                _follow(copy, old, parameter.detach())

    @contextmanager
    def averaged(self, comm: Communicator) -> Iterator[None]:
        """Inside it the copies are averages over all workers. Collective on entry, not on exit."""
        if not self._copies:
            yield
            return
        copies = [copy for _, copy in self._pairs()]
        own = [copy.clone() for copy in copies]
        self.average(comm)
        try:
            yield
        finally:
            for copy, value in zip(copies, own, strict=True):
                copy.copy_(value)

    def average(self, comm: Communicator) -> None:
        """Averages the copies over all workers, in place. Collective over the world."""
        copies = [copy for _, copy in self._pairs()]
        for copy, mean in zip(copies, exact_average(copies, comm), strict=True):
            copy.copy_(mean)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights and their copies; each copy once, whichever optimizers hand it out."""
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for place, key in sorted(self._copies):
            for parameter, state in self._model.optimizers.all[place].state.items():
                copy = state.get(key) if isinstance(state, Mapping) else None
                if isinstance(copy, Tensor) and copy.shape == parameter.shape:
                    pairs[id(copy)] = (parameter, copy)
        yield from pairs.values()


def _is_copy(optimizer: Optimizer, key: str) -> bool | None:
    """Whether items of state of this name are near the weights that they belong to; None: these are all zero."""
    dot = size = length = 0.0
    for parameter, state in optimizer.state.items():
        held = state.get(key) if isinstance(state, Mapping) else None
        if not isinstance(held, Tensor) or not isinstance(parameter, Tensor):
            continue
        if held.shape != parameter.shape or not held.is_floating_point():
            return False
        weight, copy = parameter.detach().double(), held.detach().to(parameter.device).double()
        dot += float((weight * copy).sum())
        size, length = size + float(weight.square().sum()), length + float(copy.square().sum())
    return _near(dot, size, length) if size > 0 else None


def _near(dot: float, size: float, length: float) -> bool:
    """Whether two vectors are about the same, given their product and their squares."""
    return dot > _COSINE * math.sqrt(size * length) and 1 < _LONGEST**2 * length / size < _LONGEST**4


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
            tensor.data_ptr() != weight.data_ptr() and _resembles(tensor, weight)
            for tensor in _tensors(value, _DEEPEST)
            for weight in weights
        ):
            return name
    return ""


def _resembles(tensor: Tensor, weight: Tensor) -> bool:
    """Whether a tensor may be a copy of a weight; of a single number nobody can tell."""
    if tensor.shape != weight.shape or not tensor.is_floating_point() or tensor.numel() < 2:
        return False
    a, b = tensor.detach().to(weight.device).double(), weight.detach().double()
    size = float(b.square().sum())
    return size > 0 and _near(float((a * b).sum()), size, float(a.square().sum()))


def _tensors(value: Any, levels: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif levels and not isinstance(value, Optimizer):
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for item in items:
            yield from _tensors(item, levels - 1)
