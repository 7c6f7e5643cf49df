"""A method of training as data: what happens at each step. Imports no torch.

A recipe is a prologue of phases followed by a cycle of phases, repeated until the steps are spent. A phase says what
the weights look like, what is trained, and how the workers agree. `Recipe.at(step)` is a function of the step alone,
so a resumed run needs nothing but its step number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from abtrain.errors import ConfigurationError, UsageError
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.numbers import whole_number_problems
from abtrain.recipes.phase import Phase
from abtrain.recipes.sync import WeightSync


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
            if isinstance(phase.sync, WeightSync) and phase.sync.merge.needs_losses:
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

    @property
    def first_factored_step(self) -> int | None:
        """The first step of a factored phase; None if no step of the run is factored."""
        step = 0
        for phase in self.phases:
            if step >= self.total_steps:
                break
            if phase.weights == "factored":
                return step
            step += phase.steps
        return None

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
        prologue_steps = sum(phase.steps for phase in self.prologue) if not found else 0
        if prologue_steps and prologue_steps >= self.total_steps:
            found.append(
                f"the prologue ({prologue_steps} steps) leaves nothing of the {self.total_steps} total_steps "
                "to its cycle: shorten it or lengthen the run"
            )
        return found or self._round_problems()

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
