"""Gloo ranks train bit by bit as under a plain DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from abtrain.comm import Communicator, run_in_process
from abtrain.comm.link import Link
from abtrain.comm.meter import Meter
from abtrain.comm.sync_batch_norm import point_sync_batch_norm
from abtrain.errors import ConfigurationError
from tests.gloo import run_gloo


class ConvNet(nn.Module):
    """Batch norms, and weights that fill DDP's first bucket (1 MiB) and part of the next (25 MiB)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.BatchNorm2d(16),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 9, 2048), nn.ReLU(), nn.Linear(2048, 300))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).relu())


def train(comm: Communicator, plain: bool, steps: int = 4) -> list[Tensor]:
    """All that the model holds after some steps of AdamW, each of two micro-batches."""
    model = build()
    parallel: Any = DistributedDataParallel(model) if plain else comm.data_parallel(model, "world")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(comm.rank)
    for _ in range(steps):
        batches = [torch.randn(8, 1, 8, 8, generator=generator) for _ in range(2)]
        with parallel.no_sync():
            parallel(batches[0]).square().mean().backward()
        parallel(batches[1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*model.parameters(), *model.buffers()]


def build() -> ConvNet:
    # With a generator of its own: threads share that of the process.
    model, generator = ConvNet(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def train_both_ways(comm: Communicator) -> None:
    for ours, theirs in zip(train(comm, plain=False), train(comm, plain=True), strict=True):
        assert torch.equal(ours, theirs)
    gradients = 4 * sum(p.nbytes for p in build().parameters())
    # The passes inside no_sync are those that come after a synchronized one, so they carry the buffers.
    buffers = 4 * sum(b.nbytes for b in build().buffers())
    assert comm.meter.payload()["total"] == gradients + buffers


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_is_bitwise_that_of_plain_ddp(world_size: int) -> None:
    run_gloo(world_size, train_both_ways)


def test_two_threads_train_bitwise_as_two_processes_do() -> None:
    threads = run_in_process(2, lambda comm: train(comm, plain=False))
    processes = run_gloo(2, train, True)
    for rank in range(2):
        assert all(torch.equal(a, b) for a, b in zip(threads[rank], processes[rank], strict=True))


def rehearse(comm: Communicator) -> None:
    model, calls = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), list[str]()
    parallel = comm.data_parallel(model, "world")
    weight = model[0].weight
    weight.register_hook(lambda gradient: calls.append("tensor"))
    handle = weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    parallel.follow([3, 2, 1, 0])
    assert calls == []
    parallel(torch.ones(4, 2)).sum().backward()
    assert calls == ["tensor", "accumulated"]
    handle.remove()
    parallel(torch.ones(4, 2)).sum().backward()
    assert calls == ["tensor", "accumulated", "tensor"]


def test_users_hooks_do_not_see_the_gradients_of_a_rehearsal() -> None:
    run_gloo(2, rehearse)


def test_sync_batch_norm_stays_inside_the_group() -> None:
    group: Any = object()
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    link = Link(rank=2, ranks=(2, 3), group=group, spans="within_groups", meter=Meter())
    point_sync_batch_norm(model, link, alone=False)
    assert model[1].process_group is group


def test_sync_batch_norm_needs_somebody_to_synchronize_with() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    link = Link(rank=2, ranks=(2,), group=None, spans="within_groups", meter=Meter())
    with pytest.raises(ConfigurationError, match="1 SyncBatchNorm layers, but groups of one worker"):
        point_sync_batch_norm(model, link, alone=False)
    point_sync_batch_norm(model, link, alone=True)
