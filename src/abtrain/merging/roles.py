"""Which factors each worker trains: it depends on the phase, the group's role, and the turn."""

from __future__ import annotations

from collections.abc import Iterable

from abtrain.comm.topology import Topology
from abtrain.lowrank.model import TrainedFactors
from abtrain.recipes.recipe import Position
from abtrain.recipes.sync import Trains


def trained_factors(position: Position, topology: Topology, rank: int) -> TrainedFactors:
    """Returns the factors that a worker trains at a position."""
    by_role: dict[Trains, TrainedFactors] = {
        "all": "all",
        "b": "B",
        "a_or_b": topology.role(rank, position.cycle),
        "a_then_b": position.turn,
    }
    return by_role[position.phase.trains]


def trained_by(position: Position, topology: Topology, factors: Iterable[str]) -> dict[str, list[bool]]:
    """Returns by factor (`NAME.A` or `NAME.B`) for each worker whether it trains it; empty if all train all factors."""
    if position.phase.trains == "all":
        return {}
    trained = [trained_factors(position, topology, rank) for rank in range(topology.world_size)]
    return {name: [which in ("all", name[-1]) for which in trained] for name in factors}


def idle_factors(position: Position, topology: Topology, ranks: Iterable[int]) -> set[str]:
    """Returns those of A and B that none of these workers trains."""
    trained = {trained_factors(position, topology, rank) for rank in ranks}
    return set() if "all" in trained else {"A", "B"} - trained
