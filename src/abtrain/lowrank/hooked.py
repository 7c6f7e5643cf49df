"""Tensor hooks of the user's own on a weight, while it is factored.

They see the gradient of the product, once for each backward pass as before: all reads of a weight in one forward pass
give the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from abtrain.lowrank.weight import FactoredWeight, without_autocast

_read: WeakKeyDictionary[FactoredWeight, tuple[tuple[int, ...], TensorWeakRef]] = WeakKeyDictionary()
"""What was read last of each weight, until a gradient of it has come."""


class _Product(torch.autograd.Function):
    """A B, whose backward pass may run again: what several forward passes share outlives the first of them."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor) -> Tensor:
        ctx.factors = (A, B)
        return A @ B

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (G,), (A, B) = gradients, ctx.factors
        of_A, of_B = ctx.needs_input_grad
        return G @ B.T if of_A else None, A.T @ G if of_B else None


def hooked_product(weight: FactoredWeight, A: Tensor, B: Tensor) -> Tensor:
    """The dense weight, with the user's hooks on it."""
    if not torch.is_grad_enabled() or not (A.requires_grad or B.requires_grad):
        with without_autocast(A):
            return weight.matrix_shape.to_tensor(A @ B)
    key = (A._version, B._version, A.requires_grad, B.requires_grad)
    known, last = _read.get(weight, (None, lambda: None))
    W: Tensor | None = last()
    if known == key and W is not None:
        return W
    with without_autocast(A):
        W = weight.matrix_shape.to_tensor(_Product.apply(A, B))

    def call(gradient: Tensor) -> Tensor:
        _read.pop(weight, None)
        for hook in tuple(weight.hooks.values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        return gradient

    W.register_hook(call)
    _read[weight] = (key, TensorWeakRef(W))
    return W


class AfterAccumulation:
    """Calls hooks with the dense parameter once all of its factors that train have got their gradient.

    Args:
        dense: the parameter that the hooks were registered on.
        hooks: as `register_post_accumulate_grad_hook` keeps them.
        factors: that have its place.
    """

    def __init__(self, dense: nn.Parameter, hooks: Mapping[int, Callable[[Any], None]], factors: Sequence[Tensor]):
        self._dense, self._hooks, self._factors = dense, hooks, factors
        self._came: set[int] = set()
        for factor in factors:
            factor.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, factor: Tensor) -> None:
        self._came.add(id(factor))
        if all(id(one) in self._came for one in self._factors if one.requires_grad):
            self._came.clear()
            for hook in tuple(self._hooks.values()):
                hook(self._dense)
