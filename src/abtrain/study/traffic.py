"""Words for what a worker sends: a call of a collective, and a stretch of steps that repeats the same calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from abtrain.comm.communicator import Scope

Call = Literal["all_reduce", "all_gather", "exchange", "broadcast", "gradients"]


@dataclass(frozen=True)
class Traffic:
    """One collective, or one bucket of DDP's gradients.

    Attributes:
        call: how it is sent. `gradients` is an all-reduce that runs while backward goes on.
        scope: over whom.
        nbytes: payload of one worker.
        rounds: collectives one after another that `nbytes` are spread over evenly; PowerSGD's buckets take three.
        ready: of `gradients`, the share of the backward pass after which they can be sent.
    """

    call: Call
    scope: Scope
    nbytes: int
    rounds: int = 1
    ready: float = 1.0


@dataclass(frozen=True)
class Stretch:
    """Steps of one phase, and what a worker sends in them.

    Attributes:
        phase: its name.
        steps: how many.
        merges: how many rounds they are cut into.
        scope: over whom workers wait for each other at every step; None: over nobody.
        entry: once, before the first step.
        step: at each step.
        merge: at each merge.
        exit: once, after the last merge.
    """

    phase: str
    steps: int
    merges: int = 0
    scope: Scope | None = None
    entry: tuple[Traffic, ...] = ()
    step: tuple[Traffic, ...] = ()
    merge: tuple[Traffic, ...] = ()
    exit: tuple[Traffic, ...] = ()

    def all(self) -> Iterator[tuple[Traffic, int]]:
        """Every call with how often it is made."""
        for calls, times in ((self.entry, 1), (self.step, self.steps), (self.merge, self.merges), (self.exit, 1)):
            for traffic in calls:
                yield traffic, times
