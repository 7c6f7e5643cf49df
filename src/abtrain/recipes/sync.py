"""How workers agree, as data: at every step on gradients, or now and then on weights. Pure: no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

from abtrain.errors import ConfigurationError, nearest

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
        """What is wrong with these settings; empty if nothing is."""
        found = whole_number_problems("rank", self.rank, least=1)
        if self.wire not in get_args(GradientWire):
            found.append(f"unknown wire {self.wire!r} of gradients: {nearest(str(self.wire), get_args(GradientWire))}")
        return found


@dataclass(frozen=True)
class Mean:
    """All workers take the average of all, trained and frozen parts alike: the paper's merge (Algorithm 1)."""


@dataclass(frozen=True)
class TrainedOnly:
    """Of a factor that only some groups trained, all workers take the average over those."""


@dataclass(frozen=True)
class Weighted:
    """The average over those who trained it, a worker weighted by exp(-loss / temperature), its mean loss in the round.

    Args:
        temperature: in the units of the loss; the larger it is, the nearer to equal weights.
    """

    temperature: float = 0.1


@dataclass(frozen=True)
class Outer:
    """The average change of a round is the gradient of an outer Nesterov optimizer (DiLoCo, arXiv 2311.08105).

    Args:
        lr: of the outer optimizer; 1 with no momentum is `Mean`.
        momentum: of the outer optimizer.
    """

    lr: float = 0.7
    momentum: float = 0.9


Merge = Mean | TrainedOnly | Weighted | Outer
Code = Literal["fp32", "bf16", "int8", "int4", "int3", "ternary"]
LOW_RANK = "lowrank"
AUTO = "auto"


@dataclass(frozen=True)
class WireName:
    """A wire as its parts: `CODE`, `CODE:REPLY`, `lowrank:RANK` or `lowrank:RANK:CODE`.

    Attributes:
        code: in which numbers are sent.
        reply: in which their averages come back.
        rank: of the factors that changes of matrices are sent as; 0: they are sent as they are.
    """

    code: str
    reply: str
    rank: int = 0

    @classmethod
    def parse(cls, name: str) -> WireName:
        """The parts of a wire's name.

        Raises:
            ConfigurationError: no wire is called so.
        """
        kind, *rest = str(name).split(":")
        if kind == LOW_RANK and 1 <= len(rest) <= 2 and _is_rank(rest[0]):
            code = rest[1] if len(rest) == 2 else "fp32"
            parts = cls(code, code, int(rest[0]))
        else:
            # A sum of exact numbers is exact: it has no way back of its own.
            parts = cls(kind, rest[0] if len(rest) == 1 and kind != "fp32" else ":".join((kind, *rest)))
        if not {parts.code, parts.reply} <= set(get_args(Code)):
            raise ConfigurationError(f"unknown wire {name!r}: {nearest(str(name), _WIRES)}")
        return parts


AUTO_WIRES = ((2, "int4"), (5, "int3"), (math.inf, "ternary:int3"))
"""What `auto` stands for up to how many workers."""
_WIRES = (AUTO, *get_args(Code), "CODE:REPLY", f"{LOW_RANK}:RANK", f"{LOW_RANK}:RANK:CODE")


def _is_rank(text: str) -> bool:
    return text.isdecimal() and len(text) <= len(str(MOST)) and int(text) >= 1


def wire_between(workers: int, name: str) -> str:
    """`name`, or what `auto` stands for among so many workers: int4, int3, or ternary:int3.

    Each of n workers sends (n - 1) / n of the numbers and as many averages, so in one code for all, one of eight would
    send three quarters more bytes than one of two. What rounding takes on the way there is averaged over the workers:
    the more they are, the coarser it may be. In these codes a worker sends 4.2 to 5.2 bits of a number and its average,
    however many they are.
    """
    if name != AUTO:
        return name
    return next(wire for most, wire in AUTO_WIRES if workers <= most)


@dataclass(frozen=True)
class WeightSync:
    """Groups run alone for `every` steps, then merge what they hold. Inside a group gradients are averaged (DDP).

    A merge also ends the phase, whatever is left of a round then.

    Args:
        every: steps between merges, a round.
        merge: how the groups become one.
        wire: how a merge is sent: fp32, bf16, int8, int4, int3 or ternary, with averages in the same code or in another
            one as in ternary:int4 (see `abtrain.merging.wires`), or as low-rank factors, lowrank:RANK or
            lowrank:RANK:CODE; or auto, which `wire_between` chooses by the number of workers.
        delay: steps that a merge has to arrive in, while training goes on: its outcome is then added to what was
            trained meanwhile. 0: training waits for it.
        fragments: parts of the model that merge in turns, evenly over a round, so that less is sent at once.
    """

    every: int
    merge: Merge = Mean()
    wire: str = "fp32"
    delay: int = 0
    fragments: int = 1

    def problems(self) -> list[str]:
        """What is wrong with these settings; empty if nothing is."""
        found = whole_number_problems("every", self.every, least=1)
        if isinstance(self.merge, Outer):
            found += number_problems("outer_lr", self.merge.lr, above=0)
            found += share_problems("outer_momentum", self.merge.momentum, below=1)
        elif isinstance(self.merge, Weighted):
            found += number_problems("temperature", self.merge.temperature, above=0)
        elif not isinstance(self.merge, Mean | TrainedOnly):
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


MOST = 2**53
"""Up to which whole numbers are floating-point numbers too."""


def whole_number_problems(name: str, value: object, least: int) -> list[str]:
    """The message for a setting that is not a whole number of at least `least`; empty if it is one."""
    if isinstance(value, bool) or not isinstance(value, int):
        return [f"{name}={value!r} is not a whole number: use one of at least {least}"]
    if value > MOST:
        return [f"{name} is a number of {len(str(abs(value)))} digits: use at most {MOST}"]
    return [] if value >= least else [f"{name}={value} is too small: use at least {least}"]


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Whether this is a number that floating-point numbers can say."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= MOST if isinstance(value, int) else math.isfinite(value)


def number_problems(name: str, value: object, above: float) -> list[str]:
    """The message for a setting that is not a finite number above `above`; empty if it is one."""
    if not is_finite_number(value) or value <= above:
        return [f"{name}={value!r} is not a finite number above {above}: use one"]
    return []


def share_problems(name: str, value: object, below: float | None = None) -> list[str]:
    """The message for a setting that is not a number from 0 to 1 (from 0 and less than `below`, if that is given)."""
    range_ = "from 0 to 1" if below is None else f"from 0 to less than {below}"
    if not is_finite_number(value):
        return [f"{name}={value!r} is not a finite number: use one {range_}"]
    inside = 0 <= value <= 1 if below is None else 0 <= value < below
    return [] if inside else [f"{name}={value} is out of range: use a number {range_}"]
