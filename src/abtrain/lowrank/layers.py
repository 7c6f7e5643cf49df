"""Modules that hold the factors A (m, k) and B (k, n) of a weight, and look dense from outside.

A module becomes one of these by a change of its class (`surgery.py`), so hooks, names and references to it stay valid.
Linear layers and convolutions compute with the factors; every other module rebuilds the weight whenever it reads it.
The weight remains readable on all of them, as the product. State dicts, copies and pickles show the dense module.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, SupportsIndex

import torch.nn.functional as F
from torch import Tensor, nn

from abtrain.errors import UsageError
from abtrain.lowrank.hooked import hooked_product
from abtrain.lowrank.kept import FactoredParameter
from abtrain.lowrank.loading import empty_like_dense, load_
from abtrain.lowrank.svd import Factors
from abtrain.lowrank.weight import FactoredWeight, without_autocast


class Factored(nn.Module):
    """What all modules with factored weights share.

    Attributes:
        dense_type: the module's class while its weights are dense.
    """

    dense_type: ClassVar[type[nn.Module]]
    _factored: dict[str, FactoredWeight]

    def factors(self, attribute: str) -> Factors:
        """A (m, k) and B (k, n) of a weight."""
        names = self._factored[attribute].names
        return Factors(getattr(self, names.A), getattr(self, names.B))

    def product(self, attribute: str) -> Tensor:
        """The dense weight, in the dtype of its factors whatever autocast says, with a gradient to both."""
        weight, (A, B) = self._factored[attribute], self.factors(attribute)
        if weight.hooks:
            return hooked_product(weight, A, B)
        with without_autocast(A):
            W = A @ B
        return weight.matrix_shape.to_tensor(W)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in self._factored and name not in self._parameters:
            raise UsageError(
                f"{name} of a {self.dense_type.__name__} cannot be set: it is factored at present. Set it before the "
                "factored phases, or exclude this weight from factoring (exclude=)"
            )
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        ranks = [f"rank={weight.k}" for weight in self._factored.values()]
        return ", ".join(filter(None, (super().extra_repr(), *ranks)))

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """A copy or a pickle is that of the dense module."""
        reduced: Any = self._twin(_kept_or_new).__reduce_ex__(protocol)
        make, args, *rest = reduced
        # Pickle checks the class of what goes through `__newobj__`, and this is not the twin.
        return (args[0].__new__ if make is copyreg.__newobj__ else make, args, *rest)  # type: ignore[attr-defined]

    def __copy__(self) -> nn.Module:
        return copy.copy(self._twin(lambda weight: nn.Parameter(weight.laid_out())))

    def _twin(self, value: Callable[[FactoredWeight], Tensor]) -> nn.Module:
        """A module of the dense class that shares all but the factored weights."""
        twin: nn.Module = object.__new__(self.dense_type)
        own = {name: item for name, item in self.__dict__.items() if name != "_factored"}
        twin.__dict__ = own | {"_parameters": self._dense_parameters(value)}
        return twin

    def _dense_parameters(self, value: Callable[[FactoredWeight], Tensor]) -> dict[str, Any]:
        """The module's own parameters, as they are named and ordered while it is dense."""
        marks = {weight.names.mark: weight for weight in self._factored.values()}
        factors = {name for weight in self._factored.values() for name in weight.names[1:]}
        dense: dict[str, Any] = {}
        for name, parameter in self._parameters.items():
            if name in marks:
                dense[marks[name].attribute] = value(marks[name])
            elif name not in factors:
                dense[name] = parameter
        return dense

    @contextmanager
    def _shown_dense(self, value: Callable[[FactoredWeight], Tensor]) -> Iterator[dict[str, Any]]:
        """Inside it, the module's own parameters are those of the dense module; what is set then stays set."""
        own, dense = self._parameters, self._dense_parameters(value)
        self.__dict__["_parameters"] = dense
        try:
            yield dense
        finally:
            self.__dict__["_parameters"] = own
            own.update({name: dense[name] for name in own if name in dense})

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        def value(weight: FactoredWeight) -> Tensor:
            return self.product(weight.attribute).contiguous() if keep_vars else weight.weight()

        # Factors are looked up while they are the module's parameters.
        values = {name: value(weight) for name, weight in self._factored.items()}
        with self._shown_dense(lambda weight: values[weight.attribute]):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = len(error_msgs)
        with self._shown_dense(empty_like_dense) as dense:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        refused = " ".join(error_msgs[known:])
        for attribute, weight in self._factored.items():
            key = prefix + attribute
            if key in state_dict and key not in refused:
                error_msgs += load_(weight, key, dense[attribute].detach(), state_dict[key].dtype)


def _kept_or_new(weight: FactoredWeight) -> Tensor:
    """The Parameter that a copy takes for a weight: where others keep it too, their copies are that of the module."""
    return weight.dense if isinstance(weight.dense, FactoredParameter) else nn.Parameter(weight.laid_out())


def _product_of(attribute: str) -> Any:
    """The property by which a factored weight is read."""
    return property(lambda module: module.product(attribute))


class LowRank(Factored):
    """A module that computes with the factors of its weight; `weight` is built only when somebody asks for it."""

    weight = _product_of("weight")

    @property
    def rank(self) -> int:
        return self._factored["weight"].k

    @property
    def inner(self) -> Tensor:
        """(k, in * ...): the factor that meets the input."""
        A, B = self.factors("weight")
        return A.T if self._factored["weight"].matrix_shape.transposed else B

    @property
    def outer(self) -> Tensor:
        """(out, k): the factor that makes the output."""
        A, B = self.factors("weight")
        return B.T if self._factored["weight"].matrix_shape.transposed else A


class LowRankLinear(LowRank, nn.Linear):
    """y = x W^T + b as two matrix products, k (in + out) multiplications a row in place of in * out."""

    dense_type = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.linear(input, self.inner), self.outer, self.bias)


class _LowRankConv(LowRank, nn.modules.conv._ConvNd):
    """A convolution of k filters, then a 1x1 convolution that mixes them into the output channels."""

    def forward(self, input: Tensor) -> Tensor:
        filters = self.inner.reshape(self.rank, self.in_channels, *self.kernel_size)
        hidden = self._conv_forward(input, filters, None)
        mix = self.outer.reshape(self.out_channels, self.rank, *(1 for _ in self.kernel_size))
        return self._mix(hidden, mix, self.bias)

    def _mix(self, hidden: Tensor, mix: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class LowRankConv1d(_LowRankConv, nn.Conv1d):
    dense_type = nn.Conv1d

    def _mix(self, hidden: Tensor, mix: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv1d(hidden, mix, bias)


class LowRankConv2d(_LowRankConv, nn.Conv2d):
    dense_type = nn.Conv2d

    def _mix(self, hidden: Tensor, mix: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(hidden, mix, bias)


class LowRankConv3d(_LowRankConv, nn.Conv3d):
    dense_type = nn.Conv3d

    def _mix(self, hidden: Tensor, mix: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv3d(hidden, mix, bias)


FACTORED_LAYERS: dict[type[nn.Module], type[LowRank]] = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
}
"""Exact types that have a factored form. A subclass may compute something else with its weight, so it has none."""


@functools.cache
def rebuilding(dense_type: type[nn.Module], attributes: frozenset[str]) -> type[Factored]:
    """The class of a module that rebuilds these weights from their factors whenever it reads them."""
    content = {attribute: _product_of(attribute) for attribute in sorted(attributes)}
    content |= {"dense_type": dense_type, "__module__": __name__}
    return types.new_class(
        f"LowRank{dense_type.__name__}", (Factored, dense_type), exec_body=lambda c: c.update(content)
    )
