"""Tensor hooks of the user's own on a weight, while it is factored.

They see the gradient of the product, once for each backward pass as before: until it has come, all reads of a weight
give the same tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from abtrain.lowrank.weight import FactoredWeight, without_autocast


class _Read(NamedTuple):
    """The last product of a weight's factors, with copies of the factors and whether each trained."""

    W: Tensor
    A: Tensor
    B: Tensor
    trained: tuple[bool, bool]


_reads: weakref.WeakKeyDictionary[FactoredWeight, _Read] = weakref.WeakKeyDictionary()
"""Of each weight, until a gradient of it has come."""


class _Product(torch.autograd.Function):
    """A B, whose backward pass may run again: what several forward passes share outlives the first of them."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor) -> Tensor:
        ctx.factors, ctx.versions = (A, B), (A._version, B._version)
        return A @ B

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (G,), (A, B) = gradients, ctx.factors
        if (A._version, B._version) != ctx.versions:
            raise RuntimeError(
                "the factors of a weight were changed between the forward pass and its backward pass: step the "
                "optimizer after backward"
            )
        of_A, of_B = ctx.needs_input_grad
        return G @ B.T if of_A else None, A.T @ G if of_B else None


def hooked_product(weight: FactoredWeight, A: Tensor, B: Tensor) -> Tensor:
    """The dense weight, with the user's hooks on it."""
    trained = (A.requires_grad, B.requires_grad)
    if not torch.is_grad_enabled() or not any(trained):
        with without_autocast(A):
            return weight.matrix_shape.to_tensor(A @ B).contiguous()
    last = _reads.get(weight)
    # By value: what merges write leaves no trace in a tensor's version.
    if last is not None and last.trained == trained and torch.equal(last.A, A) and torch.equal(last.B, B):
        return last.W
    with without_autocast(A):
        W = weight.matrix_shape.to_tensor(_Product.apply(A, B)).contiguous()
    W.register_hook(_calling(weight))
    _reads[weight] = _Read(W, A.detach().clone(), B.detach().clone(), trained)
    return W


def _calling(weight: FactoredWeight) -> Callable[[Tensor], Tensor]:
    """A hook that calls those of the user. It does not hold the weight: what holds the hook is kept for it."""
    hooks, held = weight.hooks, weakref.ref(weight)

    def call(gradient: Tensor) -> Tensor:
        _reads.pop(held(), None)  # type: ignore[arg-type]  # None is in no dictionary
        for hook in tuple(hooks.values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        return gradient

    return call


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
