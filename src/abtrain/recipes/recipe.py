"""Defines a recipe: a training method as data, which determines what happens at each step. Imports no torch.

A recipe is a prologue of phases, followed by a cycle of phases that repeats until the end of the run. `Recipe.at(step)`
depends on the step alone, so a resumed run finds its place in the recipe from its step number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from abtrain.errors import ConfigurationError, UsageError
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.numbers import whole_number_problems
from abtrain.recipes.phase import Phase


@dataclass(frozen=True)
class Position:
    """Describes where a step is in its recipe.

    Attributes:
        step: the index of the step, from 0.
        phase_index: the index of the phase in `Recipe.phases`.
        cycle: the number of completed cycles; 0 in the prologue.
        step_in_phase: the index of the step in this run of the phase, from 0.
        steps_in_phase: the length of this run of the phase in steps, cut off at the recipe's end.
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
        """The indices of the model's fragments whose merge begins after this step; all after a phase's last step."""
        rounds = self.phase.rounds
        if rounds is None:
            return ()
        return tuple(range(rounds.fragments)) if self.last else rounds.fragments_after(self.step_in_phase)

    @property
    def merges(self) -> bool:
        """Whether a merge of any fragment of the model begins after this step."""
        return bool(self.merging)

    @property
    def starts_round(self) -> bool:
        """Whether a round begins with this step. In a phase without rounds, every step counts as a round."""
        rounds = self.phase.rounds
        return rounds is None or self.step_in_phase % rounds.every == 0

    @property
    def turn(self) -> Literal["A", "B"]:
        """The factor that all groups train in this round, with `a_then_b`: A first, counting rounds over all cycles."""
        every = self.phase.rounds.every if self.phase.rounds else self.phase.steps
        rounds = self.cycle * -(-self.phase.steps // every) + self.step_in_phase // every
        return "A" if rounds % 2 == 0 else "B"


@dataclass(frozen=True)
class Choice:
    """Marks a recipe whose cycle is still to be chosen, by what is measured in the prologue.

    Args:
        budget: the largest payload of the choice, as a share of that of data parallel training in float32; None for no
            limit.
    """

    budget: float | None = None


@dataclass(frozen=True)
class Recipe:
    """Describes a training method as a schedule of phases.

    Args:
        total_steps: the number of optimizer steps of the whole run.
        prologue: the phases that run once, at the start.
        cycle: the phases that repeat until the end of the run.
        factoring: the settings that determine which weights are factored, and how; required if a phase is factored.
        lr_rebound_steps: the number of steps in which the learning rate rises again after parameters change shape.
        outer_device: `cpu` to keep the state of merges (anchors, outer momentum, residuals) in host memory; None: on
            the device of the parameters. It changes no result, so recipes that differ in it are equal.
        choice: what is to be chosen at the end of the prologue, in place of the cycle; None if nothing is.

    Raises:
        ConfigurationError: the recipe is invalid; the error lists all problems.
    """

    name: str
    total_steps: int
    prologue: tuple[Phase, ...] = ()
    cycle: tuple[Phase, ...] = ()
    factoring: Factoring | None = None
    lr_rebound_steps: int = 0
    outer_device: str | None = field(default=None, compare=False, repr=False)
    choice: Choice | None = None

    def __post_init__(self) -> None:
        found = self._problems()
        if found:
            raise ConfigurationError([f"recipe {self.name!r}: {problem}" for problem in found])

    @property
    def phases(self) -> tuple[Phase, ...]:
        return self.prologue + self.cycle

    @property
    def chooses_at(self) -> int | None:
        """The number of steps after which the cycle is chosen; None if nothing is to be chosen."""
        return None if self.choice is None else sum(phase.steps for phase in self.prologue)

    @property
    def factored(self) -> bool:
        return any(phase.weights == "factored" for phase in self.phases)

    @property
    def phase_weighted_by_loss(self) -> str | None:
        """The name of the first phase whose merges need the workers' training losses; None if no phase needs them."""
        weighted = (phase.name for phase in self.phases if phase.rounds and phase.rounds.merge.needs_losses)
        return next(weighted, None)

    def at(self, step: int) -> Position:
        """Returns the position in the recipe of the step with index `step`.

        Raises:
            UsageError: the recipe has no such step.
        """
        if not 0 <= step < self.total_steps:
            raise UsageError(
                f"there is no step {step} in recipe {self.name!r}: its {self.total_steps} steps are 0 to "
                f"{self.total_steps - 1}. Build the recipe with a larger total_steps"
            )
        into, cycle, index = step, 0, 0
        prologue_steps = sum(phase.steps for phase in self.prologue)
        if step >= prologue_steps:
            cycle, into = divmod(step - prologue_steps, sum(phase.steps for phase in self.cycle))
            index = len(self.prologue)
        while into >= self.phases[index].steps:
            into -= self.phases[index].steps
            index += 1
        phase, steps_left = self.phases[index], self.total_steps - (step - into)
        return Position(step, phase, index, cycle, into, min(phase.steps, steps_left))

    @property
    def first_factored_step(self) -> int | None:
        """The index of the first step of a factored phase; None if no step of the run is in a factored phase."""
        first_runs = islice(self.runs(), len(self.phases))
        return next((run.step for run in first_runs if run.phase.weights == "factored"), None)

    def runs(self) -> Iterator[Position]:
        """Yields the position of the first step of every phase in the run, in order."""
        step = 0
        while step < self.total_steps:
            position = self.at(step)
            yield position
            step += position.steps_in_phase

    def _problems(self) -> list[str]:
        found = whole_number_problems("total_steps", self.total_steps, least=1)
        if not isinstance(self.name, str):
            found.append(f"the name {self.name!r} is not a string: give options by their names, such as every=20")
        found += whole_number_problems("lr_rebound_steps", self.lr_rebound_steps, least=0)
        if self.outer_device not in (None, "cpu"):
            found.append(
                f"outer_device={self.outer_device!r} is unknown: use 'cpu' to keep the state of merges in host memory, "
                "or leave it out to keep this state on the device of the parameters"
            )
        for phase in self.phases:
            found += phase.problems(self.total_steps)
        if not self.cycle:
            found.append("the cycle is empty: give at least one phase")
        if self.factoring is not None:
            found += self.factoring.problems()
        elif self.factored:
            found.append("a factored phase needs a rank rule: give factoring=Factoring(rank_rule)")
        if len(self.phases) > 1 and any(phase.sync is None for phase in self.phases):
            found.append("a phase without sync leaves workers with different weights: it must be the only phase")
        return found or self._length_problems()

    def _length_problems(self) -> list[str]:
        """Returns messages if the run is too short for its phases, or too long for a factored phase without sync."""
        start = sum(phase.steps for phase in self.prologue)
        if start >= self.total_steps:
            return [
                f"the prologue ({start} steps) leaves none of the {self.total_steps} total_steps for the cycle: "
                "shorten the prologue, or give a larger total_steps"
            ]
        found = []
        for phase in self.cycle:
            left = self.total_steps - start
            if phase.sync is None and phase.weights == "factored" and phase.steps < left:
                found.append(f"phase {phase.name!r} has no sync and cannot repeat: give it a sync, or {left} steps")
            # A round that is as long as its phase is cut short with it if the run ends early.
            if phase.rounds and 0 < left < phase.rounds.every < phase.steps:
                found.append(
                    f"phase {phase.name!r}: every={phase.rounds.every} is longer than the {left} steps that are left "
                    f"for it: use at most {left}, shorten the phases before it, or give a larger total_steps"
                )
            start += phase.steps
        return found
