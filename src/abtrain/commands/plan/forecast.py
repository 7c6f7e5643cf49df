"""Seconds and wire bytes of a run, phase by phase: traffic meets links, and workers of unlike speed.

Computing a step takes the same time in every phase, but for what factors and averaging gradients add; the arithmetic
of merges' wires is left out. Broadcasts hold everybody up, and so do merges, but for what steps hide of them: the links
are taken to be theirs meanwhile. DDP's gradients go while backward, two thirds of a step, goes on: a bucket is sent
once it is ready and the one before is through, and the optimizer waits for the last (Li et al., PyTorch Distributed,
VLDB 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from abtrain.comm.stages import stages_due
from abtrain.comm.traffic import Calls, Traffic
from abtrain.commands.plan.collectives import Cluster, Cost, cost_of
from abtrain.commands.plan.stragglers import Speeds
from abtrain.commands.plan.stretches import Merging, Stretch
from abtrain.commands.plan.worker_seconds import WorkerSeconds

BACKWARD = 2 / 3
"""Of a step's time: a backward pass computes about twice what a forward pass does."""


@dataclass(frozen=True)
class PhaseForecast:
    """The forecast of all steps of one phase.

    Attributes:
        phase: its name.
        steps: how many.
        payload: bytes of one worker.
        wire: bytes that a node puts on its link, headers included.
        compute: seconds of the nominal steps.
        waiting: seconds more until the slowest worker is done.
        communication: seconds of it that no computation hides, and of making gradients ready to be sent.
        decomposing: seconds of decompositions, and of putting factors in the weights' place and back.
    """

    phase: str
    steps: int
    payload: float
    wire: float
    compute: float
    waiting: float
    communication: float
    decomposing: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.waiting + self.communication + self.decomposing


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run; its phases sum to it."""

    phases: tuple[PhaseForecast, ...]

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def payload(self) -> float:
        return sum(phase.payload for phase in self.phases)

    @property
    def wire(self) -> float:
        return sum(phase.wire for phase in self.phases)

    @property
    def utilisation(self) -> float:
        """Seconds of computation over all seconds: what a worker alone would take over what it takes here."""
        return sum(phase.compute for phase in self.phases) / self.seconds if self.seconds else 1.0


def forecast(
    stretches: Sequence[Stretch],
    cluster: Cluster,
    alone: WorkerSeconds,
    *,
    group_size: int = 1,
    speeds: Speeds | None = None,
    algorithm: str = "ring",
) -> Forecast:
    """Forecasts the run of `stretches` on a cluster.

    Args:
        stretches: of one worker, from `abtrain.commands.plan.payload.predict`.
        cluster: with as many workers as they were predicted for.
        alone: what each worker takes for its own work.
        group_size: workers a group.
        speeds: of the workers; default all alike.
        algorithm: of all-reduces (see `abtrain.commands.plan.collectives`).
    """
    road = _Road(cluster, alone, group_size, speeds or Speeds(cluster.workers), algorithm)
    by_phase: dict[str, list[PhaseForecast]] = {}
    for stretch in stretches:
        by_phase.setdefault(stretch.phase, []).append(road.travel(stretch))
    return Forecast(tuple(_sum(name, parts) for name, parts in by_phase.items()))


class _Road:
    """A cluster on which stretches are travelled."""

    def __init__(self, cluster: Cluster, alone: WorkerSeconds, group_size: int, speeds: Speeds, algorithm: str) -> None:
        self._cluster, self._alone, self._speeds = cluster, alone, speeds
        self._group_size, self._algorithm = group_size, algorithm
        # Runs of a phase repeat, and so do their calls.
        self._cost = cache(self._cost_of)

    def travel(self, stretch: Stretch) -> PhaseForecast:
        alone = self._alone
        step = alone.step + (alone.factors.step if stretch.factored else 0.0)
        compute, slowest = stretch.steps * step, self._slowest(stretch)
        averaging = alone.averaging.get(stretch.averages, 0.0) if stretch.averages else 0.0
        exposed = stretch.steps * (averaging * slowest + self._exposed(stretch.step, step * slowest))
        exposed += self._seconds(stretch.entry) + self._seconds(stretch.exit)
        exposed += sum(merging.times * self._stalled(merging, step * slowest) for merging in stretch.merges)
        payload = sum(traffic.nbytes * times for traffic, times in stretch.all())
        wire = sum(self._cost(traffic).wire * times for traffic, times in stretch.all())
        waiting, decomposing = compute * (slowest - 1), stretch.decompositions * alone.decompositions
        if stretch.decompositions:
            decomposing += alone.factors.reshaping
        return PhaseForecast(stretch.phase, stretch.steps, payload, wire, compute, waiting, exposed, decomposing)

    def _slowest(self, stretch: Stretch) -> float:
        """How many times longer than nominal the steps take until the last worker is done with them."""
        if not stretch.steps or stretch.scope is None:
            return 1.0
        if stretch.scope == "world":
            return self._speeds.stretch(1, self._cluster.workers)
        return self._speeds.stretch(-(-stretch.steps // max(stretch.meetings, 1)), self._group_size)

    def _stalled(self, merging: Merging, step_seconds: float) -> float:
        """Seconds that one merge adds: a stage is waited for as soon as the next one is due."""
        count, hidden = len(merging.stages), merging.hidden
        # How many stages are done after each step; the next one is under way then.
        done = [stages_due(count, hidden, passed) for passed in range(1, hidden + 1)]
        stalled = 0.0
        for place, calls in enumerate(merging.stages):
            steps = sum(before == place for before in (0, *done[:-1])) if hidden else 0
            stalled += max(self._seconds(calls) - steps * step_seconds, 0.0)
        return stalled

    def _seconds(self, calls: Calls) -> float:
        return sum(self._cost(traffic).seconds for traffic in calls)

    def _exposed(self, calls: Sequence[Traffic], step_seconds: float) -> float:
        """Seconds that the calls of a step add to it."""
        # DDP has all of its buffers' broadcasts under way at once.
        buffers = [traffic for traffic in calls if traffic.call != "gradients"]
        before = math.fsum(map(self._sending, buffers)) + max(map(self._latency, buffers), default=0.0)
        forward, backward = (1 - BACKWARD) * step_seconds, BACKWARD * step_seconds
        # A bucket's messages are on their way while the bytes of the one before fill the link.
        away, arrived = 0.0, 0.0
        for traffic in calls:
            if traffic.call == "gradients":
                away = max(away, forward + backward * traffic.ready) + self._latency(traffic)
                arrived = max(arrived, away) + self._sending(traffic)
        return before + max(arrived - step_seconds, 0.0)

    def _sending(self, traffic: Traffic) -> float:
        """Seconds in which the bytes of a call fill the links."""
        return self._cost(traffic, swift=True).seconds

    def _latency(self, traffic: Traffic) -> float:
        """Seconds in which a call waits for messages that are on their way."""
        return self._cost(traffic).seconds - self._sending(traffic)

    def _cost_of(self, traffic: Traffic, swift: bool = False) -> Cost:
        """Returns the cost of one call; `swift`: on a cluster without latency."""
        cluster = self._cluster if traffic.scope == "world" else self._cluster.part(self._group_size)
        cluster = cluster.swift if swift else cluster
        once = cost_of(traffic.call, cluster, traffic.nbytes / traffic.rounds, self._algorithm)
        return Cost(traffic.rounds * once.seconds, traffic.rounds * once.wire)


def _sum(name: str, parts: Sequence[PhaseForecast]) -> PhaseForecast:
    def total(attribute: str) -> float:
        return math.fsum(getattr(part, attribute) for part in parts)

    steps = sum(part.steps for part in parts)
    summed = ("payload", "wire", "compute", "waiting", "communication", "decomposing")
    return PhaseForecast(name, steps, *map(total, summed))
