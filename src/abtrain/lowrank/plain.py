"""Copies a model into plain PyTorch modules, with two smaller layers for each factored layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from abtrain.lowrank.classify import has_factored_form
from abtrain.lowrank.layers import LowRank, LowRankLinear, inner_and_outer
from abtrain.lowrank.names import matching

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def to_plain(model: nn.Module, *, dense: Sequence[str] = ()) -> nn.Module:
    """Returns a copy of a model that computes with factors but consists of plain PyTorch modules, without abtrain.

    A factored Linear layer becomes two Linear layers with k features between them. A factored convolution becomes a
    convolution with k filters and a 1x1 convolution. A weight stays dense (W = A B) if its factors are not smaller, if
    its module is of another kind, or in one of PyTorch's transformer layers, which read the weights of submodules.

    Args:
        model: the model that ABTraining trains, at any step; it is not changed.
        dense: globs of the names of modules that stay dense, for code that reads their `weight`.
    """
    plain: nn.Module = copy.deepcopy(model)
    for name, module in model.named_modules():
        if not isinstance(module, LowRank) or not _is_smaller(module) or not becomes_two_layers(model, name):
            continue
        if matching(name, dense) is not None:
            continue
        two = _as_two(module, plain.get_submodule(name))
        if not name:
            return two
        parent, _, child = name.rpartition(".")
        plain.get_submodule(parent)._modules[child] = two
    return plain


def becomes_two_layers(model: nn.Module, name: str) -> bool:
    """Returns whether two plain layers can replace the module `name` of a model once its weight is factored."""
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    reads_weights = any(kind.__module__ == "torch.nn.modules.transformer" for kind in type(parent).__mro__)
    in_form = isinstance(module, LowRank) or has_factored_form(
        module, "weight", bool(module.get_parameter("weight")._backward_hooks)
    )
    return in_form and not reads_weights


def _is_smaller(module: LowRank) -> bool:
    weight = module._abtrain_weights["weight"]
    return weight.k * (weight.matrix_shape.m + weight.matrix_shape.n) < weight.matrix_shape.dense.numel()


def _as_two(module: LowRank, copied: nn.Module) -> nn.Sequential:
    """Returns two PyTorch layers that replace a factored layer. They get the bias and the hooks of its dense copy."""
    inner, outer = (factor.detach() for factor in inner_and_outer(module))
    kind, bias = module._abtrain_dense_type, copied.bias is not None
    if isinstance(module, LowRankLinear):
        first = kind(inner.shape[1], len(inner), bias=False, device="meta")
        last = kind(len(inner), len(outer), bias=bias, device="meta")
    else:
        geometry = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        first = kind(module.in_channels, len(inner), module.kernel_size, bias=False, device="meta", **geometry)
        last = kind(len(inner), module.out_channels, 1, bias=bias, device="meta")
    for layer, factor in ((first, inner), (last, outer)):
        layer.weight = nn.Parameter(factor.reshape(layer.get_parameter("weight").shape).clone())
    if bias:
        last.bias = copied.bias
    two = nn.Sequential(first, last).train(module.training)
    for hooks in _HOOKS:
        setattr(two, hooks, getattr(copied, hooks))
    return two
