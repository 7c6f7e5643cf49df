"""Checks whether models under FSDP2 are sharded over the workers of a group, and whether a recipe can merge them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.checks import told_names
from abtrain.comm.communicator import Communicator
from abtrain.lowrank.nested import tensors_in
from abtrain.lowrank.optimizers import Optimizers
from abtrain.own import IGNORED, own_names
from abtrain.recipes.recipe import Recipe
from abtrain.shards import fsdp_modules, is_first_fsdp, is_like, is_sharded

_LIKE_THIS = (
    'mesh = init_device_mesh(device, (groups, workers), mesh_dim_names=("groups", "places")) and '
    'fully_shard(model, mesh=mesh["places"]), with group_size=workers'
)


def shards_of(model: nn.Module) -> int | None:
    """Returns over how many workers a model is sharded; None if it is not sharded."""
    meshes: list[Any] = [getattr(p, "device_mesh") for p in model.parameters() if is_sharded(p)]  # noqa: B009
    return meshes[0].size() if meshes else None


def sharding_problems(model: nn.Module, optimizers: Optimizers, recipe: Recipe) -> list[str]:
    """Returns the problems of a sharded model with this recipe; empty if there are none, or it is not sharded."""
    wrapped = [name or "the model" for name, module in model.named_modules() if is_first_fsdp(module)]
    if wrapped:
        return [
            f"{told_names(wrapped)} is wrapped in FullyShardedDataParallel, whose flat parameters cannot be merged: "
            f"use {_LIKE_THIS}"
        ]
    buffers = [name for name, buffer in model.named_buffers() if is_sharded(buffer)]
    if buffers:
        return [f"sharded buffers cannot be merged: {told_names(buffers)}. Keep buffers whole on each worker"]
    sharded: dict[str, Any] = {name: p for name, p in model.named_parameters() if is_sharded(p)}
    if not sharded:
        return []
    problems = [*_form_problems(model, sharded), *_mixed_problems(model, optimizers, sharded)]
    # The first problem often explains the others.
    return problems[:1] + list(_recipe_problems(recipe))


def _form_problems(model: nn.Module, sharded: Mapping[str, Any]) -> Iterator[str]:
    """Yields the problems of how the parameters in `sharded` are divided."""
    odd = [name for name, p in sharded.items() if p.device_mesh.ndim > 1]
    if odd:
        axes = sharded[odd[0]].device_mesh.mesh_dim_names
        yield (
            f"the model is sharded over a mesh of several dimensions ({told_names(odd)}: {axes}), as by tensor "
            f"parallelism or hybrid sharding. abtrain merges between the groups itself: use {_LIKE_THIS}"
        )
    covered = [name for name, _ in fsdp_modules(model)]
    odd = [name for name in sharded if not any(name.startswith(f"{path}." if path else "") for path in covered)]
    if odd:
        yield (
            f"these weights are DTensors without fully_shard, as in tensor parallelism: {told_names(odd)}. Only models "
            f"that FSDP2 shards can be merged: use {_LIKE_THIS}"
        )
    odd = [f"{name} {p.placements}" for name, p in sharded.items() if not all(one.is_shard(0) for one in p.placements)]
    if odd:
        yield (
            f"weights are not sharded by their first dimension: {told_names(odd)}. Use fully_shard without "
            "shard_placement_fn"
        )


def _mixed_problems(model: nn.Module, optimizers: Optimizers, sharded: Mapping[str, Any]) -> Iterator[str]:
    """Yields the problems of parameters that are trained whole, or by one worker, beside the sharded ones."""
    held = set(map(id, optimizers.parameters()))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) in held}
    odd = [name for name in trained if name not in sharded]
    if odd:
        yield (
            f"some trained weights are sharded and others are not: {told_names(odd)}, so their gradients would not be "
            "averaged in the group. Apply fully_shard to the whole model, without ignored_params"
        )
    odd = [name for name in sorted(own_names(model)) if name in sharded]
    if odd:
        yield f"each worker has its own values of {told_names(odd)} ({IGNORED}), but they are sharded: leave them out"


def fit_problems(model: nn.Module, comm: Communicator, measure_divergence: bool) -> list[str]:
    """Returns the problems of training a sharded model with these workers and options; empty if it is not sharded."""
    sharded: dict[str, Any] = {name: p for name, p in model.named_parameters() if is_sharded(p)}
    problems = list(_mesh_problems(sharded, comm))
    if sharded and measure_divergence:
        problems.append("measure_divergence=True needs whole weights, but the model is sharded: leave it out")
    return problems


def _recipe_problems(recipe: Recipe) -> Iterator[str]:
    works = "use local_sgd or diloco, which merge shards"
    if recipe.factored:
        yield (
            f"recipe {recipe.name!r} factors weights, but the model is sharded (fully_shard), so no worker has a whole "
            f"weight to factor: {works}"
        )
        return
    other = [phase.name for phase in recipe.phases if phase.rounds is None]
    if other:
        yield (
            f"recipe {recipe.name!r} does not merge in phase {other[0]!r}, but a sharded model averages gradients in "
            f"its group only: {works}"
        )


def _mesh_problems(sharded: dict[str, Any], comm: Communicator) -> Iterator[str]:
    group = list(comm.ranks("group"))
    for name, parameter in sharded.items():
        ranks = parameter.device_mesh.mesh.flatten().tolist()
        if ranks != group:
            yield (
                f"{name} is sharded over ranks {ranks}, but this worker's group has ranks {group}. Groups are "
                f"consecutive ranks: use {_LIKE_THIS}"
            )
            return


def state_unlike_shards(optimizer: Optimizer) -> str:
    """Returns the key of optimizer state that is not sharded like its sharded weight; empty if there is none.

    Single numbers, such as step counts, need not be sharded.
    """
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, Tensor) and is_sharded(parameter) and isinstance(state, dict):
            for key, held in state.items():
                tensors = list(tensors_in(held))
                if any((one.ndim or is_sharded(one)) and not is_like(parameter, one) for one in tensors):
                    return repr(key)
    return ""
