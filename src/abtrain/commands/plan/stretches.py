"""The predicted course of a run: turns of a phase of rounds, merges, and stretches of steps with the same calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from abtrain.comm.communicator import Calls, Scope, Traffic
from abtrain.recipes.recipe import Position
from abtrain.recipes.sync import GradientWire, WeightSync


@dataclass(frozen=True)
class Merging:
    """A number of equal merges.

    Attributes:
        times: the number of merges.
        stages: the calls of each stage. A stage starts when the previous one is complete.
        hidden: the number of steps that overlap with a merge, evenly over its stages; 0 if training waits for it.
    """

    times: int
    stages: tuple[Calls, ...]
    hidden: int = 0

    @property
    def calls(self) -> Calls:
        return tuple(traffic for stage in self.stages for traffic in stage)


@dataclass(frozen=True)
class Stretch:
    """Steps of one phase with the same calls.

    Attributes:
        phase: the name of the phase.
        steps: the number of steps.
        scope: the workers that wait for each other at every step; None if they train alone.
        entry: the calls before the first step.
        step: the calls of each step.
        merges: the merges between steps, of the whole model or of fragments.
        exit: the calls after the last merge.
        averages: the wire with which gradients are averaged at each step; None if they are not averaged.
        factored: whether weights are factored.
        decompositions: the share of all decompositions that this worker computes before the first step; 0 without any.
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
    def meetings(self) -> int:
        """The number of merges, at each of which all workers meet."""
        return sum(merging.times for merging in self.merges)

    def all(self) -> Iterator[tuple[Traffic, int]]:
        """Yields every call with the number of times that it is made."""
        merges = ((merging.calls, merging.times) for merging in self.merges)
        for calls, times in ((self.entry, 1), (self.step, self.steps), *merges, (self.exit, 1)):
            for traffic in calls:
                yield traffic, times


@dataclass(frozen=True)
class Turn:
    """Steps of a phase of rounds in which the same parameters are trained.

    Attributes:
        position: the position of the first of these steps.
        steps: the number of these steps.
        merging: the number of merges that begin after these steps, by their fragments. The merge after the last step of
            the phase is left out.
        last: whether the last step of the phase, after which all fragments merge, is one of these steps.
    """

    position: Position
    steps: int
    merging: Counter[tuple[int, ...]]
    last: bool


def turns(position: Position, sync: WeightSync) -> Iterator[Turn]:
    """Yields the turns of a phase of rounds: two if the factors take turns, else one (see `abtrain.merging.rounds`).

    Args:
        position: the first position of the phase.
        sync: the sync of the phase.
    """
    # Merges repeat with this period, up to the last step.
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
