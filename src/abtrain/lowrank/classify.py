"""Decides which parameters are factored and which stay dense, with a reason for each."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from abtrain.errors import a_or_an
from abtrain.lowrank.layers import FACTORED_LAYERS
from abtrain.lowrank.names import matching
from abtrain.lowrank.svd import MatrixShape
from abtrain.own import IGNORED, own_names
from abtrain.recipes.factoring import Factoring
from abtrain.side_by_side import storage_of

Kind = Literal["factored", "averaged", "frozen", "own"]
UNSHARED: tuple[Kind, ...] = ("frozen", "own")
"""The kinds of parameters that workers never average."""

_ATTENTION = (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Treatment:
    """Describes how a recipe treats one parameter. `name` is its first name in the model, `shape` its dense shape.

    Attributes:
        kind: `factored`: replaced by A and B in factored phases; `averaged`: always dense, and averaged at merges;
            `frozen`: never trained, so never sent; `own`: trained by each worker separately, so never sent or compared.
        reason: the reason for this kind, in words.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    reason: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def classify(model: nn.Module, factoring: Factoring | None, optimized: set[int] | None = None) -> list[Treatment]:
    """Returns how the recipe treats each parameter of a model. Tied parameters appear once.

    Args:
        model: a model with dense weights only.
        factoring: the recipe's factoring settings; None if the recipe has no factored phase.
        optimized: the `id`s of the parameters in the optimizer; None if all parameters are in it.
    """
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    treatments, own, sharing = [], own_names(model), sharing_memory(model)
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
            module, attribute = owner(model, name)
            reason = _why_dense(module, attribute, name, parameter, factoring)
            if not reason and name in sharing:
                reason = f"shares memory with {sharing[name]}"
            if not reason:
                how = _how_computed(module, attribute, bool(parameter._backward_hooks))
                kind, reason = "factored", f"{type(module).__name__}, {how}"
        treatments.append(Treatment(name, tuple(parameter.shape), kind, reason))
    return treatments


def _why_dense(module: nn.Module, attribute: str, name: str, parameter: nn.Parameter, factoring: Factoring) -> str:
    """Returns the reason why a trained parameter stays dense, or an empty string if it can be factored."""
    least_dim = MatrixShape(parameter.shape).n if parameter.ndim >= 2 else 0
    excluded = matching(name, factoring.exclude)
    kind = a_or_an(type(parameter).__name__)
    rules = (
        (parameter.numel() == 0, "empty"),
        (type(parameter) is not nn.Parameter, f"{kind}: only plain nn.Parameters are factored"),
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


def sharing_memory(model: nn.Module) -> dict[str, str]:
    """Returns for each parameter or buffer that shares its storage with another one the other's name, by name."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # Sparse tensors and those of other classes may have no storage.
        if tensor.layout == torch.strided and type(tensor.data) is torch.Tensor and tensor.untyped_storage().data_ptr():
            places[storage_of(tensor)].append(name)
    shared = [names for names in places.values() if len(names) > 1]
    return {name: next(other for other in names if other != name) for names in shared for name in names}


def _how_computed(module: nn.Module, attribute: str, hooked: bool) -> str:
    """Returns how a module computes with a factored weight, in words."""
    if has_factored_form(module, attribute, hooked):
        return "computed in factored form"
    if type(module) in _ATTENTION and attribute in ("in_proj_weight", "weight") and not hooked:
        return "computed in factored form in self-attention"
    return "rebuilt from its factors when read"


def has_factored_form(module: nn.Module, attribute: str, hooked: bool) -> bool:
    """Returns whether a module can compute with A and B instead of W. It cannot if W has a tensor hook (`hooked`)."""
    plain = attribute == "weight" and not hooked
    return plain and type(module) in FACTORED_LAYERS and getattr(module, "groups", 1) == 1


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the module that has the parameter `name`, and the parameter's name within that module."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
