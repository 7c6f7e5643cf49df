"""Compares settings between workers: before a run begins, at the start of each phase, and before a run resumes.

If one worker has a different recipe, option, memory format or learning rate, the other workers may hang. At worst, the
workers average wrong values without any error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn

from abtrain.comm.communicator import Communicator
from abtrain.consistency.agreement import Hashed, check_equal
from abtrain.lowrank.model import FactoredModel
from abtrain.lowrank.optimizers import Optimizers, settings_of
from abtrain.own import own_names, shared_buffers
from abtrain.shards import is_sharded

HYPERPARAMETERS = frozenset(
    {"lr", "weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha", "rho", "amsgrad", "maximize"}
)
"""Settings in param groups that no optimizer changes by itself. Other settings may be state, such as step counts."""

_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Settings of PyTorch's optimizers that select an implementation and do not change what is computed."""


def check_phase(comm: Communicator, model: FactoredModel, where: str, settings: Collection[str]) -> None:
    """Checks at the start of a phase that tensors and param groups match on all workers. Collective over the world.

    Compares shapes, dtypes and strides before DDP wraps the model, and the settings named in `settings`.

    Raises:
        RanksDisagreeError: tensors or settings differ. All ranks raise the error, which lists the differences.
    """
    names, own = model.parameters(), own_names(model.model)
    factors = model.factors().keys()
    # Which factors require gradients depends on the role of the worker's group.
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
        "Change buffers, memory formats, requires_grad and the optimizer's settings on all workers at the same step",
    )


def settings_at_start(optimizers: Optimizers) -> frozenset[str]:
    """Returns the names of the optimizers' constructor settings, except those that only select an implementation."""
    defaults = {key for optimizer in optimizers.all for key in getattr(optimizer, "defaults", ())}
    return frozenset(defaults - _IMPLEMENTATION)


def layout(tensor: Tensor, **more: object) -> dict[str, object]:
    """Returns a tensor's shape, dtype, strides, and `more`. Strides matter because sums follow the order of memory.

    A sharded tensor also has its `placements`, the dimensions in which it is divided among the workers of a group.
    """
    if is_sharded(tensor):
        more["placements"] = str(getattr(tensor, "placements"))  # noqa: B009
    # The stride of a dimension of size 1 has no meaning.
    strides = tuple(stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return {"shape": str(tuple(tensor.shape)), "dtype": str(tensor.dtype), "strides": str(strides), **more}


class GroupNames:
    """Remembers the names of the parameters in each param group, until `key` or the lengths of the groups change."""

    def __init__(self) -> None:
        self.key = 0
        self._known: list[tuple[int, int]] = []
        self._names: list[Hashed] = []

    def of(self, optimizers: Optimizers, parameters: Mapping[str, nn.Parameter]) -> list[Hashed]:
        """Returns the sorted names of the parameters in each param group of all optimizers."""
        groups = [group["params"] for group in optimizers.groups()]
        known = [(self.key, len(held)) for held in groups]
        if known != self._known:
            names = {id(parameter): name for name, parameter in parameters.items()}
            listed = [sorted(names.get(id(p), "not a parameter of the model") for p in held) for held in groups]
            self._known, self._names = known, list(map(Hashed, listed))
        return self._names


def optimizer_settings(
    optimizers: Optimizers,
    parameters: Mapping[str, nn.Parameter],
    keys: Collection[str],
    known: GroupNames | None = None,
) -> list[dict[str, object]]:
    """Returns, for each param group, the settings named in `keys` and its parameters' names, for `check_equal`.

    `known` remembers the names from call to call.
    """
    names = (known or GroupNames()).of(optimizers, parameters)
    return [{**chosen(group, keys), "parameters": held} for group, held in zip(optimizers.groups(), names, strict=True)]


def chosen(group: Mapping[str, Any], keys: Collection[str]) -> dict[str, object]:
    """Returns the settings named in `keys` from a param group. Tensors become Python numbers, equal on any device."""
    return {key: _plain(value) for key, value in settings_of(group).items() if key in keys}


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return value.tolist()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value
