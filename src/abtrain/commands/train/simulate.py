"""Simulates many workers in one process. This shows how a method affects a model, without real links.

Each worker is a thread with its own model, optimizer, batches and engine. The workers share an in-process communicator.
They compute the same numbers as separate processes, and the meter counts the bytes that those would send.
"""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

from torch import nn

from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.commands.tasks.samples import Data
from abtrain.commands.tasks.task import TASKS, batches, build_model
from abtrain.commands.train.config import TrainConfig, group_size_of
from abtrain.commands.train.trainer import Trainer

# Threads share a few cores, so the fastest may wait long for the slowest.
_TIMEOUT_SECONDS = 3600.0


def simulate(config: TrainConfig, data: Data) -> dict[str, Any]:
    """Trains with `config.workers` threads and evaluates the average of the groups.

    Args:
        config: the settings, validated and resolved, for the CPU.
        data: the data of the task.

    Returns:
        The content of result.json. Its wall times are longer than those of real workers, because threads share the
        cores. `cpu_seconds_per_step` is the CPU time of one worker's step, which does not depend on other load.

    Raises:
        ConfigurationError: the settings do not fit the data or the model.
        NonFiniteError: the loss of a worker is NaN or infinite.
    """
    # Threads share torch's generator, so the initial weights are drawn once for all.
    task = TASKS[config.task]
    model = build_model(task, config.seed, config.init or task.init)
    results = run_in_process(
        config.workers,
        lambda communicator: _worker(config, data, model, communicator),
        group_size_of(config),
        timeout=_TIMEOUT_SECONDS,
    )
    return results[0]


def _worker(config: TrainConfig, data: Data, initial: nn.Module, communicator: Communicator) -> dict[str, Any]:
    """Trains as one worker. Returns the content of result.json on rank 0, and an empty dict on other ranks."""
    assert config.steps is not None and config.batch_size is not None
    rank = communicator.rank
    trainer = Trainer(config, copy.deepcopy(initial), communicator)
    ab = trainer.ab
    stream = batches(
        trainer.task, data, seed=config.seed, rank=rank, world_size=config.workers, batch_size=config.batch_size
    )
    started, cpu = time.perf_counter(), time.thread_time()
    for x, y in itertools.islice(stream, config.steps):
        assert ab.position is not None
        ab.step(trainer.optimizer_step(ab.position, x, y).loss)
    cpu, seconds = time.thread_time() - cpu, time.perf_counter() - started
    result: dict[str, Any] = {}
    with ab.merged():
        if rank == 0:
            result = trainer.result({"total": seconds}, data)
            result |= {"cpu_seconds_per_step": cpu / config.steps, "divergence": ab.divergence}
        communicator.barrier()
    return result
