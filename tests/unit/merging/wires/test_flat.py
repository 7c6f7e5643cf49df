"""Averages that are computed part by part: parts change no bit, and memory is used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.comm.stages import finish
from abtrain.memory import Recycler
from abtrain.merging.held import Held
from abtrain.merging.merge_input import MergeInput
from abtrain.merging.merger import Merger
from abtrain.merging.wires import flat, scratch
from abtrain.recipes.merges import Mean, MergeRule, Outer
from abtrain.recipes.sync import WeightSync

COUNT = 5_000


def merged(comm: Communicator, wire: str, rule: MergeRule) -> dict[str, Any]:
    """Returns the weights, momentum and residuals after three merges of a tensor and some small ones."""
    numbers = torch.Generator().manual_seed(comm.rank)
    held = Held({"w": torch.zeros(COUNT), **{str(i): torch.zeros(7) for i in range(20)}})
    merger = Merger(comm)
    merger.begin(held)
    for _ in range(3):
        for tensor in held.values():
            tensor += torch.randn(tensor.shape, generator=numbers)
        finish(merger.merge(MergeInput(lambda: held, WeightSync(1, rule, wire), {})))
    state = merger.state_dict()
    return {"weights": dict(held), **{kind: state[kind] for kind in ("anchors", "momentum", "residuals")}}


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int4", "ternary:int3"])
@pytest.mark.parametrize("rule", [Mean(), Outer()], ids=["mean", "outer"])
@pytest.mark.parametrize("workers", [2, 3])
def test_parts_change_no_bit(wire: str, rule: MergeRule, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> list[dict[str, dict[str, Tensor]]]:
        return run_in_process(workers, lambda comm: merged(comm, wire, rule))

    whole = results()
    monkeypatch.setattr(scratch, "_CACHED", 640)
    monkeypatch.setattr(flat, "PART", 300)
    for one, other in zip(whole, results(), strict=True):
        for kind, tensors in one.items():
            assert tensors.keys() == other[kind].keys()
            assert all(torch.equal(tensor, other[kind][name]) for name, tensor in tensors.items()), kind


def test_returned_memory_is_used_again_for_tensors_that_fit() -> None:
    memory, cpu = Recycler(), torch.device("cpu")
    large = memory.take(10, torch.float32, cpu)
    memory.give(large)
    assert memory.take(11, torch.float32, cpu).data_ptr() != large.data_ptr()
    assert memory.take(10, torch.float64, cpu).data_ptr() != large.data_ptr()
    again = memory.take(8, torch.float32, cpu)
    assert again.data_ptr() == large.data_ptr()
    assert again.shape == (8,)
    assert memory.take(8, torch.float32, cpu).data_ptr() != large.data_ptr()
