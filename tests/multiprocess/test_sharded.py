"""Groups whose workers share one model by FSDP2: they train as groups in which each worker has the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import abtrain
from abtrain import ABTraining, checkpoint, recipes
from abtrain.comm.communicator import Communicator
from abtrain.engine import shared_steps
from abtrain.optim import muon_and_adamw
from abtrain.recipes.recipe import Recipe
from tests.cases import adamw, largest_difference, seeded, sgd
from tests.gloo import run_gloo
from tests.meshes import mesh_of_groups, places_of

RECIPES = {
    "local_sgd": recipes.local_sgd(10, every=4, wire="fp32"),
    "diloco": recipes.diloco(10, every=4, wire="int4"),
    "hidden": recipes.diloco(14, every=5, delay=3, fragments=2, wire="int8"),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A transformer's nesting, with odd numbers of rows, a bias of one element, a frozen weight and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 1)
        self.embed.bias.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            cast(Tensor, self.seen).add_(1)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def sharded(comm: Communicator, seed: int = 0) -> nn.Module:
    model = whole(comm, seed)
    mesh = places_of(mesh_of_groups(comm.topology.n_groups, comm.topology.group_size))
    for block in cast(Any, model).blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(comm: Communicator, seed: int = 0) -> nn.Module:
    with seeded(seed):
        return Net()


Build = Callable[..., nn.Module]


class Loop:
    def __init__(
        self, comm: Communicator, build: Build, recipe: Recipe, optimizer: Any = adamw, seed: int = 0, **options: Any
    ) -> None:
        self.rank, self.model = comm.rank, build(comm, seed)
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.ab = ABTraining(self.model, self.optimizer, recipe, communicator=comm, **options)

    def batch(self, part: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * self.ab.steps_done + 10 * part + self.rank)
        x = torch.randn(8, 5, generator=generator)
        return x, x.square().sum(1, keepdim=True) / 5

    def step(self, parts: int = 1, spoil: float = 1.0) -> None:
        for part in range(parts):
            x, y = self.batch(part)
            with nullcontext() if part == parts - 1 else self.ab.no_sync():
                (F.mse_loss(self.ab(x), y) * spoil / parts).backward()
        # Norms over shards are summed in another order, so codes of few bits could differ.
        self.ab.clip_grad_norm_(1.0 if parts > 1 else 1e9)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ab.step()

    def run(self, until: int | None = None, **options: Any) -> dict[str, Tensor]:
        """Runs to a step, or to the end. Returns the weights."""
        while not self.ab.finished and self.ab.steps_done != until:
            self.step(**options)
        return {name: tensor.clone() for name, tensor in self.ab.dense_state_dict().items()}


def ended(comm: Communicator, build: Build, recipe: Recipe, parts: int, optimizer: Any = adamw) -> dict[str, Tensor]:
    return Loop(comm, build, recipe, optimizer).run(parts=parts)


def agree(one: Sequence[dict[str, Tensor]], other: Sequence[dict[str, Tensor]]) -> None:
    assert all(largest_difference(weights, one[0]) == 0 for weights in one)
    assert all(largest_difference(weights, other[0]) == 0 for weights in other)
    assert largest_difference(one[0], other[0]) < 1e-6


@pytest.mark.parametrize(("name", "parts"), [("local_sgd", 3), ("diloco", 1), ("hidden", 1)])
def test_sharded_groups_end_with_the_weights_of_whole_ones(name: str, parts: int) -> None:
    """With accumulation under `no_sync`, frozen weights and clipped gradients."""
    ends = [run_gloo(4, ended, build, RECIPES[name], parts, group_size=2) for build in (sharded, whole)]
    agree(*ends)


class Slow(torch.optim.SGD):
    """Keeps slow weights in its state, and overwrites weights with them."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.clone())
                parameter.copy_(slow.lerp_(parameter, 0.5))


def slowly(parameters: Any) -> torch.optim.Optimizer:
    return Slow(parameters, lr=0.05)


def test_copies_of_shards_follow_merges() -> None:
    ends = [run_gloo(4, ended, build, RECIPES["hidden"], 1, slowly, group_size=2) for build in (sharded, whole)]
    agree(*ends)


def under_muon(comm: Communicator, build: Build, shared_from: int) -> dict[str, Tensor]:
    shared_steps.SHARED_FROM = shared_from
    model = build(comm)
    optimizers = muon_and_adamw(model, 1e-2)
    ab = ABTraining(model, optimizers, RECIPES["diloco"], communicator=comm)
    while not ab.finished:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(100 * ab.steps_done + comm.rank))
        ab(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ab.step()
    return ab.dense_state_dict()


@pytest.mark.parametrize("shared_from", [0, 10_000_000])
def test_muon_trains_shards_as_whole_matrices(shared_from: int) -> None:
    agree(*(run_gloo(4, under_muon, build, shared_from, group_size=2) for build in (sharded, whole)))


def in_three(comm: Communicator, build: Build) -> dict[str, Tensor]:
    return Loop(comm, build, RECIPES["diloco"], sgd).run()


def test_groups_of_three_leave_the_last_worker_without_rows() -> None:
    agree(*(run_gloo(6, in_three, build, group_size=3) for build in (sharded, whole)))


def resumed(comm: Communicator, recipe: Recipe, stops: Sequence[int], builds: Sequence[Build]) -> dict[str, Tensor]:
    """Stops at some steps, each time going on with the next way to build the model."""
    loop = Loop(comm, builds[0], recipe)
    for stop, build in zip(stops, builds[1:], strict=True):
        loop.run(stop)
        state = copy.deepcopy(loop.ab.state_dict())
        loop = Loop(comm, build, recipe, seed=9)
        loop.ab.load_state_dict(state)
    return loop.run()


@pytest.mark.parametrize(("name", "stops"), [("diloco", (2, 4, 7)), ("hidden", (6, 7, 11))])
def test_a_sharded_run_resumes_to_the_bit(name: str, stops: tuple[int, ...]) -> None:
    """Amid a round, at a merge, and amid hidden merges."""
    recipe = RECIPES[name]
    expected = run_gloo(4, resumed, recipe, (), [sharded], group_size=2)
    again = run_gloo(4, resumed, recipe, stops, [sharded] * 4, group_size=2)
    assert all(largest_difference(*pair) == 0 for pair in zip(expected, again, strict=True))


@pytest.mark.parametrize(("name", "stops"), [("diloco", (2, 6)), ("hidden", (7, 11))])
def test_a_sharded_run_is_loaded_whole_and_back(name: str, stops: tuple[int, ...]) -> None:
    recipe = RECIPES[name]
    expected = run_gloo(4, resumed, recipe, (), [whole], group_size=2)
    agree(run_gloo(4, resumed, recipe, stops, [sharded, whole, sharded], group_size=2), expected)
    agree(run_gloo(4, resumed, recipe, stops, [whole, sharded, whole], group_size=2), expected)


def through_files(comm: Communicator, folder: Path) -> dict[str, Tensor]:
    loop = Loop(comm, sharded, RECIPES["hidden"])
    loop.run(7)
    checkpoint.save(folder, 7, loop.ab.state_dict(), comm)
    loop = Loop(comm, whole, RECIPES["hidden"], seed=9)
    found = checkpoint.latest(folder, comm)
    assert found is not None
    loop.ab.load_state_dict(found.states[0])
    return loop.run()


def looked_at(comm: Communicator, build: Build, folder: Path) -> tuple[Any, ...]:
    """What validation, files and loading give; what follows must not change."""
    loop = Loop(comm, build, RECIPES["local_sgd"])
    loop.run(2)
    x = loop.batch()[0]
    with loop.ab.merged() as model, torch.no_grad():
        seen = model(x)
        merged = {name: tensor.clone() for name, tensor in loop.ab.dense_state_dict().items()}
        path = folder / f"{build.__name__}-{comm.topology.group_of(comm.rank)}.safetensors"
        if build is sharded or comm.topology.place_of(comm.rank) == 0:
            loop.ab.save(path)
    with torch.no_grad():
        loop.ab(x)
    ends = loop.run()
    # Loaded into a run that goes on, and into a model before its run.
    loop.ab.load_dense_state_dict(merged)
    model = build(comm, 5)
    comm.barrier()
    abtrain.load(model, path)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    other = ABTraining(model, optimizer, RECIPES["local_sgd"], communicator=comm)
    return seen, merged, ends, loop.ab.dense_state_dict(), other.dense_state_dict()


def test_a_look_at_a_sharded_model_shows_the_average_and_changes_nothing(tmp_path: Path) -> None:
    ranks, expected = (run_gloo(4, looked_at, build, tmp_path, group_size=2) for build in (sharded, whole))
    for (seen, merged, ends, loaded, other), reference in zip(ranks, expected, strict=True):
        torch.testing.assert_close(seen, reference[0])
        assert largest_difference(merged, reference[1]) < 1e-6
        assert largest_difference(ends, reference[2]) < 1e-6
        assert largest_difference(loaded, merged) == largest_difference(other, merged) == 0


def test_a_checkpoint_of_a_sharded_run_is_loaded_whole(tmp_path: Path) -> None:
    ends = run_gloo(4, through_files, tmp_path, group_size=2)
    agree(ends, run_gloo(4, resumed, RECIPES["hidden"], (), [whole], group_size=2))
