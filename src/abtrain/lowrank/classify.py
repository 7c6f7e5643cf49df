"""Which parameters are factored, which are averaged as they are, and why."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from abtrain.lowrank.layers import FACTORED_LAYERS
from abtrain.lowrank.matrix import MatrixShape
from abtrain.own import IGNORED, own_names
from abtrain.recipes.factoring import Factoring

Kind = Literal["factored", "averaged", "frozen", "own"]
UNSHARED: tuple[Kind, ...] = ("frozen", "own")
"""Kinds that merges leave out."""

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)


@dataclass(frozen=True)
class Treatment:
    """The treatment of one parameter.

    Attributes:
        name: its first name in the model.
        shape: of the dense parameter.
        kind: `factored`: A and B in factored phases; `averaged`: always dense, and averaged at merges; `frozen`: never
            trained, so never sent; `own`: left to each worker, so neither sent nor compared.
        reason: why it has this kind, for people.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    reason: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def classify(model: nn.Module, factoring: Factoring | None, optimized: set[int] | None = None) -> list[Treatment]:
    """Decides how every parameter of the model is treated; tied parameters appear once.

    Args:
        model: with all its weights dense.
        factoring: None if the recipe has no factored phase.
        optimized: `id`s of the parameters that the optimizer holds; None: it holds all of them.
    """
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    treatments, own, sharing = [], own_names(model), _sharing_memory(model)
    for name, parameter in model.named_parameters():
        kind: Kind = "averaged"
        if name in own:
            kind, reason = "own", f"in {IGNORED}"
        elif not parameter.requires_grad:
            kind, reason = "frozen", "does not require a gradient"
        elif optimized is not None and id(parameter) not in optimized:
            kind, reason = "frozen", "not in the optimizer"
        elif len(names[id(parameter)]) > 1:
            reason = f"tied with {', '.join(names[id(parameter)][1:])}"
        elif factoring is None:
            reason = "the recipe has no factored phase"
        else:
            reason = _why_dense(model, name, parameter, factoring) or sharing.get(name, "")
            if not reason:
                kind, reason = "factored", _how_factored(model, name, parameter)
        treatments.append(Treatment(name, tuple(parameter.shape), kind, reason))
    return treatments


def _why_dense(model: nn.Module, name: str, parameter: nn.Parameter, factoring: Factoring) -> str:
    """The reason why a trained parameter stays dense; empty if it can be factored."""
    module, attribute = owner(model, name)
    least_dim = MatrixShape(parameter.shape).n if parameter.ndim >= 2 else 0
    excluded = next((pattern for pattern in factoring.exclude if fnmatchcase(name, pattern)), None)
    rules = (
        (parameter.numel() == 0, "empty"),
        (type(parameter) is not nn.Parameter, f"a {type(parameter).__name__}: only plain nn.Parameters are factored"),
        (parameter.ndim < 2, "a vector or scalar"),
        (not parameter.is_floating_point(), f"{parameter.dtype}: only real weights are factored"),
        (isinstance(module, nn.Embedding | nn.EmbeddingBag), "an embedding"),
        (isinstance(module, _NORMS), "a norm"),
        (isinstance(module, nn.RNNBase), "a recurrent layer keeps flat copies of its weights"),
        (not attribute.endswith("weight"), "its name does not end in 'weight'"),
        (excluded is not None, f"excluded by {excluded!r}"),
        (least_dim < factoring.min_dim, f"smaller matrix dimension {least_dim} is below min_dim={factoring.min_dim}"),
    )
    return next((reason for applies, reason in rules if applies), "")


def _sharing_memory(model: nn.Module) -> dict[str, str]:
    """The reasons why parameters stay dense whose storage is shared, as by ties of `.data`; by parameter and buffer."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # Sparse tensors and those of other classes may have no storage.
        plain = tensor.layout == torch.strided and type(tensor.data) is torch.Tensor
        if plain and tensor.untyped_storage().data_ptr():
            places[tensor.untyped_storage().data_ptr()].append(name)
    shared = [names for names in places.values() if len(names) > 1]
    first = {name: next(other for other in names if other != name) for names in shared for name in names}
    return {name: f"shares memory with {other}" for name, other in first.items()}


def _how_factored(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    module, attribute = owner(model, name)
    if has_factored_form(module, attribute, bool(parameter._backward_hooks)):
        return f"{type(module).__name__}, computed in factored form"
    return f"{type(module).__name__}, rebuilt from its factors when read"


def has_factored_form(module: nn.Module, attribute: str, hooked: bool) -> bool:
    """Whether a dense module can compute with A and B without rebuilding W.

    Args:
        module: the module that holds the weight.
        attribute: the weight's name in the module.
        hooked: whether a tensor hook needs the gradient of W.
    """
    alone = attribute == "weight" and not hooked
    return alone and type(module) in FACTORED_LAYERS and getattr(module, "groups", 1) == 1


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds parameter `name`, and the parameter's name in it."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
