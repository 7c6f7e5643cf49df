"""Measures one worker on this machine: its steps, the cost that averaging and factors add, and decompositions."""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abtrain.comm.data_parallel import DataParallel, Unsynchronized
from abtrain.comm.ddp import TorchDataParallel
from abtrain.comm.hooks import make_hook
from abtrain.comm.link import Link
from abtrain.comm.meter import Meter
from abtrain.commands.plan.shapes import ModelShapes
from abtrain.commands.plan.worker_seconds import FactorSeconds
from abtrain.commands.tasks.task import Task, batches, build_model, build_optimizer
from abtrain.errors import UsageError
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizers import Optimizers
from abtrain.lowrank.svd import Factors, decompose
from abtrain.recipes.rank_rules import FixedRank
from abtrain.recipes.sync import GradientSync, GradientWire

_UNTIMED = 3
_TIMED = 10
_TURNS = 10
"""In which steps of two kinds and more are timed side by side, at most: what else a machine does slows all of them."""
_TURN = 4
"""Steps of each kind in a turn."""
_TURNS_SECONDS = 10.0
"""After which there is no further turn: of long steps one is enough."""


class Bench:
    """Times a task in this process, on the CPU: what one worker takes that has as many cores as this process.

    Args:
        task: whose models are trained for a few steps.
        folder: with the task's data.
        batch_size: samples a step; default the task's.

    Raises:
        DataError: the task's data is not to be had.
    """

    def __init__(self, task: Task, folder: Path | None = None, batch_size: int | None = None) -> None:
        self._task, self._data = task, task.load(folder)
        self._batch_size = task.batch_size if batch_size is None else batch_size
        self._factors: dict[tuple[tuple[str, int], ...], FactorSeconds] = {}

    def step(self) -> float:
        """Median seconds of a training step."""
        return statistics.median(self._trainer().seconds(_UNTIMED, _TIMED))

    def averaging(self) -> dict[GradientWire, float]:
        """Seconds that averaging gradients adds to a step beside sending them, by their wire (PowerSGD's default rank).

        DDP copies gradients into its buckets and back, rounds or factors them, and hands them to threads of its own: in
        a world of one worker it does all of this, and sends nothing.
        """
        with world_of_one() as wrap:
            plain = self._trainer()
            averaging = {wire: self._trainer(partial(wrap, GradientSync(wire))) for wire in get_args(GradientWire)}
            for trainer in (plain, *averaging.values()):
                trainer.seconds(_UNTIMED, 0)
            plain_steps, steps = list[float](), {wire: list[float]() for wire in averaging}
            for _ in _turns():
                plain_steps += plain.seconds(1, _TURN)
                for wire, trainer in averaging.items():
                    steps[wire] += trainer.seconds(1, _TURN)
            for trainer in averaging.values():
                trainer.close()
        of_plain = statistics.median(plain_steps)
        return {wire: max(statistics.median(seconds) - of_plain, 0.0) for wire, seconds in steps.items()}

    def factors(self, ranks: Mapping[str, int]) -> FactorSeconds:
        """Measures the seconds that factors add to a step, and those of each factoring.

        A preconditioner, and the optimizer's state where a recipe projects it, are not in it. Ranks are a guess, and
        those of a few large weights may be all that there are in the end: factors that save time here count as adding
        none.

        Args:
            ranks: of the weights that are factored, by name.
        """
        key = tuple(ranks.items())
        if key not in self._factors:
            self._factors[key] = self._time_factors(ranks)
        return self._factors[key]

    def _time_factors(self, ranks: Mapping[str, int]) -> FactorSeconds:
        plain, factored = self._trainer(), self._trainer()
        weights = FactoredModel(factored.model, Optimizers(factored.optimizer), list(ranks))
        # Of the right shapes and about the right size; no decomposition, which is timed elsewhere.
        factors = {
            name: Factors(W[:, : ranks[name]].clone(), torch.eye(ranks[name], W.shape[1], dtype=W.dtype))
            for name, W in weights.matrices().items()
        }
        plain_steps, steps, changes = list[float](), list[float](), list[float]()
        plain.seconds(_UNTIMED, 0)
        for _ in _turns():
            plain_steps += plain.seconds(1, _TURN)
            # The first step in another shape is slow: the optimizer's state is made anew, and so is memory.
            change = _timed(partial(weights.factorize, factors)) + factored.single()
            steps += factored.seconds(1, _TURN)
            changes.append(change + _timed(weights.restore) + factored.single())
        of_plain, of_factors = statistics.median(plain_steps), statistics.median(steps)
        reshaping = statistics.median(changes) - of_factors - of_plain
        return FactorSeconds(max(of_factors - of_plain, 0.0), max(reshaping, 0.0))

    def _trainer(self, wrap: Callable[[nn.Module], DataParallel] = Unsynchronized) -> _Trainer:
        stream = batches(self._task, self._data, seed=0, rank=0, world_size=1, batch_size=self._batch_size)
        return _Trainer(self._task, stream, wrap)


@contextmanager
def world_of_one() -> Iterator[Callable[[GradientSync, nn.Module], DataParallel]]:
    """Yields a function that wraps a model in DDP as a phase with this gradient synchronization does; sends nothing.

    Raises:
        UsageError: this process has joined other workers.
    """
    if dist.is_initialized():
        raise UsageError("this process has already joined other workers: use a separate process for a world of one")
    # init_process_group prefixes messages of uncaught errors with the rank; destroy_process_group does not undo that.
    shown = sys.excepthook
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        link = Link(rank=0, ranks=(0,), group=None, spans="between_groups", meter=Meter())
        yield lambda sync, module: TorchDataParallel(module, link, False, make_hook(sync, link.group))
    finally:
        dist.destroy_process_group()
        sys.excepthook = shown


def measure_decompositions(model: ModelShapes) -> float:
    """Seconds in which one worker alone decomposes all weights that may be factored; each shape is timed once.

    Args:
        model: by the shapes of its weights; their values play no part.
    """
    counts = Counter((matrix.m, matrix.n) for matrix in model.matrices().values())
    return sum(count * _seconds_of_one(m, n) for (m, n), count in counts.items())


def _seconds_of_one(m: int, n: int) -> float:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    # The first one of a process sets things up.
    decompose(W[:2, :2].contiguous(), FixedRank(1))
    return _timed(lambda: decompose(W, FixedRank(1)))


def _turns() -> Iterator[int]:
    """At least one turn."""
    end = time.perf_counter() + _TURNS_SECONDS
    for turn in range(_TURNS):
        if turn and time.perf_counter() > end:
            return
        yield turn


def _timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


class _Trainer:
    """A model of a task, and steps of its training."""

    def __init__(
        self, task: Task, stream: Iterator[tuple[Tensor, Tensor]], wrap: Callable[[nn.Module], DataParallel]
    ) -> None:
        self._task, self._stream = task, stream
        self.model = build_model(task, seed=0)
        self.optimizer = build_optimizer(self.model, task.lr)
        self._parallel = wrap(self.model)

    def seconds(self, untimed: int, timed: int) -> list[float]:
        """Returns the seconds of each of `timed` steps, after `untimed` steps of warm-up."""
        return [_timed(self._step) for _ in range(untimed + timed)][untimed:]

    def single(self) -> float:
        """Returns the seconds of the next step."""
        return _timed(self._step)

    def close(self) -> None:
        self._parallel.close()

    def _step(self) -> None:
        x, y = next(self._stream)
        self._task.loss(self._parallel(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
