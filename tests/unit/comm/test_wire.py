"""Averages in few bits: what every worker gets, what it keeps, and what was sent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.comm.wire import Wire
from tests.gloo import run_gloo

SHAPES = {"weight": (40, 33), "bias": (7,), "empty": (0, 3), "scalar": ()}
CODES = ["fp32", "bf16", "int8", "int4"]


def numbers(rank: int, turn: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * turn + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def several_turns(comm: Communicator, code: str, turns: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], int]:
    wire = Wire(code)
    before = comm.meter.payload()["total"]
    averages = [wire.average(numbers(comm.rank, turn), comm) for turn in range(turns)]
    return averages, wire.residuals, comm.meter.payload()["total"] - before


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_what_was_received_and_what_was_kept_sum_to_the_truth(code: str, workers: int) -> None:
    turns = 5
    results = run_in_process(workers, lambda comm: several_turns(comm, code, turns))
    for name, shape in SHAPES.items():
        truth = sum(numbers(rank, turn)[name] for rank in range(workers) for turn in range(turns)) / workers
        received = sum(average[name] for average in results[0][0])
        kept = sum(residuals.get(name, torch.zeros(shape)) for _, residuals, _ in results) / workers
        torch.testing.assert_close(received + kept, truth, rtol=1e-4, atol=1e-5)
    for averages, _, _ in results:
        for mine, first in zip(averages, results[0][0], strict=True):
            assert all(torch.equal(mine[name], first[name]) for name in SHAPES)


@pytest.mark.parametrize(("code", "error"), [("bf16", 0.02), ("int8", 0.03), ("int4", 0.5)])
def test_one_average_is_close(code: str, error: float) -> None:
    averages, _, _ = run_in_process(3, lambda comm: several_turns(comm, code, 1))[0]
    truth = sum(numbers(rank, 0)["weight"] for rank in range(3)) / 3
    assert (averages[0]["weight"] - truth).abs().max() < error


@pytest.mark.parametrize(
    ("code", "share", "tolerance"), [("bf16", 1 / 2, 0.01), ("int8", 1 / 4, 0.05), ("int4", 1 / 8, 0.15)]
)
def test_payload_is_that_share_of_float32(code: str, share: float, tolerance: float) -> None:
    def work(comm: Communicator) -> int:
        Wire(code).average({"weight": torch.ones(400, 500)}, comm)
        return int(comm.meter.payload()["total"])

    assert run_in_process(4, work)[0] / (4 * 200_000) == pytest.approx(share, rel=tolerance)


@pytest.mark.parametrize("code", CODES)
def test_gloo_ranks_get_the_bits_of_threads(code: str) -> None:
    threads = run_in_process(2, lambda comm: several_turns(comm, code, 3))
    ranks = run_gloo(2, several_turns, code, 3)
    assert [sent for _, _, sent in ranks] == [sent for _, _, sent in threads]
    for mine, other in zip(ranks[1][0], threads[0][0], strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in SHAPES)


def test_dtypes_come_back_and_forgetting_drops_the_residual() -> None:
    def work(comm: Communicator) -> tuple[Tensor, list[str]]:
        wire = Wire("int8")
        average = wire.average({"half": torch.full((4,), 0.5, dtype=torch.bfloat16), "w": torch.randn(3)}, comm)
        wire.forget("w")
        return average["half"], list(wire.residuals)

    half, kept = run_in_process(2, work)[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, torch.full((4,), 0.5, dtype=torch.bfloat16))
    assert kept == ["half"]
