"""Measures how long a worker computes in a merge: changes, codes, outer steps and comparisons, without the transfer."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from abtrain.comm.communicator import Communicator, Pending, Reduction, Scope
from abtrain.comm.topology import Topology
from abtrain.engine.ab_training import ABTraining
from abtrain.recipes.phase import Phase
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import WeightSync
from abtrain.recipes.wires import wire_between

_MOST_NUMBERS = 2**22
"""The largest number of parameters to merge. They fit into no cache, so more of them take proportionally longer."""
_MOST_GROUPS = 16
_ROUNDS = 4


def seconds_of_merge(sync: WeightSync, groups: int, numbers: int) -> float:
    """Returns the seconds that a worker computes in a merge of `numbers` parameters with other groups of workers."""
    rule = replace(sync, every=2, wire=wire_between(groups, sync.wire), delay=min(sync.delay, 1), fragments=1)
    measured = max(min(numbers, _MOST_NUMBERS), 1)
    return numbers / measured * _measured(rule, min(groups, _MOST_GROUPS), measured)


@cache
def _measured(sync: WeightSync, groups: int, numbers: int) -> float:
    if groups == 1:
        return 0.0
    model = _OneWeight(numbers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    # The run ends one round early, since the last merge of a phase is never hidden.
    steps = sync.every * (_ROUNDS + 1)
    recipe = Recipe("plan", steps, cycle=(Phase("local", steps, sync=sync),))
    ab = ABTraining(model, optimizer, recipe, communicator=_Echo(groups))
    rounds = [sum(_step(ab, optimizer) for _ in range(sync.every)) for _ in range(_ROUNDS)]
    ab.close()
    # The first merge allocates memory.
    return statistics.median(rounds[1:])


def _step(ab: ABTraining, optimizer: torch.optim.Optimizer) -> float:
    loss = ab()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    started = time.perf_counter()
    ab.step(1.0)
    return time.perf_counter() - started


class _OneWeight(nn.Module):
    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(numbers, generator=torch.Generator().manual_seed(0)))

    def forward(self) -> Tensor:
        return (self.weight**2).sum()


class _Echo(Communicator):
    """A `Communicator` that answers as if the other workers had sent what this worker sends. It sends nothing.

    The worker is the last one, since only the first one prints notices about the run.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers - 1, Topology(workers), torch.device("cpu"))

    def _start_all_reduce(self, tensor: Tensor, op: Reduction, scope: Scope) -> Pending[None]:
        return Pending(lambda: None)

    def _start_all_gather(self, tensor: Tensor, scope: Scope) -> Pending[Tensor]:
        gathered = torch.stack([tensor] * len(self.ranks(scope)))
        return Pending(lambda: gathered)

    def _start_exchange(self, rows: Tensor, scope: Scope, nbytes: int) -> Pending[Tensor]:
        received = rows.clone()
        return Pending(lambda: received)

    def _broadcast(self, tensor: Tensor, source: int, scope: Scope) -> None:
        return None
