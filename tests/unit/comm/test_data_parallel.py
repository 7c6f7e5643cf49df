"""Every communicator averages gradients by the rules, and with the payload, of DDP."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch
from torch import Tensor, nn

from abtrain.comm import Communicator
from abtrain.comm.communicator import Scope
from abtrain.comm.ddp import TorchDataParallel
from abtrain.errors import UsageError
from tests.unit.comm.worlds import WORLDS, World, peers

pytestmark = pytest.mark.parametrize("world", WORLDS, ids=str)
every_scope = pytest.mark.parametrize("scope", ["world", "group"])


class Affine(nn.Module):
    """y = w x + b, where the gradients are plain to see: dw = x, db = 1."""

    GRADIENT_BYTES = 4 * 4
    BUFFER_BYTES = 2 * 8

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.b = nn.Parameter(torch.zeros(()))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.seen: Tensor

    def forward(self, x: float | Tensor, use_b: bool = True) -> Tensor:
        self.seen[0] += 1
        y = (self.w * x).sum()
        return y + self.b if use_b else y


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def average(comm: Communicator, scope: Scope) -> None:
    model = Affine()
    ranks = peers(comm, scope)
    parallel = comm.data_parallel(model, scope)
    for step in range(3):
        model.zero_grad()
        parallel(comm.rank + step).backward()
        assert model.w.grad is not None and model.b.grad is not None
        assert model.w.grad.tolist() == pytest.approx([mean([rank + step for rank in ranks])] * 3)
        assert model.b.grad.item() == pytest.approx(1)


@every_scope
def test_gradients_are_averaged_over_the_scope(world: World, scope: Scope) -> None:
    world.run(average, scope)


def freeze(comm: Communicator) -> None:
    model = Affine()
    model.b.requires_grad_(False)
    parallel = comm.data_parallel(model, "world")
    parallel(comm.rank).backward()
    assert model.b.grad is None
    assert model.w.grad is not None
    assert model.w.grad.tolist() == pytest.approx([mean(list(peers(comm, "world")))] * 3)
    sent = (4 * 3 + Affine.BUFFER_BYTES) if comm.topology.world_size > 1 else 0
    assert comm.meter.payload()["total"] == sent


def test_frozen_parameters_take_no_part(world: World) -> None:
    world.run(freeze)


def accumulate(comm: Communicator) -> None:
    model = Affine()
    ranks = peers(comm, "world")
    parallel = comm.data_parallel(model, "world")
    for _ in range(2):
        model.zero_grad()
        comm.meter.phase = "alone"
        with parallel.no_sync():
            parallel(comm.rank).backward()
            assert model.w.grad is not None
            assert model.w.grad.tolist() == [comm.rank] * 3
            parallel(comm.rank).backward()
        assert model.w.grad.tolist() == [2 * comm.rank] * 3
        comm.meter.phase = "together"
        parallel(10 * comm.rank).backward()
        assert model.w.grad.tolist() == pytest.approx([12 * mean(list(ranks))] * 3)
    # As in DDP, buffers travel with the first pass after one that synchronized gradients.
    expected = {"alone": 2 * Affine.BUFFER_BYTES, "together": 2 * Affine.GRADIENT_BYTES}
    assert comm.meter.payload()["by_phase"] == (expected if len(ranks) > 1 else {})


def test_no_sync_accumulates_locally(world: World) -> None:
    world.run(accumulate)


def count_steps(comm: Communicator, scope: Scope) -> None:
    parallel = comm.data_parallel(Affine(), scope)
    for _ in range(3):
        parallel(1.0).backward()
    several = len(peers(comm, scope)) > 1
    total = 3 * (Affine.GRADIENT_BYTES + Affine.BUFFER_BYTES) if several else 0
    between = scope == "world" and comm.topology.n_groups > 1
    payload = comm.meter.payload()
    assert (payload["total"], payload["between_groups"]) == (total, total if between else 0)


@every_scope
def test_payload_is_gradients_and_buffers(world: World, scope: Scope) -> None:
    world.run(count_steps, scope)


def spread_buffers(comm: Communicator, scope: Scope) -> None:
    model = Affine()
    model.seen.fill_(100 * comm.rank)
    parallel = comm.data_parallel(model, scope)
    parallel(1.0).backward()
    first = peers(comm, scope)[0]
    assert model.seen.tolist() == [100 * first + 1, 100 * first]


@every_scope
def test_buffers_follow_the_first_rank_of_the_scope(world: World, scope: Scope) -> None:
    world.run(spread_buffers, scope)


def validate_alone(comm: Communicator) -> None:
    model = Affine()
    parallel = comm.data_parallel(model, "world")
    parallel(1.0).backward()
    before = comm.meter.payload()
    if comm.rank == 0:
        with torch.no_grad():
            parallel(2.0)
    assert comm.meter.payload() == before
    parallel(1.0).backward()


def test_one_rank_may_validate_alone(world: World) -> None:
    world.run(validate_alone)


def train_in_eval_mode(comm: Communicator) -> None:
    model = Affine().eval()
    parallel = comm.data_parallel(model, "world")
    parallel(float(comm.rank)).backward()
    assert model.w.grad is not None
    assert model.w.grad.tolist() == pytest.approx([(comm.topology.world_size - 1) / 2] * 3)


def test_gradients_in_eval_mode_are_averaged_too(world: World) -> None:
    world.run(train_in_eval_mode)


def use_some(comm: Communicator) -> None:
    n = comm.topology.world_size
    model = Affine()
    parallel = comm.data_parallel(model, "world", find_unused_parameters=True)
    # b is used by rank 0 alone: the others add nothing to its average.
    parallel(1.0, use_b=comm.rank == 0).backward()
    assert model.w.grad is not None
    assert model.w.grad.tolist() == [1, 1, 1]
    assert model.b.grad is not None
    assert model.b.grad.item() == pytest.approx(1 / n)
    # Nobody uses b: its gradient stays as it is, be that a value or none.
    parallel(1.0, use_b=False).backward()
    assert model.b.grad.item() == pytest.approx(1 / n)
    model.zero_grad()
    parallel(1.0, use_b=False).backward()
    assert model.b.grad is None
    # One int32 for each parameter tells the others what was used.
    sent = 3 * (Affine.GRADIENT_BYTES + Affine.BUFFER_BYTES + 2 * 4) if n > 1 else 0
    assert comm.meter.payload()["total"] == sent


def test_unused_parameters_may_be_allowed(world: World) -> None:
    world.run(use_some)


def leave_some_unused(comm: Communicator) -> None:
    parallel = comm.data_parallel(Affine(), "world")
    parallel(1.0, use_b=False).backward()
    if comm.topology.world_size == 1:
        parallel(1.0)
        return
    with pytest.raises(UsageError, match=r"without a gradient.*find_unused_parameters=True"):
        parallel(1.0)


def test_unused_parameters_are_an_error_otherwise(world: World) -> None:
    world.run(leave_some_unused)


def fail_in_the_model(comm: Communicator) -> None:
    parallel = comm.data_parallel(Affine(), "world")
    with pytest.raises(RuntimeError, match="size of tensor"):
        parallel(torch.ones(2))


def test_errors_of_the_model_are_left_alone(world: World) -> None:
    world.run(fail_in_the_model)


def close_one(comm: Communicator) -> None:
    model = Affine()
    parallel = comm.data_parallel(model, "world")
    parallel(1.0).backward()
    model.zero_grad()
    loss = parallel(comm.rank)
    before = comm.meter.payload()
    comm.barrier()
    parallel.close()
    parallel.close()
    loss.backward()
    assert model.w.grad is not None
    assert model.w.grad.tolist() == [comm.rank] * 3
    assert comm.meter.payload() == before
    with pytest.raises(RuntimeError, match="closed"):
        parallel(1.0)


def test_a_closed_wrapper_leaves_the_model_alone(world: World) -> None:
    world.run(close_one)


def drop_one(comm: Communicator) -> None:
    model = Affine()
    parallel = comm.data_parallel(model, "world")
    for _ in range(3):
        parallel(1.0).backward()
    wrappers = weakref.WeakSet([parallel])
    if isinstance(parallel, TorchDataParallel):
        wrappers.add(parallel._ddp)
    comm.barrier()
    del parallel
    assert not wrappers
    model.zero_grad()
    model(comm.rank).backward()
    assert model.w.grad is not None and model.w.grad.tolist() == [comm.rank] * 3
    kept = weakref.ref(model)
    del model
    assert kept() is None


def drop_without_the_collector(comm: Communicator) -> None:
    gc.disable()
    try:
        drop_one(comm)
    finally:
        gc.enable()


def test_a_dropped_wrapper_is_freed_at_once(world: World) -> None:
    world.run(drop_without_the_collector)


def train_nothing(comm: Communicator) -> None:
    model = Affine().requires_grad_(False)
    parallel = comm.data_parallel(model, "world")
    assert parallel(1.0).item() == 0
    with parallel.no_sync():
        parallel(1.0)
    assert comm.meter.payload()["total"] == 0


def test_a_model_with_nothing_to_train_is_called_as_it_is(world: World) -> None:
    world.run(train_nothing)


def come_late(comm: Communicator) -> float:
    parallel = comm.data_parallel(Affine(), "world")
    loss = parallel(1.0)
    comm.barrier()
    before = comm.meter.sync_seconds
    if comm.rank == 0:
        time.sleep(0.2)
    loss.backward()
    return comm.meter.sync_seconds - before


def test_the_wait_that_backward_does_not_hide_is_timed(world: World) -> None:
    first, *others = world.run(come_late)
    assert all(seconds > first + 0.1 for seconds in others)


def pass_twice(comm: Communicator) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    parallel = comm.data_parallel(model, "world")
    x = torch.arange(8.0).view(4, 2) * (comm.rank + 1)
    (parallel(x).square().sum() + parallel(x + 1).square().sum()).backward()


def test_two_passes_may_share_one_backward(world: World) -> None:
    world.run(pass_twice)
