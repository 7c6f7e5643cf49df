"""A user's training loop on threads, in which tests cause faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from abtrain import ABTraining, FixedRank, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.errors import AbtrainError
from abtrain.recipes.recipe import Recipe
from tests.cases import SCHEDULE, adamw, batch, build

AB = recipes.ab(15, **SCHEDULE, sigma_cutoff=0.2)
OUTER = recipes.ab_outer(20, every=4, warmup_steps=8, rank_rule=FixedRank(3), wire="int8")
HIDDEN = recipes.ab_outer(20, every=4, delay=2, warmup_steps=8, rank_rule=FixedRank(3))


class Loop:
    """A user's loop over batches of the small MLP."""

    def __init__(
        self,
        comm: Communicator,
        recipe: Recipe,
        model: nn.Module | None = None,
        make: Callable[[nn.Module], Any] = lambda model: adamw(model.parameters()),
        **options: Any,
    ) -> None:
        self.comm, self.model = comm, build("mlp") if model is None else model
        self.optimizer = make(self.model)
        self.optimizers = self.optimizer if isinstance(self.optimizer, list) else [self.optimizer]
        self.ab = ABTraining(self.model, self.optimizer, recipe, communicator=comm, **options)

    def step(self, spoil: float = 1.0) -> None:
        x, y = batch("mlp", self.comm.rank, self.ab.steps_done, next(self.model.parameters()).dtype)
        loss = F.cross_entropy(self.ab(x), y) * spoil
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.ab.step(loss)

    def run(self, until: int | None = None) -> dict[str, Tensor]:
        while not self.ab.finished and self.ab.steps_done != until:
            self.step()
        return self.ab.dense_state_dict()


def told(workers: int, worker: Any, **options: Any) -> list[AbtrainError]:
    """Returns the error of every worker, by rank."""

    def caught(comm: Communicator) -> AbtrainError:
        with pytest.raises(AbtrainError) as error:
            worker(comm)
        return error.value

    return run_in_process(workers, caught, **options)
