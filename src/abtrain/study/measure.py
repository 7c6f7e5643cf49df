"""What one worker takes for a task on this machine: its steps, what averaging and factors add, and decompositions."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from abtrain.comm.alone import world_of_one
from abtrain.comm.communicator import DataParallel, Unsynchronized
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.rank import FixedRank
from abtrain.lowrank.svd import decompose
from abtrain.study.seconds import FactorSeconds
from abtrain.study.shapes import ModelShapes
from abtrain.sync import GradientSync, GradientWire
from abtrain.train.tasks import Task, batches, build_model, build_optimizer

_UNTIMED = 3
_TIMED = 10
_TURNS = 10
"""In which steps of several kinds are timed side by side, at most: what else a machine does slows all of them."""
_TURN = 4
"""Steps of each kind in a turn."""
_TURNS_SECONDS = 10.0
"""After which there is no further turn: of long steps one is enough."""


def measure_step(task: Task, data: Path | None = None, batch_size: int | None = None) -> float:
    """Median seconds of a training step of one worker alone, on the CPU, as this process may use it.

    Args:
        task: whose model is trained for a few steps.
        data: folder with the task's data.
        batch_size: samples a step; default the task's.

    Raises:
        DataError: the task's data is not to be had.
    """
    trainer = _Trainer(task, data, batch_size, Unsynchronized)
    return statistics.median(trainer.seconds(_UNTIMED, _TIMED))


def measure_averaging(task: Task, data: Path | None = None, batch_size: int | None = None) -> dict[GradientWire, float]:
    """Seconds that averaging gradients adds to a step of one worker, beside sending them, by their wire.

    DDP copies gradients into its buckets and back, rounds or factors them, and hands them to threads of its own: in a
    world of one worker it does all of this, and sends nothing.

    Raises:
        DataError: the task's data is not to be had.
    """
    with world_of_one() as wrap:
        alone = _Trainer(task, data, batch_size, Unsynchronized)
        trainers = {
            wire: _Trainer(task, data, batch_size, partial(wrap, GradientSync(wire))) for wire in get_args(GradientWire)
        }
        for trainer in (alone, *trainers.values()):
            trainer.seconds(_UNTIMED, 0)
        bare, averaged = list[float](), {wire: list[float]() for wire in trainers}
        for _ in _turns():
            bare += alone.seconds(1, _TURN)
            for wire, trainer in trainers.items():
                averaged[wire] += trainer.seconds(1, _TURN)
        for trainer in trainers.values():
            trainer.close()
    return {wire: max(statistics.median(seconds) - statistics.median(bare), 0.0) for wire, seconds in averaged.items()}


def measure_factors(
    task: Task, ranks: Mapping[str, int], data: Path | None = None, batch_size: int | None = None
) -> FactorSeconds:
    """What factors add to the training of one worker: to a step, and whenever they take the weights' place.

    Args:
        task: whose model is trained for a few steps.
        ranks: of the weights that are factored, by name.
        data: folder with the task's data.
        batch_size: samples a step; default the task's.

    Raises:
        DataError: the task's data is not to be had.
    """
    bare, factored = (_Trainer(task, data, batch_size, Unsynchronized) for _ in range(2))
    weights = FactoredModel(factored.model, factored.optimizer, list(ranks))
    factors = {name: decompose(W, FixedRank(ranks[name])) for name, W in weights.matrices().items()}
    plain, of_factors, first = list[float](), list[float](), list[float]()
    bare.seconds(_UNTIMED, 0)
    for _ in _turns():
        plain += bare.seconds(1, _TURN)
        # The first steps in another shape are slow: the optimizer's state is made anew, and memory is.
        into = _timed(partial(weights.factorize, factors)) + factored.first()
        of_factors += factored.seconds(1, _TURN)
        first.append(into + _timed(weights.restore) + factored.first())
    of_plain, of_factored = statistics.median(plain), statistics.median(of_factors)
    # Ranks are a guess: factors that turn out to be those of a few large weights alone save no time.
    more, reshaping = of_factored - of_plain, statistics.median(first) - of_factored - of_plain
    return FactorSeconds(max(more, 0.0), max(reshaping, 0.0))


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
        self, task: Task, data: Path | None, batch_size: int | None, wrap: Callable[[nn.Module], DataParallel]
    ) -> None:
        size = task.batch_size if batch_size is None else batch_size
        self._task = task
        self._stream = batches(task, task.load(data), seed=0, rank=0, world_size=1, batch_size=size)
        self.model = build_model(task, seed=0)
        self.optimizer = build_optimizer(self.model, task.lr)
        self._parallel = wrap(self.model)

    def seconds(self, untimed: int, timed: int) -> list[float]:
        """Of each of `timed` steps, after some that only warm up."""
        return [_timed(self._step) for _ in range(untimed + timed)][untimed:]

    def first(self) -> float:
        """Of a single step."""
        return self.seconds(untimed=0, timed=1)[0]

    def close(self) -> None:
        self._parallel.close()

    def _step(self) -> None:
        x, y = next(self._stream)
        self._task.loss(self._parallel(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
