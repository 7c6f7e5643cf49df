"""State of merges in host memory. A subclass of Tensor stands for another device: it refuses to meet other tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from abtrain import FixedRank, Recipe, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.errors import ConfigurationError
from abtrain.merging.outer_state import OuterState
from tests.unit.engine.test_saved_state import Loop

RANK: dict[str, Any] = {"rank_rule": FixedRank(3), "warmup_steps": 4, "every": 2}
RECIPES = {
    "local_sgd": recipes.local_sgd(6, every=2, outer_device="cpu"),
    "diloco": recipes.diloco(6, every=2, wire="int4", outer_device="cpu"),
    "hidden": recipes.diloco(9, every=4, delay=2, fragments=2, wire="int4", outer_device="cpu"),
    "ab": recipes.ab(14, warmup_steps=2, ab_steps=4, rebound_steps=2, every=2, wire="int8", outer_device="cpu"),
    "ab_local": recipes.ab_local(8, **RANK, outer_device="cpu"),
    "refactored": recipes.ab_outer(
        20, **RANK, wire="int8", refactor_every=2, rebound_steps=2, optimizer_state="project", outer_device="cpu"
    ),
}


def tensors_among(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_among(value)


class Host(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        met = list(tensors_among([*args, *(kwargs or {}).values()]))
        mixed = any(type(one) is Host for one in met) and any(type(one) is not Host for one in met)
        if mixed and func is not Tensor.copy_:
            raise AssertionError(f"{func} computes with tensors of two devices")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    room = OuterState._room

    def create(self: OuterState, like: Tensor, beside: torch.device, dtype: torch.dtype) -> Tensor:
        return room(self, like.as_subclass(Tensor), beside, dtype).as_subclass(Host)

    monkeypatch.setattr(OuterState, "_room", create)
    monkeypatch.setattr(OuterState, "near", lambda self, tensor, device: tensor.as_subclass(Tensor))
    monkeypatch.setattr(OuterState, "_home", lambda self, tensor: tensor.as_subclass(Host))


def trained(comm: Communicator, recipe: Recipe) -> tuple[Any, list[Tensor]]:
    loop = Loop(comm, recipe)
    loop.run(recipe.total_steps)
    merger = loop.ab._rounds.merger
    state = [*merger.anchors.values(), *merger.momentum.values(), *merger.residuals.values()]
    return loop.outcome(), state


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_all_state_is_on_the_outer_device_and_no_operation_mixes_devices(
    name: str, group_size: int, request: pytest.FixtureRequest
) -> None:
    workers = 2 * group_size
    beside = run_in_process(workers, lambda comm: trained(comm, RECIPES[name])[0], group_size=group_size)
    request.getfixturevalue("host")
    found = run_in_process(workers, lambda comm: trained(comm, RECIPES[name]), group_size=group_size)
    assert [outcome for outcome, _ in found] == beside
    assert all(state and all(type(tensor) is Host for tensor in state) for _, state in found)


@pytest.mark.parametrize("places", [("cpu", None), (None, "cpu")])
def test_checkpoints_do_not_depend_on_the_outer_device(places: tuple[str | None, str | None]) -> None:
    before, after = (recipes.diloco(6, every=2, wire="int4", outer_device=place) for place in places)

    def resumed(comm: Communicator, first: Recipe, then: Recipe) -> Any:
        loop = Loop(comm, first)
        loop.run(3)
        fresh = Loop(comm, then)
        fresh.ab.load_state_dict(loop.ab.state_dict())
        fresh.optimizer.load_state_dict(loop.optimizer.state_dict())
        fresh.schedule.load_state_dict(loop.schedule.state_dict())
        fresh.run(6)
        return fresh.outcome()[0]

    whole = run_in_process(2, lambda comm: trained(comm, before)[0][0])
    assert run_in_process(2, lambda comm: resumed(comm, before, after)) == whole


def test_workers_may_have_different_outer_devices() -> None:
    one, other = recipes.diloco(4, every=2), recipes.diloco(4, every=2, outer_device="cpu")
    assert one == other
    digests = run_in_process(2, lambda comm: trained(comm, other if comm.rank else one)[0][0])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("build", [recipes.local_sgd, recipes.diloco, recipes.ab, recipes.ab_local, recipes.ab_outer])
def test_an_unknown_outer_device_is_refused_with_a_remedy(build: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"outer_device='gpu' is unknown: use 'cpu'"):
        build(100, outer_device="gpu")


def test_the_option_on_the_command_line() -> None:
    assert recipes.from_text("ab_local:outer_device=cpu", 100).outer_device == "cpu"
    assert recipes.from_text("diloco", 100).outer_device is None
