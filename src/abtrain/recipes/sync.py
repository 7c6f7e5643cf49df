"""How workers agree, as data: at every step on gradients, or now and then on weights. Pure: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.merges import Mean, MergeRule
from abtrain.recipes.numbers import whole_number_problems
from abtrain.recipes.wires import WireName, wire_between

GradientWire = Literal["fp32", "bf16", "powersgd"]


@dataclass(frozen=True)
class GradientSync:
    """Gradients are averaged over all workers at every step: DDP itself, with its communication hooks.

    Args:
        wire: gradients as they are, in bfloat16, or as low-rank factors (PowerSGD, arXiv 1905.13727).
        rank: of PowerSGD's factors.
    """

    wire: GradientWire = "fp32"
    rank: int = 4

    def problems(self) -> list[str]:
        """Returns the problems of these settings; empty if there are none."""
        found = whole_number_problems("rank", self.rank, least=1)
        if self.wire not in get_args(GradientWire):
            found.append(f"unknown wire {self.wire!r} of gradients: {nearest(str(self.wire), get_args(GradientWire))}")
        return found


@dataclass(frozen=True)
class WeightSync:
    """Groups run alone for `every` steps, then merge what they hold. Inside a group gradients are averaged (DDP).

    A merge also ends the phase, whatever is left of a round then.

    Args:
        every: steps between merges, a round.
        merge: how the groups become one.
        wire: how a merge is sent, in a form of `abtrain.recipes.wires`; or auto, which `wire_between` chooses by the
            number of workers.
        delay: steps that a merge has to arrive in, while training goes on: its outcome is then added to what was
            trained meanwhile. 0: training waits for it.
        fragments: parts of the model that merge in turns, evenly over a round, so that less is sent at once.
    """

    every: int
    merge: MergeRule = Mean()
    wire: str = "fp32"
    delay: int = 0
    fragments: int = 1

    def problems(self) -> list[str]:
        """Returns the problems of these settings; empty if there are none."""
        found = whole_number_problems("every", self.every, least=1)
        if isinstance(self.merge, MergeRule):
            found += self.merge.problems()
        else:
            found.append(f"merge={self.merge!r} is unknown: use Mean(), TrainedOnly(), Weighted() or Outer()")
        try:
            WireName.parse(wire_between(1, self.wire))
        except ConfigurationError as error:
            found += error.problems
        return found or self._pace_problems()

    def _pace_problems(self) -> list[str]:
        found = whole_number_problems("delay", self.delay, least=0)
        found += whole_number_problems("fragments", self.fragments, least=1)
        if not found and self.delay >= self.every:
            found.append(f"delay={self.delay} is not smaller than every={self.every}: a merge must end before the next")
        if not found and self.fragments > self.every:
            found.append(f"fragments={self.fragments} do not fit in a round: use at most every={self.every}")
        return found

    def fragments_after(self, step: int) -> tuple[int, ...]:
        """The fragments that begin to merge after step `step` of the phase, from 0."""
        done = step + 1
        return tuple(
            f for f in range(self.fragments) if (done - (f + 1) * self.every // self.fragments) % self.every == 0
        )


Sync = GradientSync | WeightSync | None
"""None: workers never agree (the limit without communication)."""

Trains = Literal["all", "a_or_b", "a_then_b", "b"]
