"""Defines the synchronization of workers: of gradients at every step, or of weights once a round. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.merges import Mean, MergeRule
from abtrain.recipes.numbers import whole_number_problems
from abtrain.recipes.wires import parse_wire, wire_between

GradientWire = Literal["fp32", "bf16", "powersgd"]


@dataclass(frozen=True)
class GradientSync:
    """Averages gradients over all workers at every step, with DDP and its communication hooks.

    Args:
        wire: how gradients are sent: unchanged, in bfloat16, or as low-rank factors (PowerSGD, arXiv 1905.13727).
        rank: the rank of PowerSGD's factors.
    """

    wire: GradientWire = "fp32"
    rank: int = 4

    def problems(self) -> list[str]:
        """Returns one message for each problem with these settings."""
        found = whole_number_problems("rank", self.rank, least=1)
        if self.wire not in get_args(GradientWire):
            known = nearest(str(self.wire), get_args(GradientWire))
            found.append(f"unknown wire format {self.wire!r} for gradients: {known}")
        return found


@dataclass(frozen=True)
class WeightSync:
    """Lets groups of workers train separately for `every` steps, then merges their weights.

    Within a group, DDP averages gradients at every step. A phase always ends with a merge, even in mid-round.

    Args:
        every: the length of a round: the number of steps between merges.
        merge: the rule that computes common weights from those of the groups.
        wire: the wire format of merges: a name as in `abtrain.recipes.wires`, or `auto` (see `wire_between`).
        delay: the number of training steps during which a merge is sent. Its result is then added to what these
            steps changed. With 0, training waits for the merge.
        fragments: the number of parts of the model. Their merges are spread evenly over a round, to send less at once.
    """

    every: int
    merge: MergeRule = Mean()
    wire: str = "fp32"
    delay: int = 0
    fragments: int = 1

    def problems(self) -> list[str]:
        """Returns one message for each problem with these settings."""
        found = whole_number_problems("every", self.every, least=1)
        found += whole_number_problems("delay", self.delay, least=0)
        found += whole_number_problems("fragments", self.fragments, least=1)
        are_numbers = not found
        if are_numbers and self.delay >= self.every:
            found.append(f"delay={self.delay} is not smaller than every={self.every}: use at most {self.every - 1}")
        if are_numbers and self.fragments > self.every:
            found.append(f"fragments={self.fragments} is larger than every={self.every}: use at most {self.every}")
        if isinstance(self.merge, MergeRule):
            found += self.merge.problems()
        else:
            found.append(f"merge={self.merge!r} is unknown: use Mean(), TrainedOnly(), Weighted() or Outer()")
        try:
            parse_wire(wire_between(1, self.wire))
        except ConfigurationError as error:
            found += error.problems
        return found

    def fragments_after(self, step: int) -> tuple[int, ...]:
        """Returns the indices of the fragments whose merge begins after step `step` of the phase, all from 0."""
        done = step + 1
        return tuple(
            f for f in range(self.fragments) if (done - (f + 1) * self.every // self.fragments) % self.every == 0
        )


Sync = GradientSync | WeightSync | None
"""How workers synchronize; None: never."""

Trains = Literal["all", "a_or_b", "a_then_b", "b"]
