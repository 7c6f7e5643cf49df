"""Simulates workers of different speeds to estimate how long workers wait for the slowest one.

The time of a worker's step is the nominal time, times the worker's slowness, times a jitter that is drawn for each
step. Workers of a group wait for each other at every step, and groups wait for each other at the end of a round. A step
of a group takes as long as its slowest worker. A round takes as long as the slowest group needs for all its steps. The
expected time has no closed form, so the module estimates it from random samples.
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
"""The number of random step times for one estimate, unless a single round has more."""
_MOST_ROUNDS = 200
_AT_ONCE = 1_000_000
"""The largest number of step times that are in memory at the same time."""


@dataclass(frozen=True)
class Speeds:
    """The speeds of the workers of a cluster.

    Args:
        workers: the number of workers.
        jitter: the standard deviation of a step's time divided by its mean. The jitter is log-normal and independent
            from step to step.
        slow_share: the share of workers that are permanently slower. Any share above 0 means at least one worker.
        slow_factor: the step time of slow workers divided by the step time of the others.
        seed: the seed of all random numbers.

    Raises:
        ConfigurationError: a number is out of range. The error lists all of them.
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
            found.append(f"jitter={self.jitter} is out of range: use a finite number of at least 0, such as 0.1")
        if not 0 <= self.seed < 2**32:
            found.append(f"seed={self.seed} is out of range: use a number from 0 to {2**32 - 1}")
        if found:
            raise ConfigurationError(found)

    @property
    def slow(self) -> int:
        """The number of slow workers."""
        # In floating point, 0.07 * 100 is slightly more than 7.
        return math.ceil(round(self.slow_share * self.workers, 9))

    def slowdown(self, steps: int, together: int) -> float:
        """Returns the expected time until the last worker completes a round, divided by the nominal time of the round.

        A round is the steps between two merges.

        Args:
            steps: the number of steps in the round.
            together: the number of neighbouring workers that wait for each other at every step. Such groups of
                workers wait for each other only at the end of the round.
        """
        return _slowdown(self, steps, together)


@cache
def _slowdown(speeds: Speeds, steps: int, together: int) -> float:
    generator = torch.Generator().manual_seed(speeds.seed)
    slowness = torch.ones(speeds.workers)
    slowness[torch.randperm(speeds.workers, generator=generator)[: speeds.slow]] = speeds.slow_factor
    if speeds.jitter == 0:
        return float(slowness.max())
    # If the last group is incomplete, its missing workers take no time.
    groups = -(-speeds.workers // together)
    slowness = torch.nn.functional.pad(slowness, (0, groups * together - speeds.workers)).view(groups, together)
    rounds = max(1, min(_MOST_ROUNDS, _DRAWS // (steps * speeds.workers)))
    return sum(_round(slowness, speeds.jitter, steps, generator) for _ in range(rounds)) / rounds / steps


def _round(slowness: Tensor, jitter: float, steps: int, generator: torch.Generator) -> float:
    """Returns a random time for a round, in units of a step. `slowness` has the shape (groups, workers of a group)."""
    # The variance of the logarithm of a log-normal variable with mean 1 and this standard deviation.
    variance = math.log1p(jitter**2)
    done = torch.zeros(len(slowness), dtype=torch.float64)
    at_once = max(1, _AT_ONCE // slowness.numel())
    for start in range(0, steps, at_once):
        normal = torch.randn(min(at_once, steps - start), *slowness.shape, generator=generator)
        times = slowness * (normal * math.sqrt(variance) - variance / 2).exp()
        done += times.amax(dim=2).sum(dim=0, dtype=torch.float64)
    return float(done.max())
