"""How long a step of a task takes on this machine."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

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
