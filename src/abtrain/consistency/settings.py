"""Workers compare their settings: before they begin, at each phase, and before they continue from saved states.

A recipe, an option, a memory format or a learning rate that differs on one worker would hang the others at best. At
worst it changes what is averaged, and nobody learns of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn

from abtrain.comm.checksums import fingerprint, stable_repr
from abtrain.comm.communicator import Communicator
from abtrain.comm.traffic import Calls
from abtrain.consistency.agreement import ABSENT, ROLL_CALL, differing_fields, gather_json, values_by_rank
from abtrain.errors import RanksDisagreeError
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizers import Optimizers, settings_of
from abtrain.own import own_names, shared_buffers
from abtrain.recipes.recipe import Recipe

_MOST_TOLD = 5


def check_start(comm: Communicator, recipe: Recipe, **options: object) -> None:
    """Compares recipe, groups and options. Collective over the world; 24 bytes, until something differs.

    Args:
        comm: of this worker.
        recipe: as it was given.
        options: what else has to be alike, versions too.

    Raises:
        RanksDisagreeError: on all ranks, with what differs and where.
    """
    check_equal(
        comm,
        {"topology": comm.topology, "recipe": recipe, **options},
        "workers were started with different software or settings",
        "Build ABTraining with the same recipe, options, model and optimizer on every worker, under the same versions",
    )


def check_phase(comm: Communicator, model: FactoredModel, where: str, settings: Collection[str]) -> None:
    """Compares what DDP is about to be built on, and the optimizer. Collective over the world; 24 bytes.

    Args:
        comm: of this worker.
        model: with its optimizer, in the form of the phase that begins.
        where: for the message, such as `step 120, phase rebound`.
        settings: of the optimizer's param groups that have to be equal.

    Raises:
        RanksDisagreeError: on all ranks, with what differs and where.
    """
    names, own = model.parameters(), own_names(model.model)
    factors = model.factors().keys()
    # Which factors require gradients is a matter of roles.
    layouts = {
        name: layout(p) if name in factors else layout(p, requires_grad=p.requires_grad)
        for name, p in names.items()
        if name not in own
    }
    layouts |= {name: layout(buffer) for name, buffer in shared_buffers(model.model).items()}
    check_equal(
        comm,
        {"model": layouts, "param_groups": optimizer_settings(model.optimizers, names, settings)},
        f"workers differ at {where}",
        "Change buffers, memory formats, requires_grad and the optimizer's settings on all workers, at the same step",
    )


HYPERPARAMETERS = frozenset(
    {"lr", "weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha", "rho", "amsgrad", "maximize"}
)
"""Settings of param groups that no optimizer changes by itself. Others may be state, such as a count of steps."""


_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Settings of PyTorch's optimizers that do not say what is computed."""


def settings_at_start(optimizers: Optimizers) -> frozenset[str]:
    """The settings that optimizers were built with, without what schedulers and loops have added to their groups."""
    return (
        frozenset(key for optimizer in optimizers.all for key in getattr(optimizer, "defaults", ())) - _IMPLEMENTATION
    )


def layout(tensor: Tensor, **more: object) -> dict[str, object]:
    """Returns the properties that have to be equal before elements at the same place in memory are added, and `more`.

    Strides of dimensions of one element say nothing: they are left out.
    """
    strides = tuple(stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return {"shape": str(tuple(tensor.shape)), "dtype": str(tensor.dtype), "strides": str(strides), **more}


def optimizer_settings(
    optimizers: Optimizers, names: Mapping[str, nn.Parameter], keys: Collection[str] | None = None
) -> list[dict[str, object]]:
    """The settings of all param groups, and whose they are.

    Args:
        optimizers: over the parameters.
        names: of these.
        keys: settings of interest; None: all.
    """
    known = {id(parameter): name for name, parameter in names.items()}
    groups = []
    for group in optimizers.groups():
        owned = sorted(known.get(id(p), "a stranger") for p in group["params"])
        groups.append({**chosen(group, keys), "parameters": owned})
    return groups


def chosen(group: Mapping[str, Any], keys: Collection[str] | None) -> dict[str, object]:
    """Settings of a param group, to be compared; `keys`: of interest (None: all)."""
    return {key: _plain(value) for key, value in settings_of(group).items() if keys is None or key in keys}


def _plain(value: object) -> object:
    """A learning rate may be a tensor on any device, or a number of any kind."""
    if isinstance(value, Tensor):
        return value.tolist()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def check_loaded(comm: Communicator, recipe: Recipe, state: Mapping[str, Any], **more: object) -> None:
    """Compares where workers go on. Collective over the world; 24 bytes, until something differs.

    Args:
        comm: of this worker.
        recipe: of the run.
        state: of this worker, from `ABTraining.state_dict`.
        more: what else has to be alike.

    Raises:
        RanksDisagreeError: on all ranks, if steps, phases or merges under way differ.
    """
    step = int(state["step"])
    place = {
        "step": step,
        "phase": recipe.at(step).phase.name if step < recipe.total_steps else "none, the recipe has ended",
        "workers_equal": bool(state["workers_equal"]),
        "merges_since_step": [merge["step"] for merge in state["rounds"]["under_way"]],
        **more,
    }
    check_equal(
        comm,
        place,
        "workers load states that do not belong together",
        "Load on every worker what was saved at the same step of the same run",
    )


def sent_by_check_settings() -> Calls:
    """The call of `check_start`, and of `check_phase`, where nothing differs."""
    return ROLL_CALL


def check_equal(comm: Communicator, values: Mapping[str, object], what: str, remedy: str) -> None:
    """Checks that all ranks hold the same values. Collective over the world; 24 bytes, until something differs.

    Args:
        comm: of this worker.
        values: by name: numbers, words, dataclasses, and any nesting of them.
        what: the first words of the error.
        remedy: its last words.

    Raises:
        RanksDisagreeError: on all ranks, with the first differences and where they are.
    """
    held = {name: dict(leaves(name, value)) for name, value in values.items()}
    differing = differing_fields(comm, **{name: fingerprint(*parts.items()) for name, parts in held.items()})
    if not differing:
        return
    # All ranks are here, since all have seen it.
    everyone = gather_json(comm, {place: text for name in differing for place, text in held[name].items()})
    told = _differences(everyone)
    more = f"; and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
    raise RanksDisagreeError(f"{what}: {'; '.join(told[:_MOST_TOLD])}{more}. {remedy}")


def leaves(place: str, value: object) -> Iterator[tuple[str, str]]:
    """A value as words, part by part, each with its place: dataclasses by their fields, tuples by their items."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield place, type(value).__name__
        for field in dataclasses.fields(value):
            yield from leaves(f"{place}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(f"{place}.{key}", item)
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from leaves(f"{place}[{i}]", item)
    else:
        yield place, stable_repr(value)


def _differences(everyone: list[dict[str, str]]) -> list[str]:
    """Lists the differences and their places. A value that is missing or of another kind has no parts listed."""
    found: dict[str, str] = {}
    for place in dict.fromkeys(place for held in everyone for place in held):
        values = [held.get(place, ABSENT) for held in everyone]
        within = tuple(f"{outer}{mark}" for outer in found for mark in ".[")
        if len(set(values)) > 1 and not place.startswith(within):
            found[place] = values_by_rank(place, values)
    return list(found.values())
