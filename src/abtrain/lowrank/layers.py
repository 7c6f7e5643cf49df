"""Layers that compute with the factors A (m, k) and B (k, n) of their weight.

A module becomes one of these by a change of its class (`surgery.py`), so hooks, names and references to it stay valid.
`weight` remains readable on all of them, as the product; it is built only when somebody asks for it, as
nn.TransformerEncoderLayer's fast path does.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from abtrain.lowrank.matrix import MatrixShape


class _LowRank(nn.Module):
    """What the factored layers share: the factors, and the weight they stand for."""

    A: nn.Parameter
    B: nn.Parameter
    matrix_shape: MatrixShape

    @property
    def rank(self) -> int:
        return self.B.shape[0]

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out, in, ...)."""
        return self.matrix_shape.to_tensor(self.A @ self.B)

    @property
    def inner(self) -> Tensor:
        """(k, in * ...): the factor that meets the input."""
        return self.A.T if self.matrix_shape.transposed else self.B

    @property
    def outer(self) -> Tensor:
        """(out, k): the factor that makes the output."""
        return self.B.T if self.matrix_shape.transposed else self.A

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class LowRankLinear(_LowRank, nn.Linear):  # type: ignore[override]  # `weight` is computed here, stored there
    """y = x W^T + b as two matrix products, k (in + out) multiplications a row in place of in * out."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.linear(input, self.inner), self.outer, self.bias)


class _LowRankConv(_LowRank, nn.modules.conv._ConvNd):  # type: ignore[override]  # as above
    """A convolution of k filters, then a 1x1 convolution that mixes them into the output channels."""

    def forward(self, input: Tensor) -> Tensor:
        filters = self.inner.reshape(self.rank, self.in_channels, *self.kernel_size)
        hidden = self._conv_forward(input, filters, None)
        mix = self.outer.reshape(self.out_channels, self.rank, *(1 for _ in self.kernel_size))
        return self._mix(hidden, mix, self.bias)

    def _mix(self, hidden: Tensor, mix: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class LowRankConv1d(_LowRankConv, nn.Conv1d):  # type: ignore[override]
    def _mix(self, hidden: Tensor, mix: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv1d(hidden, mix, bias)


class LowRankConv2d(_LowRankConv, nn.Conv2d):  # type: ignore[override]
    def _mix(self, hidden: Tensor, mix: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(hidden, mix, bias)


class LowRankConv3d(_LowRankConv, nn.Conv3d):  # type: ignore[override]
    def _mix(self, hidden: Tensor, mix: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv3d(hidden, mix, bias)


FACTORED_LAYERS: dict[type[nn.Module], type[_LowRank]] = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
}
"""Exact types that have a factored form. A subclass may compute something else with its weight, so it has none."""


class LowRankWeight(nn.Module):
    """Parametrization for every other module: rebuilds the dense weight from its factors whenever it is read."""

    def __init__(self, matrix_shape: MatrixShape, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.matrix_shape = matrix_shape
        self._start = (A, B)

    def forward(self, A: Tensor, B: Tensor) -> Tensor:
        return self.matrix_shape.to_tensor(A @ B)

    def right_inverse(self, _: Tensor) -> tuple[Tensor, Tensor]:
        """The factors to start from: they were agreed upon beforehand, so they are not computed from the weight."""
        return self._start
