"""Defines a phase of a recipe: the form of the weights, the trained parameters and the synchronization. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from abtrain.recipes.numbers import number_problems, share_problems, whole_number_problems
from abtrain.recipes.sync import GradientSync, Sync, Trains, WeightSync

Weights = Literal["full", "factored"]


@dataclass(frozen=True)
class Phase:
    """Describes consecutive steps with the same form of weights, trained parameters and synchronization.

    Args:
        name: the phase's name in logs, metrics and payload counts.
        steps: the length in steps; the end of the run cuts off the last phase.
        weights: the form of the weights: `full` matrices W, or `factored` into A and B.
        trains: the trained factors: `all`; A or B, fixed for each group (`a_or_b`); A and B in alternate rounds, the
            same in all groups (`a_then_b`); or B only (`b`). Parameters that are not factored are always trained.
        sync: the synchronization of workers; None for none.
        damping: the damping of the preconditioner of the factors' steps (see `abtrain.lowrank.precondition`); 0: no
            preconditioner.
        factor_lr: the number by which preconditioned steps are multiplied.
        local_lr: the number by which the learning rate is multiplied while workers train alone, between merges. Adam
            normalizes by gradient noise, which is sqrt(workers) larger on one worker's batch. A factor of sqrt(workers)
            restores the step length.
    """

    name: str
    steps: int
    weights: Weights = "full"
    trains: Trains = "all"
    sync: Sync = GradientSync()
    damping: float = 0.0
    factor_lr: float = 1.0
    local_lr: float = 1.0

    @property
    def rounds(self) -> WeightSync | None:
        """The settings of merges; None if groups do not train alone in this phase."""
        return self.sync if isinstance(self.sync, WeightSync) else None

    @property
    def shares_gradients(self) -> bool:
        """Whether gradients are averaged over all workers at every step."""
        return isinstance(self.sync, GradientSync)

    def problems(self) -> list[str]:
        """Returns one message for each problem of the phase."""
        found = whole_number_problems("steps", self.steps, least=1)
        if self.weights not in get_args(Weights):
            found.append(f"weights={self.weights!r} is unknown: use 'full' or 'factored'")
        if self.trains not in get_args(Trains):
            found.append(f"trains={self.trains!r} is unknown: use {', '.join(map(repr, get_args(Trains)))}")
        if self.trains != "all" and self.weights == "full":
            found.append(f"trains={self.trains!r} needs factors: use weights='factored'")
        if self.trains in ("a_or_b", "a_then_b") and not self.rounds:
            found.append(f"trains={self.trains!r} needs merges: use trains='b', or a WeightSync (every of at least 1)")
        found += share_problems("damping", self.damping)
        found += number_problems("factor_lr", self.factor_lr, above=0)
        found += number_problems("local_lr", self.local_lr, above=0)
        if self.local_lr != 1 and not self.rounds:
            found.append(f"local_lr={self.local_lr} has no effect without merges: use a WeightSync, or leave it at 1")
        if self.factor_lr != 1 and self.damping == 0:
            found.append(f"factor_lr={self.factor_lr} scales preconditioned steps: give damping, or leave it at 1")
        if not isinstance(self.sync, Sync):
            found.append(f"sync={self.sync!r} is unknown: use GradientSync(), WeightSync(every) or None")
        elif self.sync is not None:
            found += self.sync.problems()
        return [f"phase {self.name!r}: {problem}" for problem in found or self._round_problems()]

    def _round_problems(self) -> list[str]:
        """Returns a message if rounds do not fit into the phase or do not suit `a_then_b`. Settings must be valid."""
        if not self.rounds:
            return []
        if self.rounds.every > self.steps:
            return [f"every={self.rounds.every} is longer than the phase: use at most its {self.steps} steps"]
        if self.trains == "a_then_b" and (self.rounds.delay or self.rounds.fragments > 1):
            return ["trains='a_then_b' needs merges of the whole model at once: use delay=0 and fragments=1"]
        return []
