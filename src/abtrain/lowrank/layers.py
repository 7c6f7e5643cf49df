"""Defines modules that have the factors A (m, k) and B (k, n) of a weight as parameters but appear dense to users.

`surgery.py` changes the class of a module to one of these, so hooks, names and references to the module stay valid.
Linear layers, convolutions and self-attention (`attention.py`) compute with the factors. Every other module rebuilds
the weight whenever it reads it.
The weight can be read, as the product, but not be written. State dicts, copies and pickles contain dense weights.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abtrain.errors import UsageError, a_or_an
from abtrain.lowrank.kept import shown
from abtrain.lowrank.loading import load_
from abtrain.lowrank.products import best_order, through_factors
from abtrain.lowrank.svd import Factors
from abtrain.lowrank.weight import FactoredWeight, read_product


class Factored(nn.Module):
    """The base class of all modules with factored weights. The prefix `_abtrain` of attributes avoids clashes."""

    _abtrain_dense_type: ClassVar[type[nn.Module]]
    """The class of the module while its weights are dense."""
    _abtrain_weights: dict[str, FactoredWeight]
    """The records of the module's factored weights, by the weights' names in the module."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in self._abtrain_weights and name not in self._parameters:
            raise UsageError(
                f"{name} of {a_or_an(self._abtrain_dense_type.__name__)} cannot be set: this weight is currently "
                "factored. Set it before a factored phase, or exclude this weight from factoring with the recipe's "
                "option exclude"
            )
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        ranks = [f"rank={weight.k}" for weight in self._abtrain_weights.values()]
        return ", ".join(filter(None, (super().extra_repr(), *ranks)))

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Makes deep copies and pickles contain the dense module, without factors."""
        # The twin has the weight's own Parameter, so that a deep copy of a larger object still shares it.
        reduced: Any = _twin(self, lambda weight: weight.dense).__reduce_ex__(protocol)
        make, args, *rest = reduced
        # With `__newobj__`, pickle would compare the twin's class with that of this module.
        return (args[0].__new__ if make is copyreg.__newobj__ else make, args, *rest)  # type: ignore[attr-defined]

    def _abtrain_copied_by_its_class(self, memo: dict[int, Any]) -> nn.Module:
        """Calls the `__deepcopy__` of the module's dense class, with the module temporarily dense."""
        kind, own = type(self), self.__dict__
        dense = _twin(self, lambda weight: weight.dense).__dict__
        self.__class__, self.__dict__ = self._abtrain_dense_type, dense  # type: ignore[assignment]  # it is a base
        try:
            copied: nn.Module = copy.deepcopy(self, memo)
        finally:
            self.__class__, self.__dict__ = kind, own
        return copied

    def __copy__(self) -> nn.Module:
        return copy.copy(_twin(self, lambda weight: nn.Parameter(weight.laid_out())))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Computed first, because the factors are not among the module's parameters in the block below.
        values = {
            name: product(self, name) if keep_vars else weight.weight()
            for name, weight in self._abtrain_weights.items()
        }
        with _shown_dense(self, lambda weight: values[weight.attribute]):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        known = len(error_msgs)

        def empty(weight: FactoredWeight) -> nn.Parameter:
            return nn.Parameter(weight.A.detach().new_empty(weight.matrix_shape.dense))

        with _shown_dense(self, empty) as dense:
            super()._load_from_state_dict(state_dict, prefix, *args)
        refused = " ".join(error_msgs[known:])
        for attribute, weight in self._abtrain_weights.items():
            key = prefix + attribute
            if key in state_dict and key not in refused:
                error_msgs += load_(weight, key, dense[attribute].detach(), state_dict[key].dtype)


def factors_of(module: Factored, attribute: str) -> Factors:
    """Returns the factors A (m, k) and B (k, n) of one weight of a module."""
    names = module._abtrain_weights[attribute].names
    return Factors(getattr(module, names.A), getattr(module, names.B))


def product(module: Factored, attribute: str) -> Tensor:
    """Returns A B in the dense weight's shape and the factors' dtype, even under autocast. A and B get gradients."""
    return read_product(module._abtrain_weights[attribute], *factors_of(module, attribute))


def _twin(module: Factored, value: Callable[[FactoredWeight], Tensor]) -> nn.Module:
    """Returns a dense module that shares all attributes with a factored one except weights: `value` returns these."""
    twin: nn.Module = object.__new__(module._abtrain_dense_type)
    own = {name: item for name, item in module.__dict__.items() if name != "_abtrain_weights"}
    twin.__dict__ = own | {"_parameters": _dense_parameters(module, value)}
    return twin


def _dense_parameters(module: Factored, value: Callable[[FactoredWeight], Tensor]) -> dict[str, Any]:
    """Returns a module's parameters with the names and order of the dense module. `value` returns factored weights."""
    replaced = {name: weight for weight in module._abtrain_weights.values() for name in weight.names}
    dense: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        weight = replaced.get(name)
        if weight is None:
            dense[name] = parameter
        elif name == weight.names.mark:
            dense[weight.attribute] = value(weight)
    return dense


@contextmanager
def _shown_dense(module: Factored, value: Callable[[FactoredWeight], Tensor]) -> Iterator[dict[str, Any]]:
    """Gives a module its dense parameters within the block. Parameters without factors keep the block's changes."""
    own, dense = module._parameters, _dense_parameters(module, value)
    module.__dict__["_parameters"] = dense
    try:
        yield dense
    finally:
        module.__dict__["_parameters"] = own
        own.update({name: dense[name] for name in own if name in dense})


def _product_of(attribute: str) -> Any:
    """Returns a property that reads a factored weight as the read-only product of its factors.

    PyTorch's own forward methods get a plain tensor. They do not write to it, and fast attention accepts no subclass.
    """

    def read(module: Factored) -> Tensor:
        W = product(module, attribute)
        if torch.compiler.is_compiling():
            return W
        code, place = sys._getframe(1).f_code, sys._getframe(1).f_globals.get("__name__", "")
        in_torch = code.co_name == "forward" and place.startswith("torch.nn.modules.")
        return W if in_torch else shown(module._abtrain_weights[attribute], W)

    return property(read)


class LowRank(Factored):
    """The base class of modules that compute with the factors. `weight` is only computed when it is read."""

    weight = _product_of("weight")


def inner_and_outer(module: Factored, attribute: str = "weight") -> tuple[Tensor, Tensor]:
    """Returns the factor with k rows, to apply to the input, and the one with k columns, which gives the output."""
    A, B = factors_of(module, attribute)
    return (A.T, B.T) if module._abtrain_weights[attribute].matrix_shape.transposed else (B, A)


def project(module: nn.Module, attribute: str, x: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x W^T + b for a matrix W of a module, which may be factored."""
    weight = module._abtrain_weights.get(attribute) if isinstance(module, Factored) else None
    if weight is None:
        return F.linear(x, getattr(module, attribute), bias)
    assert isinstance(module, Factored)
    inner, outer = inner_and_outer(module, attribute)
    order = "rebuilt" if weight.hooks else best_order(x, inner, outer)
    if order == "rebuilt":
        return F.linear(x, product(module, attribute), bias)
    return through_factors(x, inner, outer, bias, order)


class LowRankLinear(LowRank, nn.Linear):
    """Computes y = x W^T + b as two matrix products, with k (in + out) multiplications per row instead of in * out.

    Near full size, a training step may compute with W = A B instead (`products.py`).
    """

    _abtrain_dense_type = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return project(self, "weight", input, self.bias)


class _LowRankConv(LowRank, nn.modules.conv._ConvNd):
    """Applies a convolution with k filters, then a 1x1 convolution that mixes the results into the output channels."""

    def forward(self, input: Tensor) -> Tensor:
        inner, outer = inner_and_outer(self)
        filters = inner.reshape(len(inner), self.in_channels, *self.kernel_size)
        if self._abtrain_weights["weight"].channels_last:
            # PyTorch takes the layout of the output from the filters if the input is in no special layout.
            last = filters.movedim(1, -1)
            filters = last.reshape(len(inner), -1).contiguous().view(last.shape).movedim(-1, 1)
        hidden = self._conv_forward(input, filters, None)
        mix = outer.reshape(self.out_channels, len(inner), *(1 for _ in self.kernel_size))
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        return convolve(hidden, mix, self.bias)


class LowRankConv1d(_LowRankConv, nn.Conv1d):
    _abtrain_dense_type = nn.Conv1d


class LowRankConv2d(_LowRankConv, nn.Conv2d):
    _abtrain_dense_type = nn.Conv2d


class LowRankConv3d(_LowRankConv, nn.Conv3d):
    _abtrain_dense_type = nn.Conv3d


FACTORED_LAYERS: dict[type[nn.Module], type[LowRank]] = {
    kind._abtrain_dense_type: kind for kind in (LowRankLinear, LowRankConv1d, LowRankConv2d, LowRankConv3d)
}
"""The factored class for each dense class. Subclasses are left out, as they may use their weight in another way."""


@functools.cache
def rebuilding(
    dense_type: type[nn.Module], attributes: frozenset[str], base: type[Factored] = Factored
) -> type[Factored]:
    """Returns a subclass of `dense_type` that rebuilds the named weights from their factors whenever it reads them."""
    content = {attribute: _product_of(attribute) for attribute in sorted(attributes)}
    content |= {"_abtrain_dense_type": dense_type, "__module__": __name__}
    if hasattr(dense_type, "__deepcopy__"):
        content["__deepcopy__"] = Factored._abtrain_copied_by_its_class
    return type(f"Factored{dense_type.__name__}", (base, dense_type), content)
