"""Copies a model into plain PyTorch modules, with two smaller layers for each factored layer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
from torch import nn

from abtrain.errors import UsageError
from abtrain.lowrank.classify import has_factored_form
from abtrain.lowrank.layers import Factored, LowRank, LowRankLinear, inner_and_outer
from abtrain.lowrank.names import matching
from abtrain.lowrank.weight import FactoredWeight
from abtrain.shards import fsdp_modules, is_sharded

log = logging.getLogger("abtrain")

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def to_plain(model: nn.Module, *, dense: Sequence[str] = ()) -> nn.Module:
    """Returns a copy of a model that computes with factors but consists of plain PyTorch modules, without abtrain.

    A factored Linear layer becomes two Linear layers with k features between them. A factored convolution becomes a
    convolution with k filters and a 1x1 convolution. A weight stays dense (W = A B) if its factors are not smaller or
    if its module is of another kind, such as attention. A warning says how many smaller weights stay dense, and why.

    In the copy, PyTorch's transformer encoder layers leave out their fast path, which reads the weights of their Linear
    layers. Without it, outputs at padded positions are no zeros.

    Args:
        model: the model that ABTraining trains, at any step, or that `load` has filled; it is not changed.
        dense: globs of the names of modules that stay dense, for code that reads their `weight`.

    Raises:
        UsageError: the model is sharded.
    """
    refuse_sharded(model)
    if not any(map(_weights_of, model.modules())):
        log.warning(
            "to_plain returns a dense copy, since the model has no factored weights. Perhaps ab.close() has multiplied "
            "them out: call it before, or load a file of ab.save() by abtrain.load(model, path). Or no weight became "
            "smaller, or the recipe has no factors: ab.describe() says so"
        )
    plain, kept = plain_copy(model, dense)
    if kept:
        log.warning("to_plain: %s", multiplied_out(kept))
    return plain


def plain_copy(model: nn.Module, dense: Sequence[str] = ()) -> tuple[nn.Module, list[FactoredWeight]]:
    """Returns the result of `to_plain`, and the weights that are larger in it because their modules need W = A B."""
    plain: nn.Module = copy.deepcopy(model)
    kept = list[FactoredWeight]()
    for name, module in model.named_modules():
        smaller = [weight for weight in _weights_of(module) if _size(weight) < _dense_size(weight)]
        if not smaller or matching(name, dense) is not None:
            continue
        if not isinstance(module, LowRank):
            kept += smaller
            continue
        two = _as_two(module, plain.get_submodule(name))
        if not name:
            return two, kept
        parent, _, child = name.rpartition(".")
        plain.get_submodule(parent)._modules[child] = two
        _leave_fast_path(plain, parent)
    return plain, kept


def multiplied_out(weights: Sequence[FactoredWeight]) -> str:
    """Describes weights whose factors are smaller, but whose modules compute with the product."""
    kinds = sorted({kind_of(weight.module) for weight in weights})
    dense, small = (sum(map(count, weights)) for count in (_dense_size, _size))
    what = f"{len(weights)} weights stay dense, such as" if len(weights) > 1 else "one weight stays dense,"
    return (
        f"{what} {weights[0].name}: {' and '.join(kinds)} cannot compute with factors. They take {dense:,} parameters "
        f"instead of {small:,}"
    )


def kind_of(module: nn.Module) -> str:
    """Returns the name of a module's dense class. The output layer of attention counts as attention."""
    kind = module._abtrain_dense_type if isinstance(module, Factored) else type(module)
    return "MultiheadAttention" if kind is nn.modules.linear.NonDynamicallyQuantizableLinear else kind.__name__


def refuse_sharded(model: nn.Module) -> None:
    """Raises UsageError if FSDP2 has sharded a model: such a model cannot be copied, and has no whole weights."""
    if any(fsdp_modules(model)) or any(map(is_sharded, model.parameters())):
        raise UsageError(
            "the model is sharded over several workers (fully_shard): save it by ab.save(path) on all workers of a "
            "group, and load the file by abtrain.load(model, path) into a model that is not sharded"
        )


def becomes_two_layers(model: nn.Module, name: str) -> bool:
    """Returns whether two plain layers can replace the module `name` of a model once its weight is factored."""
    module = model.get_submodule(name)
    hooked = bool(module.get_parameter("weight")._backward_hooks)
    return isinstance(module, LowRank) or has_factored_form(module, "weight", hooked)


def _weights_of(module: nn.Module) -> list[FactoredWeight]:
    return list(module._abtrain_weights.values()) if isinstance(module, Factored) else []


def _dense_size(weight: FactoredWeight) -> int:
    return weight.matrix_shape.dense.numel()


def _size(weight: FactoredWeight) -> int:
    return weight.k * (weight.matrix_shape.m + weight.matrix_shape.n)


def _leave_fast_path(plain: nn.Module, name: str) -> None:
    """Makes the transformer encoder layer `name`, and the encoder around it, call the submodules of the layer.

    In evaluation, both pass the weights of the submodules to fused kernels instead; two layers have no such weight.
    """
    if isinstance(layer := plain.get_submodule(name), nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0
        for encoder in plain.modules():
            if isinstance(encoder, nn.TransformerEncoder) and any(one is layer for one in encoder.layers):
                encoder.use_nested_tensor = False


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
        layer.weight = nn.Parameter(factor.reshape(layer.get_parameter("weight").shape).contiguous().clone())
        if module._abtrain_weights["weight"].channels_last:
            layout = torch.channels_last if layer.get_parameter("weight").ndim == 4 else torch.channels_last_3d
            layer.to(memory_format=layout)
    if bias:
        last.bias = copied.bias
    two = nn.Sequential(first, last).train(module.training)
    for hooks in _HOOKS:
        setattr(two, hooks, getattr(copied, hooks))
    return two
