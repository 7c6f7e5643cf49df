"""Workers that differ where they should agree, and workers that are gone. Workers are threads here, but for some."""

from __future__ import annotations

import copy
import os
import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abtrain import ABTraining, FixedRank, checkpoint, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.errors import CheckpointError, PeerLostError, RanksDisagreeError
from abtrain.recipes.recipe import Recipe
from tests.cases import SCHEDULE, adamw, build, largest_difference, sgd, train
from tests.faults.loops import AB, HIDDEN, OUTER, Loop, told
from tests.gloo import run_gloo


def swapped() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("second", "first")})


def named() -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("first", "second")})


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ((named, swapped), "names[0] is 'first.weight' on rank 0, 2 and 'second.weight'"),
        (
            (lambda: nn.Linear(4, 4), lambda: nn.Linear(4, 5)),
            "weight.shape is '(4, 4)' on rank 0, 2 and '(5, 4)'",
        ),
        ((lambda: nn.Linear(4, 4), lambda: nn.Linear(4, 4).double()), "model.weight.dtype is 'torch.float32' on"),
        (
            (named, lambda: nn.ModuleDict({"first": nn.Linear(4, 4)})),
            "names[2] is 'second.weight' on rank 0, 2 and",
        ),
    ],
    ids=["order", "shapes", "dtypes", "layers"],
)
def test_models_that_differ(models: Any, words: str) -> None:
    errors = told(3, lambda comm: Loop(comm, recipes.ddp(5), models[comm.rank == 1]()))
    assert {type(error) for error in errors} == {RanksDisagreeError} and errors[0].exit_code == 5
    assert all(words in str(error) and "rank 1" in str(error) for error in errors)


UNLIKE_RECIPES = {
    "cutoff": (
        AB,
        recipes.ab(15, **SCHEDULE, sigma_cutoff=0.3),
        "recipe.factoring.rank_rule.cutoff is 0.2 on rank 0, 2 and 0.3 on rank 1",
    ),
    "outer lr": (
        OUTER,
        recipes.ab_outer(20, every=4, warmup_steps=8, rank_rule=FixedRank(3), wire="int8", outer_lr=0.5),
        "recipe.cycle[0].sync.merge.lr is 0.9 on rank 0, 2 and 0.5 on rank 1",
    ),
    "warm-up": (
        AB,
        recipes.ab(15, **SCHEDULE | {"warmup_steps": 4}, sigma_cutoff=0.2),
        "recipe.prologue[0].steps is 3 on rank 0, 2 and 4 on rank 1",
    ),
    "name": (AB, replace(AB, name="mine"), "recipe.name is 'ab' on rank 0, 2 and 'mine' on rank 1"),
    "length": (recipes.ddp(9), recipes.ddp(8), "recipe.total_steps is 9 on rank 0, 2 and 8 on rank 1"),
    "damping": (
        AB,
        replace(AB, cycle=(replace(AB.cycle[0], damping=0.01), *AB.cycle[1:])),
        "recipe.cycle[0].damping is 0.0 on rank 0, 2 and 0.01 on rank 1",
    ),
    "merge": (
        OUTER,
        replace(OUTER, cycle=AB.cycle[:1]),
        "recipe.cycle[0].sync.merge is Outer on rank 0, 2 and Mean on",
    ),
    "phase": (AB, replace(AB, cycle=AB.cycle[:1]), "recipe.cycle[1] is Phase on rank 0, 2 and absent on rank 1"),
}


@pytest.mark.parametrize("unlike", UNLIKE_RECIPES)
def test_recipes_that_differ(unlike: str) -> None:
    most, odd, words = UNLIKE_RECIPES[unlike]
    errors = told(3, lambda comm: Loop(comm, odd if comm.rank == 1 else most))
    assert {type(error) for error in errors} == {RanksDisagreeError} and errors[0].exit_code == 5
    assert all(words in str(error) for error in errors)
    assert all("Use the same recipe" in str(error) for error in errors)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("on_nonfinite", "skip", "on_nonfinite is 'stop' on rank 0, 2 and 'skip' on rank 1"),
        ("find_unused_parameters", True, "find_unused_parameters is False on rank 0, 2 and True on rank 1"),
        ("grad_scaler", torch.amp.GradScaler("cpu"), "grad_scaler is False on rank 0, 2 and True on rank 1"),
        ("measure_divergence", True, "measure_divergence is False on rank 0, 2 and True on rank 1"),
    ],
    ids=["on_nonfinite", "find_unused_parameters", "grad_scaler", "measure_divergence"],
)
def test_options_that_differ(option: str, value: Any, words: str) -> None:
    errors = told(3, lambda comm: Loop(comm, AB, **({option: value} if comm.rank == 1 else {})))
    assert {type(error) for error in errors} == {RanksDisagreeError} and errors[0].exit_code == 5
    assert all(words in str(error) for error in errors)


@pytest.mark.parametrize(
    ("asks_at", "words"),
    [
        ((2, 3), "step is 2 on rank 0 and 3 on rank 1"),
        ((None, 3), "the call is ab.step() on rank 0 and ab.merged() on rank 1. All workers must make the same calls"),
    ],
    ids=["at another step", "alone"],
)
def test_an_average_that_not_all_ask_for_at_the_same_step(asks_at: tuple[int | None, int], words: str) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, recipes.local_sgd(20, every=5))
        loop.run(asks_at[comm.rank] or 5)
        with loop.ab.merged():
            raise AssertionError("an average of different steps was shown")

    errors = told(2, work)
    assert {type(error) for error in errors} == {RanksDisagreeError} and errors[0].exit_code == 5
    assert all(words in str(error) for error in errors)


@pytest.mark.parametrize("kind", ["save", "latest"])
def test_a_checkpoint_of_one_worker_alone(kind: str, tmp_path: Path) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, recipes.local_sgd(20, every=5))
        loop.run(2)
        if comm.rank == 0 and kind == "save":
            checkpoint.save(tmp_path, 2, {"ab": loop.ab.state_dict()}, comm)
        elif comm.rank == 0:
            checkpoint.latest(tmp_path, comm)
        loop.run(10)

    errors = told(2, work)
    assert {type(error) for error in errors} == {RanksDisagreeError}
    words = f"the call is checkpoint.{kind}() on rank 0 and ab.step() on rank 1. All workers must make the same calls"
    assert all(words in str(error) and "`if rank == 0:`" in str(error) for error in errors)


def test_optimizers_that_differ() -> None:
    def work(comm: Communicator) -> None:
        model = build("mlp")
        ABTraining(model, (sgd if comm.rank == 3 else adamw)(model.parameters()), AB, communicator=comm)

    for error in told(4, work):
        assert type(error) is RanksDisagreeError
        assert "AdamW' on rank 0, 1, 2 and 'torch.optim.sgd.SGD' on rank 3" in str(error)


@pytest.mark.parametrize(
    ("recipe", "steps", "words"),
    [
        (AB, (2, 1), "step is 2 on rank 0, 2 and 1 on rank 1"),
        (AB, (4, 3), "step is 4 on rank 0, 2 and 3 on rank 1"),
        (AB, (8, 5), "phase is 'rebound' on rank 0, 2 and 'group' on rank 1"),
        (HIDDEN, (13, 14), "step is 13 on rank 0, 2 and 14 on rank 1"),
        (HIDDEN, (13, 11), "merges_since_step[0] is 12 on rank 0, 2 and absent on rank 1"),
        (OUTER, (20, 18), "phase is 'none, the recipe has ended' on rank 0, 2 and "),
    ],
    ids=["warm-up", "round", "phases", "hidden merge", "no merge", "end"],
)
def test_states_of_different_steps(recipe: Recipe, steps: tuple[int, int], words: str) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, recipe)
        states = []
        for step in sorted(steps):
            loop.run(step)
            states.append(copy.deepcopy(loop.ab.state_dict()))
        before = copy.deepcopy(loop.ab.dense_state_dict())
        try:
            loop.ab.load_state_dict(states[(steps[0] > steps[1]) != (comm.rank == 1)])
        finally:
            assert loop.ab.steps_done == max(steps)
            assert largest_difference(before, loop.ab.dense_state_dict()) == 0

    errors = told(3, work)
    assert {type(error) for error in errors} == {RanksDisagreeError} and errors[0].exit_code == 5
    assert all(words in str(error) and f"step is {steps[0]} on rank 0, 2" in str(error) for error in errors)
    assert all("what was saved at the same step" in str(error) for error in errors)


@pytest.mark.parametrize(
    ("recipe", "step", "group_size"), [(AB, 2, 1), (AB, 4, 2), (HIDDEN, 13, 2)], ids=["world", "group", "hidden merge"]
)
def test_states_of_weights_that_differ(recipe: Recipe, step: int, group_size: int) -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, recipe)
        loop.run(step)
        state = copy.deepcopy(loop.ab.state_dict())
        if comm.rank == 3:
            next(iter(state["model"]["weights"].values())).view(-1)[0] += 1e-3
        loop.ab.load_state_dict(state)
        comm.barrier()

    errors = told(4, work, group_size=group_size)
    found = [error for error in errors if isinstance(error, RanksDisagreeError)]
    # In a group its own workers find out, and the others lose them.
    assert len(found) == (4 if group_size == 1 else 2)
    words = f"rank 3 has different weights from rank {'0, 1, 2' if group_size == 1 else '2'}: step {step} of the"
    assert all(words in str(error) for error in found) or group_size == 2
    assert all(f"step {step} of the loaded states" in str(error) for error in found)
    assert all(isinstance(error, PeerLostError) for error in errors if error not in found)


def test_initial_weights_that_differ() -> None:
    expected = copy.deepcopy(build("mlp").state_dict())

    def work(comm: Communicator) -> dict[str, Tensor]:
        loop = Loop(comm, recipes.ddp(5), build("mlp", seed=comm.rank))
        return {name: value.clone() for name, value in loop.model.state_dict().items()}

    for state in run_in_process(3, work):
        assert largest_difference(state, dict(expected)) == 0


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("recipe", ["ab", "ab_outer"])
def test_any_number_of_workers(recipe: str, workers: int) -> None:
    options = {} if recipe == "ab" else {"every": 4, "warmup_steps": 5, "wire": "int4", "delay": 1}
    states = run_in_process(workers, lambda comm: train(comm, build("mlp"), "mlp", recipe, steps=15, **options))
    assert all(largest_difference(states[0], state) == 0 for state in states)
    assert all(torch.isfinite(value).all() for value in states[0].values())


def drifting(comm: Communicator, recipe: Recipe, step: int, odd: int, part: str) -> None:
    """Changes a weight, or the anchor of the last merge, by 1e-3 on one worker without abtrain's knowledge."""
    loop = Loop(comm, recipe, build("mlp", torch.float32))
    loop.run(step)
    if comm.rank == odd:
        tensors = loop.ab._rounds.merger.anchors if part == "anchors" else loop.ab._model.parameters()
        next(iter(tensors.values())).data.view(-1)[0] += 1e-3
    loop.run()


@pytest.mark.parametrize(
    ("recipe", "step", "group_size", "part"),
    [(AB, 1, 1, "weights"), (AB, 8, 1, "weights"), (AB, 4, 2, "weights"), (OUTER, 2, 2, "weights")]
    + [(recipe, 9, 1, "anchors") for recipe in (OUTER, HIDDEN)],
    ids=["warm-up", "rebound", "group on factors", "group", "between merges", "between hidden merges"],
)
def test_a_replica_that_drifts(recipe: Recipe, step: int, group_size: int, part: str) -> None:
    errors = told(4, lambda comm: drifting(comm, recipe, step, 3, part), group_size=group_size)
    found = [error for error in errors if isinstance(error, RanksDisagreeError)]
    # In a group its own workers find out, and the others lose them.
    assert len(found) == (2 if group_size == 2 and part == "weights" else 4)
    assert all(error.exit_code == 5 for error in found)
    assert all("rank 3" in str(error) for error in found) or group_size == 2
    assert all(isinstance(error, PeerLostError) for error in errors if error not in found)


def test_rounding_differences_between_processors_are_equalized() -> None:
    def work(comm: Communicator) -> dict[str, Tensor]:
        loop = Loop(comm, AB, build("mlp", torch.float32))
        loop.run(2)
        if comm.rank == 1:
            loop.model.get_parameter("0.weight").data.mul_(1 + 1e-7)
        return loop.run()

    states = run_in_process(3, work)
    assert all(largest_difference(states[0], state) == 0 for state in states)


@pytest.mark.parametrize("recipe", [recipes.ddp(9), AB, OUTER], ids=["ddp", "ab", "ab_outer"])
def test_batches_that_run_out_on_one_worker(recipe: Recipe) -> None:
    def work(comm: Communicator) -> None:
        Loop(comm, recipe).run(3 if comm.rank == 1 else None)

    host = re.escape(platform.node())
    with pytest.raises(
        PeerLostError, match=rf"step \d, phase '\w+', host {host}: rank 1 has finished its work"
    ) as lost:
        run_in_process(2, work)
    assert lost.value.exit_code == 6


def uneven(comm: Communicator, batches: tuple[int, ...]) -> str:
    loop = Loop(comm, recipes.ddp(20))
    loop.run(batches[comm.rank])
    if comm.rank == 1:
        os._exit(0)  # as a script that has come to its end
    with pytest.raises(PeerLostError) as lost:
        loop.run()
    return str(lost.value)


def test_batches_that_run_out_in_a_process() -> None:
    message, _ = run_gloo(2, uneven, (3, 3), may_die=[1])
    assert message.startswith("rank 0 lost a peer in ")
    assert f"over ranks [0, 1], step 3, phase 'full', host {platform.node()}: a worker died" in message


def leave(comm: Communicator, folder: Path) -> None:
    """Processes that end with their error, as those of users do: whoever waits for them learns of it."""
    if comm.rank != 3:
        with pytest.raises(PeerLostError) as lost:
            Loop(comm, recipes.ab_outer(20, every=4, warmup_steps=8)).run()
        (folder / str(comm.rank)).write_text(str(lost.value))
    os._exit(lost.value.exit_code if comm.rank != 3 else 1)


def test_a_peer_that_dies_before_the_first_collective_of_its_group(tmp_path: Path) -> None:
    run_gloo(4, leave, tmp_path, group_size=2, may_die=range(4))
    messages = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(messages) == ["0", "1", "2"]
    assert all(message.startswith(f"rank {rank} lost a peer in ") for rank, message in messages.items())


def test_an_optimizer_state_of_another_phase() -> None:
    def work(comm: Communicator) -> None:
        loop = Loop(comm, AB)
        full = copy.deepcopy(loop.ab.state_dict())
        loop.run(5)
        state = copy.deepcopy(loop.ab.state_dict())
        state["model"]["optimizers"][0] = full["model"]["optimizers"][0]
        state["model"]["optimizers"][0]["state"] = {"0.weight": {"exp_avg": torch.zeros(16, 10)}}
        before = copy.deepcopy(loop.ab.dense_state_dict())
        try:
            loop.ab.load_state_dict(state)
        finally:
            assert largest_difference(before, loop.ab.dense_state_dict()) == 0

    errors = told(2, work)
    assert {type(error) for error in errors} == {CheckpointError} and errors[0].exit_code == 4
