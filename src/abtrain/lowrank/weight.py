"""A factored weight: its record, and its product as autograd and users' hooks see it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from abtrain.lowrank.svd import MatrixShape


class Names(NamedTuple):
    """The names in a module of the parameters that replace one weight: its `FactoredMark`, A and B."""

    mark: str
    A: str
    B: str


@dataclass(frozen=True, eq=False)
class FactoredWeight:
    """The record of one factored weight: everything needed to use it and to undo the factoring.

    Attributes:
        name: the weight's name in the model.
        attribute: the weight's name in `module`.
        dense: the weight's own Parameter; its storage is empty while the factors live.
        A, B: the factors, (m, k) and (k, n).
        strides: the strides of the dense weight before it was factored.
        hooks: tensor hooks that the user has registered on the dense weight.
    """

    name: str
    module: nn.Module
    attribute: str
    dense: nn.Parameter
    A: nn.Parameter
    B: nn.Parameter
    names: Names
    matrix_shape: MatrixShape
    strides: tuple[int, ...]
    hooks: Mapping[int, Any]

    @property
    def k(self) -> int:
        return self.B.shape[0]

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.A, self.B

    def weight(self) -> Tensor:
        """Returns W = A B in the weight's shape, contiguous, without a gradient. Multiplies in float32 at least."""
        return self.product_of(self.A.detach(), self.B.detach())

    def product_of(self, A: Tensor, B: Tensor) -> Tensor:
        """Returns `weight()` of other factors of these shapes, with a gradient to those that require one."""
        with without_autocast(A):
            wide = A.dtype if A.dtype == torch.float64 else torch.float32
            return self.matrix_shape.to_tensor((A.to(wide) @ B.to(wide)).to(A.dtype)).contiguous()

    def laid_out(self) -> Tensor:
        """Returns `weight()` in the memory layout that the dense weight had."""
        return self.lay_out(self.weight())

    def lay_out(self, W: Tensor) -> Tensor:
        """Returns W in the memory layout that the dense weight had."""
        if W.stride() == self.strides:
            return W
        return torch.empty_strided(W.shape, self.strides, dtype=W.dtype, device=W.device).copy_(W)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off on the tensor's device, so that products have the dtype of their factors."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class _Read(NamedTuple):
    """The last product of a weight's factors, with copies of the factors and whether each required a gradient."""

    W: Tensor
    A: Tensor
    B: Tensor
    trained: tuple[bool, bool]


_reads: weakref.WeakKeyDictionary[FactoredWeight, _Read] = weakref.WeakKeyDictionary()
"""The last read of each hooked weight, until its gradient has arrived."""


class _Product(torch.autograd.Function):
    """A B with a backward pass that can run again, because several forward passes share one read."""

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


def read_product(weight: FactoredWeight, A: Tensor, B: Tensor) -> Tensor:
    """Returns A B as the dense weight: contiguous, in their dtype, with a gradient to both and the user's hooks.

    A tensor hook sees the gradient of the product once in each backward pass, as it saw that of the dense weight.
    Therefore all reads of a hooked weight return the same tensor until its gradient has arrived.
    """
    trained = (A.requires_grad, B.requires_grad)
    hooked = bool(weight.hooks) and torch.is_grad_enabled() and any(trained)
    last = _reads.get(weight) if hooked else None
    # Compared by value, because merges do not advance a tensor's version.
    if last is not None and last.trained == trained and torch.equal(last.A, A) and torch.equal(last.B, B):
        return last.W
    with without_autocast(A):
        W = weight.matrix_shape.to_tensor(_Product.apply(A, B) if hooked else A @ B).contiguous()
    if hooked:
        W.register_hook(_calling(weight))
        _reads[weight] = _Read(W, A.detach().clone(), B.detach().clone(), trained)
    return W


def _calling(weight: FactoredWeight) -> Callable[[Tensor], Tensor]:
    """Returns a hook that calls the user's hooks. `_reads` keeps it, so it refers to the weight weakly."""
    hooks, held = weight.hooks, weakref.ref(weight)

    def call(gradient: Tensor) -> Tensor:
        _reads.pop(held(), None)  # type: ignore[arg-type]  # None is in no dictionary
        for hook in tuple(hooks.values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        return gradient

    return call


def after_accumulation(dense: nn.Parameter, factors: Sequence[Tensor]) -> None:
    """Makes the parameter's hooks run whenever all of its trained factors have their gradients."""
    hooks: dict[int, Callable[[Any], None]] = dense._post_accumulate_grad_hooks or {}
    arrived: set[int] = set()

    def arrive(factor: Tensor) -> None:
        arrived.add(id(factor))
        if all(id(one) in arrived for one in factors if one.requires_grad):
            arrived.clear()
            for hook in tuple(hooks.values()):
                hook(dense)

    for factor in factors if hooks else ():
        factor.register_post_accumulate_grad_hook(arrive)
