"""Every communicator keeps the same promises about its collectives."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from abtrain.comm import Communicator
from tests.unit.comm.worlds import SCOPES, WORLDS, World, peers

pytestmark = pytest.mark.parametrize("world", WORLDS, ids=str)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int32, torch.int64]
UNUSUAL = [torch.bool, torch.int16, torch.complex64, torch.float8_e4m3fn]


def sums_and_maxima(comm: Communicator) -> None:
    for scope in SCOPES:
        ranks = peers(comm, scope)
        for dtype in [*FLOATS, *INTEGERS, torch.complex64]:
            tensor = torch.tensor([[comm.rank, 1], [2, comm.rank + 10]]).to(dtype)
            comm.all_reduce(tensor, scope=scope)
            n = len(ranks)
            assert tensor.tolist() == [[sum(ranks), n], [2 * n, sum(ranks) + 10 * n]]
        for dtype in [*FLOATS, *INTEGERS]:
            tensor = torch.tensor([comm.rank, 5]).to(dtype)
            comm.all_reduce(tensor, "max", scope)
            assert tensor.tolist() == [max(ranks), 5]


def test_all_reduce(world: World) -> None:
    world.run(sums_and_maxima)


def sum_of_noise(comm: Communicator) -> Tensor:
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(comm.rank))
    comm.all_reduce(noise)
    return noise


def test_all_ranks_end_with_the_same_bits(world: World) -> None:
    results = world.run(sum_of_noise)
    assert all(torch.equal(result, results[0]) for result in results)


def reduce_a_parameter(comm: Communicator) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    comm.all_reduce(weight)
    comm.broadcast(weight, source=0)
    assert not comm.all_gather(weight).requires_grad
    assert weight.tolist() == [comm.topology.world_size] * 2
    assert weight.is_leaf and weight.requires_grad


def test_parameters_can_be_communicated(world: World) -> None:
    world.run(reduce_a_parameter)


def gather_everything(comm: Communicator) -> None:
    for scope in SCOPES:
        ranks = peers(comm, scope)
        for dtype in [*FLOATS, *INTEGERS, *UNUSUAL]:
            for shape in [(2, 3), (1,), (), (0, 2)]:
                mine = torch.full(shape, comm.rank + 1).to(dtype)
                gathered = comm.all_gather(mine, scope)
                assert gathered.shape == (len(ranks), *shape) and gathered.dtype == dtype
                for row, rank in zip(gathered, ranks, strict=True):
                    assert row.tolist() == torch.full(shape, rank + 1).to(dtype).tolist()
        gathered = comm.all_gather(torch.zeros(1), scope)
        gathered += comm.rank + 1
        assert gathered.tolist() == [[comm.rank + 1]] * len(ranks)


def test_all_gather(world: World) -> None:
    world.run(gather_everything)


def broadcast_everything(comm: Communicator) -> None:
    for source in range(comm.topology.world_size):
        for dtype in [*FLOATS, *INTEGERS, *UNUSUAL]:
            bits = torch.arange(48, dtype=torch.uint8) if dtype != torch.bool else torch.arange(48) % 3 == 0
            sent = (bits if comm.rank == source else torch.zeros_like(bits)).view(dtype)
            comm.broadcast(sent, source)
            assert torch.equal(sent.view(torch.uint8), bits.view(torch.uint8))
        scalar = torch.tensor(float(comm.rank))
        comm.broadcast(scalar, source)
        assert scalar.item() == source
        comm.broadcast(torch.empty(0), source)
    first, *_ = ranks = comm.ranks("group")
    for source in ranks:
        mine = torch.tensor([comm.rank, first])
        comm.broadcast(mine, source, scope="group")
        assert mine.tolist() == [source, first]


def test_broadcast_moves_the_bits_of_any_dtype(world: World) -> None:
    world.run(broadcast_everything)


def count_everything(comm: Communicator) -> None:
    comm.meter.phase = "first"
    comm.all_reduce(torch.zeros(10))
    comm.all_gather(torch.zeros(3, dtype=torch.int64))
    comm.barrier()
    comm.meter.phase = "second"
    comm.broadcast(torch.zeros(7, dtype=torch.bool), source=0)
    comm.all_reduce(torch.zeros(5), "max", scope="group")
    comm.all_gather(torch.zeros(1, dtype=torch.float16), scope="group")
    world = 1 if comm.topology.world_size > 1 else 0
    group = 1 if comm.topology.group_size > 1 else 0
    payload = comm.meter.payload()
    several = comm.topology.n_groups > 1
    between, within = (64, 0) if several else (0, 64 * world)
    if several and group:
        # The group collects 40 and 24 bytes of each worker, and its first worker passes on the sum and four rows.
        within = 40 + 40 + 24 + 4 * 24
        between = 40 + 2 * 24 if comm.rank in (0, 2) else 0
    assert payload["between_groups"] == between + (7 if several else 0)
    assert payload["within_groups"] == within + 22 * group + (0 if several else 7 * world)
    assert payload["total"] == payload["between_groups"] + payload["within_groups"]
    assert payload["by_phase"] == ({"first": between + within, "second": 7 + 22 * group} if world else {})


def test_every_byte_handed_over_is_counted(world: World) -> None:
    world.run(count_everything)


def wait_for_rank_0(comm: Communicator) -> float:
    comm.barrier()
    before = comm.meter.sync_seconds
    if comm.rank == 0:
        time.sleep(0.2)
    comm.all_reduce(torch.ones(1))
    return comm.meter.sync_seconds - before


def test_seconds_lost_are_those_of_the_ranks_that_wait(world: World) -> None:
    first, *others = world.run(wait_for_rank_0)
    assert all(seconds > first + 0.1 for seconds in others)


def refuse_what_cannot_be_sent(comm: Communicator) -> None:
    strided = torch.zeros(3, 2).t()
    for refused in (
        lambda: comm.all_reduce(strided),
        lambda: comm.all_gather(strided),
        lambda: comm.broadcast(strided, 0),
    ):
        with pytest.raises(ValueError, match=r"shape \[2, 3\] with strides \[1, 2\].*contiguous"):
            refused()
    with pytest.raises(TypeError, match=r"all_reduce\(sum\) does not support torch.bool"):
        comm.all_reduce(torch.ones(1, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"all_reduce\(max\) does not support torch.complex64"):
        comm.all_reduce(torch.ones(1, dtype=torch.complex64), "max")
    with pytest.raises(ValueError, match="give one of the ranks 0 to"):
        comm.broadcast(torch.ones(1), source=comm.topology.world_size)
    if comm.topology.n_groups > 1:
        elsewhere = (comm.rank + comm.topology.group_size) % comm.topology.world_size
        with pytest.raises(ValueError, match=f"there is no rank {elsewhere} to broadcast from"):
            comm.broadcast(torch.ones(1), elsewhere, scope="group")
    assert comm.meter.payload()["total"] == 0


def test_what_cannot_be_sent_is_refused_before_anyone_waits(world: World) -> None:
    world.run(refuse_what_cannot_be_sent)
