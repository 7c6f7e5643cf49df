"""Measures the memory of training steps of a task, in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from abtrain.commands.memory import peak_memory, present_memory, reset_peak
from abtrain.commands.plan.bench import made_up_factors, world_of_one
from abtrain.commands.plan.memory import OptimizerName
from abtrain.commands.tasks.task import TASKS, batches, build_model, build_optimizers
from abtrain.commands.train.trainer import clip_gradients, loss_of
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizers import Optimizers

_STEPS = 3
_MOMENTUM = 0.9


def measure_task(
    name: str, folder: Path | None, batch_size: int | None, optimizer: OptimizerName, ranks: Mapping[str, int]
) -> tuple[int, int]:
    """Measures training steps of the task `name` in a new process. Returns what `measure_steps` returns.

    Raises:
        DataError: the task's data is not available.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure_task, name, folder, batch_size, optimizer, dict(ranks)).result()


def measure_process() -> int:
    """Returns the bytes of a new process with its libraries, before it builds a model."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure_process).result()


def measure_steps(
    build: Callable[[], tuple[nn.Module, Sequence[Optimizer], Callable[[], None]]], ranks: Mapping[str, int]
) -> tuple[int, int]:
    """Measures training steps in this process, which should be new.

    Args:
        build: a function that returns a model, its optimizers, and a function that makes a training step.
        ranks: the rank of each weight to factor, by name; empty for full weights.

    Returns:
        The bytes of the process before the model is built, and what a training step needs at its peak besides
        parameters, gradients and optimizer state.
    """
    with world_of_one():
        process = _libraries()
        model, optimizers, step = build()
        if ranks:
            factored = FactoredModel(model, Optimizers(optimizers), list(ranks))
            factored.factorize(made_up_factors(factored.matrices(), ranks))
            reset_peak()
        for _ in range(_STEPS):
            step()
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        rest = sum(p.nbytes for p in model.parameters() if not p.requires_grad) + sum(b.nbytes for b in model.buffers())
        known = 2 * trained + rest + sum(map(_bytes_of_state, optimizers))
        return process, max(peak_memory() - process - known, 0)


def _bytes_of_state(optimizer: Optimizer) -> int:
    held = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in held if isinstance(value, Tensor) and value.ndim)


def _measure_process() -> int:
    with world_of_one():
        return _libraries()


def _libraries() -> int:
    """Trains a tiny model, since libraries load most of their code in the first step. Returns the bytes afterwards."""
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64))
    optimizer = AdamW(model.parameters())
    functional.cross_entropy(model(torch.ones(8, 64)), torch.zeros(8, dtype=torch.int64)).backward()
    optimizer.step()
    return present_memory()


def _measure_task(
    name: str, folder: Path | None, batch_size: int | None, optimizer: OptimizerName, ranks: Mapping[str, int]
) -> tuple[int, int]:
    task = TASKS[name]
    data = task.load(folder)
    stream = batches(task, data, seed=0, rank=0, world_size=1, batch_size=batch_size or task.batch_size)

    def build() -> tuple[nn.Module, list[Optimizer], Callable[[], None]]:
        model = build_model(task, seed=0)
        if optimizer in ("adamw", "muon"):
            optimizers = build_optimizers(model, optimizer, task.lr, task.weight_decay)
        else:
            momentum = _MOMENTUM if optimizer == "momentum" else 0.0
            optimizers = [SGD(model.parameters(), lr=task.lr, momentum=momentum)]

        def step() -> None:
            x, y = next(stream)
            loss_of(model, task, x, y, task.precision).backward()
            clip_gradients(optimizers, task.clip)
            for one in optimizers:
                one.step()
                one.zero_grad()

        return model, optimizers, step

    torch.manual_seed(0)
    return measure_steps(build, ranks)
