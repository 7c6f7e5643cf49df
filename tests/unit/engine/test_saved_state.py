"""Stopped at any step and resumed by fresh objects, a run ends with the bits of one that was never stopped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from abtrain import ABTraining, FixedRank, recipes, weights_digest
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.errors import CheckpointError, UsageError
from abtrain.recipes.recipe import Recipe
from tests.cases import adamw, batch, build, sgd

HIDDEN: dict[str, Any] = {"every": 5, "delay": 3, "fragments": 2, "wire": "int8"}
AB = {"warmup_steps": 3, "ab_steps": 5, "rebound_steps": 2, "lr_rebound_steps": 3, "sigma_cutoff": 0.2}
RECIPES = {
    "ab": recipes.ab(24, **AB),
    "ab in turns": recipes.ab(24, **{**AB, "ab_steps": 6}, every=2, trains="a_then_b", warmup_every=2, wire="int4"),
    "ab_outer": recipes.ab_outer(27, **HIDDEN, warmup_steps=10, rank_rule=FixedRank(3), lr_rebound_steps=4),
    "ab_outer refactored": recipes.ab_outer(
        33,
        **HIDDEN,
        warmup_steps=8,
        warmup_every=4,
        refactor_every=2,
        rebound_steps=3,
        rebound_every=0,
        rank_rule=FixedRank(3),
        optimizer_state="project",
    ),
    "ab_local": recipes.ab_local(27, every=5, delay=3, warmup_delay=2, warmup_steps=10, rank_rule=FixedRank(1)),
    "diloco": recipes.diloco(17, **{**HIDDEN, "wire": "int4"}),
    "weighted": recipes.local_sgd(16, every=4, delay=2, merge="weighted", rebound_steps=0),
}
OPTIMIZERS = {"adamw": adamw, "sgd": sgd}


def normed(seed: int = 0) -> nn.Module:
    """A float32 model with buffers that are averaged, and counters that are not."""
    mlp = build("mlp", torch.float32, seed)
    assert isinstance(mlp, nn.Sequential)
    return nn.Sequential(mlp[0], nn.BatchNorm1d(16), *mlp[1:])


class Loop:
    """A user's loop, with a scheduler beside it."""

    def __init__(self, comm: Communicator, recipe: Recipe, optimizer: str = "adamw", seed: int = 0) -> None:
        self.comm, self.model = comm, normed(seed)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, recipe.total_steps)
        self.ab = ABTraining(self.model, self.optimizer, recipe, communicator=comm)

    def run(self, until: int) -> None:
        while self.ab.steps_done < until:
            x, y = batch("mlp", self.comm.rank, self.ab.steps_done, torch.float32)
            loss = F.cross_entropy(self.ab(x), y)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.ab.step(loss)

    def outcome(self) -> tuple[str, Any, Any]:
        payload = self.comm.meter.payload()
        return weights_digest(self.ab.dense_state_dict()), payload, self.ab.rank_history


def stopped_and_resumed(
    comm: Communicator, recipe: Recipe, optimizer: str, stops: tuple[int, ...], validate: bool = False
) -> Any:
    loop = Loop(comm, recipe, optimizer)
    for stop in stops:
        loop.run(stop)
        if validate:
            with loop.ab.merged() as model, torch.no_grad():
                model.eval()(torch.zeros(2, 10))
            model.train()
        saved = copy.deepcopy((loop.ab.state_dict(), loop.schedule.state_dict()))
        # The meter is the communicator's: what the state holds has to replace whatever was counted since.
        loop = Loop(comm, recipe, optimizer, seed=9)
        loop.ab.load_state_dict(saved[0])
        loop.schedule.load_state_dict(saved[1])
    loop.run(recipe.total_steps)
    return loop.outcome()


@pytest.mark.parametrize("name", RECIPES)
def test_resumed_in_every_phase(name: str) -> None:
    """Each run is stopped and resumed at many steps, among them the first, the last, and those around every merge."""
    recipe, optimizer = RECIPES[name], "sgd" if name in ("ab", "diloco") else "adamw"
    expected = run_in_process(3, lambda comm: stopped_and_resumed(comm, recipe, optimizer, ()))
    steps = range(recipe.total_steps + 1)
    for stops in (steps[::3], steps[1::3]):
        resumed = run_in_process(3, lambda comm, at=tuple(stops): stopped_and_resumed(comm, recipe, optimizer, at))
        assert resumed == expected, f"stopped at {stops}"


@pytest.mark.parametrize("name", RECIPES)
def test_resumed_after_a_look_at_the_average(name: str) -> None:
    """It sends ahead what merges under way are still to send, and changes nothing."""
    recipe = RECIPES[name]
    expected = run_in_process(3, lambda comm: stopped_and_resumed(comm, recipe, "adamw", ()))
    stops = tuple(range(recipe.total_steps + 1))[2::3]
    looked = run_in_process(3, lambda comm: stopped_and_resumed(comm, recipe, "adamw", stops, validate=True))
    # All but the payload: what was sent to look is counted.
    assert [(outcome[0], outcome[2]) for outcome in looked] == [(outcome[0], outcome[2]) for outcome in expected]


def test_one_worker_is_resumed_amid_hidden_merges() -> None:
    """Its weights and its buffers change in one stage, although it averages them with nobody."""
    recipe = RECIPES["diloco"]
    stops = tuple(range(1, recipe.total_steps))
    resumed = stopped_and_resumed(SingleProcess(), recipe, "adamw", stops)
    assert resumed == stopped_and_resumed(SingleProcess(), recipe, "adamw", ())


def saved(recipe: Recipe, steps: int, **options: Any) -> tuple[Loop, dict[str, Any]]:
    """A loop of one worker, and its state after so many steps."""
    loop = Loop(SingleProcess(), recipe, **options)
    loop.run(steps)
    return loop, copy.deepcopy(loop.ab.state_dict())


def test_a_run_goes_back_to_what_was_saved() -> None:
    loop, state = saved(RECIPES["ab"], 5)
    loop.run(20)
    loop.ab.load_state_dict(state)
    assert loop.ab.steps_done == 5
    again = loop.ab.state_dict()
    assert again["model"]["factored"] == state["model"]["factored"] != []
    for name, value in state["model"]["weights"].items():
        assert torch.equal(again["model"]["weights"][name], value)


def test_nothing_is_taken_from_a_state_that_does_not_fit() -> None:
    loop, state = saved(RECIPES["ab"], 5)
    before = weights_digest(loop.ab.dense_state_dict())
    other = {**state, "recipe": "0" * 64}
    shapes = copy.deepcopy(state)
    shapes["model"]["weights"]["0.weight.A"] = torch.zeros(3, 2)
    phase = copy.deepcopy(state)
    phase["model"]["optimizers"][0]["state"]["0.weight"] = {"exp_avg": torch.zeros(16, 10)}
    moments = copy.deepcopy(state)
    moments["model"]["optimizers"][0]["state"]["0.weight.A"]["exp_avg"] = torch.zeros(16, 10)
    for wrong, why in (
        ({}, "not a state of version"),
        (other, "another recipe"),
        (shapes, "shapes .3, 2. and"),
        (phase, "belongs to no parameter here"),
        (moments, "does not fit shape"),
    ):
        with pytest.raises(CheckpointError, match=why):
            loop.ab.load_state_dict(wrong)
    with pytest.raises(CheckpointError, match="SGD with 1 in the training loop"):
        Loop(SingleProcess(), RECIPES["ab"], "sgd").ab.load_state_dict(state)
    loop.run(7)
    assert loop.ab.steps_done == 7 and weights_digest(loop.ab.dense_state_dict()) != before


def test_a_state_of_another_recipe_names_the_settings_that_differ() -> None:
    _, state = saved(recipes.ab_outer(100), 2)
    other = Loop(SingleProcess(), recipes.ab_outer(120, every=10))
    words = r"ab_outer' of 120 steps \(total_steps was 100, and is 120 now; .*every was 20, and is 10 now"
    with pytest.raises(CheckpointError, match=words):
        other.ab.load_state_dict(state)


def test_a_state_saved_during_a_step_is_refused() -> None:
    loop, _ = saved(RECIPES["ab"], 2)
    loop.ab(torch.zeros(2, 10)).sum().backward()
    loop.optimizer.step()
    with pytest.raises(UsageError, match=r"call ab.step\(\) first"):
        loop.ab.state_dict()
