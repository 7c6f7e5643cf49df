"""`merged()` where workers hold the same weights: their buffers are the first worker's meanwhile, as under DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtrain import ABTraining, FixedRank, Recipe, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.errors import RanksDisagreeError
from tests.cases import SCHEDULE, batch, build, sgd
from tests.faults.loops import Loop, told
from tests.gloo import run_gloo

AB = recipes.ab(9, **SCHEDULE, rank_rule=FixedRank(2))


def start(comm: Communicator, recipe: Recipe) -> tuple[nn.Module, Any, ABTraining]:
    model = nn.Sequential(nn.BatchNorm1d(10), build("mlp", torch.float32))
    optimizer = sgd(model.parameters())
    return model, optimizer, ABTraining(model, optimizer, recipe, communicator=comm)


def go(comm: Communicator, ab: ABTraining, optimizer: Any, steps: int) -> None:
    while ab.steps_done < steps:
        x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()


def statistics(comm: Communicator, recipe: Recipe, steps: int) -> dict[str, Tensor]:
    """The running mean before, inside and after `merged()`."""
    model, optimizer, ab = start(comm, recipe)
    go(comm, ab, optimizer, steps)
    mean = model.get_buffer("0.running_mean")
    before = mean.clone()
    with ab.merged():
        inside = mean.clone()
    return {"before": before, "inside": inside, "after": mean.clone()}


CASES = {
    "data parallel": (recipes.ddp(8), 5),
    "at the end": (recipes.ddp(8), 8),
    "a rebound": (AB, 8),
    "a warm-up": (recipes.local_sgd(20, every=4, warmup_steps=8), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_all_workers_validate_with_the_buffers_of_the_first(case: str) -> None:
    check(run_in_process(3, lambda comm: statistics(comm, *CASES[case])))


def test_on_gloo_likewise() -> None:
    check(run_gloo(2, statistics, *CASES["data parallel"]))


def check(results: list[dict[str, Tensor]]) -> None:
    first = results[0]
    for result in results[1:]:
        assert not torch.equal(result["before"], first["before"])
        assert torch.equal(result["inside"], first["before"])
    assert all(torch.equal(result["after"], result["before"]) for result in results)


def test_a_recipe_that_shares_nothing_leaves_each_worker_its_own() -> None:
    def work(comm: Communicator) -> tuple[dict[str, Tensor], int]:
        return statistics(comm, recipes.solo(4), steps), comm.meter.payload()["total"]

    for steps in (0, 2, 4):
        (one, sent), (other, _) = run_in_process(2, work)
        assert torch.equal(one["inside"], one["before"]) and torch.equal(other["inside"], other["before"])
        assert torch.equal(one["inside"], other["inside"]) == (steps == 0)
        assert sent < 1000  # what was compared at the start


@pytest.mark.parametrize(("kind", "nbytes"), [("norm", 24), ("none", 0)])
def test_where_no_buffer_differs_one_small_message_is_sent(kind: str, nbytes: int) -> None:
    def work(comm: Communicator) -> int:
        if kind == "none":
            loop = Loop(comm, recipes.ddp(8))
            loop.run(2)
            ab = loop.ab
        else:
            _, _, ab = start(comm, recipes.ddp(8))
        before = comm.meter.payload()["total"]
        with ab.merged():
            pass
        return int(comm.meter.payload()["total"] - before)

    assert run_in_process(2, work) == [nbytes, nbytes]


def test_an_own_buffer_stays_own() -> None:
    def work(comm: Communicator) -> tuple[float, float]:
        model = nn.Sequential(nn.BatchNorm1d(10), build("mlp", torch.float32))
        model._ddp_params_and_buffers_to_ignore = ["0.running_mean"]  # type: ignore[assignment]
        ab = ABTraining(model, sgd(model.parameters()), recipes.ddp(8), communicator=comm)
        for name in ("0.running_mean", "0.running_var"):
            model.get_buffer(name).fill_(comm.rank)
        with ab.merged():
            return model.get_buffer("0.running_mean")[0].item(), model.get_buffer("0.running_var")[0].item()

    assert run_in_process(2, work) == [(0, 0), (1, 0)]


def test_training_during_an_average_is_reported() -> None:
    def work(comm: Communicator) -> None:
        _, optimizer, ab = start(comm, recipes.ddp(8))
        go(comm, ab, optimizer, 2)
        if comm.rank == 0:
            with ab.merged():
                raise AssertionError("one worker's buffers were shown")
        go(comm, ab, optimizer, 3)

    assert {type(error) for error in told(2, work)} == {RanksDisagreeError}
