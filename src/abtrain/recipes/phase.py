"""Defines a phase of a recipe: form of the weights, trained parameters and synchronization. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from abtrain.recipes.numbers import number_problems, share_problems, whole_number_problems
from abtrain.recipes.sync import GradientSync, Sync, Trains, WeightSync

Weights = Literal["full", "factored"]

SHORT_RUN = 300
"""Runs with fewer steps are too short for recipes that merge weights, on any link (docs/studies/large-batch.md)."""


@dataclass(frozen=True)
class Phase:
    """Describes a phase of training: a number of consecutive steps that use the same settings.

    Args:
        name: the phase's name in logs, in metrics, and in reports of the bytes sent.
        steps: the number of steps; the last phase is cut short if the run ends before it.
        weights: the form of the weights: `full` matrices W, or `factored` into A and B.
        trains: which factors are trained: both (`all`), A or B depending on the group (`a_or_b`), A and B in alternate
            rounds (`a_then_b`), or only B (`b`). Parameters that are not factored are always trained.
        sync: how workers are synchronized; None if they are not.
        damping: the damping used to precondition the factors (see `abtrain.lowrank.precondition`); 0 turns it off.
        factor_lr: the number by which preconditioned updates are multiplied.
    """

    name: str
    steps: int
    weights: Weights = "full"
    trains: Trains = "all"
    sync: Sync = GradientSync()
    damping: float = 0.0
    factor_lr: float = 1.0

    @property
    def rounds(self) -> WeightSync | None:
        """The settings of merges; None if this phase has no merges."""
        return self.sync if isinstance(self.sync, WeightSync) else None

    @property
    def shares_gradients(self) -> bool:
        """Whether gradients are averaged over all workers at every step."""
        return isinstance(self.sync, GradientSync)

    def problems(self, total_steps: object) -> list[str]:
        """Returns one message for each problem with the phase in a run of `total_steps`, which the recipe checks."""
        wrong_steps = whole_number_problems("steps", self.steps, least=1)
        # The recipe reports the problem of a phase that lasts for the whole run.
        found = [] if self.steps is total_steps else list(wrong_steps)
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
        if self.factor_lr != 1 and self.damping == 0:
            found.append(f"factor_lr={self.factor_lr} has no effect without preconditioning: use 1, or set damping > 0")
        if not isinstance(self.sync, Sync):
            found.append(f"sync={self.sync!r} is unknown: use GradientSync(), WeightSync(every) or None")
        elif self.sync is not None:
            found += self.sync.problems()
        if not (found or wrong_steps):
            found = self._round_problems(total_steps)
        return [f"phase {self.name!r}: {problem}" for problem in found]

    def _round_problems(self, total_steps: object) -> list[str]:
        """Returns a message if rounds do not fit into the phase or do not suit `a_then_b`. Settings must be valid."""
        if not self.rounds:
            return []
        if self.rounds.every > self.steps:
            is_short = isinstance(total_steps, int) and total_steps < min(self.rounds.every, SHORT_RUN)
            hint = f", or the recipe ddp, which suits runs below {SHORT_RUN} steps" if is_short else ""
            return [f"every={self.rounds.every} is longer than the phase: use at most its {self.steps} steps{hint}"]
        if self.trains == "a_then_b" and (self.rounds.delay or self.rounds.fragments > 1):
            return ["trains='a_then_b' needs merges of the whole model at once: use delay=0 and fragments=1"]
        return []
