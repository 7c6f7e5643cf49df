"""Represents the predicted course of a run: steps with the same collectives, and the merges between steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from abtrain.comm.communicator import Calls, Scope, Traffic
from abtrain.recipes.recipe import Position
from abtrain.recipes.sync import GradientWire, WeightSync


@dataclass(frozen=True)
class Merging:
    """Several merges with the same collectives. A merge averages the weights of workers that train separately.

    Attributes:
        times: the number of merges.
        stages: the collectives of each stage. A stage starts when the previous one is complete.
        sync: the settings of the merges.
        numbers: the number of parameters that the worker merges, which are a part of those of its group.
        hidden: the number of training steps that overlap with a merge, spread evenly over its stages. It is 0 if
            training waits for the merge.
    """

    times: int
    stages: tuple[Calls, ...]
    sync: WeightSync
    numbers: int
    hidden: int = 0

    @property
    def calls(self) -> Calls:
        return tuple(traffic for stage in self.stages for traffic in stage)


@dataclass(frozen=True)
class Stretch:
    """Steps of one phase in which a worker calls the same collectives.

    Attributes:
        phase: the name of the phase.
        steps: the number of steps.
        scope: the workers that wait for each other at every step; None if every worker trains alone.
        entry: the collectives before the first step.
        step: the collectives of each step.
        merges: the merges after some of the steps. Each merges the whole model or a part of it.
        exit: the collectives after the last merge.
        averages: the wire format in which gradients are averaged at each step; None if they are not averaged.
        factored: whether weights are factored.
        decompositions: the largest share of the work of decomposing weights before the first step that one worker
            does, from 0 to 1.
    """

    phase: str
    steps: int
    scope: Scope | None = None
    entry: Calls = ()
    step: Calls = ()
    merges: tuple[Merging, ...] = ()
    exit: Calls = ()
    averages: GradientWire | None = None
    factored: bool = False
    decompositions: float = 0.0

    @property
    def merge_count(self) -> int:
        """The number of merges. All workers take part in each merge."""
        return sum(merging.times for merging in self.merges)

    def all(self) -> Iterator[tuple[Traffic, int]]:
        """Yields each collective with the number of times that the worker calls it."""
        merges = ((merging.calls, merging.times) for merging in self.merges)
        for calls, times in ((self.entry, 1), (self.step, self.steps), *merges, (self.exit, 1)):
            for traffic in calls:
                yield traffic, times


@dataclass(frozen=True)
class Turn:
    """The steps of a phase that train the same parameters, if groups train alone between merges.

    Attributes:
        position: the position of the first of these steps in the recipe.
        steps: the number of steps.
        merging: the number of merges that begin after these steps, by the fragments of the model that they send. The
            merge after the last step of the phase is not included.
        last: whether the steps include the last one of the phase. All fragments merge after that step.
    """

    position: Position
    steps: int
    merging: Counter[tuple[int, ...]]
    last: bool


def turns(position: Position, sync: WeightSync) -> Iterator[Turn]:
    """Yields one turn for each factor if a phase trains A and B alternately, or one turn for all its steps.

    A and B alternate from round to round. A round is the steps between two merges (see `abtrain.merging.rounds`).

    Args:
        position: the position of the first step of the phase in the recipe.
        sync: the settings of the merges of the phase.
    """
    # The merges repeat with this period until the last step of the phase.
    period = sync.every * (2 if position.phase.trains == "a_then_b" else 1)
    periods, rest = divmod(position.steps_in_phase - 1, period)
    for start in range(0, min(period, position.steps_in_phase), sync.every):
        merging: Counter[tuple[int, ...]] = Counter()
        for offset in range(start, start + sync.every):
            fragments = sync.fragments_after(offset)
            if fragments:
                merging[fragments] += periods + (offset < rest)
        last = start <= rest < start + sync.every
        steps = periods * sync.every + min(max(rest - start, 0), sync.every) + last
        yield Turn(replace(position, step=position.step + start, step_in_phase=start), steps, +merging, last)
