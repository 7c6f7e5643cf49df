"""Many small tensors merge like one large one: what is read and written, and in how many operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from abtrain import ABTraining, WeightSync, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.comm.stages import finish
from abtrain.merging.held import Held
from abtrain.merging.merge_input import MergeInput
from abtrain.merging.merger import Merger
from abtrain.merging.store import Layout, Store
from abtrain.recipes.merges import Mean, MergeRule, Outer


def several(count: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {str(i): torch.randn(i % 4, 3, generator=generator).to(dtype) for i in range(count)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [1, 5, 50])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_written_is_read(dtype: torch.dtype, count: int, transposed: bool) -> None:
    held = Held(several(count, dtype))
    if transposed:
        held["0"] = torch.zeros(3, 4, dtype=dtype).T
    for batch in held.batches():
        values = torch.arange(float(sum(shape.numel() for shape in batch.shapes)))
        held.write(batch, values)
        assert torch.equal(held.flat(batch), values.to(dtype))
        assert torch.equal(torch.cat([held[name].reshape(-1) for name in batch.names]), values.to(dtype))


def test_a_store_fills_up_with_zeros_and_keeps_what_was_set() -> None:
    held = Held(several(20))
    (batch,) = held.batches()
    store = Store(Layout(held))
    assert store.flat(batch) is None
    store["3"] = torch.ones_like(held["3"])
    expected = torch.cat([torch.full((held[name].numel(),), float(name == "3")) for name in held])
    flat = store.flat(batch)
    assert flat is not None and torch.equal(flat, expected)
    store.put(batch, 2 * expected)
    store.add(batch, torch.ones_like(expected))
    assert torch.equal(torch.cat([store[name].view(-1) for name in held]), 2 * expected + 1)
    store.lay_out(Layout({name: held[name] for name in ("3", "7")}))
    assert sorted(store) == ["3", "7"] and bool((store["3"] == 3).all())


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(comm: Communicator, count: int, rule: MergeRule, wire: str) -> int:
    """Returns the number of operations in the third merge of tensors with 1,200 numbers in all."""
    held = Held({str(i): torch.zeros(1200 // count) for i in range(count)})
    merger = Merger(comm)
    merger.begin(held)
    for _ in range(3):
        torch._foreach_add_(list(held.values()), float(comm.rank))
        with Counting() as counting:
            finish(merger.merge(MergeInput(lambda: held, WeightSync(1, rule, wire), {})))
    return counting.count


@pytest.mark.parametrize("rule", [Mean(), Outer()])
@pytest.mark.parametrize("wire", ["fp32", "int4"])
def test_many_tensors_take_no_more_operations_than_one(rule: MergeRule, wire: str) -> None:
    def work(comm: Communicator) -> tuple[int, int]:
        return operations(comm, 1, rule, wire), operations(comm, 300, rule, wire)

    assert all(many <= one + 3 for one, many in run_in_process(2, work))


class Parallel(nn.ModuleList):
    """Adds up what layers compute."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self]).sum(0)


@pytest.mark.parametrize("layers", [20, 600])
@pytest.mark.parametrize("group_size", [1, 2])
def test_parameters_that_get_other_data_merge_as_they_are_then(group_size: int, layers: int) -> None:
    def work(comm: Communicator) -> Tensor:
        model = Parallel(nn.Linear(2, 2) for _ in range(layers))
        for i, parameter in enumerate(model.parameters()):
            nn.init.constant_(parameter, i)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        ab = ABTraining(model, optimizer, recipes.local_sgd(4, every=1, wire="fp32"), communicator=comm)
        for _ in range(4):
            ab(torch.zeros(1, 2)).sum().backward()
            optimizer.step()
            for parameter in model.parameters():
                parameter.data = parameter.data + comm.topology.group_of(comm.rank)
            ab.step()
        return torch.stack([parameter.detach().flatten()[:2] for parameter in model.parameters()])

    # Of two groups, one adds 1 in each of four rounds, and the other 0.
    expected = torch.arange(2.0 * layers)[:, None].expand(2 * layers, 2) + 4 * 0.5
    for result in run_in_process(2 * group_size, work, group_size=group_size):
        assert torch.equal(result, expected)
