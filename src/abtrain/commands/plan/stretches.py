"""Words for what a worker sends in a run: merges, and stretches of steps with the same calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from abtrain.comm.communicator import Scope
from abtrain.comm.traffic import Calls, Traffic
from abtrain.recipes.sync import GradientWire


@dataclass(frozen=True)
class Merging:
    """Merges that are alike.

    Attributes:
        times: how often one begins.
        stages: what is sent at once, then what waits for that to arrive, and so on.
        hidden: steps that go on meanwhile, evenly over the stages; 0: training waits.
    """

    times: int
    stages: tuple[Calls, ...]
    hidden: int = 0

    @property
    def calls(self) -> Calls:
        return tuple(traffic for stage in self.stages for traffic in stage)


@dataclass(frozen=True)
class Stretch:
    """Steps of one phase, and what a worker sends in them.

    Attributes:
        phase: its name.
        steps: how many.
        scope: over whom workers wait for each other at every step; None: over nobody.
        entry: once, before the first step.
        step: at each step.
        merges: whenever a part of the model, or all of it, merges.
        exit: once, after the last merge.
        averages: the wire in which gradients are averaged at each step; None: they are not.
        factored: whether its steps are those of factors.
        decompositions: before the first step, in those of all weights that are factored: 1, or this worker's share.
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
        """How often all workers meet to merge."""
        return sum(merging.times for merging in self.merges)

    def all(self) -> Iterator[tuple[Traffic, int]]:
        """Every call with how often it is made."""
        merges = ((merging.calls, merging.times) for merging in self.merges)
        for calls, times in ((self.entry, 1), (self.step, self.steps), *merges, (self.exit, 1)):
            for traffic in calls:
                yield traffic, times
