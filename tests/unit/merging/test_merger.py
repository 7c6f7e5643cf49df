"""Merge rules, against arithmetic done by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from abtrain import WeightSync
from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.comm.stages import finish
from abtrain.errors import NonFiniteError
from abtrain.merging.merge_input import MergeInput
from abtrain.merging.merger import Merger
from abtrain.recipes.merges import Mean, MergeRule, Outer, TrainedOnly

START = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
MOVES = [torch.tensor([0.3, 0.0, -0.6], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64)]
D = (MOVES[0] + MOVES[1]) / 2


def part(w: Tensor, sync: WeightSync, trainers: dict[str, list[bool]] | None = None) -> MergeInput:
    return MergeInput(lambda: {"w": w}, sync, trainers or {})


def rounds(comm: Communicator, rule: MergeRule, count: int, trainers: dict[str, list[bool]]) -> Tensor:
    """Every worker makes its own move in every round."""
    w = START.clone()
    merger = Merger(comm)
    merger.begin({"w": w})
    for _ in range(count):
        w += MOVES[comm.rank]
        finish(merger.merge(part(w, WeightSync(1, rule), trainers)))
    return w


def both(rule: MergeRule, count: int = 1, trainers: dict[str, list[bool]] | None = None) -> Tensor:
    one, other = run_in_process(2, lambda comm: rounds(comm, rule, count, trainers or {}))
    assert torch.equal(one, other)
    return one


@pytest.mark.parametrize(("workers", "wire"), [(2, "int4"), (3, "int3"), (5, "int3"), (6, "ternary:int3")])
def test_the_number_of_workers_chooses_the_wire(workers: int, wire: str) -> None:
    def merged(wire: str, comm: Communicator) -> Tensor:
        w = torch.zeros(100)
        merger = Merger(comm)
        merger.begin({"w": w})
        w += torch.randn(100, generator=torch.Generator().manual_seed(comm.rank))
        finish(merger.merge(part(w, WeightSync(1, wire=wire))))
        return w

    chosen, named = (run_in_process(workers, partial(merged, name))[0] for name in ("auto", wire))
    assert torch.equal(chosen, named)


def test_mean() -> None:
    torch.testing.assert_close(both(Mean(), 3), START + 3 * D)
    torch.testing.assert_close(both(Mean(), 1, {"w": [True, False]}), START + D)


def test_trained_only_is_the_mean_over_those_who_trained() -> None:
    torch.testing.assert_close(both(TrainedOnly(), 1, {"w": [True, False]}), START + MOVES[0])
    torch.testing.assert_close(both(TrainedOnly(), 1), START + D)


def test_outer_is_pytorchs_nesterov_sgd_on_the_average_move() -> None:
    parameter = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(4):
        parameter.grad = -D.clone()
        optimizer.step()
    torch.testing.assert_close(both(Outer(0.7, 0.9), 4), parameter.detach())
    torch.testing.assert_close(both(Outer(1.0, 0.0), 4), START + 4 * D)


@pytest.mark.parametrize(("wire", "change"), [("fp32", 1.5e38), ("bf16", 3.4e38)])
def test_an_average_that_overflows_stops_all_and_changes_nothing(wire: str, change: float) -> None:
    def work(comm: Communicator) -> tuple[Tensor, Tensor]:
        w = torch.zeros(4)
        merger = Merger(comm, on_nonfinite="drop_worker")
        merger.begin({"w": w})
        w += change
        with pytest.raises(NonFiniteError, match="their average is not"):
            finish(merger.merge(part(w, WeightSync(1, wire=wire))))
        return w, merger.anchors["w"]

    for w, anchor in run_in_process(3, work):
        assert torch.equal(w, torch.full((4,), change)) and not anchor.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_too_small_for_halves_add_up(dtype: torch.dtype) -> None:
    def work(comm: Communicator) -> tuple[Tensor, Tensor]:
        w = torch.ones(4, dtype=dtype)
        merger = Merger(comm)
        merger.begin({"w": w})
        step = 2 * torch.finfo(dtype).eps
        for _ in range(8):
            w += step
            finish(merger.merge(part(w, WeightSync(1, Outer(0.125, 0.0)))))
        return w, torch.ones(4) + step

    for merged, expected in run_in_process(2, work):
        torch.testing.assert_close(merged.float(), expected, rtol=0, atol=torch.finfo(dtype).eps)
