"""A model can be copied and saved between any two lines of the loop, and keeps nothing of abtrain after `close`."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from abtrain import ABTraining, FixedRank, Recipe, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.errors import UsageError
from tests.cases import SCHEDULE, adamw, batch, build, largest_difference
from tests.gloo import run_gloo

RECIPES = {
    "ddp": recipes.ddp(3),
    "solo": recipes.solo(3),
    "local_sgd": recipes.local_sgd(8, every=3, delay=2),
    "diloco": recipes.diloco(8, every=4, wire="int8"),
    "ab": recipes.ab(9, **SCHEDULE, rank_rule=FixedRank(2)),
    "ab_outer": recipes.ab_outer(9, every=3, warmup_steps=6, rank_rule=FixedRank(2)),
}


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


TYPES = [nn.Sequential, nn.BatchNorm1d, nn.Sequential, nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
"""Types of the dense model's modules, which copies have in every phase."""


def check_copies(model: nn.Module) -> None:
    for copied in (copy.deepcopy, pickled, saved):
        twin = copied(model)
        assert largest_difference(model.state_dict(), twin.state_dict()) == 0
        assert [type(module) for module in twin.modules()] == TYPES
        assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in twin.parameters())


def start(comm: Communicator, recipe: Recipe) -> tuple[nn.Module, Any, ABTraining]:
    model = nn.Sequential(nn.BatchNorm1d(10), build("mlp", torch.float32))
    optimizer = adamw(model.parameters())
    return model, optimizer, ABTraining(model, optimizer, recipe, communicator=comm)


def copy_everywhere(comm: Communicator, recipe: Recipe) -> None:
    model, optimizer, ab = start(comm, recipe)
    while not ab.finished:
        x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
        loss = F.cross_entropy(ab(x), y)
        check_copies(model)
        loss.backward()
        check_copies(model)
        optimizer.step()
        check_copies(model)
        copy.deepcopy(optimizer)
        optimizer.zero_grad()
        ab.step()
        check_copies(model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_is_copied_between_any_two_lines(recipe: str) -> None:
    run_in_process(2, lambda comm: copy_everywhere(comm, RECIPES[recipe]))


@pytest.mark.parametrize("recipe", [recipes.ddp(3), recipes.powersgd(4, rank=1)], ids=lambda recipe: recipe.name)
def test_on_gloo_likewise(recipe: Recipe) -> None:
    run_gloo(2, copy_everywhere, recipe)


def kept(model: nn.Module, optimizer: Any) -> list[Any]:
    """All that hooks and attributes could be left in."""
    modules = [(type(module), sorted(vars(module))) for module in model.modules()]
    of_modules = [[value for name, value in vars(m).items() if "hooks" in name] for m in model.modules()]
    of_parameters = [(sorted(vars(p)), p._backward_hooks, p._post_accumulate_grad_hooks) for p in model.parameters()]
    hooks = {name: len(value) for name, value in vars(optimizer).items() if "hooks" in name}
    return [
        modules,
        of_modules,
        of_parameters,
        sorted(vars(optimizer)),
        hooks,
        [sorted(g) for g in optimizer.param_groups],
    ]


def what_close_leaves(comm: Communicator, recipe: Recipe, steps: int) -> bool:
    model = nn.Sequential(nn.BatchNorm1d(10), build("mlp", torch.float32))
    optimizer = adamw(model.parameters())
    before = kept(model, optimizer)
    ab = ABTraining(model, optimizer, recipe, communicator=comm)
    while ab.steps_done < steps:
        x, y = batch("mlp", comm.rank, ab.steps_done, torch.float32)
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    ab.close()
    after = kept(model, optimizer)
    # No gradient is averaged from here on: one worker alone may train.
    if comm.rank == 0:
        F.cross_entropy(model(x), y).backward() if steps else model(torch.ones(2, 10)).sum().backward()
    return [_plain(one) for one in before] == [_plain(one) for one in after]


def _plain(value: Any) -> Any:
    """Hooks that were there and are gone leave an empty mapping."""
    return repr(value).replace("OrderedDict()", "None")


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("recipe", ["ddp", "solo", "local_sgd", "diloco", "ab"])
def test_nothing_is_left_after_close(recipe: str, steps: int) -> None:
    assert all(run_in_process(2, lambda comm: what_close_leaves(comm, RECIPES[recipe], steps)))


@pytest.mark.parametrize("steps", [0, 2])
def test_on_gloo_nothing_is_left_either(steps: int) -> None:
    assert all(run_gloo(2, what_close_leaves, RECIPES["ddp"], steps))


def test_a_closed_one_validates_and_does_not_train() -> None:
    model, _, ab = start(None, recipes.ddp(3))  # type: ignore[arg-type]
    ab.close()
    ab.close()
    with torch.no_grad():
        assert torch.equal(ab(torch.ones(2, 10)), model(torch.ones(2, 10)))
    with pytest.raises(UsageError, match="was closed"):
        ab(torch.ones(2, 10))
