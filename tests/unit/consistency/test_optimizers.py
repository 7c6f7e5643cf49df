"""Optimizer state that workers make equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from abtrain.comm import Communicator, run_in_process
from abtrain.consistency.nested_state import cannot_be_shared
from abtrain.consistency.optimizers import equalize_optimizers
from abtrain.lowrank.optimizers import Optimizers


def equalized(comm: Communicator, parameters: list[nn.Parameter], states: list[dict[str, Any]]) -> list[Any]:
    """Returns the states of an optimizer that began with these."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    optimizer.state.update(zip(parameters, states, strict=True))
    equalize_optimizers(Optimizers(optimizer), parameters, comm)
    return [dict(optimizer.state[parameter]) for parameter in parameters]


@pytest.mark.parametrize("order", [1, -1])
def test_a_key_may_be_a_tensor_for_one_parameter_and_a_number_for_another(order: int) -> None:
    def work(comm: Communicator) -> list[Any]:
        parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))]
        states: list[dict[str, Any]] = [{"trace": torch.full((2, 2), 1.0 + comm.rank)}, {"trace": 5.0 + comm.rank}]
        matrix, vector = equalized(comm, parameters[::order], states[::order])[::order]
        return [matrix["trace"].tolist(), vector["trace"]]

    assert run_in_process(2, work) == [[[[1.5, 1.5], [1.5, 1.5]], 6.0]] * 2


def test_a_worker_without_state_gets_negative_numbers_of_others() -> None:
    def work(comm: Communicator) -> float:
        own = {"level": torch.tensor(-2.0)} if comm.rank else {}
        (state,) = equalized(comm, [nn.Parameter(torch.zeros(2))], [own])
        return float(state["level"])

    assert run_in_process(2, work) == [-2.0] * 2


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({"helper": object()}, "'helper' (an object)"),
        ({"all": {"helper": [object()]}}, "0 (an object)"),
        ({torch.zeros(2): [1.0]}, "a list instead of a dict for a parameter"),
        ({torch.zeros(2): {frozenset(): 1.0}}, "a key that is a frozenset"),
        ({torch.zeros(2): {"step": 1}, "count": 3, None: [torch.zeros(2)]}, ""),
    ],
)
def test_state_that_cannot_be_shared_is_named(state: dict[Any, Any], problem: str) -> None:
    assert cannot_be_shared(state) == problem
