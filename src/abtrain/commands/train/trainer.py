"""Trains a task's model with the engine, step by step. Real and simulated workers share this code."""

from __future__ import annotations

import atexit
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.checkpoint.digest import weights_digest
from abtrain.comm.communicator import Communicator
from abtrain.commands.circumstances import hardware, versions
from abtrain.commands.plan.totals import over_links, payload_ratio
from abtrain.commands.tasks.choices import Precision
from abtrain.commands.tasks.evaluation import evaluate
from abtrain.commands.tasks.samples import Data
from abtrain.commands.tasks.task import TASKS, Task, build_optimizers, build_schedule
from abtrain.commands.train.config import TrainConfig, completed, recipe_of
from abtrain.engine import progress
from abtrain.engine.ab_training import ABTraining
from abtrain.errors import NonFiniteError
from abtrain.recipes.recipe import Position

VALIDATE, CHECKPOINT = "validate", "checkpoint"
"""The names under which the meter counts the bytes of validations and checkpoints, which do not count as training."""


class StepFigures(NamedTuple):
    """Measurements of an optimizer step on one worker.

    Attributes:
        loss: the training loss on the worker's batch.
        lr: the learning rate.
        grad_norm: the total norm of all gradients, before clipping; None if it was not measured.
    """

    loss: float
    lr: float
    grad_norm: float | None


class Trainer:
    """Trains the model of one worker. Owns the model, its optimizers, their schedules and its ABTraining.

    All workers construct their trainers together, because ABTraining compares the workers' models.

    Args:
        config: the settings, validated and resolved.
        model: the model of the task, on the communicator's device.
        communicator: the connection to the other workers.

    Attributes:
        parameters: the number of the model's parameters with dense weights.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, communicator: Communicator) -> None:
        assert config.steps is not None and config.lr is not None and config.weight_decay is not None
        self.config, self.task, self.model = config, TASKS[config.task], model
        self.parameters = sum(p.numel() for p in model.parameters())
        optimizers = build_optimizers(model, config.optimizer, config.lr, config.weight_decay)
        self.schedules = [build_schedule(one, config.steps, self.task.lr_warmup) for one in optimizers]
        self.ab = ABTraining(
            model,
            optimizers,
            recipe_of(config),
            communicator=communicator,
            on_nonfinite=config.on_nonfinite,
            measure_divergence=config.divergence,
        )
        # The command itself reports a run that ends early.
        atexit.unregister(progress.warn)

    @property
    def completed_config(self) -> TrainConfig:
        """The settings, with what the recipe `auto` has chosen by now."""
        return completed(self.config, self.ab.recipe)

    def optimizer_step(self, position: Position, x: Tensor, y: Tensor, measures_norm: bool = False) -> StepFigures:
        """Computes the gradients of a batch and takes one optimizer step. The caller must call `ab.step` afterwards.

        Args:
            position: the position of the step in the recipe.
            x: the inputs of the batch.
            y: the targets of the batch.
            measures_norm: whether to measure the norm of the gradients, which reads all of them once more.

        Raises:
            NonFiniteError: the loss is NaN or infinite, and `on_nonfinite` cannot leave out this worker or step.
        """
        ab = self.ab
        lr = float(self.schedules[0].get_last_lr()[0]) * ab.lr_factor
        loss = loss_of(ab, self.task, x, y, self.config.precision)
        value = loss.item()
        self._check_loss(value, lr, position)
        loss.backward()
        norm = gradient_norm(ab.optimizers) if measures_norm else None
        clip_gradients(ab.optimizers, self.config.clip)
        for optimizer, schedule in zip(ab.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return StepFigures(value, lr, norm)

    def _check_loss(self, value: float, lr: float, position: Position) -> None:
        policy, phase = self.config.on_nonfinite, position.phase
        shared = phase.shares_gradients
        if not math.isfinite(value) and (policy == "stop" or (shared and policy != "skip")):
            # The error is raised before this worker sends gradients. The launcher ends the workers that wait for them.
            raise NonFiniteError(
                f"the loss of worker {self.ab.communicator.rank} is {value} at step {self.ab.steps_done} (phase "
                f"{phase.name}, learning rate {lr:.3g}): lower --lr (now {self.config.lr}), or try another --seed"
            )

    def result(
        self,
        seconds: Mapping[str, float],
        data: Data,
        validation: Mapping[str, Any] = {},
        memory: Mapping[str, int] = {},
    ) -> dict[str, Any]:
        """Evaluates the model and returns the content of result.json. Call it inside `ab.merged()`.

        Args:
            seconds: the wall time of the run (`total`), and the parts of it that validations (`validate`) and
                checkpoints (`checkpoint`) took, if there were any.
            data: the data of the task.
            validation: the `best` and the `last` validation during training.
            memory: the peak memory of this worker's process during training.
        """
        ab, config = self.ab, self.config
        meter, topology, device = ab.communicator.meter, ab.communicator.topology, ab.communicator.device
        payload = meter.payload()
        trained_by = sum(n for name, n in over_links(payload, topology).items() if name not in (VALIDATE, CHECKPOINT))
        return {
            "recipe": config.recipe_name,
            "task": config.task,
            "seed": config.seed,
            "world_size": topology.world_size,
            "group_size": topology.group_size,
            "steps": ab.steps_done,
            **evaluate(self.model, self.task, data),
            "seconds": self._seconds(seconds),
            "validation": dict(validation),
            "peak_memory": dict(memory),
            "payload_bytes": payload,
            "payload_ratio": payload_ratio(trained_by, self.parameters, ab.steps_done),
            "parameters": self.parameters,
            "compression": ab.compression,
            "ranks": ab.rank_history,
            "dropped_parts": ab.dropped_parts,
            "weights_digest": weights_digest(ab.dense_state_dict()),
            "schedule": repr(ab.recipe),
            "versions": {**versions(), "torch": torch.__version__},
            "hardware": {
                **hardware(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "threads_per_worker": torch.get_num_threads(),
            },
            "config": dataclasses.asdict(self.completed_config),
        }

    def _seconds(self, spent: Mapping[str, float]) -> dict[str, float]:
        """Returns the seconds of a run, in total and by part: computation, collectives, SVDs, and those in `spent`."""
        parts = {
            "sync": self.ab.communicator.meter.sync_seconds,
            "svd": self.ab.seconds["svd"],
            **{name: spent.get(name, 0.0) for name in (VALIDATE, CHECKPOINT)},
        }
        return {"total": spent["total"], "compute": spent["total"] - sum(parts.values()), **parts}


def loss_of(model: Callable[[Tensor], Any], task: Task, x: Tensor, y: Tensor, precision: Precision | None) -> Tensor:
    """Returns the task's training loss on a batch. Computes it under autocast to bf16 if `precision` is bf16."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return task.loss(model(x), y)


def clip_gradients(optimizers: Sequence[Optimizer], max_norm: float | None) -> None:
    """Scales all gradients so that their global norm is at most `max_norm`; 0 or None leaves them unchanged."""
    if max_norm:
        torch.nn.utils.clip_grad_norm_(_parameters(optimizers), max_norm)


def gradient_norm(optimizers: Sequence[Optimizer]) -> float:
    """Returns the Euclidean norm of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in _parameters(optimizers) if p.grad is not None]).item()


def _parameters(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
