"""What happens at step t. Pure: no torch, no communication, no state.

A recipe is a prologue of phases followed by a cycle of phases, repeated until the steps are spent. A phase says what
the weights look like, what is trained, and how the workers agree. `Recipe.at(step)` is a function of the step alone,
so a resumed run needs nothing but its step number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from abtrain.errors import ConfigurationError, UsageError
from abtrain.factoring import Factoring
from abtrain.sync import (
    GradientSync,
    Sync,
    Trains,
    Weighted,
    WeightSync,
    number_problems,
    share_problems,
    whole_number_problems,
)

Weights = Literal["full", "factored"]
Measure = Literal["spectrum_drift", "agreement"]


@dataclass(frozen=True)
class Until:
    """Ends a phase at the first merge after which a measure is below a limit; its `steps` at the latest.

    Args:
        measure: `spectrum_drift`, how much the singular values of weights that may be factored, over the largest,
            changed in the last round (relative, averaged over the weights by their size); or `agreement`, the mean
            cosine between what any two workers changed in the round, from about 0 (noise) to 1 (all the same),
            whatever the wire makes of it.
        below: the limit.
    """

    measure: Measure
    below: float

    def problems(self) -> list[str]:
        """What is wrong with these settings; empty if nothing is."""
        found = number_problems(f"until: {self.measure} below", self.below, above=0)
        if self.measure not in get_args(Measure):
            found.append(f"until: measure={self.measure!r} is unknown: use {' or '.join(map(repr, get_args(Measure)))}")
        return found


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
        until: what is measured at merges may end the phase before its steps are spent. In the prologue only.
    """

    name: str
    steps: int
    weights: Weights = "full"
    trains: Trains = "all"
    sync: Sync = GradientSync()
    damping: float = 0.0
    factor_lr: float = 1.0
    local_lr: float = 1.0
    until: Until | None = None

    @property
    def merges_at_once(self) -> bool:
        """Whether it merges the whole model now and then, waited for."""
        return isinstance(self.sync, WeightSync) and not self.sync.delay and self.sync.fragments == 1

    def problems(self) -> list[str]:
        """What is wrong with the phase; empty if nothing is."""
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
        return found or [f"{where}: {problem}" for problem in self._merge_problems()]

    def _merge_problems(self) -> list[str]:
        """What merges of this phase cannot be; of settings that are well by themselves."""
        at_once = self.merges_at_once
        found = [] if self.until is None else self.until.problems()
        if self.until is not None and not at_once:
            found.append("until is decided at merges of the whole model: use a WeightSync without delay and fragments")
        if self.trains == "a_then_b" and not at_once:
            found.append("trains='a_then_b' changes the factor at merges of the whole model: use no delay or fragments")
        return found


@dataclass(frozen=True)
class Position:
    """Where a step stands in its recipe.

    Attributes:
        step: index of the step, from 0.
        phase: the phase that the step belongs to.
        phase_index: which of the recipe's phases that is, prologue and cycle counted through.
        cycle: how many cycles are completed; 0 in the prologue.
        step_in_phase: index of the step in this run of the phase, from 0.
        steps_in_phase: length of this run of the phase, cut off at the recipe's end.
    """

    step: int
    phase: Phase
    phase_index: int
    cycle: int
    step_in_phase: int
    steps_in_phase: int

    @property
    def first(self) -> bool:
        return self.step_in_phase == 0

    @property
    def last(self) -> bool:
        return self.step_in_phase == self.steps_in_phase - 1

    @property
    def merging(self) -> tuple[int, ...]:
        """The fragments of the model that begin to merge after this step; all of them after the last one."""
        sync = self.phase.sync
        if not isinstance(sync, WeightSync):
            return ()
        return tuple(range(sync.fragments)) if self.last else sync.fragments_after(self.step_in_phase)

    @property
    def merges(self) -> bool:
        """Whether any part of the model begins to merge after this step."""
        return bool(self.merging)

    @property
    def starts_round(self) -> bool:
        """Whether a round begins with this step; where gradients are shared, every step is a round."""
        sync = self.phase.sync
        return not isinstance(sync, WeightSync) or self.step_in_phase % sync.every == 0

    @property
    def turn(self) -> Literal["A", "B"]:
        """The factor that all groups train in this round, where they take turns: A first, counted over all cycles."""
        every = self.phase.sync.every if isinstance(self.phase.sync, WeightSync) else self.phase.steps
        rounds = self.cycle * -(-self.phase.steps // every) + self.step_in_phase // every
        return "A" if rounds % 2 == 0 else "B"


@dataclass(frozen=True)
class Recipe:
    """A method of training, as data.

    Args:
        name: how it is called.
        total_steps: optimizer steps of the whole run.
        prologue: phases that are run once.
        cycle: phases that are repeated until the steps are spent.
        factoring: which weights are factored and how; needed if a phase is factored.
        lr_rebound_steps: after a change of parameter shapes, steps in which the learning rate climbs back (0: none).

    Raises:
        ConfigurationError: all that is wrong with it, at once.
    """

    name: str
    total_steps: int
    prologue: tuple[Phase, ...] = ()
    cycle: tuple[Phase, ...] = ()
    factoring: Factoring | None = None
    lr_rebound_steps: int = 0

    def __post_init__(self) -> None:
        found = self._problems()
        if found:
            raise ConfigurationError([f"recipe {self.name!r}: {problem}" for problem in found])

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self.prologue + self.cycle

    @property
    def factored(self) -> bool:
        """Whether any phase is factored."""
        return any(phase.weights == "factored" for phase in self.phases)

    @property
    def phase_weighted_by_loss(self) -> str | None:
        """The first phase whose merges need workers' training losses; None if none does."""
        for phase in self.phases:
            if isinstance(phase.sync, WeightSync) and isinstance(phase.sync.merge, Weighted):
                return phase.name
        return None

    def at(self, step: int) -> Position:
        """The position of step `step`.

        Raises:
            UsageError: the step is not one of the recipe's.
        """
        if not 0 <= step < self.total_steps:
            raise UsageError(
                f"step {step} is not in recipe {self.name!r} of {self.total_steps} steps "
                f"(0 to {self.total_steps - 1}): build the recipe with more total_steps"
            )
        into, cycle, phases, index = step, 0, self.prologue, 0
        prologue_steps = sum(phase.steps for phase in self.prologue)
        if step >= prologue_steps:
            cycle, into = divmod(step - prologue_steps, sum(phase.steps for phase in self.cycle))
            phases, index = self.cycle, len(self.prologue)
        for phase in phases:
            if into < phase.steps:
                break
            into -= phase.steps
            index += 1
        steps_left = self.total_steps - (step - into)
        return Position(step, phase, index, cycle, into, min(phase.steps, steps_left))

    def cut_after(self, position: Position) -> Recipe:
        """The recipe in which the position's phase, one of the prologue, ends with its step.

        What was decided by measurement is data from then on: the new recipe is a function of the step again.
        """
        ended = replace(position.phase, steps=position.step_in_phase + 1, until=None)
        prologue = list(self.prologue)
        prologue[position.phase_index] = ended
        return replace(self, prologue=tuple(prologue))

    def runs(self) -> Iterator[Position]:
        """The first position of every run of a phase, from the start to the end."""
        step = 0
        while step < self.total_steps:
            position = self.at(step)
            yield position
            step += position.steps_in_phase

    def _problems(self) -> list[str]:
        found = whole_number_problems("total_steps", self.total_steps, least=1)
        found += whole_number_problems("lr_rebound_steps", self.lr_rebound_steps, least=0)
        for phase in self.phases:
            found += phase.problems()
        if not self.cycle:
            found.append("the cycle is empty: give at least one phase")
        if self.factoring is not None:
            found += self.factoring.problems()
        elif self.factored:
            found.append("a factored phase needs a rank rule: give factoring=Factoring(...)")
        if len(self.phases) > 1 and any(phase.sync is None for phase in self.phases):
            found.append("a phase without sync leaves workers apart for good: it must be the only phase")
        if any(phase.until is not None for phase in self.cycle):
            found.append("a phase that is repeated has a fixed length: use until in the prologue only")
        prologue_steps = sum(phase.steps for phase in self.prologue) if not found else 0
        if prologue_steps and prologue_steps >= self.total_steps:
            found.append(
                f"the prologue ({prologue_steps} steps) leaves nothing of the {self.total_steps} total_steps "
                "to its cycle: shorten it or lengthen the run"
            )
        return found or self._round_problems() + self._settled_problems()

    def _round_problems(self) -> list[str]:
        """Phases of which the run's end cuts off the first of several rounds; a single round ends with its phase."""
        found, start = [], sum(phase.steps for phase in self.prologue)
        for phase in self.cycle:
            left = self.total_steps - start
            if isinstance(phase.sync, WeightSync) and 0 < left < phase.sync.every < phase.steps:
                found.append(
                    f"phase {phase.name!r}: every={phase.sync.every} is longer than the {left} steps that are left to "
                    f"it of {self.total_steps}: use at most {left}, shorten what comes before, or lengthen the run"
                )
            start += phase.steps
        return found

    def _settled_problems(self) -> list[str]:
        if self.factoring is None or not self.factoring.settled:
            return []
        if any(phase.weights == "full" and phase.merges_at_once for phase in self.phases):
            return []
        return [
            f"settled={self.factoring.settled} is measured at merges of full-rank weights, and no phase has such: give "
            "the warm-up or the rebound rounds, without delay (warmup_every, rebound_every), or leave settled at 0"
        ]
