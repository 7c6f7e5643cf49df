"""Divides the workers into groups, and assigns the factor that each group trains. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from abtrain.errors import ConfigurationError

Role = Literal["A", "B"]


@dataclass(frozen=True)
class Topology:
    """Assigns `world_size` workers to groups of `group_size` consecutive ranks.

    Raises:
        ConfigurationError: a size is below 1, or the group size does not divide the world size.
    """

    world_size: int
    group_size: int = 1

    def __post_init__(self) -> None:
        problems = topology_problems(self.world_size, self.group_size)
        if problems:
            raise ConfigurationError(problems)

    @property
    def n_groups(self) -> int:
        return self.world_size // self.group_size

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each group, in order."""
        size = self.group_size
        return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(self.n_groups))

    def group_of(self, rank: int) -> int:
        """Returns the index of the rank's group."""
        return rank // self.group_size

    def place_of(self, rank: int) -> int:
        """Returns the index of the rank in its group."""
        return rank % self.group_size

    def counterparts(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks with the same place in all groups, in ascending order."""
        return tuple(range(self.place_of(rank), self.world_size, self.group_size))

    def role(self, rank: int, cycle: int) -> Role:
        """Returns the factor that the worker trains (Algorithm 1, lines 1 to 4): A in the first half of the groups.

        If the number of groups is odd, the one in the middle trains A. A single group alternates by cycle, since it
        would never train B otherwise.
        """
        if self.n_groups == 1:
            return "A" if cycle % 2 == 0 else "B"
        return "A" if self.group_of(rank) < (self.n_groups + 1) // 2 else "B"


def default_group_size(machines: Sequence[int]) -> int:
    """Returns the number of workers on each machine; 1 for one machine, or if a machine's ranks are not consecutive.

    A single machine as one group would have no other group to average weights with. `machines` lists an
    identifier for the machine of each rank.

    Raises:
        ConfigurationError: machines have different numbers of workers.
    """
    workers = Counter(machines)
    runs = sum(1 for before, after in pairwise(machines) if before != after) + 1
    # Groups are consecutive ranks: if ranks are dealt out over machines in turn, a group cannot be a machine.
    if len(workers) == 1 or runs > len(workers):
        return 1
    if len(set(workers.values())) > 1:
        sizes = ", ".join(f"{size} on rank {machines.index(machine)}'s machine" for machine, size in workers.items())
        common = [d for d in range(1, min(workers.values()) + 1) if all(size % d == 0 for size in workers.values())]
        raise ConfigurationError(
            f"machines have different numbers of workers ({sizes}), but groups must have equal sizes: set group_size "
            f"to {' or '.join(map(str, common))}, or start the same number of workers on every machine"
        )
    return workers[machines[0]]


def topology_problems(world_size: int, group_size: int) -> list[str]:
    """Returns a message for each problem with these sizes; an empty list if there are none."""
    if world_size < 1 or group_size < 1:
        return [f"world size {world_size} and group size {group_size}: both must be at least 1"]
    if world_size % group_size:
        divisors = ", ".join(str(d) for d in range(1, world_size + 1) if world_size % d == 0)
        return [
            f"world size {world_size} is not a multiple of group size {group_size}: "
            f"choose a group size among {divisors}"
        ]
    return []
