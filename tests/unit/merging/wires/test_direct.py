"""Averages in few bits: what every worker gets, what it keeps, and what was sent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abtrain.comm.communicator import Communicator
from abtrain.comm.in_process import run_in_process
from abtrain.comm.stages import finish
from abtrain.merging.wires.codes import CODES as FORMS
from abtrain.merging.wires.wire import make_wire
from tests.gloo import run_gloo

SHAPES = {"weight": (40, 33), "bias": (7,), "empty": (0, 3), "scalar": ()}
CODES = [
    "fp32",
    "bf16",
    "int8",
    "int4",
    "int3",
    "ternary",
    "ternary:int3",
]


def numbers(rank: int, turn: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * turn + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def several_turns(comm: Communicator, name: str, turns: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], int]:
    """The averages, what this worker kept, and what it handed over."""
    wire, kept = make_wire(name, comm.topology.world_size), dict[str, Tensor]()
    before = comm.meter.payload()["total"]
    averages = []
    for turn in range(turns):
        owed = {n: t + kept[n] if n in kept else t for n, t in numbers(comm.rank, turn).items()}
        mean, kept = finish(wire.average(owed, comm))
        averages.append(mean)
    return averages, kept, comm.meter.payload()["total"] - before


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
    ("code", "share", "tolerance"),
    [
        ("bf16", 1 / 2, 0.01),
        ("int8", 1 / 4, 0.05),
        ("int4", 1 / 8, 0.15),
        ("int3", 1 / 10, 0.05),
        ("ternary", 1 / 20, 0.15),
        ("ternary:int4", 1 / 13, 0.1),
    ],
)
def test_payload_is_that_share_of_float32(code: str, share: float, tolerance: float) -> None:
    def work(comm: Communicator) -> int:
        finish(make_wire(code, comm.topology.world_size).average({"weight": torch.ones(400, 500)}, comm))
        return int(comm.meter.payload()["total"])

    assert run_in_process(4, work)[0] / (4 * 200_000) == pytest.approx(share, rel=tolerance)


@pytest.mark.parametrize(("workers", "code"), [*((2, code) for code in CODES), (3, "int4"), (3, "ternary:int3")])
def test_gloo_ranks_get_the_bits_of_threads(workers: int, code: str) -> None:
    threads = run_in_process(workers, lambda comm: several_turns(comm, code, 3))
    ranks = run_gloo(workers, several_turns, code, 3)
    assert [sent for _, _, sent in ranks] == [sent for _, _, sent in threads]
    for mine, other in zip(ranks[1][0], threads[0][0], strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in SHAPES)


@pytest.mark.parametrize("code", ["bf16", "int8", "int4", "int3", "ternary", "ternary:int4"])
def test_two_workers_round_each_number_once(code: str) -> None:
    averages, _, _ = run_in_process(2, lambda comm: several_turns(comm, code, 1))[0]
    form = FORMS[code.split(":")[0]]
    flats = [torch.cat([tensor.flatten() for tensor in numbers(rank, 0).values()]) for rank in range(2)]
    count = flats[0].numel()
    padding = torch.zeros(-count % form.granule)
    rows = [form.decode(form.encode(torch.cat([flat, padding])), count + len(padding)) for flat in flats]
    mean = torch.cat([tensor.flatten() for tensor in averages[0].values()])
    assert torch.equal(mean, ((rows[0] + rows[1]) / 2)[:count])


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("code", CODES)
def test_a_wire_predicts_its_messages(code: str, workers: int) -> None:
    stages = make_wire(code, workers).sends([torch.empty(shape) for shape in SHAPES.values()], workers)
    _, _, sent = run_in_process(workers, lambda comm: several_turns(comm, code, 1))[0]
    assert sent == sum(traffic.nbytes for stage in stages for traffic in stage)


def test_dtypes_come_back() -> None:
    def work(comm: Communicator) -> Tensor:
        halves = {"half": torch.full((4,), 0.5, dtype=torch.bfloat16), "w": torch.linspace(-0.5, 0.5, 3)}
        return finish(make_wire("int8", comm.topology.world_size).average(halves, comm)).mean["half"]

    half = run_in_process(2, work)[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, torch.full((4,), 0.5, dtype=torch.bfloat16))
