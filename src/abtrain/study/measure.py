"""How long a step of a task takes on this machine, and the decompositions of its weights."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from pathlib import Path

import torch

from abtrain.lowrank.rank import FixedRank
from abtrain.lowrank.svd import decompose
from abtrain.study.shapes import ModelShapes
from abtrain.train.tasks import Task, batches, build_model, build_optimizer

_UNTIMED = 3
_TIMED = 10


def measure_step(task: Task, data: Path | None = None, batch_size: int | None = None) -> float:
    """Median seconds of a training step of one worker alone, on the CPU, as this process may use it.

    Args:
        task: whose model is trained for a few steps.
        data: folder with the task's data.
        batch_size: samples a step; default the task's.

    Raises:
        DataError: the task's data is not to be had.
    """
    size = task.batch_size if batch_size is None else batch_size
    stream = batches(task, task.load(data), seed=0, rank=0, world_size=1, batch_size=size)
    model = build_model(task, seed=0)
    optimizer = build_optimizer(model, task.lr)
    seconds = []
    for _ in range(_UNTIMED + _TIMED):
        started = time.perf_counter()
        x, y = next(stream)
        task.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[_UNTIMED:])


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
    started = time.perf_counter()
    decompose(W, FixedRank(1))
    return time.perf_counter() - started
