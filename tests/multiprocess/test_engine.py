"""The engine on real Gloo ranks: the same results as the reference, and as plain DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from abtrain import ABTraining, GradientSync, Phase, Recipe, WeightSync, recipes
from abtrain.comm.communicator import Communicator
from abtrain.comm.hooks import PowerSGD
from tests.cases import THREE_CYCLES, adamw, batch, build, largest_difference, sgd, train, train_by_reference
from tests.gloo import run_gloo


def engine_run(comm: Communicator, kind: str, recipe: str, options: dict[str, Any]) -> dict[str, Tensor]:
    return train(comm, build(kind, torch.float32), kind, recipe, **options)


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
@pytest.mark.parametrize("recipe", ["ab", "ab_no_groups"])
@pytest.mark.parametrize("group_size", [1, 2])
def test_four_ranks_equal_the_reference(kind: str, recipe: str, group_size: int) -> None:
    results = run_gloo(4, engine_run, kind, recipe, {"optimizer": "sgd"}, group_size=group_size)
    expected = train_by_reference(kind, recipe, 4, group_size, "sgd", torch.float32)
    assert largest_difference(results[0], expected) < 1e-5
    assert all(largest_difference(results[0], result) == 0 for result in results[1:])


def in_double(comm: Communicator, kind: str) -> dict[str, Tensor]:
    return train(comm, build(kind), kind)


def test_four_ranks_with_adamw_equal_the_reference() -> None:
    results = run_gloo(4, in_double, "attention", group_size=2)
    assert largest_difference(results[0], train_by_reference("attention", "ab", 4, 2)) < 1e-9


def normed() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))


def by_abtrain(comm: Communicator) -> dict[str, Tensor]:
    model = normed()
    optimizer = adamw(model.parameters())
    ab = ABTraining(model, optimizer, recipes.ddp(8), communicator=comm)
    for step in range(8):
        x, y = batch("conv", comm.rank, step, torch.float32)
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return dict(model.state_dict())


def by_ddp(comm: Communicator) -> dict[str, Tensor]:
    model = normed()
    ddp = DistributedDataParallel(model)
    optimizer = adamw(model.parameters())
    for step in range(8):
        x, y = batch("conv", dist.get_rank(), step, torch.float32)
        F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


@pytest.mark.parametrize("workers", [2, 3])
def test_ddp_through_abtrain_has_the_bits_of_plain_ddp(workers: int) -> None:
    ours, plain = run_gloo(workers, by_abtrain), run_gloo(workers, by_ddp)
    for rank in range(workers):
        assert all(torch.equal(ours[rank][name], plain[rank][name]) for name in plain[rank])


def odd_worlds(comm: Communicator) -> dict[str, Tensor]:
    return train(comm, build("mlp"), "mlp", steps=THREE_CYCLES)


def test_three_ranks_give_the_extra_group_to_A() -> None:
    results = run_gloo(3, odd_worlds)
    assert largest_difference(results[2], train_by_reference("mlp", "ab", 3, 1)) < 1e-9


def by_recipe(comm: Communicator, recipe: str, options: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    state = train(comm, build("conv", torch.float32), "conv", recipe, steps=12, **options)
    return state, comm.meter.payload()["total"]


@pytest.mark.parametrize(
    ("recipe", "options", "share"), [("ddp", {"wire": "bf16"}, 0.5), ("powersgd", {"rank": 1}, 0.8)]
)
def test_narrow_gradients_keep_ranks_equal_and_send_less(recipe: str, options: dict[str, Any], share: float) -> None:
    plain, everything = run_gloo(2, by_recipe, "ddp", {})[0]
    (one, sent), (other, _) = run_gloo(2, by_recipe, recipe, options)
    assert largest_difference(one, other) == 0
    assert 0 < largest_difference(one, plain) < 0.2
    assert sent <= share * everything + 500  # what agreement costs


def reordered(comm: Communicator) -> dict[str, Tensor]:
    """PowerSGD before and after a group phase: its state has to fit the new wrapper."""
    model = build("conv", torch.float32)
    optimizer = adamw(model.parameters())
    narrow = GradientSync("powersgd", 1)
    phases = (Phase("one", 4, sync=narrow), Phase("alone", 2, sync=WeightSync(2)), Phase("two", 4, sync=narrow))
    ab = ABTraining(model, optimizer, Recipe("mixed", 20, cycle=phases), communicator=comm)
    for step in range(20):
        x, y = batch("conv", comm.rank, step, torch.float32)
        F.cross_entropy(ab(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return ab.dense_state_dict()


class Backwards(nn.Module):
    """Registered in another order than it is run in, so that DDP rebuilds its buckets after the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(96, 8), nn.Linear(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def layouts_where_errors_are_kept(comm: Communicator) -> list[list[tuple[int, ...]]]:
    """Returns the shapes in the bucket at every step that PowerSGD compressed."""
    torch.manual_seed(0)
    model = Backwards()
    optimizer = sgd(model.parameters())
    phases = (Phase("shared", 5, sync=GradientSync("powersgd", 1)), Phase("alone", 2, sync=WeightSync(2)))
    found: list[list[tuple[int, ...]]] = []
    inner = PowerSGD.__call__

    def spy(self: PowerSGD, bucket: Any) -> Any:
        if bucket.index() in self._state.error_dict:
            found.append([tuple(p.shape) for p in bucket.parameters()])
        return inner(self, bucket)

    PowerSGD.__call__ = spy  # type: ignore[method-assign]
    try:
        ab = ABTraining(model, optimizer, Recipe("mixed", 19, cycle=phases), communicator=comm)
        while not ab.finished:
            ab(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
    finally:
        PowerSGD.__call__ = inner  # type: ignore[method-assign]
    return found


def test_powersgd_finds_its_errors_in_the_places_where_it_left_them() -> None:
    found = run_gloo(2, layouts_where_errors_are_kept)[0]
    assert len(found) > 8
    assert all(layout == found[0] for layout in found)


def two_runs(comm: Communicator) -> list[dict[str, Tensor]]:
    """One after the other, on the same communicator."""
    ended = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Backwards()
        optimizer = sgd(model.parameters())
        ab = ABTraining(model, optimizer, recipes.powersgd(6, rank=1), communicator=comm)
        generator = torch.Generator().manual_seed(comm.rank)
        while not ab.finished:
            ab(torch.randn(8, 64, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ab.step()
        ended.append(ab.dense_state_dict())
    return ended


def test_a_second_run_inherits_nothing_of_powersgds_first() -> None:
    first, second = run_gloo(2, two_runs)[0]
    assert largest_difference(first, second) == 0


def several_buckets(comm: Communicator) -> dict[str, Tensor]:
    """PowerSGD on 5 MB of gradients: DDP sends the first MB apart from the rest."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(560, 560), nn.ReLU())]
    model = nn.Sequential(*layers)
    optimizer = adamw(model.parameters())
    ab = ABTraining(model, optimizer, recipes.build("powersgd", 10, rank=1), communicator=comm)
    generator = torch.Generator().manual_seed(comm.rank)
    for _ in range(10):
        ab(torch.randn(4, 560, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ab.step()
    return ab.dense_state_dict()


def test_powersgd_takes_buckets_in_turn() -> None:
    one, other = run_gloo(2, several_buckets)
    assert largest_difference(one, other) == 0


def test_powersgd_resumes_after_a_phase_of_another_kind() -> None:
    one, other = run_gloo(2, reordered)
    assert largest_difference(one, other) == 0
