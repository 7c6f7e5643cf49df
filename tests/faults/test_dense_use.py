"""Loops that use a factored model as the dense one in the midst of a run: loads, penalties, masks, tied weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from torch import Tensor

from abtrain import FixedRank, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.recipes.recipe import Recipe
from tests.cases import largest_difference
from tests.faults.loops import AB, HIDDEN, OUTER, Loop

LOCAL = recipes.ab_local(20, every=2, warmup_steps=4, rank_rule=FixedRank(3))


def nothing(loop: Loop) -> None:
    """Leaves the loop as it is."""


def load_its_own(loop: Loop) -> None:
    loop.model.load_state_dict(copy.deepcopy(loop.model.state_dict()))


def swap_an_average(loop: Loop) -> None:
    """Validates by other weights, and comes back to its own."""
    own = copy.deepcopy(loop.ab.dense_state_dict())
    average = {name: tensor * 0.7 + 0.01 for name, tensor in own.items()}
    loop.ab.load_dense_state_dict(average, cut=True)
    loop.ab.load_dense_state_dict(own)


@pytest.mark.parametrize("act", [load_its_own, swap_an_average])
@pytest.mark.parametrize("recipe", [AB, OUTER, HIDDEN, LOCAL], ids=["ab", "outer", "hidden", "local"])
@pytest.mark.parametrize("workers", [1, 2])
def test_loads_that_change_no_weight_change_no_bit_of_a_run(
    act: Callable[[Loop], None], recipe: Recipe, workers: int
) -> None:
    def run(act: Callable[[Loop], None]) -> list[dict[str, Tensor]]:
        def work(comm: Communicator) -> dict[str, Tensor]:
            loop = Loop(comm, recipe)
            while not loop.ab.finished:
                loop.step()
                act(loop)
            return loop.ab.dense_state_dict()

        return run_in_process(workers, work)

    for one, other in zip(run(nothing), run(act), strict=True):
        assert largest_difference(one, other) == 0
