"""Optimizers that talk to other workers are known by their class, their groups, or their code; others are not."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed as renamed
from torch import nn
from torch.distributed import all_reduce as summed
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import SGD, Optimizer

from abtrain.engine.communicating_optimizers import communicates


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2))]


OF_TORCH = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)]


@pytest.mark.parametrize("kind", [kind for kind in OF_TORCH if kind is not Optimizer])
def test_optimizers_of_pytorch_send_nothing(kind: Any) -> None:
    optimizer = kind(weights())
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps optimizer.step
    assert communicates(optimizer) == ""


class Plain(SGD):
    """Named as data parallel ones are, with a distance for a variable."""

    def step(self, closure: Any = None) -> Any:
        dist = torch.cdist(torch.ones(1, 2), torch.ones(1, 2))
        self.broadcast(dist)
        return super().step(closure)

    def broadcast(self, value: Any) -> None:
        self.state["broadcast"] = value


def test_an_optimizer_that_names_something_likewise_sends_nothing() -> None:
    assert communicates(Plain(weights())) == ""


@pytest.mark.parametrize("name", ["ZeroRedundancyOptimizer", "PostLocalSGDOptimizer"])
def test_those_of_torch_distributed_are_known_by_their_class(name: str) -> None:
    kind = getattr(__import__("torch.distributed.optim", fromlist=[name]), name)
    assert name in communicates(kind.__new__(kind))


@pytest.mark.parametrize(
    ("module", "known"),
    [
        ("horovod.torch.optimizer", True),
        ("deepspeed.runtime.fp16.onebit.adam", True),
        ("deepspeed.ops.adam.fused_adam", False),
        ("hivemind.optim.optimizer", True),
        ("torchft.optim", True),
        ("torchfts.optim", False),
    ],
)
def test_those_of_other_libraries_are_known_by_their_module(module: str, known: bool) -> None:
    optimizer = type("Adam", (SGD,), {"__module__": module})(weights())
    assert communicates(optimizer) == (f"it is a {module}.Adam" if known else "")
    child = type("Mine", (type(optimizer),), {"__module__": "mine"})(weights())
    assert bool(communicates(child)) == known


@pytest.mark.parametrize("group", [dist.ProcessGroup, DeviceMesh])
@pytest.mark.parametrize("place", ["attribute", "list", "dict", "inside", "param_groups"])
def test_a_group_of_processes_gives_them_away(group: Any, place: str) -> None:
    held = group.__new__(group) if group is DeviceMesh else group(0, 1)
    optimizer: Any = SGD(weights(), lr=0.1)
    if place == "attribute":
        optimizer.process_group = held
    elif place == "list":
        optimizer.groups = [None, held]
    elif place == "dict":
        optimizer.groups = {"shard": held}
    elif place == "inside":
        optimizer.averager = SimpleNamespace(period=4, process_group=held)
    else:
        optimizer.param_groups[0]["mesh"] = held
    assert f"is a {group.__name__}" in communicates(optimizer)


def test_a_model_with_a_group_that_an_optimizer_holds_says_nothing() -> None:
    optimizer: Any = SGD(weights(), lr=0.1)
    optimizer.model = nn.SyncBatchNorm(2, process_group=dist.ProcessGroup(0, 1))
    assert communicates(optimizer) == ""


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Gathers(SGD):
    """As Keller Jordan's Muon does."""

    @torch.no_grad()
    @decorated
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            padded = group["params"] + [torch.empty_like(group["params"][-1])] * dist.get_world_size()
            dist.all_gather(padded[:2], padded[dist.get_rank()])


class ByAnotherName(SGD):
    def step(self, closure: Any = None) -> Any:
        [renamed.all_reduce(p.grad) for p in self.param_groups[0]["params"]]


class ByAFunction(SGD):
    def step(self, closure: Any = None) -> Any:
        def send() -> None:
            summed(self.param_groups[0]["params"][0])

        send()


class ByAnImportOfItsOwn(SGD):
    def step(self, closure: Any = None) -> Any:
        import torch.distributed as mine

        mine.broadcast(self.param_groups[0]["params"][0], 0)


class ByAHelper(SGD):
    def step(self, closure: Any = None) -> Any:
        send_all(self.param_groups)


def send_all(groups: Any) -> None:
    torch.distributed.reduce_scatter_tensor(groups[0]["params"][0], groups[0]["params"][0])


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Gathers, "Gathers.step calls all_gather"),
        (ByAnotherName, "ByAnotherName.step calls all_reduce"),
        (ByAnImportOfItsOwn, "ByAnImportOfItsOwn.step calls broadcast"),
        (ByAHelper, "ByAHelper.step calls reduce_scatter_tensor"),
    ],
)
def test_collectives_in_their_code_give_them_away(kind: Any, why: str) -> None:
    assert communicates(kind(weights(), lr=0.1)) == why
    child = type("Child", (kind,), {})(weights(), lr=0.1)
    assert communicates(child) == why


def test_a_collective_that_was_imported_under_another_name_does_too() -> None:
    assert communicates(ByAFunction(weights(), lr=0.1)) == "ByAFunction.step calls all_reduce"


@pytest.mark.parametrize("in_use", [False, True])
def test_collectives_for_sharded_models_alone_count_where_they_are_in_use(in_use: bool) -> None:
    """D-Adaptation and Prodigy sum over shards, and over nothing else."""
    optimizer = Gathers(weights(), lr=0.1)
    optimizer.param_groups[0]["fsdp_in_use"] = in_use
    assert bool(communicates(optimizer)) == in_use


def test_an_optimizer_inside_another_is_looked_at_too() -> None:
    outer: Any = SGD(weights(), lr=0.1)
    outer.base = Gathers(weights(), lr=0.1)
    outer.base.wrapper = outer
    assert communicates(outer) == "Gathers.step calls all_gather, at .base"
