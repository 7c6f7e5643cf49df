"""Workers that are not equally fast: how long the others wait for the last.

A worker's step takes its nominal time, times the worker's own slowness, times a jitter that is drawn anew for each
step. Workers of a group wait for each other at every step, groups only at the end of a round: so a round of H steps
takes the largest, over the groups, of the sum over its steps of the largest inside the group. The expectation of that
has no closed form; it is sampled, from a seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from abtrain.errors import ConfigurationError
from abtrain.recipes.numbers import number_problems, share_problems, whole_number_problems

_DRAWS = 1_000_000
"""Step times that are drawn for one estimate, unless one round takes more."""
_MOST_ROUNDS = 200
_AT_ONCE = 1_000_000
"""Step times that are held in memory."""


@dataclass(frozen=True)
class Speeds:
    """How fast the workers of a cluster are.

    Args:
        workers: how many.
        jitter: standard deviation of a step's time over its mean, log-normal, independent from step to step.
        slow_share: share of the workers that are slower for good, at least one where it is not 0.
        slow_factor: how many times longer their steps take.
        seed: of everything that is drawn.

    Raises:
        ConfigurationError: all that is wrong with it, at once.
    """

    workers: int
    jitter: float = 0.0
    slow_share: float = 0.0
    slow_factor: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        found = whole_number_problems("workers", self.workers, 1) + share_problems("slow_share", self.slow_share)
        found += number_problems("slow_factor", self.slow_factor, above=0)
        if not found and self.slow_factor < 1:
            found.append(f"slow_factor={self.slow_factor} makes slow workers faster: use a number of at least 1")
        if not (math.isfinite(self.jitter) and self.jitter >= 0):
            found.append(f"jitter={self.jitter} is not a finite number of at least 0: 0.1 is a tenth of a step")
        if not 0 <= self.seed < 2**32:
            found.append(f"seed={self.seed} is out of range: use a number from 0 to {2**32 - 1}")
        if found:
            raise ConfigurationError(found)

    def stretch(self, steps: int, together: int) -> float:
        """How many times longer than nominal a round takes until its last worker is done, on average.

        Args:
            steps: of the round.
            together: workers, side by side, that wait for each other at every step; the rest wait at its end.
        """
        return _stretch(self, steps, together)


@cache
def _stretch(speeds: Speeds, steps: int, together: int) -> float:
    generator = torch.Generator().manual_seed(speeds.seed)
    slowness = torch.ones(speeds.workers)
    slow = math.ceil(speeds.slow_share * speeds.workers)
    slowness[torch.randperm(speeds.workers, generator=generator)[:slow]] = speeds.slow_factor
    if speeds.jitter == 0:
        return float(slowness.max())
    # Workers cut evenly into groups; where they cannot be, the last group's missing ones take no time.
    groups = -(-speeds.workers // together)
    slowness = torch.nn.functional.pad(slowness, (0, groups * together - speeds.workers)).view(groups, together)
    rounds = max(1, min(_MOST_ROUNDS, _DRAWS // (steps * speeds.workers)))
    return sum(_round(slowness, speeds.jitter, steps, generator) for _ in range(rounds)) / rounds / steps


def _round(slowness: Tensor, jitter: float, steps: int, generator: torch.Generator) -> float:
    """One round's time in steps, drawn; slowness is (groups, workers of a group)."""
    # Of the normal distribution behind a log-normal one with mean 1 and this standard deviation.
    variance = math.log1p(jitter**2)
    done = torch.zeros(len(slowness), dtype=torch.float64)
    at_once = max(1, _AT_ONCE // slowness.numel())
    for start in range(0, steps, at_once):
        normal = torch.randn(min(at_once, steps - start), *slowness.shape, generator=generator)
        times = slowness * (normal * math.sqrt(variance) - variance / 2).exp()
        done += times.amax(dim=2).sum(dim=0, dtype=torch.float64)
    return float(done.max())
