"""Models under FSDP2: what cannot be merged is refused before anything is sent, and a group stops as one."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import abtrain
from abtrain import ABTraining, Energy, recipes
from abtrain.comm.communicator import Communicator
from abtrain.errors import AbtrainError, NonFiniteError
from tests.cases import adamw, batch, build
from tests.gloo import run_gloo
from tests.meshes import counterparts_of, mesh_of_groups, places_of

Make = Callable[[nn.Sequential, DeviceMesh], Any]


def as_it_should_be(model: nn.Sequential, mesh: DeviceMesh) -> None:
    fully_shard(model, mesh=places_of(mesh))


def over_the_world(model: nn.Sequential, mesh: DeviceMesh) -> None:
    fully_shard(model, mesh=places_of(mesh_of_groups(1, 4)))


def over_counterparts(model: nn.Sequential, mesh: DeviceMesh) -> None:
    fully_shard(model, mesh=counterparts_of(mesh))


def hybrid(model: nn.Sequential, mesh: DeviceMesh) -> None:
    fully_shard(model, mesh=mesh)


def in_tensor_parallel(model: nn.Sequential, mesh: DeviceMesh) -> None:
    parallelize_module(model, places_of(mesh), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def by_columns(model: nn.Sequential, mesh: DeviceMesh) -> None:
    fully_shard(model, mesh=places_of(mesh), shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else None)


def in_part(model: nn.Sequential, mesh: DeviceMesh) -> None:
    fully_shard(model, mesh=places_of(mesh), ignored_params={model[0].weight})


def with_a_sharded_buffer(model: nn.Sequential, mesh: DeviceMesh) -> None:
    model.register_buffer("table", distribute_tensor(torch.ones(4), places_of(mesh), [Shard(0)]))


def by_the_first_fsdp(model: nn.Sequential, mesh: DeviceMesh) -> None:
    model[0] = FullyShardedDataParallel(model[0], device_id=torch.device("cpu"), use_orig_params=True)


def on_one_worker_of_a_group(model: nn.Sequential, mesh: DeviceMesh) -> None:
    if dist.get_rank() % 2:
        fully_shard(model, mesh=places_of(mesh))


def one_is_wider(model: nn.Sequential, mesh: DeviceMesh) -> None:
    if dist.get_rank() == 3:
        model[4] = nn.Linear(12, 7)
    fully_shard(model, mesh=places_of(mesh))


def told(comm: Communicator, make: Make, recipe: str, options: dict[str, Any]) -> str:
    model: Any = build("mlp", torch.float32)
    make(model, mesh_of_groups(2, 2))
    try:
        ABTraining(model, adamw(model.parameters()), recipes.build(recipe, 20), communicator=comm, **options)
    except AbtrainError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (over_the_world, "0.weight is sharded over ranks [0, 1, 2, 3], but this worker's group has ranks"),
        (over_counterparts, "0.weight is sharded over ranks"),
        (hybrid, "the model is sharded over a mesh of several dimensions"),
        (in_tensor_parallel, "these weights are DTensors without fully_shard, as in tensor parallelism: 0.weight"),
        (by_columns, "weights are not sharded by their first dimension: 0.weight"),
        (in_part, "some trained weights are sharded and others are not: 0.weight"),
        (with_a_sharded_buffer, "sharded buffers cannot be merged: table"),
        (by_the_first_fsdp, "0 is wrapped in FullyShardedDataParallel"),
        (on_one_worker_of_a_group, "model.0.weight.placements is absent on rank 0, 2 and "),
        (one_is_wider, "model.4.weight.shape is '(5, 12)' on rank 0, 1, 2 and '(7, 12)' on rank 3"),
    ],
)
def test_a_model_that_is_sharded_otherwise_is_refused_by_all(make: Make, message: str) -> None:
    texts = run_gloo(4, told, make, "local_sgd", {}, group_size=2)
    assert all(message in text for text in texts), texts


@pytest.mark.parametrize("recipe", ["ab_outer", "ab_local", "ab", "ab_no_groups", "ddp", "powersgd", "solo"])
def test_recipes_that_need_more_than_shards_say_what_works(recipe: str) -> None:
    texts = run_gloo(4, told, as_it_should_be, recipe, {}, group_size=2)
    assert all(f"recipe {recipe!r}" in text and "use local_sgd or diloco" in text for text in texts), texts


def test_divergence_is_refused() -> None:
    texts = run_gloo(4, told, as_it_should_be, "diloco", {"measure_divergence": True}, group_size=2)
    assert all("measure_divergence=True needs whole weights" in text for text in texts)


class Loop:
    def __init__(self, comm: Communicator | None, optimizer: Any = adamw, **options: Any) -> None:
        self.model: Any = build("mlp", torch.float32)
        fully_shard(self.model, mesh=places_of(mesh_of_groups(2, 2)))
        self.optimizer = optimizer(self.model.parameters())
        recipe = recipes.local_sgd(8, every=4, wire="fp32")
        self.ab = ABTraining(self.model, self.optimizer, recipe, communicator=comm, **options)

    def step(self, change: Callable[[], Any] = lambda: None) -> None:
        x, y = batch("mlp", dist.get_rank(), self.ab.steps_done, torch.float32)
        F.cross_entropy(self.ab(x), y).backward()
        change()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ab.step()

    def spoil(self) -> None:
        """NaN on one shard of one gradient."""
        if dist.get_rank() == 1:
            self.model[2].weight.grad.to_local()[0] = math.nan


def spoiled(comm: Communicator, policy: Any) -> tuple[Any, ...]:
    loop = Loop(comm, on_nonfinite=policy)
    try:
        while not loop.ab.finished:
            loop.step(loop.spoil if loop.ab.steps_done == 1 else lambda: None)
    except NonFiniteError as error:
        return (str(error),)
    return loop.ab.dropped_parts, loop.ab.skipped_steps, abtrain.weights_digest(loop.model)


def test_a_group_with_nan_on_one_shard_is_dropped_as_one() -> None:
    ranks = run_gloo(4, spoiled, "drop_worker", group_size=2)
    assert all(rank == ranks[0] for rank in ranks)
    assert ranks[0][0] == [{"step": 4, "ranks": [0, 1]}]


def test_a_group_skips_a_step_together() -> None:
    ranks = run_gloo(4, spoiled, "skip", group_size=2)
    assert [skipped for _, skipped, _ in ranks] == [[1], [1], [], []]
    assert len({digest for _, _, digest in ranks}) == 1


def test_all_workers_stop() -> None:
    assert all("NaN or infinity on rank 0, 1" in text for (text,) in run_gloo(4, spoiled, "stop", group_size=2))


def drifted(comm: Communicator) -> str:
    """After the last merge, one worker changes its shard, which only its counterpart can find."""
    loop = Loop(comm)
    merge = loop.ab._rounds.step

    def changed(*args: Any) -> bool:
        equal = merge(*args)
        if comm.rank == 3 and loop.ab.steps_done == 8:
            loop.model[0].weight.detach().to_local()[0] += 1
        return equal

    loop.ab._rounds.step = changed  # type: ignore[method-assign]
    with pytest.raises(AbtrainError) as error:
        while not loop.ab.finished:
            loop.step()
    return str(error.value)


def test_all_workers_hear_of_a_shard_that_has_drifted() -> None:
    texts = run_gloo(4, drifted, group_size=2)
    assert all("rank 3 has different weights from rank 1" in text for text in texts), texts


def answers(comm: Communicator) -> list[str]:
    loop = Loop(None)
    assert loop.ab.communicator.topology.group_size == 2
    told = []
    calls: list[Callable[[], Any]] = [
        lambda: loop.ab.ema(0.9),
        lambda: abtrain.compress(loop.model, Energy(0.9)),
        lambda: abtrain.to_plain(loop.model),
    ]
    for call in calls:
        with pytest.raises(AbtrainError) as error:
            call()
        told.append(str(error.value))
    return told


def test_calls_that_need_whole_weights_say_what_to_do() -> None:
    """The size of groups is that of the mesh."""
    for ema, *copies in run_gloo(4, answers):
        assert "validate and save inside `with ab.merged():`" in ema
        assert all("save it by ab.save(path) on all workers of a group" in text for text in copies)


class RowSums(torch.optim.SGD):
    """Keeps one number for each row, as Adafactor does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["rows"] = parameter.grad.sum(-1)


def other_state(comm: Communicator) -> str:
    loop = Loop(comm, functools.partial(RowSums, lr=0.01))
    with pytest.raises(AbtrainError) as error:
        loop.step()
    return str(error.value)


def test_state_of_other_shapes_is_refused() -> None:
    texts = run_gloo(4, other_state, group_size=2)
    assert all("RowSums keeps 'rows' in its state, which is not sharded like" in text for text in texts), texts


def unknown_shard(state: Any) -> None:
    state["model"]["sharded"].append("9.weight")


def fewer_shards(state: Any) -> None:
    state["model"]["sharded"].remove("0.weight")


def another_shape(state: Any) -> None:
    state["model"]["weights"]["0.weight"] = torch.zeros(3, 10)


def momentum_of_another_shape(state: Any) -> None:
    state["model"]["optimizers"][0]["state"]["0.weight"]["exp_avg"] = torch.zeros(16, 10)


def state_of_one_weight_less(state: Any) -> None:
    del state["model"]["optimizers"][0]["state"]["0.weight"]


def refused(comm: Communicator, change: Callable[[Any], None]) -> str:
    """Rank 1 of a run with whole models loads a changed state of a sharded run."""
    loop = Loop(comm)
    loop.step()
    state = copy.deepcopy(loop.ab.state_dict())
    if comm.rank == 1:
        change(state)
    model = build("mlp", torch.float32, seed=9)
    other = ABTraining(model, adamw(model.parameters()), loop.ab.recipe, communicator=comm)
    before = abtrain.weights_digest(model)
    with pytest.raises(AbtrainError) as error:
        other.load_state_dict(state)
    assert abtrain.weights_digest(model) == before
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unknown_shard, "on rank 1: the checkpoint does not fit: '9.weight' is sharded in the state"),
        (fewer_shards, "on rank 1: the checkpoint does not fit: "),
        (another_shape, "on rank 1: the checkpoint does not fit: "),
        (momentum_of_another_shape, "on rank 1: the checkpoint does not fit: "),
        (state_of_one_weight_less, "on rank 0, 1: the states of a group have optimizer state for different weights"),
    ],
)
def test_changed_states_are_refused_by_all(change: Callable[[Any], None], message: str) -> None:
    texts = run_gloo(4, refused, change, group_size=2)
    assert all(f"CheckpointError: {message}" in text for text in texts), texts
