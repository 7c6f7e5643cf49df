"""A step that is saved again, and what a loop may hold beside the engine."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.optim.lr_scheduler as schedulers

from abtrain import ABTraining, FixedRank, recipes, weights_digest
from abtrain import failpoints as faults
from abtrain.checkpoint import store as checkpoint
from abtrain.checkpoint import tidying
from abtrain.comm.communicator import Communicator, SingleProcess
from abtrain.comm.in_process import run_in_process
from abtrain.errors import CheckpointError
from tests.cases import batch, build
from tests.faults.loops import told


def value(folder: Path) -> float:
    found = checkpoint.latest(folder, SingleProcess())
    assert found is not None
    return float(found.states[0]["x"])


def save(folder: Path, step: int, x: float, keep: int = 1) -> None:
    checkpoint.save(folder, step, {"x": torch.tensor(x)}, SingleProcess(), keep=keep)


class Crash(BaseException):
    """As if the process had ended here."""


MOMENTS = ("prepare", "write", "fsync", "fsync", "manifest", "fsync", "rename", "replace", "prune")


@pytest.mark.parametrize("moment", range(len(MOMENTS)), ids=[f"{i} {point}" for i, point in enumerate(MOMENTS)])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_while_a_step_is_saved_again_loses_neither(
    moment: int, keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 9, 0.5, keep=2)
    save(tmp_path, 10, 1.0, keep=2)
    passed: list[str] = []

    def crash(rank: int, step: int, name: str) -> None:
        passed.append(name.removeprefix("checkpoint."))
        if len(passed) == moment + 1:
            raise Crash

    for module in (checkpoint, tidying):
        monkeypatch.setattr(module, "fail_at", crash)
    # Nothing is left to prune where two are kept.
    if keep == 2 and MOMENTS[moment] == "prune":
        save(tmp_path, 10, 2.0, keep)
    else:
        with pytest.raises(Crash):
            save(tmp_path, 10, 2.0, keep)
    monkeypatch.undo()
    assert value(tmp_path) == (2.0 if moment >= MOMENTS.index("replace") else 1.0)
    # And neither the next save nor the same one is in the way.
    save(tmp_path, 10, 3.0, keep=1)
    assert value(tmp_path) == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000010"]


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize(("point", "left"), [("write", 1.0), ("manifest", 1.0), ("rename", 1.0), ("replace", 2.0)])
def test_a_disk_that_fails_while_a_step_is_saved_again(
    error: str, point: str, left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10, 1.0)
    monkeypatch.setattr(faults, "_planned", faults.parse(f"{error} 0 10 checkpoint.{point}"))
    with pytest.raises(CheckpointError, match="step 10 could not be written"):
        save(tmp_path, 10, 2.0)
    assert value(tmp_path) == left
    save(tmp_path, 11, 4.0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000011"]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_saved_again_takes_the_place_of_what_was(workers: int, tmp_path: Path) -> None:
    def work(comm: Communicator) -> float:
        for x in (1.0, 2.0, 3.0):
            checkpoint.save(tmp_path, 10, {"x": torch.tensor(x + comm.rank)}, comm, keep=2)
        found = checkpoint.latest(tmp_path, comm)
        assert found is not None
        return float(found.states[0]["x"])

    assert run_in_process(workers, work) == [3.0 + rank for rank in range(workers)]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000010"]


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [3, 7, 11]),
    "MultiStepLR with a step twice": lambda o: schedulers.MultiStepLR(o, [3, 7, 7, 11]),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 20),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.02, total_steps=40),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.001, 0.01, step_size_up=4),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.MultiStepLR(o, [2, 4])], [5]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o), schedulers.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_loop_continues_with_its_schedule(name: str, tmp_path: Path) -> None:
    recipe = recipes.ab_outer(16, every=4, warmup_steps=8, rank_rule=FixedRank(3))

    def start() -> tuple[ABTraining, Any]:
        model = build("mlp", torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        return ABTraining(model, optimizer, recipe), SCHEDULES[name](optimizer)

    def run(ab: ABTraining, schedule: Any, until: int) -> str:
        while ab.steps_done < until:
            x, y = batch("mlp", 0, ab.steps_done, torch.float32)
            F.cross_entropy(ab(x), y).backward()
            ab.optimizer.step()
            schedule.step()
            ab.optimizer.zero_grad()
            ab.step()
        return weights_digest(ab.dense_state_dict())

    ab, schedule = start()
    run(ab, schedule, 6)
    state = {"ab": ab.state_dict(), "scheduler": schedule.state_dict()}
    checkpoint.save(tmp_path, ab.steps_done, state, ab.communicator)
    wanted = run(ab, schedule, 16)
    ab, schedule = start()
    found = checkpoint.latest(tmp_path, ab.communicator)
    assert found is not None
    ab.load_state_dict(found.states[0]["ab"])
    schedule.load_state_dict(found.states[0]["scheduler"])
    assert run(ab, schedule, 16) == wanted


KEPT: dict[str, tuple[Any, Any]] = {
    "whole numbers as keys": ({1: "a", 2: {3: torch.ones(2)}}, {1: "a", 2: {3: torch.ones(2)}}),
    "keys of all kinds": ({None: 1, True: 2, 0.5: 3, "x": 4}, {None: 1, True: 2, 0.5: 3, "x": 4}),
    "a key that is infinite": ({math.inf: 1}, {math.inf: 1}),
    "a slash in a key": ({"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}, None),
    "keys like our own": ({"$tensor": 1, "$number": "nan", "$items": [], "$same": "world"}, None),
    "a counter": (Counter({3: 2, 5: 1}), Counter({3: 2, 5: 1})),
    "a whole number of numpy": (np.int64(3), 3),
    "a float of numpy": (np.float32(0.5), 0.5),
    "a truth of numpy": (np.bool_(True), True),
    "numbers of numpy in a dict": ({"best": np.float64(1.5), np.int32(2).item(): [np.uint8(7)]}, {"best": 1.5, 2: [7]}),
    "a conjugate view": (torch.tensor([1 + 2j, 3 - 1j]).conj(), torch.tensor([1 - 2j, 3 + 1j])),
    "a negative view": (torch.tensor([1 + 2j]).conj().imag, torch.tensor([-2.0])),
    "a conjugate scalar": (torch.tensor(1 + 2j).conj(), torch.tensor(1 - 2j)),
    "an expanded tensor": (torch.ones(1).expand(4), torch.ones(4)),
    "a transposed tensor": (torch.arange(6.0).view(2, 3).T, torch.arange(6.0).view(2, 3).T.contiguous()),
    "the state of a generator": (torch.random.get_rng_state(), torch.random.get_rng_state()),
    "the state of Python's generator": (random.Random(1).getstate()[1][:3], list(random.Random(1).getstate()[1][:3])),
}


def equal(one: Any, other: Any) -> bool:
    if isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(other, dict):
        return type(one) is type(other) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in other)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_loop_holds_comes_back(name: str, workers: int, tmp_path: Path) -> None:
    given, wanted = KEPT[name]

    def work(comm: Communicator) -> Any:
        checkpoint.save(tmp_path, 1, {"x": given}, comm)
        found = checkpoint.latest(tmp_path, comm)
        assert found is not None
        return found.states[0]["x"]

    for found in run_in_process(workers, work):
        assert equal(found, given if wanted is None else wanted)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "NAdam": torch.optim.NAdam,
    "Rprop": torch.optim.Rprop,
    "Adadelta": torch.optim.Adadelta,
    "ASGD": torch.optim.ASGD,
    "Adamax": torch.optim.Adamax,
    "a rate as a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
def test_any_optimizer_of_torch_loads(name: str, kind: str) -> None:
    def start(comm: Communicator) -> ABTraining:
        model = build(kind, torch.float32)
        return ABTraining(model, OPTIMIZERS[name](model.parameters()), recipes.ddp(8), communicator=comm)

    def run(ab: ABTraining, until: int) -> str:
        while ab.steps_done < until:
            x, y = batch(kind, ab.communicator.rank, ab.steps_done, torch.float32)
            F.cross_entropy(ab(x), y).backward()
            ab.optimizer.step()
            ab.optimizer.zero_grad()
            ab.step()
        return weights_digest(ab.dense_state_dict())

    def work(comm: Communicator) -> bool:
        ab = start(comm)
        run(ab, 4)
        state = copy.deepcopy(ab.state_dict())
        wanted = run(ab, 8)
        again = start(comm)
        again.load_state_dict(state)
        return run(again, 8) == wanted

    assert run_in_process(2, work) == [True, True]


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("here", DTYPES, ids=str)
@pytest.mark.parametrize("there", DTYPES, ids=str)
@pytest.mark.parametrize("step", [6, 10])
def test_a_state_of_another_dtype_is_refused(there: torch.dtype, here: torch.dtype, step: int) -> None:
    """Also while weights are factored."""
    recipe = recipes.ab_outer(16, every=4, warmup_steps=8, rank_rule=FixedRank(3))

    def start(comm: Communicator, dtype: torch.dtype) -> ABTraining:
        model = build("mlp", dtype)
        return ABTraining(model, torch.optim.SGD(model.parameters(), lr=1e-2), recipe, communicator=comm)

    def work(comm: Communicator) -> None:
        ab = start(comm, there)
        while ab.steps_done < step:
            x, y = batch("mlp", comm.rank, ab.steps_done, there)
            F.cross_entropy(ab(x).float(), y).backward()
            ab.optimizer.step()
            ab.optimizer.zero_grad()
            ab.step()
        start(comm, here).load_state_dict(ab.state_dict())

    if here == there:
        run_in_process(2, work)
    else:
        words = (
            f"is a tensor of {there} and shape (16, {10 if step == 6 else 3}), not a dense tensor of {here} of shape"
        )
        assert all(isinstance(error, CheckpointError) and words in str(error) for error in told(2, work))
