"""A phase of a recipe: what the weights look like, what is trained, and how workers agree. Pure: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from abtrain.recipes.numbers import number_problems, share_problems, whole_number_problems
from abtrain.recipes.sync import GradientSync, Sync, Trains, WeightSync

Weights = Literal["full", "factored"]


@dataclass(frozen=True)
class Phase:
    """A stretch of steps in which weights, trained parts and synchronization stay the same.

    Args:
        name: how the phase is called in logs, metrics and payload counts.
        steps: its length; the last phase of a run is cut off where the steps are spent.
        weights: `full` matrices W, or `factored` into A and B.
        trains: `all` parameters, one factor by the group's role (`a_or_b`), the same factor in all groups, another
            in each round (`a_then_b`), or B only (`b`). Parameters that are not factored are always trained.
        sync: how workers agree.
        damping: take the steps of factors in coordinates of the weight, with this damping (see
            `abtrain.lowrank.precondition`); 0: leave them as they are.
        factor_lr: multiplies those steps.
        local_lr: multiplies the learning rate where workers train alone, between merges. Adam divides by the noise of
            the gradients, which in a worker's share of a batch is sqrt(workers) times that of the whole: times as much,
            its steps are as long as they would be there.
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
        """How groups that train alone merge; None if they never train alone."""
        return self.sync if isinstance(self.sync, WeightSync) else None

    @property
    def shares_gradients(self) -> bool:
        """Whether all workers step by the same gradients."""
        return isinstance(self.sync, GradientSync)

    def problems(self) -> list[str]:
        """Returns the problems of the phase; empty if there are none."""
        where = f"phase {self.name!r}"
        found = whole_number_problems(f"{where}: steps", self.steps, least=1)
        if self.weights not in ("full", "factored"):
            found.append(f"{where}: weights={self.weights!r} is unknown: use 'full' or 'factored'")
        if self.trains not in get_args(Trains):
            found.append(f"{where}: trains={self.trains!r} is unknown: use {', '.join(map(repr, get_args(Trains)))}")
        if self.trains != "all" and self.weights == "full":
            found.append(f"{where}: trains={self.trains!r} needs factors: use weights='factored'")
        if self.trains in ("a_or_b", "a_then_b") and not isinstance(self.sync, WeightSync):
            found.append(f"{where}: trains={self.trains!r} goes by groups and rounds: use a WeightSync")
        found += share_problems(f"{where}: damping", self.damping)
        found += number_problems(f"{where}: factor_lr", self.factor_lr, above=0)
        found += number_problems(f"{where}: local_lr", self.local_lr, above=0)
        if self.local_lr != 1 and not isinstance(self.sync, WeightSync):
            found.append(f"{where}: local_lr={self.local_lr} is for training alone: use a WeightSync, or leave it at 1")
        if self.factor_lr != 1 and self.damping == 0:
            found.append(
                f"{where}: factor_lr={self.factor_lr} scales preconditioned steps: give damping, or leave it at 1"
            )
        if not isinstance(self.sync, Sync):
            found.append(f"{where}: sync={self.sync!r} is unknown: use GradientSync(), WeightSync(every) or None")
        elif self.sync is not None:
            wrong = self.sync.problems()
            if not (wrong or found) and isinstance(self.sync, WeightSync) and self.sync.every > self.steps:
                wrong = [f"every={self.sync.every} is longer than the phase: use at most its {self.steps} steps"]
            found += [f"{where}: {problem}" for problem in wrong]
        return found or [f"{where}: {problem}" for problem in self._turn_problems()]

    def _turn_problems(self) -> list[str]:
        """Delays and fragments that factors trained in turns do not allow; of settings that are valid one by one."""
        if self.trains != "a_then_b" or not isinstance(self.sync, WeightSync):
            return []
        if not self.sync.delay and self.sync.fragments == 1:
            return []
        return ["trains='a_then_b' changes the factor at merges of the whole model: use no delay or fragments"]
