"""Forecasts the seconds of a run and the bytes on its links, phase by phase.

The forecast makes these assumptions. The computation of a step takes the same time in every phase, except for the cost
of factors and of averaging gradients. All workers wait for broadcasts and merges, unless a merge runs in the background
of training steps. Such a hidden merge has the links to itself, but its computation is added to the steps. DDP sends
gradients during the backward pass, which is two thirds of a step. It sends a bucket when the bucket is ready and the
previous one is complete. The optimizer waits for the last bucket (Li et al., PyTorch Distributed, VLDB 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from abtrain.comm.communicator import Calls, Traffic, sent_by_call
from abtrain.comm.stages import stages_due
from abtrain.comm.topology import Topology
from abtrain.commands.plan.collectives import Cluster, Cost, cost_of, scoped
from abtrain.commands.plan.stragglers import Speeds
from abtrain.commands.plan.stretches import Merging, Stretch
from abtrain.commands.plan.totals import over_links, payload
from abtrain.recipes.sync import GradientWire, WeightSync

BACKWARD = 2 / 3
"""The backward pass as a share of a step's time: it computes about twice as much as the forward pass."""


@dataclass(frozen=True)
class FactorSeconds:
    """The seconds that factors add to training.

    Args:
        step: the seconds that factors add to each step.
        reshaping: the seconds that each factored phase takes to replace weights by factors and back. They do not
            include decompositions.
    """

    step: float = 0.0
    reshaping: float = 0.0

    def times(self, slower: float) -> FactorSeconds:
        """Returns these seconds for a worker that takes `slower` times as long."""
        return FactorSeconds(slower * self.step, slower * self.reshaping)


@dataclass(frozen=True)
class WorkerSeconds:
    """The seconds that one worker takes for its own work, without communication.

    Args:
        step: the seconds of a training step.
        averaging: the seconds that averaging gradients adds to a step for each wire format, without the transfer.
            PowerSGD has one value for all ranks.
        decompositions: the seconds that one worker takes to decompose all factored weights.
        factors: the seconds that factors add to training, without decompositions.
        merge: a function that takes the settings of a merge, the number of groups, and the number of parameters that
            the worker merges. It returns the seconds that the worker computes in the merge.
        muon: the part of `step` that Muon takes.
    """

    step: float
    averaging: Mapping[GradientWire, float] = field(default_factory=dict)
    decompositions: float = 0.0
    factors: FactorSeconds = FactorSeconds()
    merge: Callable[[WeightSync, int, int], float] = field(default=lambda sync, groups, numbers: 0.0, compare=False)
    muon: float = 0.0

    def shared_by(self, workers: int) -> WorkerSeconds:
        """Returns these seconds if so many workers divide what Muon does (see `abtrain.engine.shared_steps`)."""
        saved = self.muon * (1 - 1 / workers)
        return replace(self, step=self.step - saved, muon=self.muon - saved)

    def times(self, slower: float) -> WorkerSeconds:
        """Returns these seconds for a worker that takes `slower` times as long, for example on a shared core."""
        return replace(
            self,
            step=slower * self.step,
            muon=slower * self.muon,
            averaging={wire: slower * seconds for wire, seconds in self.averaging.items()},
            decompositions=slower * self.decompositions,
            factors=self.factors.times(slower),
            merge=lambda sync, groups, numbers: slower * self.merge(sync, groups, numbers),
        )


@dataclass(frozen=True)
class PhaseForecast:
    """The forecast of all steps of one phase.

    Attributes:
        phase: the name of the phase.
        steps: the number of steps.
        payload: the bytes that a group hands to collectives with other groups; of a single group, those of a worker.
        wire: the bytes that a node sends over its link, headers included.
        compute: the seconds of computation at nominal speed.
        waiting: the seconds that workers wait for the slowest one.
        communication: the seconds of communication that do not overlap with computation, and the seconds that workers
            take to copy and compress gradients for it, and to compute merges.
        decomposing: the seconds that workers take to decompose weights, and to replace weights by factors and back.
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
    """The forecast of a run: the sum of the forecasts of its phases."""

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
        """The seconds of computation divided by the seconds of the run."""
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
    """Returns the forecast of a run on a cluster: its bytes and seconds, phase by phase.

    Args:
        stretches: the collectives of one worker in all steps, as `abtrain.commands.plan.payload.predict` returns them.
        cluster: a cluster with the same number of workers.
        alone: the seconds that each worker takes for its own work, without communication.
        group_size: the number of workers in a group.
        speeds: the speeds of the workers; by default all workers are equally fast.
        algorithm: the algorithm of all-reduces (see `abtrain.commands.plan.collectives`).
    """
    forecaster = _Forecaster(cluster, alone, group_size, speeds or Speeds(cluster.workers), algorithm)
    by_phase: dict[str, list[PhaseForecast]] = {}
    for stretch in stretches:
        by_phase.setdefault(stretch.phase, []).append(forecaster.stretch(stretch))
    return Forecast(tuple(_sum(name, parts) for name, parts in by_phase.items()))


class _Forecaster:
    """Forecasts the seconds and bytes of steps on a cluster."""

    def __init__(self, cluster: Cluster, alone: WorkerSeconds, group_size: int, speeds: Speeds, algorithm: str) -> None:
        self._cluster, self._alone, self._speeds = cluster, alone, speeds
        self._group_size, self._algorithm = group_size, algorithm
        self._topology = Topology(cluster.workers, group_size)
        # Repeated phases call the same collectives.
        self._cost = cache(self._cost_of)

    def stretch(self, stretch: Stretch) -> PhaseForecast:
        alone = self._alone
        step = alone.step + (alone.factors.step if stretch.factored else 0.0)
        compute, slowest = stretch.steps * step, self._slowest(stretch)
        averaging = alone.averaging.get(stretch.averages, 0.0) if stretch.averages else 0.0
        exposed = stretch.steps * (averaging * slowest + self._exposed(stretch.step, step * slowest))
        exposed += self._seconds(stretch.entry) + self._seconds(stretch.exit)
        for merging in stretch.merges:
            computing = alone.merge(merging.sync, self._topology.n_groups, merging.numbers)
            exposed += merging.times * (self._stalled(merging, step * slowest) + computing * slowest)
        sent = sum(over_links(payload([stretch], self._topology), self._topology).values())
        wire = sum(self._cost(traffic).wire * times for traffic, times in stretch.all())
        waiting, decomposing = compute * (slowest - 1), stretch.decompositions * alone.decompositions
        if stretch.decompositions:
            decomposing += alone.factors.reshaping
        return PhaseForecast(stretch.phase, stretch.steps, sent, wire, compute, waiting, exposed, decomposing)

    def _slowest(self, stretch: Stretch) -> float:
        """Returns the time until the last worker has completed the steps, divided by their nominal time."""
        if not stretch.steps or stretch.scope is None:
            return 1.0
        if stretch.scope == "world":
            return self._speeds.slowdown(1, self._cluster.workers)
        return self._speeds.slowdown(-(-stretch.steps // max(stretch.merge_count, 1)), self._group_size)

    def _stalled(self, merging: Merging, step_seconds: float) -> float:
        """Returns the seconds that workers wait for one merge. They wait for a stage when the next stage is due."""
        count, hidden = len(merging.stages), merging.hidden
        # The number of complete stages after each step. The next stage is under way then.
        done = [stages_due(count, hidden, passed) for passed in range(1, hidden + 1)]
        stalled = 0.0
        for place, calls in enumerate(merging.stages):
            steps = sum(before == place for before in (0, *done[:-1])) if hidden else 0
            stalled += max(self._seconds(calls) - steps * step_seconds, 0.0)
        return stalled

    def _seconds(self, calls: Calls) -> float:
        return sum(self._cost(traffic).seconds for traffic in calls)

    def _exposed(self, calls: Sequence[Traffic], step_seconds: float) -> float:
        """Returns the seconds that the collectives of a step add to the step."""
        # DDP broadcasts all buffers at the same time.
        buffers = [traffic for traffic in calls if traffic.call != "gradients"]
        before = math.fsum(map(self._sending, buffers)) + max(map(self._latency, buffers), default=0.0)
        forward, backward = (1 - BACKWARD) * step_seconds, BACKWARD * step_seconds
        # The latency of a bucket overlaps with the transfer of the previous one.
        away, arrived = 0.0, 0.0
        for traffic in calls:
            if traffic.call == "gradients":
                away = max(away, forward + backward * traffic.ready) + self._latency(traffic)
                arrived = max(arrived, away) + self._sending(traffic)
        return before + max(arrived - step_seconds, 0.0)

    def _sending(self, traffic: Traffic) -> float:
        """Returns the seconds of a collective without its latency."""
        return self._cost(traffic, swift=True).seconds

    def _latency(self, traffic: Traffic) -> float:
        """Returns the seconds of a collective that are due to latency."""
        return self._cost(traffic).seconds - self._sending(traffic)

    def _cost_of(self, traffic: Traffic, swift: bool = False) -> Cost:
        """Returns the cost of one call of a collective. `swift` assumes links without latency."""
        parts = sent_by_call(traffic, Topology(self._cluster.workers, self._group_size))
        costs = [self._cost_of_part(part, swift) for part in parts]
        return Cost(sum(cost.seconds for cost in costs), sum(cost.wire for cost in costs))

    def _cost_of_part(self, traffic: Traffic, swift: bool) -> Cost:
        cluster, at_once = scoped(self._cluster, traffic.scope, self._group_size)
        cluster = cluster.swift if swift else cluster
        once = cost_of(traffic.call, cluster, at_once * traffic.nbytes / traffic.rounds, self._algorithm)
        return Cost(traffic.rounds * once.seconds, traffic.rounds * once.wire)


def _sum(name: str, parts: Sequence[PhaseForecast]) -> PhaseForecast:
    def total(attribute: str) -> float:
        return math.fsum(getattr(part, attribute) for part in parts)

    steps = sum(part.steps for part in parts)
    summed = ("payload", "wire", "compute", "waiting", "communication", "decomposing")
    return PhaseForecast(name, steps, *map(total, summed))
