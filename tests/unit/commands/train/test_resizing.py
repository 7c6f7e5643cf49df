"""Another number of workers continues a run with equal weights, from the last merge."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from abtrain import FixedRank, recipes, weights_digest
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.commands.train.resizing import can_be_resized, resized
from tests.cases import build
from tests.faults import loops as faults
from tests.faults.optimizers import Masters
from tests.unit.engine.test_saved_state import AB, Loop, normed


@pytest.mark.parametrize("workers", [2, 4])
def test_another_number_of_workers_resumes_at_a_merge(workers: int) -> None:
    recipe = recipes.ab_outer(30, every=5, wire="int8", warmup_steps=10, rank_rule=FixedRank(3))

    def first(comm: Communicator) -> dict[str, Any]:
        loop = Loop(comm, recipe)
        loop.run(15)
        state = copy.deepcopy(loop.ab.state_dict())
        assert state["workers_equal"] and can_be_resized(state, loop.ab.position)
        return state

    parts = run_in_process(3, first)

    def go_on(comm: Communicator) -> tuple[str, dict[str, Tensor]]:
        loop = Loop(comm, recipe, seed=9)
        loop.ab.load_state_dict(resized(parts, comm.rank, recipe))
        owed = copy.deepcopy(loop.ab.state_dict()["merger"]["residuals"])
        loop.run(30)
        weights = loop.ab.dense_state_dict()
        return weights_digest(weights), owed

    ended = run_in_process(workers, go_on)
    assert len({digest for digest, _ in ended}) == 1
    for name in parts[0]["merger"]["residuals"]:
        before = torch.stack([part["merger"]["residuals"][name] for part in parts]).mean(0)
        torch.testing.assert_close(ended[0][1][name], before)


AMID = {
    "ab": (recipes.ab(30, **AB), 6, 3),
    "outer": (recipes.ab_outer(30, every=5, wire="int8", warmup_steps=10, rank_rule=FixedRank(3)), 18, 15),
    "first round of factors": (recipes.ab_outer(30, every=5, warmup_steps=10, rank_rule=FixedRank(3)), 12, 10),
    "hidden merge under way": (recipes.ab_outer(30, every=5, delay=3, warmup_steps=10, rank_rule=FixedRank(3)), 21, 15),
    "hidden merge arrived": (recipes.ab_outer(30, every=5, delay=2, warmup_steps=10, rank_rule=FixedRank(3)), 24, 20),
    "fragments": (recipes.local_sgd(30, every=6, fragments=3), 14, 12),
}


@pytest.mark.parametrize("case", AMID)
@pytest.mark.parametrize("workers", [2, 4])
def test_another_number_of_workers_goes_back_to_the_last_merge(case: str, workers: int) -> None:
    recipe, step, merged = AMID[case]
    trained = dict(normed().named_parameters())

    def first(comm: Communicator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        loop = Loop(comm, recipe)
        loop.run(merged)
        at_merge = copy.deepcopy(loop.ab.dense_state_dict())
        loop.run(step)
        assert can_be_resized(loop.ab.state_dict(), loop.ab.position)
        return copy.deepcopy(loop.ab.state_dict()), at_merge

    left = run_in_process(3, first)
    parts = [state for state, _ in left]

    def go_on(comm: Communicator) -> tuple[int, dict[str, Tensor], str]:
        loop = Loop(comm, recipe, seed=9)
        loop.ab.load_state_dict(resized(parts, comm.rank, recipe))
        done, began_with = loop.ab.steps_done, copy.deepcopy(loop.ab.dense_state_dict())
        loop.run(30)
        # Where gradients are shared, every worker has running means of its own after the last step.
        weights = {name: value for name, value in loop.ab.dense_state_dict().items() if name in trained}
        return done, began_with, weights_digest(weights)

    ended = run_in_process(workers, go_on)
    assert {done for done, _, _ in ended} == {merged}
    assert len({digest for _, _, digest in ended}) == 1
    for name, value in ended[0][1].items():
        assert all(torch.equal(value, began_with[name]) for _, began_with, _ in ended)
        # Hidden merges and fragments arrive later than the round begins; buffers are averaged as they are.
        if case in ("ab", "outer", "first round of factors") and name in trained:
            assert torch.equal(value, left[0][1][name])


def test_copies_of_weights_keep_a_run_from_going_back_to_a_merge() -> None:
    def work(comm: Communicator) -> list[bool]:
        recipe, found = recipes.local_sgd(12, every=4), []
        loop = faults.Loop(comm, recipe, build("mlp", torch.float32), make=lambda model: Masters(model.parameters()))
        for steps in (8, 9, 12):
            loop.run(steps)
            found.append(can_be_resized(loop.ab.state_dict(), loop.ab.position))
        return found

    assert run_in_process(2, work) == 2 * [[True, False, True]]
