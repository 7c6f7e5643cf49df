"""Modes that a caller has switched on change nothing of what abtrain computes or keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from abtrain import ABTraining, FixedRank, recipes, weights_digest
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.modes import own_modes
from tests.cases import SCHEDULE, adamw, batch, build
from tests.gloo import run_gloo


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def anomaly() -> Iterator[None]:
    before = torch.is_anomaly_enabled()
    torch.autograd.set_detect_anomaly(True)
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "anomaly": anomaly,
}

RECIPES = {
    "ab": recipes.ab(15, **SCHEDULE, sigma_cutoff=0.2, optimizer_state="project"),
    "outer": recipes.ab_outer(16, every=4, warmup_steps=8, rank_rule=FixedRank(3), wire="int8", delay=2),
    "ternary": recipes.local_sgd(12, every=3, wire="ternary:int8", rebound_steps=2),
}


def train(comm: Communicator, recipe: str, mode: str | None) -> str:
    """All calls of abtrain are made in the mode; forward pass, backward pass and optimizer are the user's own."""
    enter = MODES[mode] if mode else own_modes
    model = build("attention", torch.float32)
    optimizer = adamw(model.parameters())
    with enter():
        ab = ABTraining(model, optimizer, RECIPES[recipe], communicator=comm)
    while not ab.finished:
        x, y = batch("attention", comm.rank, ab.steps_done, torch.float32)
        loss = F.cross_entropy(ab(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with enter():
            ab.step(loss.detach())
            if ab.steps_done in (6, 11):
                ab.load_state_dict(ab.state_dict())
            if ab.steps_done % 5 == 0:
                with ab.merged():
                    pass
    kept = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))]
    assert not any(tensor.is_inference() or tensor.device.type == "meta" for tensor in kept)
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32 and not torch.are_deterministic_algorithms_enabled()
    with enter():
        return weights_digest(ab.dense_state_dict())


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_mode_changes_what_is_computed(recipe: str) -> None:
    wanted = run_gloo(2, train, recipe, None)
    assert {mode: run_gloo(2, train, recipe, mode) for mode in MODES} == dict.fromkeys(MODES, wanted)


def step_under(comm: Communicator, mode: str | None) -> str:
    """The optimizer steps in the mode too, and with it abtrain's hooks."""
    enter = MODES[mode] if mode else own_modes
    model = build("mlp", torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = recipes.ab_outer(16, every=4, warmup_steps=8, rank_rule=FixedRank(3))
    ab = ABTraining(model, optimizer, recipe, communicator=comm)
    while not ab.finished:
        x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
        F.cross_entropy(ab(x), y).backward()
        with enter():
            optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return weights_digest(ab.dense_state_dict())


@pytest.mark.parametrize("mode", ["autocast", "no_grad", "float64", "bfloat16", "deterministic", "anomaly"])
def test_hooks_of_the_optimizer_run_in_their_own_modes(mode: str) -> None:
    assert run_gloo(2, step_under, mode) == run_gloo(2, step_under, None)


def test_an_average_is_looked_at_in_the_callers_modes() -> None:
    def work(comm: Communicator) -> None:
        model = build("mlp", torch.float32)
        optimizer = adamw(model.parameters())
        ab = ABTraining(model, optimizer, recipes.local_sgd(8, every=4), communicator=comm)
        ab(batch("mlp", comm.rank, 0, torch.float32)[0]).sum().backward()
        optimizer.step()
        ab.step()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), ab.merged() as average:
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
            assert average(torch.ones(1, 10)).dtype == torch.bfloat16

    run_in_process(2, work)


def test_threads_that_leave_in_any_order_put_the_callers_setting_back() -> None:
    with default_dtype(torch.float64):
        first, second = own_modes(), own_modes()
        first.__enter__()
        second.__enter__()
        assert torch.get_default_dtype() == torch.float32
        first.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32
        second.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float64
