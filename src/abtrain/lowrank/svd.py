"""Views weights as (m, n) matrices with m >= n (Section III of the paper), and factors them by SVD (equation 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from abtrain.errors import NonFiniteError
from abtrain.recipes.factoring import RankRule


@dataclass(frozen=True)
class MatrixShape:
    """Converts a weight of the shape `dense` to an (m, n) matrix with m >= n, and back.

    The first dimension is kept, and the others are flattened. The matrix is transposed if necessary for m >= n.
    """

    dense: torch.Size

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
        first = self.dense[0]
        return first, (self.dense.numel() // first if first else 0)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Returns the (m, n) view of a weight of shape `self.dense`."""
        flat = weight.reshape(self._flat)
        return flat.T if self.transposed else flat

    def to_tensor(self, matrix: Tensor) -> Tensor:
        """Returns the weight of shape `self.dense` whose (m, n) view is `matrix`."""
        return (matrix.T if self.transposed else matrix).reshape(self.dense)


class Factors(NamedTuple):
    """Contains the factors A (m, k) and B (k, n) of a matrix W, which A B equals or approximates."""

    A: Tensor
    B: Tensor

    @property
    def k(self) -> int:
        return self.B.shape[0]


def decompose(W: Tensor, rank_rule: RankRule) -> Factors:
    """Factors an (m, n) matrix W by SVD, truncated to the rank k that `rank_rule` chooses.

    The right singular vectors of a matrix in 16 or 32 bits are eigenvectors of the Gram matrix W^T W, in float64. If k
    includes singular values below about 1e-4 of the largest, a full SVD in float32 replaces them. A matrix in float64
    gets a full SVD in float64. An SVD that does not converge is repeated in float64. An all-zero matrix gives zero
    factors of rank 1.

    Returns:
        The factors A = U sqrt(S) (m, k) and B = sqrt(S) Vh (k, n), contiguous, in W's dtype and on its device.

    Raises:
        NonFiniteError: W contains NaN or infinity.
        torch.linalg.LinAlgError: the SVD did not converge in float64 either.
        ValueError: W is not a matrix, is empty, or is not real floating point.
    """
    if W.ndim != 2 or W.numel() == 0 or not W.is_floating_point():
        raise ValueError(f"cannot decompose {W.dtype} of shape {tuple(W.shape)}: pass a floating-point (m, n) matrix")
    if not torch.isfinite(W).all():
        raise NonFiniteError(f"cannot decompose a matrix of shape {tuple(W.shape)}: it contains NaN or infinity")
    W = W.detach()
    A, B = _from_gram_matrix(W, rank_rule) or _from_svd(W, rank_rule)
    # Copied by rows: a single column of U counts as contiguous, but its strides change how products are rounded.
    return Factors(*(factor.to(W.dtype).clone(memory_format=torch.contiguous_format) for factor in (A, B)))


def used_by_decompose(m: int, n: int, k: int) -> int:
    """Returns the largest number of bytes of temporary tensors while `decompose` factors an (m, n) matrix with rank k.

    Assumes that the factors come from the Gram matrix.
    """
    # Eigenvectors need the matrix, its copy, and twice as much for LAPACK. Then U S is checked, scaled and copied.
    eigenvectors, factors = 4 * n * n, 2 * n * n + 2 * m * k + n * k
    return torch.float64.itemsize * (m * n + max(eigenvectors, factors))


def _from_gram_matrix(W: Tensor, rank_rule: RankRule) -> Factors | None:
    """Returns factors in float64 from the eigenvectors V of W^T W = V S^2 V^T; None if these are not exact enough.

    Rounding adds about 1e-16 of the largest s^2 to each s^2. An s above 1e-4 of the largest is then exact to float32.
    Smaller ones have an absolute error of at most about 1e-8 of the largest, as in an SVD in float32, so rank rules
    find the spectrum that they would find there.
    """
    # Apple's GPUs have no float64.
    if W.dtype == torch.float64 or W.device.type == "mps":
        return None
    wide = W.double()
    try:
        squares, V = torch.linalg.eigh(wide.T @ wide)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not in the stubs
        return None
    S = squares.flip(0).clamp(min=0).sqrt()
    k = _rank(S, rank_rule, W)
    S, V = S[:k], V.flip(1)[:, :k]
    US = wide @ V
    # Column i of U S has the length s_i, unless rounding has spoiled a small eigenvalue.
    if not bool(((US.norm(dim=0) - S).abs() <= torch.finfo(torch.float32).eps * S).all()):
        return None
    root = S.sqrt()
    # eq. 3: W = (U sqrt(S)) (sqrt(S) Vh)
    return Factors(US / root.clamp(min=torch.finfo(root.dtype).tiny), root[:, None] * V.T)


def _from_svd(W: Tensor, rank_rule: RankRule) -> Factors:
    single = W if W.dtype == torch.float64 else W.float()
    try:
        U, S, Vh = torch.linalg.svd(single, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        U, S, Vh = torch.linalg.svd(single.double(), full_matrices=False)
    k = _rank(S, rank_rule, W)
    root = S[:k].sqrt()
    return Factors(U[:, :k] * root, root[:, None] * Vh[:k])


def _rank(S: Tensor, rank_rule: RankRule, W: Tensor) -> int:
    m, n = W.shape
    # A user's rule may return more than n.
    return min(max(int(rank_rule(S.tolist(), m, n)), 1), n) if S[0] > 0 else 1
