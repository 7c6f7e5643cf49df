"""Computes the nearest matrices with orthonormal rows or columns, roughly, by Newton-Schulz iterations.

An iteration maps X to (a I + b G + c G^2) X with G = X X^T, so that all singular values come near 1 (Jordan et al.,
2024, Muon: an optimizer for hidden layers in neural networks). The factor on the left is a polynomial in the first G.
Where X is much wider than high, it is cheaper to iterate on G, and to multiply X once.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE = 1.5
"""The ratio of width to height from which fewer numbers are multiplied if iterations are on G."""


def orthogonalized(M: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Returns matrices (N, m, n) whose singular values are near 1, with the singular vectors of those in `M`.

    CPUs compute in float32, since many of them are slow in bfloat16. Other devices compute in bfloat16.

    Args:
        M: matrices (N, m, n).
        coefficients: the numbers a, b and c of an iteration.
        steps: the number of iterations.
        eps: the norm from which a matrix is scaled to norm 1. A smaller one stays small.
    """
    on_cpu = M.device.type == "cpu"
    X = M.to(working_dtype(M.device))
    high = X.shape[-2] > X.shape[-1]
    X = X.mT if high else X
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=eps)
    # In bfloat16, errors of G would grow with every iteration.
    by_gram = on_cpu and X.shape[-1] >= _WIDE * X.shape[-2]
    X = _by_gram(X, coefficients, steps) if by_gram else _directly(X, coefficients, steps)
    return X.mT if high else X


def working_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype in which matrices on a device are orthogonalized."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _directly(X: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    a, b, c = coefficients
    for _ in range(steps):
        G = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(G, G, G, beta=b, alpha=c), X, beta=a)
    return X


def _by_gram(X: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    a, b, c = coefficients
    G = X @ X.mT
    product = torch.eye(len(G[0]), dtype=X.dtype, device=X.device)
    for step in range(steps):
        P = torch.baddbmm(G, G, G, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        product = P if step == 0 else P @ product
        if step < steps - 1:
            G = P @ (P @ G)  # the next X is P X, and P and G commute
    return product @ X
