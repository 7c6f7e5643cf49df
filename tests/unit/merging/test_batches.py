"""Merges go batch by batch: what a batch holds, and that batches change no outcome."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from abtrain import FixedRank
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.comm.stages import finish
from abtrain.errors import NonFiniteError, UsageError
from abtrain.merging import batch_merge
from abtrain.merging.batches import cut_into_batches
from abtrain.merging.merge_input import MergeInput
from abtrain.merging.merger import Merger
from abtrain.merging.wires.direct import DirectWire
from abtrain.merging.wires.flat import WholeAverage
from abtrain.recipes.sync import WeightSync
from tests.cases import build, largest_difference, train

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8)


@given(SHAPES, st.integers(1, 40), st.booleans())
def test_batches_hold_every_number_once(shapes: list[list[int]], capacity: int, whole: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("abtrain.merging.batches.CAPACITY", capacity)
        dtypes = (torch.float32, torch.bfloat16)
        tensors = {str(i): torch.randn(shape).to(dtypes[i % 2]) for i, shape in enumerate(shapes)}
        copied = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
        for batch in cut_into_batches(tensors, whole=whole):
            flat = batch.flat(tensors)
            assert flat.numel() <= capacity or len(batch.ranges) == 1
            batch.write(copied, flat)
        assert all(torch.equal(copied[name], tensors[name]) for name in tensors)


def test_only_tensors_of_one_kind_share_a_batch() -> None:
    tensors = {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.float64), "c": torch.ones(4), "d": torch.ones(1)}
    names = [batch.names for batch in cut_into_batches(tensors, {"a": 1.0, "c": 2.0, "d": 1.0})]
    assert names == [["a", "d"], ["b"], ["c"]]


def test_a_tensor_in_another_memory_format_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abtrain.merging.batches.CAPACITY", 10)
    tensors = {"conv": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)}
    (batch,) = cut_into_batches(tensors)
    copied = {"conv": torch.zeros_like(tensors["conv"])}
    batch.write(copied, batch.flat(tensors))
    assert torch.equal(copied["conv"], tensors["conv"])


CASES: dict[str, dict[str, Any]] = {
    "local_sgd": {"every": 4, "wire": "fp32"},
    "diloco": {"every": 4, "wire": "fp32", "delay": 2, "fragments": 2},
    "ab_outer": {"every": 4, "wire": "fp32", "warmup_steps": 8, "rank_rule": FixedRank(3)},
    "ab": {"merge": "trained_only"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("group_size", [1, 2])
def test_small_batches_have_the_outcome_of_large_ones(name: str, group_size: int, monkeypatch: Any) -> None:
    def run() -> list[dict[str, Tensor]]:
        return run_in_process(
            4, lambda comm: train(comm, build("mlp"), "mlp", name, steps=20, **CASES[name]), group_size=group_size
        )

    large = run()
    monkeypatch.setattr("abtrain.merging.batches.CAPACITY", 50)
    small = run()
    assert all(largest_difference(one, small[0]) == 0 for one in small)
    assert largest_difference(small[0], large[0]) < 1e-12


@pytest.mark.parametrize("wire", ["int4", "ternary"])
def test_errors_of_every_batch_are_kept(wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been merged and what is kept sum up to what all workers have changed."""
    monkeypatch.setattr("abtrain.merging.batches.CAPACITY", 640)
    shapes = {"w": (30, 60), "v": (20, 20), "b": (7,)}

    def work(comm: Communicator) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(comm.rank)
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        merger, moved = Merger(comm), {name: torch.zeros(shape) for name, shape in shapes.items()}
        merger.begin(tensors)
        for _ in range(4):
            for name, tensor in tensors.items():
                step = torch.randn(tensor.shape, generator=generator)
                tensor += step
                moved[name] += step
            finish(merger.merge(MergeInput(lambda: tensors, WeightSync(1, wire=wire), {})))
        return tensors, moved, merger.residuals

    results = run_in_process(3, work)
    for name in shapes:
        truth = sum(moved[name] for _, moved, _ in results) / 3
        kept = sum(residuals[name] for _, _, residuals in results) / 3
        torch.testing.assert_close(results[0][0][name] + kept, truth, rtol=1e-4, atol=1e-4)


def test_an_interrupted_merge_cannot_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abtrain.merging.batches.CAPACITY", 8)
    ordinary = batch_merge.BatchMerge.apply
    applied: dict[int, int] = {}

    def failing(self: Any, *args: Any) -> list[str]:
        applied[self.comm.rank] = applied.get(self.comm.rank, 0) + 1
        if applied[self.comm.rank] == 2:
            raise OSError("the link is gone")
        return ordinary(self, *args)

    monkeypatch.setattr(batch_merge.BatchMerge, "apply", failing)

    def work(comm: Communicator) -> None:
        tensors = {"w": torch.zeros(40)}
        merger = Merger(comm)
        merger.begin(tensors)
        tensors["w"] += 1
        with pytest.raises(OSError, match="gone"):
            finish(merger.merge(MergeInput(lambda: tensors, WeightSync(1), {})))
        with pytest.raises(UsageError, match=r"interrupted.*last checkpoint"):
            merger.state_dict()

    run_in_process(2, work)


class _Spoiling(DirectWire):
    """A wire with a fault: its averages are infinite."""

    def average_flat(self, numbers: Any, comm: Communicator) -> Any:
        average = (yield from super().average_flat(numbers, comm)).whole()
        return WholeAverage(average.mean + torch.inf, average.error)


def test_an_infinite_average_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abtrain.merging.merger.make_wire", lambda name, workers: _Spoiling(name))

    def work(comm: Communicator) -> None:
        tensors = {"w": torch.zeros(4)}
        merger = Merger(comm)
        merger.begin(tensors)
        with pytest.raises(NonFiniteError, match=r"average is not \(w\).*last checkpoint"):
            finish(merger.merge(MergeInput(lambda: tensors, WeightSync(1, wire="int4"), {})))

    run_in_process(2, work)
