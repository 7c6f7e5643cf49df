"""Copies of the weights that optimizers keep: float32 masters of bf16 parameters, slow weights, averages.

Such an optimizer steps its own copy and overwrites the parameter with it, which would undo a merge. So a merge moves
the copies by the same change as the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

_COSINE, _LONGEST = 0.7, 2.0
"""A copy has the direction of the weights and about their length. State made from gradients has neither."""
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
        self._from_start = frozenset(self._copies)

    def look(self) -> bool:
        """Examines state whose name is new. Returns whether there was any."""
        found = False
        for place, optimizer in enumerate(self._model.optimizers.all):
            held = {key for state in optimizer.state.values() if isinstance(state, Mapping) for key in state}
            fresh = {key for key in held if isinstance(key, str) and (place, key) not in self._seen}
            for key in fresh:
                is_copy = False if key in LINEAR_MOMENTS | SQUARED_MOMENTS else _is_copy(optimizer, key)
                found = True
                if is_copy:
                    self._copies.add((place, key))
                # Nothing is near or far from weights that are all zero: look again later.
                if is_copy is not None:
                    self._seen.add((place, key))
        return found

    @property
    def names(self) -> str:
        """The names of all copies as one string, by optimizer and key."""
        return " ".join(f"{place}/{key}" for place, key in sorted(self._copies))

    def renew(self) -> None:
        """Gives new parameters the copies that their optimizer makes when it is built."""
        for place, key in self._from_start:
            optimizer = self._model.optimizers.all[place]
            for parameter in parameters_of(optimizer):
                optimizer.state.setdefault(parameter, {}).setdefault(key, parameter.detach().clone())

    def state_dict(self) -> dict[str, Any]:
        """Returns the names of known state, and of copies."""
        return {"seen": sorted(map(list, self._seen)), "copies": sorted(map(list, self._copies))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the names of a `state_dict`."""
        self._seen = {(place, key) for place, key in state["seen"]}
        self._copies = {(place, key) for place, key in state["copies"]}

    @contextmanager
    def following(self) -> Iterator[None]:
        """Moves the copies by the changes that the block makes to the weights."""
        pairs = list(self._pairs())
        before = [parameter.detach().clone() for parameter, _ in pairs]
        yield
        for (parameter, copy), old in zip(pairs, before, strict=True):
            if not torch.equal(parameter, old):
                _follow(copy, old, parameter.detach())

    def tensors(self) -> list[Tensor]:
        """Returns all copies, each once."""
        return [copy for _, copy in self._pairs()]

    def average(self, comm: Communicator) -> None:
        """Averages the copies over all workers, in place. Collective over the world."""
        copies = self.tensors()
        for copy, mean in zip(copies, exact_average(copies, comm), strict=True):
            copy.copy_(mean)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields weights and their copies, each copy once, even if several optimizers share it."""
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for place, key in sorted(self._copies):
            for parameter, state in self._model.optimizers.all[place].state.items():
                copy = state.get(key) if isinstance(state, Mapping) else None
                if isinstance(copy, Tensor) and copy.shape == parameter.shape:
                    pairs[id(copy)] = (parameter, copy)
        yield from pairs.values()


def _is_copy(optimizer: Optimizer, key: str) -> bool | None:
    """Returns whether state of this name is near the weights; None if the weights are all zero."""
    held = ((p, state.get(key)) for p, state in optimizer.state.items() if isinstance(state, Mapping))
    return _near((p, copy) for p, copy in held if isinstance(copy, Tensor) and isinstance(p, Tensor))


def _near(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool | None:
    """Returns whether the second tensors, as one vector, are near the first; None if the first are all zero."""
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
    """Adds the change of a weight to its copy. A master still rounds to its weight afterwards."""
    was_master = copy.dtype != old.dtype and torch.equal(copy.to(old.dtype), old)
    copy.add_((new.to(copy.dtype) - old.to(copy.dtype)).to(copy.device))
    if was_master:
        copy.copy_(torch.where(copy.to(new.dtype) == new, copy, new.to(copy.dtype)))


def kept_elsewhere(optimizer: Optimizer) -> str:
    """Returns the attribute in which an optimizer keeps copies of weights outside its state; empty if there is none."""
    weights = parameters_of(optimizer)
    general = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    for name, value in {**vars(optimizer), "state": general}.items():
        if name not in ("param_groups", "defaults") and any(
            # A single number may be near by chance.
            tensor.data_ptr() != weight.data_ptr() and tensor.numel() > 1 and _near([(weight, tensor)])
            for tensor in tensors_in(value, _DEEPEST)
            for weight in weights
        ):
            return name
    return ""


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restores the values of tensors after the block."""
    own = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, own, strict=True):
            tensor.copy_(value)
