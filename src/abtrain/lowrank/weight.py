"""Defines the record of a factored weight, and computes the weight so that gradients and users' hooks keep working."""

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
    """Contains the names, within the module, of a weight's `FactoredMark` and its factors A and B."""

    mark: str
    A: str
    B: str


@dataclass(frozen=True, eq=False)
class FactoredWeight:
    """Records one factored weight, with all that is needed to compute it and to make it dense again.

    Attributes:
        name: the weight's name in the model.
        attribute: the weight's name in `module`.
        dense: the Parameter of the dense weight; its storage is empty while the weight is factored.
        A, B: the factors, (m, k) and (k, n).
        strides: the strides of the dense weight before it was factored.
        hooks: the tensor hooks that the user has registered on the dense weight.
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

    @property
    def channels_last(self) -> bool:
        """Whether the dense weight was that of a 2-D or 3-D convolution, and in torch.channels_last(_3d)."""
        shape, strides = self.matrix_shape.dense, self.strides
        return len(shape) in (4, 5) and strides[1] == 1 and strides[-1] == shape[1]

    def weight(self) -> Tensor:
        """Returns W = A B in the weight's shape, contiguous and detached. Multiplies in float32 or float64."""
        return self.product_of(self.A.detach(), self.B.detach())

    def product_of(self, A: Tensor, B: Tensor) -> Tensor:
        """Computes `weight()` from the arguments A and B, which get gradients from the result if they require them."""
        with without_autocast(A):
            wide = A.dtype if A.dtype == torch.float64 else torch.float32
            return self.matrix_shape.to_tensor((A.to(wide) @ B.to(wide)).to(A.dtype)).contiguous()

    def laid_out(self) -> Tensor:
        """Returns `weight()` in the memory layout of the dense weight before it was factored."""
        return self.lay_out(self.weight())

    def lay_out(self, W: Tensor) -> Tensor:
        """Returns a value W of the weight in the memory layout of the dense weight before it was factored."""
        if W.stride() == self.strides:
            return W
        return torch.empty_strided(W.shape, self.strides, dtype=W.dtype, device=W.device).copy_(W)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off on the tensor's device, so that matrix products have the dtype of their operands."""
    kind = tensor.device.type
    # Where autocast is off anyway, the context would only remain in exported programs, which torch could not load.
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


class _Read(NamedTuple):
    """Stores the last product of a weight's factors, copies of A and B, and whether each required a gradient."""

    W: Tensor
    A: Tensor
    B: Tensor
    trained: tuple[bool, bool]


_reads: weakref.WeakKeyDictionary[FactoredWeight, _Read] = weakref.WeakKeyDictionary()
"""The last product of each weight with tensor hooks, until the hooks have received its gradient."""


class _Product(torch.autograd.Function):
    """Computes A B. Its backward pass can run several times, because several forward passes share one product."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor) -> Tensor:
        ctx.factors, ctx.versions = (A, B), (A._version, B._version)
        return A @ B

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (G,), (A, B) = gradients, ctx.factors
        if (A._version, B._version) != ctx.versions:
            raise RuntimeError(
                "the factors of a weight were changed between the forward pass and its backward pass: call the "
                "optimizer's step after backward"
            )
        of_A, of_B = ctx.needs_input_grad
        return G @ B.T if of_A else None, A.T @ G if of_B else None


def read_product(weight: FactoredWeight, A: Tensor, B: Tensor) -> Tensor:
    """Returns A B in the weight's shape: contiguous, in the dtype of A and B, with a gradient to both.

    A user's tensor hook receives the gradient of W once in each backward pass, as if W were dense. Therefore, all reads
    of a weight with hooks return the same tensor until the hooks have received its gradient.
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
    """Returns a hook for W that drops the cached product and calls the user's hooks.

    It refers to the weight weakly. `_reads` has W and W has the hook, so the weight could otherwise never be freed.
    """
    hooks, held = weight.hooks, weakref.ref(weight)

    def call(gradient: Tensor) -> Tensor:
        _reads.pop(held(), None)  # type: ignore[arg-type]  # None is in no dictionary
        for hook in tuple(hooks.values()):
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        return gradient

    return call


def after_accumulation(dense: nn.Parameter, factors: Sequence[Tensor]) -> None:
    """Makes the post-accumulate hooks of a dense Parameter run when all its trained factors have their gradients."""
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
