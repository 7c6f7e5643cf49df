"""Completes a recipe that chooses its cycle by measurement: times the first steps and the links, and chooses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from abtrain.comm.communicator import Communicator
from abtrain.comm.speed import reduce_seconds, synchronize
from abtrain.consistency.nested_state import cannot_be_shared
from abtrain.engine.beginning import announce
from abtrain.engine.problems import problems_here
from abtrain.engine.sharding import sharding_problems
from abtrain.lowrank.optimizers import Optimizers
from abtrain.recipes import automatic
from abtrain.recipes.recipe import Recipe

_STEPS = automatic.MEASURED_STEPS // 2
"""The number of steps whose times count."""


class Choosing:
    """Times training steps, and completes the recipe at the end of its prologue.

    Args:
        recipe: the recipe of the run; nothing is timed if nothing is to be chosen.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, optimizers: Optimizers, comm: Communicator) -> None:
        self._recipe, self._model, self._optimizers, self._comm = recipe, model, optimizers, comm
        self._began: float | None = None
        self._seconds: list[float] = []

    def begin_step(self) -> None:
        """Begins to time a training step, at the end of `ab.step()`."""
        if self._recipe.choice is not None:
            self._began = self._now()

    def end_step(self) -> None:
        """Records the seconds of a training step, at the start of `ab.step()`."""
        if self._recipe.choice is not None and self._began is not None:
            self._seconds.append(self._now() - self._began)

    def due(self, steps_done: int) -> bool:
        """Returns whether the recipe is to be completed after this number of steps."""
        return self._recipe.chooses_at == steps_done

    def completed(self, merge: Mapping[str, Any]) -> Recipe:
        """Measures the links, and returns the completed recipe, the same on all workers. Collective over the world.

        `merge` is the report of the merge that has just ended.
        """
        comm, recipe = self._comm, self._recipe
        here = self._circumstances(merge["seconds"] - merge["wait_seconds"])
        assert recipe.choice is not None
        row = automatic.choose(here, recipe.choice.budget)
        if comm.rank == 0 and comm.topology.world_size > 1:
            announce(automatic.in_words(row, here))
        return self.adopt(automatic.completed(recipe, row.options))

    def _circumstances(self, merge: float) -> automatic.Circumstances:
        """Returns what all workers have measured, of which the slowest counts. `merge` are the seconds of a merge."""
        comm, recipe = self._comm, self._recipe
        numbers = sum(p.numel() for p in self._model.parameters() if p.requires_grad) / comm.topology.group_size
        per_byte, latency = reduce_seconds(comm, round(4 * numbers))
        # The first steps include one-time work. A run that was resumed in mid-prologue may have timed none.
        steps = self._seconds[-_STEPS:]
        step = _usual(steps)
        steps += [step] * (_STEPS - len(steps))
        plain = automatic.auto(recipe.total_steps, every=1, wire="fp32", delay=0)
        measured = [step, 4 * numbers * per_byte, latency, merge, float(self._refuses(plain)), *steps]
        slowest = torch.tensor(measured, dtype=torch.float64, device=comm.device)
        comm.all_reduce(slowest, "max")
        step, reduce, latency, merge, unfit, *longest = slowest.tolist()
        assert recipe.chooses_at is not None
        left = recipe.total_steps - recipe.chooses_at
        here = automatic.Circumstances(step, reduce, latency, left, not unfit)
        uneven = max(_usual(longest) - step, 0.0)
        computing = max(merge - here.sending(automatic.MEASURED_BITS), 0.0)
        hides = 0.0 if comm.device.type == "cpu" else automatic.BACKWARD
        return replace(here, uneven=uneven, computing=computing, hides=hides)

    def _refuses(self, recipe: Recipe) -> bool:
        """Returns whether the model or its optimizers do not allow a recipe."""
        unfit = sharding_problems(self._model, self._optimizers, recipe)
        unfit += problems_here(self._model, self._optimizers, recipe, self._comm)
        return bool(unfit) or any(cannot_be_shared(optimizer.state) for optimizer in self._optimizers.stateful)

    def adopt(self, recipe: Recipe) -> Recipe:
        """Replaces the recipe, after which nothing is timed any more. Returns it."""
        self._recipe = recipe
        return recipe

    def _now(self) -> float:
        synchronize(self._comm.device)
        return time.perf_counter()


def _usual(seconds: Sequence[float]) -> float:
    """Returns the mean without the smallest and the largest number, which something else may have caused."""
    inner = sorted(seconds)[1:-1] or seconds
    return statistics.fmean(inner) if inner else 0.0
