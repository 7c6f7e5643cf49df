"""Finds copies of the weights in optimizers' state (float32 masters, slow weights, averages), and moves them in merges.

An optimizer that keeps such a copy may overwrite the weight with it, which would undo a merge. So a merge adds the
change of a weight to its copies, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from abtrain.comm.buckets import exact_average
from abtrain.comm.communicator import Communicator
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.nested import tensors_in
from abtrain.lowrank.optimizer import LINEAR_MOMENTS, SQUARED_MOMENTS
from abtrain.lowrank.optimizers import parameters_of
from abtrain.merging.changes import is_finite

_COSINE, _LONGEST = 0.7, 2.0
"""State is a copy if its cosine with the weights is above 0.7 and their lengths differ by less than a factor of 2."""
_DEEPEST = 4
"""Levels of lists and dicts in which an optimizer may keep copies outside its state."""
_Name = tuple[int, str]
"""The name of a kind of state: the index of the optimizer, and the key."""


class WeightCopies:
    """Finds copies of the weights in the state of a model's optimizers, and moves them with the weights."""

    def __init__(self, model: FactoredModel) -> None:
        self._model = model
        self._seen: set[_Name] = set()
        self._copies: set[_Name] = set()
        self.look()
        # The copies that constructors of optimizers make, with their dtype and device.
        self._from_start = {
            (place, key, parameter.dtype): (copy.dtype, copy.device)
            for place, key in self._copies
            for parameter, copy in self._of_kind(place, key)
        }

    def look(self) -> bool:
        """Examines the kinds of optimizer state that it has not seen before. Returns whether there were any."""
        found = False
        for place, optimizer in enumerate(self._model.optimizers.all):
            held = {key for state in optimizer.state.values() if isinstance(state, Mapping) for key in state}
            fresh = {key for key in held if isinstance(key, str) and (place, key) not in self._seen}
            for key in fresh:
                is_copy = False if key in LINEAR_MOMENTS | SQUARED_MOMENTS else _is_copy(optimizer, key)
                found = True
                if is_copy:
                    self._copies.add((place, key))
                # Weights that are all zero do not tell: look again later.
                if is_copy is not None:
                    self._seen.add((place, key))
        return found

    @property
    def names(self) -> str:
        """The kinds of state that are copies, as one string: the optimizer's index and the key of each."""
        return " ".join(f"{place}/{key}" for place, key in sorted(self._copies))

    def renew(self) -> None:
        """Gives parameters without state the copies that the optimizer's constructor made for the first parameters."""
        for (place, key, of), (dtype, device) in self._from_start.items():
            optimizer = self._model.optimizers.all[place]
            for parameter in parameters_of(optimizer):
                if parameter.dtype == of and key not in optimizer.state.setdefault(parameter, {}):
                    optimizer.state[parameter][key] = parameter.detach().to(device, dtype, copy=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the kinds of state that were examined (`seen`), and those that are copies, as [optimizer, key]."""
        return {"seen": sorted(map(list, self._seen)), "copies": sorted(map(list, self._copies))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict`."""
        self._seen = {(place, key) for place, key in state["seen"]}
        self._copies = {(place, key) for place, key in state["copies"]}

    @contextmanager
    def following(self) -> Iterator[None]:
        """Adds the changes that a `with` block makes to weights to their copies."""
        pairs = list(self._pairs())
        before = [parameter.detach().clone() for parameter, _ in pairs]
        yield
        for (parameter, copy), old in zip(pairs, before, strict=True):
            if not torch.equal(parameter, old):
                _follow(copy, old, parameter.detach())
        # The block may have dropped state that was not finite.
        self.renew()

    def tensors(self) -> list[Tensor]:
        """Returns every copy of a weight. A copy that several optimizers share is listed once."""
        return [copy for _, copy in self._pairs()]

    def average(self, comm: Communicator) -> None:
        """Averages each copy over all workers, in place. Collective over the world."""
        copies = self.tensors()
        for copy, mean in zip(copies, exact_average(copies, comm), strict=True):
            copy.copy_(mean)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each copy of a weight once, even if several optimizers share it, as (weight, copy)."""
        found = (pair for place, key in sorted(self._copies) for pair in self._of_kind(place, key))
        yield from {id(copy): (parameter, copy) for parameter, copy in found}.values()

    def _of_kind(self, place: int, key: str) -> Iterator[tuple[Tensor, Tensor]]:
        for parameter, state in self._model.optimizers.all[place].state.items():
            copy = state.get(key) if isinstance(parameter, Tensor) and isinstance(state, Mapping) else None
            # A tensor in the weight's own memory follows the weight by itself.
            if isinstance(copy, Tensor) and copy.shape == parameter.shape and copy.data_ptr() != parameter.data_ptr():
                yield parameter, copy


def _is_copy(optimizer: Optimizer, key: str) -> bool | None:
    """Returns whether the state under a key is near the weights; None if the weights are all zero."""
    held = ((p, state.get(key)) for p, state in optimizer.state.items() if isinstance(state, Mapping))
    return _near((p, copy) for p, copy in held if isinstance(copy, Tensor) and isinstance(p, Tensor))


def _near(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool | None:
    """Returns whether the second tensors of all pairs, as one vector, are near the weights; None if these are all 0."""
    dot = size = length = 0.0
    for weight, copy in pairs:
        if copy.shape != weight.shape or not copy.is_floating_point():
            return False
        a, b = weight.detach().double(), copy.detach().to(weight.device).double()
        dot += float((a * b).sum())
        size, length = size + float(a.square().sum()), length + float(b.square().sum())
    if not size > 0:
        return None
    return dot > _COSINE * math.sqrt(size * length) and 1 < _LONGEST**2 * length / size < _LONGEST**4


def _follow(copy: Tensor, old: Tensor, new: Tensor) -> None:
    """Adds the change of a weight from `old` to `new` to its copy. A master still rounds to its weight afterwards."""
    if not is_finite(old):
        # There is no change to add: if the weight is finite now, a merge has replaced it.
        if is_finite(new):
            copy.copy_(new)
        return
    held = copy.to(old.device)
    was_master = held.dtype != old.dtype and torch.equal(held.to(old.dtype), old)
    moved = held + (new.to(held.dtype) - old.to(held.dtype))
    copy.copy_(torch.where(moved.to(new.dtype) == new, moved, new.to(held.dtype)) if was_master else moved)


def kept_elsewhere(optimizer: Optimizer) -> str:
    """Returns the attribute in which an optimizer keeps copies of weights outside its state; empty if there is none."""
    weights = parameters_of(optimizer)
    general = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    for name, value in {**vars(optimizer), "state": general}.items():
        if name not in ("param_groups", "defaults") and any(
            # A single number may be near a weight by chance.
            tensor.data_ptr() != weight.data_ptr() and tensor.numel() > 1 and _near([(weight, tensor)])
            for tensor in tensors_in(value, _DEEPEST)
            for weight in weights
        ):
            return name
    return ""
