"""Measures the seconds of one worker on this machine: training steps, gradient averaging, factors, decompositions."""

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
from abtrain.commands.plan.forecast import FactorSeconds
from abtrain.commands.plan.shapes import ModelShapes
from abtrain.commands.tasks.choices import OptimizerName
from abtrain.commands.tasks.task import Task, batches, build_model, build_optimizers
from abtrain.commands.train.trainer import clip_gradients, loss_of
from abtrain.errors import UsageError
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizers import Optimizers
from abtrain.lowrank.svd import Factors, decompose
from abtrain.optim import Muon
from abtrain.recipes.rank_rules import FixedRank
from abtrain.recipes.sync import GradientSync, GradientWire

_UNTIMED = 3
_TIMED = 10
_TURNS = 10
"""The largest number of turns. Each turn times all kinds of steps, so that other load slows all kinds equally."""
_TURN = 4
"""The number of timed steps of each kind in a turn."""
_TURNS_SECONDS = 10.0
"""No further turn starts after this many seconds."""


class Bench:
    """Times the training of a task on the CPU in this process. A worker with the same number of cores takes as long.

    Args:
        task: the task that provides the model and the data.
        folder: the folder with the task's data; None for its default place.
        batch_size: the number of samples per step; by default the task's.
        optimizer: the name of the optimizer.

    Raises:
        DataError: the task's data is not available.
    """

    def __init__(
        self,
        task: Task,
        folder: Path | None = None,
        batch_size: int | None = None,
        optimizer: OptimizerName = "adamw",
    ) -> None:
        self._task, self._data, self._optimizer = task, task.load(folder), optimizer
        self._batch_size = task.batch_size if batch_size is None else batch_size
        self._factors: dict[tuple[tuple[str, int], ...], FactorSeconds] = {}

    def step(self) -> tuple[float, float]:
        """Returns the median seconds of a training step, and those that Muon takes of it (0 if there is no Muon)."""
        model = self._timed_model()
        seconds = statistics.median(model.seconds(_UNTIMED, _TIMED))
        return seconds, statistics.median(model.of_muon[_UNTIMED:])

    def averaging(self) -> dict[GradientWire, float]:
        """Returns the seconds that averaging gradients adds to a step for each wire format, without the transfer.

        DDP copies gradients into buckets and back, compresses them, and passes them to its threads. With a single
        worker, DDP does the same work but sends nothing. PowerSGD is measured at its default rank.
        """
        with world_of_one() as wrap:
            plain = self._timed_model()
            averaging = {wire: self._timed_model(partial(wrap, GradientSync(wire))) for wire in get_args(GradientWire)}
            for model in (plain, *averaging.values()):
                model.seconds(_UNTIMED, 0)
            plain_steps, steps = list[float](), {wire: list[float]() for wire in averaging}
            for _ in _turns():
                plain_steps += plain.seconds(1, _TURN)
                for wire, model in averaging.items():
                    steps[wire] += model.seconds(1, _TURN)
            for model in averaging.values():
                model.close()
        of_plain = statistics.median(plain_steps)
        return {wire: max(statistics.median(seconds) - of_plain, 0.0) for wire, seconds in steps.items()}

    def factors(self, ranks: Mapping[str, int]) -> FactorSeconds:
        """Measures the seconds that factors add to each step, and the seconds to replace weights by factors and back.

        The result does not include decompositions, preconditioners or the projection of optimizer state. The ranks of
        the real run are unknown, so a measured speed-up is not reliable. It is reported as a cost of 0.

        Args:
            ranks: the rank of each factored weight, by name.
        """
        key = tuple(ranks.items())
        if key not in self._factors:
            self._factors[key] = self._time_factors(ranks)
        return self._factors[key]

    def _time_factors(self, ranks: Mapping[str, int]) -> FactorSeconds:
        plain, factored = self._timed_model(), self._timed_model()
        weights = FactoredModel(factored.model, Optimizers(factored.optimizers), list(ranks))
        factors = made_up_factors(weights.matrices(), ranks)
        plain_steps, steps, changes = list[float](), list[float](), list[float]()
        plain.seconds(_UNTIMED, 0)
        for _ in _turns():
            plain_steps += plain.seconds(1, _TURN)
            # The first step in another shape is slow, because it allocates optimizer state and memory.
            change = _timed(partial(weights.factorize, factors)) + factored.single()
            steps += factored.seconds(1, _TURN)
            changes.append(change + _timed(weights.restore) + factored.single())
        of_plain, of_factors = statistics.median(plain_steps), statistics.median(steps)
        reshaping = statistics.median(changes) - of_factors - of_plain
        return FactorSeconds(max(of_factors - of_plain, 0.0), max(reshaping, 0.0))

    def _timed_model(self, wrap: Callable[[nn.Module], DataParallel] = Unsynchronized) -> _TimedModel:
        stream = batches(self._task, self._data, seed=0, rank=0, world_size=1, batch_size=self._batch_size)
        return _TimedModel(self._task, stream, wrap, self._optimizer)


def made_up_factors(matrices: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Factors]:
    """Returns factors of the right shapes without decompositions, whose time and memory are predicted separately."""
    return {
        name: Factors(W[:, : ranks[name]].clone(), torch.eye(ranks[name], W.shape[1], dtype=W.dtype))
        for name, W in matrices.items()
    }


@contextmanager
def world_of_one() -> Iterator[Callable[[GradientSync, nn.Module], DataParallel]]:
    """Creates a process group of one worker, and yields a function (sync, model) that wraps a model in DDP.

    The function's first argument determines in which wire format DDP averages gradients.

    Raises:
        UsageError: this process already has a process group.
    """
    if dist.is_initialized():
        raise UsageError("this process has already joined other workers: use a separate process for this measurement")
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
    """Returns the seconds that one worker takes to decompose all factorable weights. Each shape is timed once."""
    counts = Counter((matrix.m, matrix.n) for matrix in model.matrices().values())
    return sum(count * _seconds_of_one(m, n) for (m, n), count in counts.items())


def _seconds_of_one(m: int, n: int) -> float:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    # The first decomposition of a process includes one-time setup.
    decompose(W[:2, :2].contiguous(), FixedRank(1))
    # Factors of a larger rank would hardly be smaller than the weight.
    rank = FixedRank(max(n // 2, 1))
    return _timed(lambda: decompose(W, rank))


def _turns() -> Iterator[int]:
    """Yields the number of each turn, from 0 on. Ends after `_TURNS` turns, or once `_TURNS_SECONDS` have passed."""
    end = time.perf_counter() + _TURNS_SECONDS
    for turn in range(_TURNS):
        if turn and time.perf_counter() > end:
            return
        yield turn


def _timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


class _TimedModel:
    """Trains the model of a task and times the steps.

    Attributes:
        of_muon: the seconds that Muon took in each step so far.
    """

    def __init__(
        self,
        task: Task,
        stream: Iterator[tuple[Tensor, Tensor]],
        wrap: Callable[[nn.Module], DataParallel],
        optimizer: OptimizerName,
    ) -> None:
        self._task, self._stream = task, stream
        self.model = build_model(task, seed=0)
        self.optimizers = build_optimizers(self.model, optimizer, task.lr, task.weight_decay)
        self._parallel = wrap(self.model)
        self.of_muon: list[float] = []

    def seconds(self, untimed: int, timed: int) -> list[float]:
        """Runs `untimed` steps of warm-up and then `timed` steps, and returns the seconds of each timed step."""
        return [_timed(self._step) for _ in range(untimed + timed)][untimed:]

    def single(self) -> float:
        """Runs one training step, and returns the seconds that it took."""
        return _timed(self._step)

    def close(self) -> None:
        self._parallel.close()

    def _step(self) -> None:
        x, y = next(self._stream)
        loss_of(self._parallel, self._task, x, y, self._task.precision).backward()
        clip_gradients(self.optimizers, self._task.clip)
        muons = [optimizer for optimizer in self.optimizers if isinstance(optimizer, Muon)]
        self.of_muon.append(sum(_timed(optimizer.step) for optimizer in muons))
        for optimizer in self.optimizers:
            if optimizer not in muons:
                optimizer.step()
            optimizer.zero_grad()
