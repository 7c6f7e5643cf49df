"""Evaluates models on the test set of a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from abtrain.commands.tasks.samples import Data
from abtrain.commands.tasks.task import Task, cross_entropy


class Score(NamedTuple):
    """The sum of the losses of test samples, the number of samples classified correctly, and the number of samples."""

    loss: float
    correct: float
    seen: float

    def quality(self, task: Task) -> dict[str, float | None]:
        """Returns `top1` accuracy in percent (None if the task has no classes), and the mean `loss` in nats."""
        return {"top1": 100 * self.correct / self.seen if task.classifies else None, "loss": self.loss / self.seen}


@torch.no_grad()
def score(
    model: nn.Module,
    task: Task,
    data: Data,
    part: int = 0,
    parts: int = 1,
    batch_size: int = 100,
    after_batch: Callable[[], object] = lambda: None,
) -> Score:
    """Evaluates a model on every `parts`-th batch of the test set, starting with batch `part`.

    Calls `after_batch` after each batch.
    """
    was_training = model.training
    model.eval()
    loss, correct, seen = 0.0, 0, 0
    for x, y in data.test.in_order(batch_size, part, parts):
        targets = y.long()
        output = model(task.prepare(x))
        loss += float(cross_entropy(output, targets)) * len(x)
        if task.classifies:
            correct += int((output.argmax(dim=-1) == targets).sum())
        seen += len(x)
        after_batch()
    model.train(was_training)
    return Score(loss, correct, seen)


def evaluate(model: nn.Module, task: Task, data: Data, batch_size: int = 100) -> dict[str, float | None]:
    """Evaluates a model on the whole test set. Returns the metrics of `Score.quality`."""
    return score(model, task, data, batch_size=batch_size).quality(task)
