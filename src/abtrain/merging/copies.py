"""Finds copies of weights in optimizer state, such as float32 master weights, and updates them at merges.

An optimizer may overwrite a weight with its copy (a master weight, a slow weight or a running average), which would
undo a merge. So whatever a merge adds to a weight is also added to its copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from abtrain.comm.buckets import average_exactly, average_over_world
from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import finish
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.nested import tensors_in
from abtrain.lowrank.optimizer import LINEAR_MOMENTS, SQUARED_MOMENTS
from abtrain.lowrank.optimizers import parameters_of
from abtrain.merging.changes import is_finite
from abtrain.shards import have_one_form, local

_COSINE, _LONGEST = 0.7, 2.0
"""State is a copy if its cosine similarity to the weights is above 0.7, and its norm is 0.5 to 2 times theirs."""
_DEEPEST = 4
"""The number of nested levels of lists and dicts in which copies outside an optimizer's state are searched for."""
_Name = tuple[int, str]
"""A kind of optimizer state: the index of the optimizer, and the key under which each parameter has this state."""


class WeightCopies:
    """Finds copies of the weights in the state of a model's optimizers, and applies changes of weights to them.

    If the model is sharded, copies are sharded like their weights, and each worker handles its shards.
    """

    def __init__(self, model: FactoredModel, comm: Communicator) -> None:
        self._model, self._comm = model, comm
        self._seen: set[_Name] = set()
        self._copies: set[_Name] = set()
        self.look()
        # The dtype and the device of the copies that the optimizers' constructors made.
        self._from_start = {
            (place, key, parameter.dtype): (copy.dtype, copy.device)
            for place, key in self._copies
            for parameter, copy in self._of_kind(place, key)
        }

    def look(self) -> bool:
        """Searches new kinds of optimizer state for copies. Returns whether there were any new kinds.

        Collective in the group if the model is sharded, as a worker with few elements could mistake others for copies.
        """
        found = False
        for place, optimizer in enumerate(self._model.optimizers.all):
            held = set().union(*(state for state in optimizer.state.values() if isinstance(state, (dict, Mapping))))
            fresh = {key for key in held if isinstance(key, str) and (place, key) not in self._seen}
            for key in sorted(fresh):
                is_copy = False if key in LINEAR_MOMENTS | SQUARED_MOMENTS else self._is_copy(optimizer, key)
                found = True
                if is_copy:
                    self._copies.add((place, key))
                # If weights are all zero, copies cannot be recognized: look again later.
                if is_copy is not None:
                    self._seen.add((place, key))
        return found

    @property
    def names(self) -> str:
        """The kinds of state that are copies, as one string of items INDEX/KEY: an optimizer's index and a key."""
        return " ".join(f"{place}/{key}" for place, key in sorted(self._copies))

    def renew(self) -> None:
        """Creates the copies that parameters lack, of the kinds that the optimizers' constructors had created."""
        for (place, key, of), (dtype, device) in self._from_start.items():
            optimizer = self._model.optimizers.all[place]
            for parameter in parameters_of(optimizer):
                if parameter.dtype == of and key not in optimizer.state.setdefault(parameter, {}):
                    optimizer.state[parameter][key] = parameter.detach().to(device, dtype, copy=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns the kinds of state that were examined (`seen`) or are copies, as [index of the optimizer, key]."""
        return {"seen": sorted(map(list, self._seen)), "copies": sorted(map(list, self._copies))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict`."""
        self._seen = {(place, key) for place, key in state["seen"]}
        self._copies = {(place, key) for place, key in state["copies"]}

    @contextmanager
    def following(self) -> Iterator[None]:
        """Adds the changes of weights during a `with` block to the copies of these weights."""
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

    def average(self) -> None:
        """Averages each copy over all workers, in place. Collective over the world."""
        copies = self.tensors()
        average = average_exactly if self._model.sharded else average_over_world
        for copy, mean in zip(copies, finish(average(copies, self._comm)), strict=True):
            copy.copy_(mean)

    def _is_copy(self, optimizer: Optimizer, key: str) -> bool | None:
        """Returns whether an optimizer's state under a key is close to the weights; None if the weights are all 0."""
        held = ((p, state.get(key)) for p, state in optimizer.state.items() if isinstance(state, Mapping))
        sums = _products((p, copy) for p, copy in held if isinstance(copy, Tensor) and isinstance(p, Tensor))
        if sums is not None and self._model.sharded:
            self._comm.all_reduce(sums := sums.to(self._comm.device), "sum", "group")
        return _near(sums)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each copy of a weight once, even if several optimizers share it, as (weight, copy)."""
        found = (pair for place, key in sorted(self._copies) for pair in self._of_kind(place, key))
        for parameter, copy in {id(copy): (parameter, copy) for parameter, copy in found}.values():
            yield local(parameter), local(copy)

    def _of_kind(self, place: int, key: str) -> Iterator[tuple[Tensor, Tensor]]:
        for parameter, state in self._model.optimizers.all[place].state.items():
            copy = state.get(key) if isinstance(parameter, Tensor) and isinstance(state, Mapping) else None
            if isinstance(copy, Tensor) and have_one_form(parameter, copy) and not _one_memory(copy, parameter):
                yield parameter, copy


def _one_memory(one: Tensor, other: Tensor) -> bool:
    """Returns whether tensors share memory, so that one changes with the other."""
    return local(one).data_ptr() == local(other).data_ptr()


def _products(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
    """Returns the products a·b, a·a and b·b of weights a and tensors b in pairs, each as one vector; of local shards.

    Returns None if a tensor cannot be the copy of its weight.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for weight, copy in pairs:
        if not have_one_form(weight, copy) or not copy.is_floating_point():
            return None
        a, b = local(weight).double(), local(copy).to(local(weight).device).double()
        sums += torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]).cpu()
    return sums


def _near(products: Tensor | None) -> bool | None:
    """Returns whether weights and tensors with these `_products` are close; None if the weights are all zero."""
    if products is None:
        return False
    dot, size, length = map(float, products)
    if not size > 0:
        return None
    return dot > _COSINE * math.sqrt(size * length) and 1 < _LONGEST**2 * length / size < _LONGEST**4


def _follow(copy: Tensor, old: Tensor, new: Tensor) -> None:
    """Adds the change of a weight from `old` to `new` to its copy. A master weight still rounds to the weight."""
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
    """Returns the name of an optimizer's attribute with copies of weights outside its state; empty if there is none."""
    weights = parameters_of(optimizer)
    general = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    for name, value in {**vars(optimizer), "state": general}.items():
        if name not in ("param_groups", "defaults") and any(
            # A single number may be close to a weight by chance.
            not _one_memory(tensor, weight) and tensor.numel() > 1 and _near(_products([(weight, tensor)]))
            for tensor in tensors_in(value, _DEEPEST)
            for weight in weights
        ):
            return name
    return ""
