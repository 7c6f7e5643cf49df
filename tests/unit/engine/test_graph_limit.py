"""Compiled models: one graph for each set of ranks and trained factors, and the same numbers as without a compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abtrain import FixedRank, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.torch_distributed import SingleProcess
from abtrain.recipes.recipe import Recipe
from tests.cases import build
from tests.faults.loops import Loop
from tests.gloo import run_gloo


@dataclass(frozen=True)
class Wandering:
    """A rank rule whose ranks hardly ever return, except as multiples of `rank_multiple`."""

    rank_multiple: int = 1

    def problems(self) -> list[str]:
        return []

    def __call__(self, singular_values: Sequence[float], m: int, n: int) -> int:
        k = 1 + int(singular_values[0] * 1e6) % 4
        return min(-(-k // self.rank_multiple) * self.rank_multiple, m, n)


CYCLES = 10
SHORT = {"warmup_steps": 1, "ab_steps": 1, "rebound_steps": 1, "lr_rebound_steps": 0}
OUTER = {"every": 2, "warmup_steps": 4, "rank_rule": FixedRank(3)}
RECIPES = {
    "ddp": recipes.ddp(4),
    "diloco": recipes.diloco(8, every=2),
    "ab": recipes.ab(1 + 2 * CYCLES, **SHORT, rank_rule=Wandering()),
    "ab fixed": recipes.ab(1 + 2 * CYCLES, **SHORT, rank_rule=FixedRank(3)),
    "ab multiple": recipes.ab(1 + 2 * CYCLES, **SHORT, rank_rule=Wandering(rank_multiple=4)),
    "ab_outer": recipes.ab_outer(10, **OUTER),
    "ab_local": recipes.ab_local(10, **OUTER),
}


class Compiler:
    """A backend of torch.compile that runs graphs eagerly and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def wrapped(model: nn.Module, backend: Compiler) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def in_place(model: nn.Module, backend: Compiler) -> nn.Module:
    model.compile(backend=backend, fullgraph=True)
    return model


def by_module(model: nn.Module, backend: Compiler) -> nn.Module:
    for module in model.children():
        module.compile(backend=backend, fullgraph=True)
    return model


WAYS = {"wrapped": wrapped, "in place": in_place, "by module": by_module}


def trained(comm: Communicator, recipe: Recipe, model: nn.Module) -> tuple[list[Tensor], set[str]]:
    """The dense weights at the end, and the forms that the model had: ranks, and trained factors."""
    loop, forms = Loop(comm, recipe, model), set()
    while not loop.ab.finished:
        trains = [p.requires_grad for p in loop.model.parameters()]
        forms.add(str((trains, [tuple(p.shape) for p in loop.model.parameters()])))
        loop.step()
    return [tensor.clone() for tensor in loop.ab.dense_state_dict().values()], forms


def compiled(comm: Communicator, name: str, way: str) -> tuple[int, int, bool]:
    """The graphs, the forms of the model, and whether the weights equal those of the eager model."""
    torch._dynamo.reset()
    compiler = Compiler()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=8):
        weights, forms = trained(comm, RECIPES[name], WAYS[way](build("mlp"), compiler))
    torch._dynamo.reset()
    eager, _ = trained(comm, RECIPES[name], build("mlp"))
    return compiler.graphs, len(forms), all(map(torch.equal, weights, eager))


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "wrapped") for name in RECIPES), ("ab", "in place"), ("ab_outer", "in place")]
)
def test_each_form_of_the_model_is_compiled_once(name: str, way: str) -> None:
    for graphs, forms, equal in run_gloo(2, compiled, name, way):
        assert graphs == forms and equal
        if name == "ab":
            assert forms > 8
        else:
            assert forms == (1 if name in ("ddp", "diloco") else 2)


# Any input that is not a leaf, as torch.compile asks it for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_modules_that_are_compiled_one_by_one_stay_compiled() -> None:
    graphs, _forms, equal = compiled(SingleProcess(), "ab", "by module")
    assert graphs > 8 and equal


def test_the_limit_stays_if_nothing_is_compiled() -> None:
    with torch._dynamo.config.patch(recompile_limit=8):
        trained(SingleProcess(), RECIPES["ab"], build("mlp"))
        assert torch._dynamo.config.recompile_limit == 8
