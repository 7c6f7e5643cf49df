"""Many workers in one process: what a method does to a model, where bytes and seconds of real links play no part.

Every worker is a thread with a model, an optimizer and batches of its own, under the engine and over the in-process
communicator: the numbers are those that as many processes would get, and the meter counts what they would send.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from typing import Any

from torch import nn

from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.commands.tasks.samples import Data
from abtrain.commands.tasks.task import TASKS, batches, build_model, evaluate
from abtrain.commands.train.config import TrainConfig, group_size_of
from abtrain.commands.train.result import result_of
from abtrain.commands.train.setup import set_up
from abtrain.commands.train.step import clip_gradients, loss_of
from abtrain.errors import NonFiniteError

# Seconds that a thread waits for the last one: all of them share a few cores.
_PATIENCE = 3600.0


def simulate(config: TrainConfig, data: Data) -> dict[str, Any]:
    """Trains with `config.workers` threads, and evaluates the average of the groups.

    Args:
        config: valid and resolved, for the CPU.
        data: of its task.

    Returns:
        The content of result.json. Its seconds are those of threads that share the cores; `cpu_seconds_per_step` is
        what one worker computes in a step, on one core, whatever else the machine does.

    Raises:
        ConfigurationError: settings that do not fit the data or the model.
        NonFiniteError: the loss of a worker is NaN or infinite.
    """
    # Threads share torch's generator, so the model is drawn once for all.
    task = TASKS[config.task]
    model = build_model(task, config.seed, config.init or task.init)
    results = run_in_process(
        config.workers,
        lambda communicator: _worker(config, data, model, communicator),
        group_size_of(config),
        timeout=_PATIENCE,
    )
    return results[0]


def _worker(config: TrainConfig, data: Data, first: nn.Module, communicator: Communicator) -> dict[str, Any]:
    """One worker; what it returns counts on rank 0."""
    assert config.steps is not None and config.batch_size is not None and config.lr is not None
    task, rank = TASKS[config.task], communicator.rank
    model = copy.deepcopy(first)
    parameters = sum(p.numel() for p in model.parameters())
    ab, schedule = set_up(config, model, communicator)
    stream = batches(task, data, seed=config.seed, rank=rank, world_size=config.workers, batch_size=config.batch_size)
    started, cpu = time.perf_counter(), time.thread_time()
    for x, y in itertools.islice(stream, config.steps):
        loss = loss_of(ab, task, x, y, config.precision)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of worker {rank} is {value} at step {ab.steps_done}: lower the learning rate ({config.lr})"
            )
        loss.backward()
        clip_gradients(ab.optimizer, config.clip)
        ab.optimizer.step()
        schedule.step()
        ab.optimizer.zero_grad()
        ab.step(value)
    cpu, seconds = time.thread_time() - cpu, time.perf_counter() - started
    result: dict[str, Any] = {}
    with ab.merged():
        if rank == 0:
            result = result_of(config, ab, parameters, seconds, evaluate(model, task, data))
            result |= {"cpu_seconds_per_step": cpu / config.steps, "divergence": ab.divergence}
        communicator.barrier()
    return result
