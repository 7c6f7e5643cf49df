"""Builds engine, optimizer and schedule from the settings of a run, for processes and for simulated workers."""

from __future__ import annotations

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from abtrain.comm.communicator import Communicator
from abtrain.commands.tasks.task import TASKS, build_optimizer, build_schedule
from abtrain.commands.train.config import TrainConfig, recipe_of
from abtrain.engine.ab_training import ABTraining


def set_up(config: TrainConfig, model: nn.Module, communicator: Communicator) -> tuple[ABTraining, LRScheduler]:
    """The engine around a model, with its optimizer, and the schedule of the learning rate. Collective.

    Args:
        config: valid and resolved.
        model: of the config's task, on the communicator's device.
    """
    assert config.steps is not None and config.lr is not None
    task = TASKS[config.task]
    decay = task.weight_decay if config.weight_decay is None else config.weight_decay
    optimizer = build_optimizer(model, config.lr, decay)
    schedule = build_schedule(optimizer, config.steps, task.lr_warmup)
    ab = ABTraining(
        model,
        optimizer,
        recipe_of(config),
        communicator=communicator,
        on_nonfinite=config.on_nonfinite,
        measure_divergence=config.divergence,
    )
    return ab, schedule
