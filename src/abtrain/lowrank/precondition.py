"""Gradients of factors, preconditioned by the other factor.

W = A B does not say how a weight is split between A and B, yet gradient steps depend on it. Multiplied by the inverse
Gram matrix of the other factor they do not: ScaledGD (Tong, Ma, Chi, arXiv 2005.08898); for LoRA, Zhang and Pilanci
(arXiv 2402.02347).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from abtrain.lowrank.surgery import FactoredWeight


@torch.no_grad()
def precondition_(records: Iterable[FactoredWeight], damping: float) -> None:
    """Replaces the gradients of the factors in place; those that have none are left alone.

    G_A (B B^T + d I)^-1  and  (A^T A + d I)^-1 G_B, where d is `damping` times the mean of the Gram matrix's diagonal.
    """
    for record in records:
        A, B = record.A, record.B
        if A.grad is not None:
            A.grad.copy_(_solve(B @ B.T, A.grad.T, damping).T)
        if B.grad is not None:
            B.grad.copy_(_solve(A.T @ A, B.grad, damping))


def _solve(gram: Tensor, G: Tensor, damping: float) -> Tensor:
    """(gram + d I)^-1 G, in float32 at least."""
    wide = gram.to(torch.promote_types(gram.dtype, torch.float32))
    d = damping * wide.diagonal().mean()
    # A factor of zeros has no Gram matrix to speak of: its partner's gradient is left as it is.
    if d == 0:
        return G
    wide.diagonal().add_(d)
    solved: Tensor = torch.linalg.solve(wide, G.to(wide.dtype))
    return solved.to(G.dtype)
