"""Replicas that drift apart: any difference is detected, and none reaches a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtrain import ABTraining, recipes, weights_digest
from abtrain.checkpoint import store as checkpoint
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.consistency.replicas import check_replicas, marked
from abtrain.errors import CheckpointError, RanksDisagreeError
from abtrain.recipes.recipe import Recipe
from tests.cases import SCHEDULE, build
from tests.faults.loops import Loop, told


def negate_every_second(w: Tensor) -> None:
    w[1::2] *= -1


def negate_a_pair(w: Tensor) -> None:
    w[:2] *= -1


def negate_all(w: Tensor) -> None:
    w *= -1


def swap_pairs(w: Tensor) -> None:
    w[:4] = w[[2, 3, 0, 1]]


def reverse(w: Tensor) -> None:
    w.copy_(w.flip(0))


def make_infinite(w: Tensor) -> None:
    w[0] = torch.inf


def make_nan(w: Tensor) -> None:
    w[0] = torch.nan


def flip_a_top_bit(w: Tensor) -> None:
    w.view(torch.int32 if w.dtype == torch.float32 else torch.int64)[3] ^= 1 << (30 if w.dtype == torch.float32 else 62)


DAMAGES = (negate_every_second, negate_a_pair, negate_all, swap_pairs, reverse, make_infinite, make_nan, flip_a_top_bit)
LOCAL = recipes.local_sgd(12, every=4)
AB = recipes.ab(15, **SCHEDULE, sigma_cutoff=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("recipe", "workers", "group_size"),
    [(recipes.ddp(8), 2, 1), (recipes.ddp(8), 3, 1), (LOCAL, 4, 2), (AB, 2, 1)],
    ids=["ddp", "ddp of 3", "local_sgd in groups", "ab"],
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_any_change_of_one_replica_is_seen(
    damage: Callable[[Tensor], None], recipe: Recipe, workers: int, group_size: int, dtype: torch.dtype
) -> None:
    """The changed row is not trained by this data, so only its bits show the difference."""

    def work(comm: Communicator) -> None:
        model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(16, 5)).to(dtype)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ab = ABTraining(model, optimizer, recipe, communicator=comm)
        data = torch.Generator().manual_seed(comm.rank)
        while not ab.finished:
            x, y = torch.randint(0, 40, (6, 2), generator=data), torch.randint(0, 5, (6,), generator=data)
            F.cross_entropy(ab(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if ab.steps_done == 1 and comm.rank == 1:
                with torch.no_grad():
                    damage(model.get_parameter("0.weight")[45])
            ab.step()

    first, second, *_ = told(workers, work, group_size=group_size)
    assert isinstance(first, RanksDisagreeError) and isinstance(second, RanksDisagreeError)
    assert "rank 1 has different weights from rank 0" in str(first) and "0.weight differs by up to" in str(first)


@pytest.mark.parametrize(
    ("mine", "others"),
    [(0.0, -0.0), (1.0, 1 + 1.2e-7), (-3.0, -3.0000002)],
    ids=["signs of zero", "one ulp", "another ulp"],
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0, 4)], ids=str)
def test_rounding_differences_of_any_shape_are_equalized(mine: float, others: float, shape: tuple[int, ...]) -> None:
    def work(comm: Communicator) -> str:
        tensor = torch.full(shape, mine if comm.rank == 0 else others)
        check_replicas(comm, {"scale": tensor}, "world", "step 1")
        return str((tensor, tensor.sign()))

    assert len(set(run_in_process(3, work))) == 1


def test_a_scalar_parameter_may_differ_by_rounding() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = build("mlp", torch.float32), nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = self.net(x) * self.scale
            return scaled

    def work(comm: Communicator) -> str:
        model = Scaled()
        loop = Loop(comm, recipes.ddp(6), model)
        loop.run(5)
        with torch.no_grad():
            model.scale += comm.rank * 1.2e-7
        return weights_digest(loop.run())

    assert len(set(run_in_process(2, work))) == 1


def saved(loop: Loop, folder: Path) -> None:
    checkpoint.save(folder, loop.ab.steps_done, {"mine": {"ab": loop.ab.state_dict()}}, loop.comm, keep=2)


def drift(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] += 0.5


SHARED = {
    "ddp": (recipes.ddp(20), 1),
    "local_sgd in groups": (recipes.local_sgd(20, every=10), 2),
    "ab in its warm-up": (recipes.ab(20, **SCHEDULE | {"warmup_steps": 14}), 1),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_drift_commits_no_checkpoint_and_costs_no_good_one(name: str, tmp_path: Path) -> None:
    recipe, group_size = SHARED[name]
    workers = 2 * group_size

    def whole(comm: Communicator) -> str:
        return weights_digest(Loop(comm, recipe).run())

    def drifting(comm: Communicator) -> None:
        loop = Loop(comm, recipe)
        for step in range(2, 20, 2):
            loop.run(step)
            if step == 8 and comm.rank == 1:
                drift(loop.model)
            saved(loop, tmp_path)

    def again(comm: Communicator) -> tuple[int, str]:
        loop = Loop(comm, recipe)
        found = checkpoint.latest(tmp_path, comm)
        assert found is not None
        loop.ab.load_state_dict(found.states[0]["mine"]["ab"])
        return found.step, weights_digest(loop.run())

    errors = told(workers, drifting, group_size=group_size)
    # Also those who are in another group.
    assert {type(error) for error in errors} == {RanksDisagreeError}
    assert all("a checkpoint of step 8" in str(error) and "resume from the last" in str(error) for error in errors)
    assert sorted(path.name[-2:] for path in tmp_path.iterdir()) == ["04", "06"]
    digests = run_in_process(workers, whole, group_size=group_size)
    assert run_in_process(workers, again, group_size=group_size) == [(6, digest) for digest in digests]


def test_rounding_differences_are_equalized_before_saving(tmp_path: Path) -> None:
    def work(comm: Communicator) -> Any:
        weights = {
            "w": torch.ones(4) + comm.rank * 1e-7,
            "c": torch.ones(2, dtype=torch.complex64) * (1 + comm.rank * 1e-7),
        }
        checkpoint.save(tmp_path, 1, {**marked("weights", weights, "world"), "own": torch.tensor(comm.rank)}, comm)
        found = checkpoint.latest(tmp_path, comm)
        assert found is not None
        return {name: tensor.tolist() for name, tensor in found.states[0]["weights"].items()}, found.states[0][
            "own"
        ].item()

    first, second = run_in_process(2, work)
    assert first[0] == second[0] and (first[1], second[1]) == (0, 1)


@pytest.mark.parametrize("workers", [2, 3])
def test_a_drifted_checkpoint_is_passed_over_for_an_older_one(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that nobody compared when it was saved; as many workers load it, or others."""

    def save(comm: Communicator, step: int, apart: float) -> None:
        weights = marked("weights", {"w": torch.full((3,), 1 + apart * comm.rank)}, "world")
        checkpoint.save(tmp_path, step, {"ab": weights}, comm, resizable=True)

    run_in_process(2, lambda comm: save(comm, 1, 0))
    monkeypatch.setattr(checkpoint, "check_same", lambda *_: None)
    run_in_process(2, lambda comm: save(comm, 2, 0.5))
    caplog.set_level(logging.WARNING)
    found = run_in_process(workers, lambda comm: checkpoint.latest(tmp_path, comm))
    assert [one.step if one else None for one in found] == [1] * workers
    assert "step-000000000002: workers saved different tensors in ab/weights, which must be equal" in caplog.text


def test_checkpoints_of_different_steps_are_never_mixed(tmp_path: Path) -> None:
    def work(comm: Communicator) -> None:
        checkpoint.save(tmp_path, 3 + comm.rank, {"x": torch.ones(1)}, comm)

    errors = told(2, work)
    assert all(
        isinstance(error, RanksDisagreeError) and "step 3" in str(error) and "step 4" in str(error) for error in errors
    )
    assert not list(tmp_path.iterdir())


def test_a_state_that_one_worker_cannot_save_is_reported_on_all(tmp_path: Path) -> None:
    def work(comm: Communicator) -> str:
        odd = {"x": {1, 2}} if comm.rank == 1 else {"x": [1, 2]}
        with pytest.raises(TypeError if comm.rank == 1 else CheckpointError) as error:
            checkpoint.save(tmp_path, 3, odd, comm)
        return str(error.value)

    first, second = run_in_process(2, work)
    assert second.startswith("x is a set, which cannot be saved: use") and f"on rank 1, {second}" in first
    assert not list(tmp_path.iterdir())


FROZEN = {
    "ddp": (recipes.ddp(8), 2, 1),
    "ab": (AB, 2, 1),
    "local_sgd": (LOCAL, 2, 1),
    "local_sgd in groups": (LOCAL, 4, 2),
    "hidden": (recipes.diloco(16, every=8, delay=4, fragments=2), 2, 1),
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_parameter_that_changes_on_one_worker_is_named(name: str) -> None:
    recipe, workers, group_size = FROZEN[name]

    def work(comm: Communicator) -> None:
        model = build("mlp")
        model.get_parameter("2.bias").requires_grad_(False)
        loop = Loop(comm, recipe, model)
        loop.run(2)
        if comm.rank == 1:
            with torch.no_grad():
                model.get_parameter("2.bias").add_(1)
        loop.run()

    first, *_ = told(workers, work, group_size=group_size)
    assert isinstance(first, RanksDisagreeError) and "2.bias " in str(first) and "rank 1" in str(first)


def test_a_frozen_parameter_that_changes_everywhere_may() -> None:
    def work(comm: Communicator) -> str:
        model = build("mlp")
        model.get_parameter("2.bias").requires_grad_(False)
        loop = Loop(comm, LOCAL, model)
        loop.run(2)
        with torch.no_grad():
            model.get_parameter("2.bias").mul_(0.5)
        return weights_digest(loop.run())

    assert len(set(run_in_process(2, work))) == 1


def test_marks_of_no_scope_are_a_loops_own(tmp_path: Path) -> None:
    """A state may hold such names for other reasons."""

    def work(comm: Communicator) -> Any:
        state = {
            "w": {"a": torch.ones(1)},
            "w_same_on": "galaxy",
            "v": [torch.ones(1)],
            "v_same_on": "world",
            "n_same_on": 3,
        }
        checkpoint.save(tmp_path, 1, state, comm)
        found = checkpoint.latest(tmp_path, comm)
        assert found is not None
        return found.states[0]["w_same_on"]

    assert run_in_process(2, work) == ["galaxy", "galaxy"]
