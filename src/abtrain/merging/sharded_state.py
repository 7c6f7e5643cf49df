"""Converts saved states between models that are whole on each worker and models that are sharded over a group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from abtrain.comm.checksums import fingerprint
from abtrain.lowrank.fit import saved_layout, state_layout
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.nested import tensors_in
from abtrain.merging.places import Places


def sharded_like(model: FactoredModel, state: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Returns a `model_state` with the weights and the optimizer state that this model's worker needs.

    Weights that are sharded in the state but not in the model are gathered, and the other way round cut. Collective in
    the group if weights are gathered: its workers have the states of one step, which have passed `model_problems`.
    """
    converted = _Conversion(model, state, places)
    optimizers = []
    for optimizer in state["optimizers"]:
        held = dict(optimizer["state"])
        for name, key, tensor in _entries(optimizer["state"], converted.names):
            held[name] = {**held[name], key: converted.of(name, tensor)}
        optimizers.append({**optimizer, "state": held})
    weights = {name: converted.of(name, tensor) for name, tensor in state["weights"].items()}
    return {**state, "weights": weights, "optimizers": optimizers}


def conversion_problem(model: FactoredModel, state: Mapping[str, Any], place: int, count: int) -> str:
    """Returns why `sharded_like` cannot convert a state that has passed `model_problems`; empty if it can."""
    layout, names = saved_layout(model, state, place, count), {*state.get("sharded", ())} ^ {*model.sharded}
    for one in state["optimizers"]:
        fits = {(name, key) for name, key, t in _entries(one["state"], names) if t.shape == layout[name].shape}
        for name in sorted(names & one["state"].keys()):
            for key, held in one["state"][name].items():
                if (name, key) not in fits and any(tensor.ndim for tensor in tensors_in(held)):
                    return (
                        f"the optimizer's {key!r} for {name} does not have the shape of its weight, so it cannot be "
                        "divided among the workers of a group, or gathered: shard the model as it was when it was saved"
                    )
    return ""


def group_problem(model: FactoredModel, state: Mapping[str, Any], places: Places) -> str:
    """Returns why the states of this group's workers do not fit each other; empty if they do. Collective in the group.

    The state has passed `conversion_problem` on all workers.
    """
    names = {*state.get("sharded", ())} ^ {*model.sharded}
    held = [f"{name} {key} {t.dtype}" for one in state["optimizers"] for name, key, t in _entries(one["state"], names)]
    if len({*places.gathered(fingerprint(*held))}) == 1:
        return ""
    return "the states of a group have optimizer state for different weights: load what its workers saved together"


def _entries(state: Mapping[str, Any], names: set[str]) -> Iterator[tuple[str, str, Tensor]]:
    """Yields parameter, key and tensor for each state tensor of the named parameters, in one order on all workers.

    Single numbers are left out. All other tensors are sharded like their parameters, since no others are accepted.
    """
    for name in sorted(names & state.keys()):
        for key, tensor in sorted(state[name].items(), key=lambda item: str(item[0])):
            if isinstance(tensor, Tensor) and tensor.ndim:
                yield name, key, tensor


class _Conversion:
    """The conversion of the tensors of one state. `names` are the parameters that need it."""

    def __init__(self, model: FactoredModel, state: Mapping[str, Any], places: Places) -> None:
        self._whole, self._places = state_layout(model, state), places
        self._sharded = {*state.get("sharded", ())}
        self.names = self._sharded ^ {*model.sharded}

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a tensor of the named parameter, as the model has it."""
        if name not in self.names:
            return tensor
        if name not in self._sharded:
            return self._places.pieces({name: tensor})[name]
        return self._places.joined({name: tensor}, {name: self._whole[name].shape})[name]
