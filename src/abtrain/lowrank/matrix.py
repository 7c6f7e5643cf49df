"""Weight tensor <-> (m, n) matrix, m >= n (Section III of the paper)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixShape:
    """How a weight tensor is seen as a matrix.

    The first dimension is kept, the others are flattened; the matrix is transposed where that makes m >= n.
    """

    tensor: torch.Size

    @property
    def transposed(self) -> bool:
        rows, columns = self._flat
        return rows < columns

    @property
    def m(self) -> int:
        return max(self._flat)

    @property
    def n(self) -> int:
        return min(self._flat)

    @property
    def _flat(self) -> tuple[int, int]:
        first = self.tensor[0]
        return first, (self.tensor.numel() // first if first else 0)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The (m, n) view of a weight of shape `self.tensor`."""
        flat = weight.reshape(self._flat)
        return flat.T if self.transposed else flat

    def to_tensor(self, matrix: Tensor) -> Tensor:
        """The weight of shape `self.tensor` whose (m, n) view is `matrix`."""
        return (matrix.T if self.transposed else matrix).reshape(self.tensor)

    def factored_numel(self, k: int) -> int:
        """Elements of A and B together at rank k."""
        return k * (self.m + self.n)
