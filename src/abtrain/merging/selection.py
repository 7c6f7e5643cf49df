"""Selects the factors that each worker trains, and the tensors that merge after a step: all or a part of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from abtrain.comm.topology import Topology
from abtrain.lowrank.model import TrainedFactors
from abtrain.lowrank.names import factor_names, weight_name
from abtrain.recipes.merges import MergeRule, Part
from abtrain.recipes.recipe import Position
from abtrain.recipes.sync import Trains, WeightSync


def trained_factors(position: Position, topology: Topology, rank: int) -> TrainedFactors:
    """Returns the factors that a worker trains at a position in the recipe."""
    by_role: dict[Trains, TrainedFactors] = {
        "all": "all",
        "b": "B",
        "a_or_b": topology.role(rank, position.cycle),
        "a_then_b": position.turn,
    }
    return by_role[position.phase.trains]


def trained_by(position: Position, topology: Topology, factors: Iterable[str]) -> dict[str, list[bool]]:
    """Returns which workers train each factor (`NAME.A` or `NAME.B`); empty if all workers train all factors."""
    if position.phase.trains == "all":
        return {}
    trained = [trained_factors(position, topology, rank) for rank in range(topology.world_size)]
    return {name: [which in ("all", name[-1]) for which in trained] for name in factors}


def weights_of(
    rule: MergeRule,
    names: Iterable[str],
    trained_by: Mapping[str, Sequence[bool]],
    alive: Sequence[bool],
    parts: Sequence[Part],
    topology: Topology,
    rank: int,
) -> tuple[float, dict[str, float]]:
    """Returns by which number a worker multiplies its change of a tensor, before counterparts average the changes.

    `alive` and `parts` have an entry for each worker. `trained_by`: see the function of this name.

    Returns:
        The number for most tensors, and another number for each tensor that has one, by name.
    """
    known = dict[tuple[bool, ...], float]()

    def weight(trained: tuple[bool, ...]) -> float:
        if trained not in known:
            shares = rule.shares(alive, trained, parts)
            # The worker also speaks for the others of its group, which made the same changes.
            own = math.fsum(shares[member] for member in topology.groups[topology.group_of(rank)])
            known[trained] = own * topology.n_groups
        return known[trained]

    common = weight(tuple(alive))
    # Most models have no such tensors, but some have many others.
    named = (name for name in names if name in trained_by) if trained_by else ()
    found = {name: weight(tuple(map(bool.__and__, alive, trained_by[name]))) for name in named}
    return common, {name: number for name, number in found.items() if number != common}


def rounds_of(position: Position) -> WeightSync:
    """Returns the merge settings of the phase at a position in the recipe. The phase must have merges."""
    sync = position.phase.rounds
    assert sync is not None, f"phase {position.phase.name!r} does not merge"
    return sync


def whole_round(position: Position) -> bool:
    """Returns whether the merge after a step includes the model's last fragment. Buffers merge with this fragment."""
    return rounds_of(position).fragments - 1 in position.merging


def tensors_due(
    position: Position, parameters: Mapping[str, Tensor], trained_by: Mapping[str, Sequence[bool]]
) -> dict[str, Tensor]:
    """Returns the parameters that merge after a step, without factors that no worker has trained.

    `trained_by` has, by parameter name, whether each worker trained it. If a name is missing, all workers did.
    """
    parts = cut_into_fragments(parameters, rounds_of(position).fragments)
    tensors = {name: tensor for fragment in position.merging for name, tensor in parts[fragment].items()}
    return {name: tensor for name, tensor in tensors.items() if any(trained_by.get(name, (True,)))}


def cut_into_fragments(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Cuts named tensors, in their order, into `count` parts of about the same size; factors of a weight stay together.

    If there are fewer weights than parts, some parts are empty.
    """
    total = sum(tensor.numel() for tensor in tensors.values())
    fragments: list[dict[str, Tensor]] = [{} for _ in range(count)]
    before, place, previous = 0, 0, ""
    for name, tensor in tensors.items():
        partner = (previous, name) == factor_names(weight_name(name))
        if not partner:
            place = min(before * count // max(total, 1), count - 1)
        fragments[place][name] = tensor
        before, previous = before + tensor.numel(), name
    return fragments
