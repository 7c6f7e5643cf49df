"""The record of one factored weight."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from abtrain.lowrank.matrix import MatrixShape


class Names(NamedTuple):
    """The names in a module of the parameters that replace one weight: its `abtrain.lowrank.mark`, A and B."""

    mark: str
    A: str
    B: str


@dataclass(frozen=True, eq=False)
class FactoredWeight:
    """The record of one factored weight: all that is needed to use it and to undo the factoring.

    Attributes:
        name: the weight's name in the model.
        attribute: the weight's name in `module`.
        dense: the weight's own Parameter; its storage is empty while the factors live.
        A, B: (m, k) and (k, n).
        strides: of the dense weight before it was factored.
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
        """W = A B in the weight's own shape, contiguous, without a gradient. Halves are multiplied in float32."""
        return self.product_of(self.A.detach(), self.B.detach())

    def product_of(self, A: Tensor, B: Tensor) -> Tensor:
        """`weight()` of other factors of these shapes, with a gradient to those that require one."""
        with without_autocast(A):
            wide = A.dtype if A.dtype == torch.float64 else torch.float32
            return self.matrix_shape.to_tensor((A.to(wide) @ B.to(wide)).to(A.dtype)).contiguous()

    def laid_out(self) -> Tensor:
        """`weight()` in the memory layout that the dense weight had."""
        return self.lay_out(self.weight())

    def lay_out(self, W: Tensor) -> Tensor:
        """W in the memory layout that the dense weight had."""
        if W.stride() == self.strides:
            return W
        return torch.empty_strided(W.shape, self.strides, dtype=W.dtype, device=W.device).copy_(W)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off on the tensor's device, so that products have the dtype of their factors."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
