"""Validates the arguments of `ABTraining`, and reports all problems at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from abtrain.checks import said, told_names
from abtrain.comm import default_communicator
from abtrain.comm.communicator import Communicator
from abtrain.engine.optimizer_problems import form_problems, optimizer_problems
from abtrain.engine.sharding import fit_problems, sharding_problems, shards_of
from abtrain.errors import ConfigurationError, OnNonFinite, nearest
from abtrain.lowrank.classify import classify
from abtrain.lowrank.layers import Factored
from abtrain.lowrank.names import matching
from abtrain.lowrank.optimizers import Optimizers
from abtrain.own import IGNORED, ignored_names
from abtrain.recipes.recipe import Recipe
from abtrain.shards import is_sharded, reshard

_FEW_STEPS = 100
"""The shortest warm-up without a warning. In docs/studies/large-batch.md, 24 steps lose 11 points, 48 lose 4."""


def checked(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    recipe: Recipe,
    communicator: Communicator | None,
    group_size: int | None,
    on_nonfinite: OnNonFinite,
    average_buffers: Sequence[str],
    measure_divergence: bool,
) -> Communicator:
    """Checks arguments of `ABTraining`. Returns the communicator that was passed in, or the default one.

    Raises:
        ConfigurationError: the arguments are invalid; the message lists all problems.
    """
    if isinstance(model, nn.Module):
        reshard(model)
    problems = _problems_of(model, optimizer, recipe)
    if on_nonfinite not in get_args(OnNonFinite):
        problems.append(f"on_nonfinite={on_nonfinite!r} is unknown: use {', '.join(get_args(OnNonFinite))}")
    if communicator is not None and group_size is not None:
        problems.append("communicator and group_size exclude each other, as a communicator has a group size: pass one")
    if isinstance(model, nn.Module):
        problems += _buffer_problems(model, average_buffers) + _ignored_problems(model)
    if problems:
        raise ConfigurationError(problems)
    if group_size is None:
        group_size = shards_of(model)
    comm = default_communicator(group_size) if communicator is None else communicator
    problems = fit_problems(model, comm, measure_divergence)
    problems += problems_here(model, Optimizers(optimizer), recipe, comm)
    if problems:
        raise ConfigurationError(problems)
    return comm


def _problems_of(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], recipe: Recipe) -> list[str]:
    if isinstance(optimizer, Recipe):
        return ["the optimizer and the recipe are swapped: call ABTraining(model, optimizer, recipe)"]
    if not isinstance(recipe, Recipe):
        example = "abtrain.recipes.ab_outer(total_steps=10_000)"
        return [f"recipe is {said(recipe)}, not a Recipe: build one, such as {example}"]
    unusable = form_problems(optimizer)
    if unusable:
        return unusable
    if isinstance(model, DistributedDataParallel | DataParallel):
        wrapper = type(model).__name__
        return [
            f"the model is wrapped in {wrapper}: pass the bare model ({wrapper}(...).module); abtrain wraps it itself"
        ]
    optimizers = Optimizers(optimizer)
    unfit = sharding_problems(model, optimizers, recipe) or _tensor_problems(model)
    unfit = unfit or (_factoring_problems(model, optimizers, recipe) if recipe.factored else [])
    return optimizer_problems(model, optimizers, recipe) + unfit


def _tensor_problems(model: nn.Module) -> list[str]:
    """Returns a message about the first problem of the model's tensors, in a list; empty if there is none."""
    parameters = dict(model.named_parameters())
    tensors = parameters | dict(model.named_buffers())
    unreal = [name for name, tensor in tensors.items() if tensor.is_meta]
    if unreal:
        return [f"the model is on the meta device ({told_names(unreal)}): give it values, or build it on a real device"]
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in parameters.values()):
        return ["the model has lazy parameters without a shape: run one forward pass first"]
    devices = sorted({str(parameter.device) for parameter in parameters.values()})
    if len(devices) > 1:
        return [f"the model is on several devices ({', '.join(devices)}): move it to one"]
    if any(isinstance(module, Factored) for module in model.modules()):
        return ["the model has the factors of another run: call close() on that run's ABTraining first"]
    wrapped = [f"{name} ({type(t.data).__name__})" for name, t in tensors.items() if _is_wrapped(t)]
    if wrapped:
        return [
            f"trained tensors of a subclass of Tensor cannot be merged: {told_names(wrapped)}. Build the model with "
            "plain tensors, or freeze such weights"
        ]
    layouts = {name: "nested" if t.is_nested else str(t.layout).removeprefix("torch.") for name, t in tensors.items()}
    odd = [f"{name} ({layout})" for name, layout in layouts.items() if layout != "strided"]
    if odd:
        return [
            f"only dense tensors can be compared, merged and saved, but these are not dense: {told_names(odd)}. Keep "
            "such a tensor as a plain attribute instead of a buffer, or register it with .to_dense()"
        ]
    expanded = [
        name for name, t in tensors.items() if any(s == 0 < n - 1 for s, n in zip(t.stride(), t.shape, strict=True))
    ]
    if expanded:
        return [
            f"several elements of expanded tensors share one place in memory, so they cannot be written one by one: "
            f"{told_names(expanded)}. Use copies, made by .clone()"
        ]
    sparse = [name for name, module in model.named_modules() if getattr(module, "sparse", False) is True]
    if sparse:
        return [f"layers have sparse gradients, which cannot be averaged: {told_names(sparse)}. Use sparse=False"]
    return []


def _factoring_problems(model: nn.Module, optimizers: Optimizers, recipe: Recipe) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    patterns = recipe.factoring.exclude if recipe.factoring else ()
    problems = [f"exclude {problem}" for problem in _unmatched(patterns, names, "parameter")]
    treatments = classify(model, recipe.factoring, set(map(id, optimizers.parameters())))
    if not any(treatment.kind == "factored" for treatment in treatments):
        reasons = "; ".join(f"{t.name} {list(t.shape)}: {t.reason}" for t in treatments[:8])
        problems.append(
            f"recipe {recipe.name!r} factors weights, but no weight of the model is eligible "
            f"({reasons or 'it has no parameters'}): loosen exclude or min_dim, or use the recipe local_sgd"
        )
    return problems


def _is_wrapped(tensor: Tensor) -> bool:
    """Returns whether a tensor is trained and belongs to a subclass of Tensor, but is not sharded over workers."""
    return tensor.requires_grad and type(tensor.data) is not Tensor and not is_sharded(tensor)


def _buffer_problems(model: nn.Module, average_buffers: Sequence[str]) -> list[str]:
    if isinstance(average_buffers, str):
        return [f"average_buffers={average_buffers!r} is a string: pass a list of globs, such as [{average_buffers!r}]"]
    unmatched = _unmatched(average_buffers, [name for name, _ in model.named_buffers()], "buffer")
    return [f"average_buffers: {problem}" for problem in unmatched]


def _ignored_problems(model: nn.Module) -> list[str]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = [name for name, _ in tensors]
    idle = sorted(ignored_names(model).difference(names))
    return [f"{IGNORED}: {name!r} is neither a parameter nor a buffer: {nearest(name, names)}" for name in idle]


def _unmatched(patterns: Iterable[str], names: Sequence[str], kind: str) -> list[str]:
    """Returns one message for each glob pattern that matches none of the names."""
    idle = [pattern for pattern in patterns if all(matching(name, [pattern]) is None for name in names)]
    return [f"{pattern!r} matches no {kind}: {nearest(pattern, names)}" for pattern in idle]


def problems_here(model: nn.Module, optimizers: Optimizers, recipe: Recipe, comm: Communicator) -> list[str]:
    """Returns one message for each problem that depends on the workers or their communicator."""
    problems, topology = [], comm.topology
    device = next((p.device for p in model.parameters()), comm.device)
    if comm.device.type != "cpu" and device != comm.device:
        problems.append(
            f"the model is on {device}, but this worker's backend sends only tensors on {comm.device}: "
            f"move the model there, or use the backend gloo"
        )
    if topology.world_size == 1:
        return problems
    refused = [comm.cannot_carry(phase.sync) for phase in recipe.phases]
    problems += dict.fromkeys(filter(None, refused))
    shared = topology.group_size > 1 or any(phase.shares_gradients for phase in recipe.phases)
    if shared and any(isinstance(one, LBFGS) for one in optimizers.all):
        problems.append(
            "LBFGS calls its closure as often as each worker's own loss requires, so some workers would average "
            "gradients more often than others: use another optimizer, or a recipe that only merges, with group_size=1"
        )
    alone = [phase.name for phase in recipe.phases if phase.sync is None or (phase.rounds and topology.group_size == 1)]
    layers = sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    if layers and alone:
        problems.append(
            f"the model has {layers} SyncBatchNorm layers, but in phase {alone[0]!r} each worker trains alone, without "
            "others to synchronize with: use BatchNorm, or a group size of at least 2"
        )
    return problems


def doubts_about(recipe: Recipe, comm: Communicator) -> list[str]:
    """Returns warnings about settings that are valid but possibly unintended; equal on all workers."""
    doubts, topology = [], comm.topology
    if topology.n_groups == 1 and any(phase.trains == "a_or_b" for phase in recipe.phases):
        doubts.append(
            "the only group trains the factors A and B in turn: to train both, use a smaller group_size, or ab_outer"
        )
    merges = any(phase.rounds for phase in recipe.phases) and recipe.choice is None
    if topology.n_groups == 1 and topology.world_size > 1 and merges:
        doubts.append(
            f"group_size={topology.group_size} makes one group of all {topology.world_size} workers: they average "
            "gradients at every step, as with ddp, and send merges as well, so nothing is saved. Use "
            "group_size=1, the workers of one machine, or the recipe ddp"
        )
    # A recipe that factors weights at step 0 is for pretrained models.
    steps = recipe.first_factored_step or 0
    if 0 < steps < _FEW_STEPS:
        doubts.append(
            f"weights are factored after {steps} steps: this is too early for a model that is trained from scratch, "
            "since factors keep only what it has learned by then. Give a warm-up of at least "
            f"{_FEW_STEPS} steps (warmup_steps), or use local_sgd"
        )
    return doubts
