"""The parts of a training step that do not depend on who else trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from abtrain.commands.tasks.choices import Precision
from abtrain.commands.tasks.task import Task


def loss_of(model: Callable[[Tensor], Any], task: Task, x: Tensor, y: Tensor, precision: Precision | None) -> Tensor:
    """The task's training loss on a batch, with the forward pass in bf16 where that is asked for and safe."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return task.loss(model(x), y)


def clip_gradients(optimizer: Optimizer, most: float | None) -> None:
    """Shortens all gradients together to a norm of `most`, if they are longer; 0 or None: leaves them."""
    if most:
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], most)
