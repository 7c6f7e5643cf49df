"""Steps of factors as the weight sees them: any optimizer, in coordinates that do not depend on the split into A and B.

W = A B does not say how a weight is split between A and B, yet steps depend on it: a gradient of A is one of W times
B^T, and a step of A moves W by that step times B. So directions with small singular values are seen dimly and moved
little, twice. Here both are made good: with R_B = (B B^T + d I)^-1/2 and R_A = (A^T A + d I)^-1/2 the optimizer gets

    G_A R_B  and  R_A G_B,    and its steps D_A, D_B become    D_A R_B  and  R_A D_B.

These are the gradient and the step in orthonormal coordinates of the rows of B and of the columns of A. For plain
gradient descent the two together are ScaledGD, G_A (B B^T + d I)^-1 (Tong, Ma, Chi, arXiv 2005.08898; for LoRA, Zhang
and Pilanci, arXiv 2402.02347). An optimizer that normalizes its gradients, as Adam does, undoes what is done to the
gradient alone: it needs both halves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from abtrain.lowrank.surgery import FactoredWeight


class _Roots(NamedTuple):
    """R_A and R_B, (k, k), in float32 at least."""

    of_A: Tensor
    of_B: Tensor


class Preconditioner:
    """Surrounds the steps of an optimizer.

    Args:
        damping: d, as a share of the mean of the Gram matrix's diagonal.
    """

    def __init__(self, damping: float) -> None:
        self._damping = damping
        self._roots: dict[str, _Roots] = {}
        self._before: list[tuple[FactoredWeight, Tensor, Tensor]] = []

    @torch.no_grad()
    def refresh(self, records: Iterable[FactoredWeight]) -> None:
        """Takes the coordinates from the factors as they are now. They may serve for some steps."""
        self._roots = {
            record.name: _Roots(
                _inverse_root(record.A.T @ record.A, self._damping), _inverse_root(record.B @ record.B.T, self._damping)
            )
            for record in records
        }

    @torch.no_grad()
    def before_step(self, records: Iterable[FactoredWeight]) -> None:
        """Replaces the gradients of the factors in place; those that have none are left alone."""
        self._before = []
        for record in records:
            roots = self._roots[record.name]
            self._before.append((record, record.A.detach().clone(), record.B.detach().clone()))
            if record.A.grad is not None:
                record.A.grad.copy_(record.A.grad.to(roots.of_B.dtype) @ roots.of_B)
            if record.B.grad is not None:
                record.B.grad.copy_(roots.of_A @ record.B.grad.to(roots.of_A.dtype))

    @torch.no_grad()
    def after_step(self) -> None:
        """Replaces the steps that the factors have made since `before_step`, in place."""
        for record, A, B in self._before:
            roots = self._roots[record.name]
            step_A = (record.A - A).to(roots.of_B.dtype) @ roots.of_B
            step_B = roots.of_A @ (record.B - B).to(roots.of_A.dtype)
            record.A.copy_(A + step_A)
            record.B.copy_(B + step_B)
        self._before = []


@torch.no_grad()
def seen_through(record: FactoredWeight, damping: float) -> tuple[Tensor, Tensor]:
    """The A' (m, k) and B' (k, n) for which the optimizer gets G B'^T and A'^T G: the factors themselves, undamped (0).

    With a preconditioner they are A R_A and R_B B.
    """
    A, B = record.A.detach(), record.B.detach()
    if damping == 0:
        return A, B
    wide = torch.promote_types(A.dtype, torch.float32)
    A, B = A.to(wide), B.to(wide)
    return A @ _inverse_root(A.T @ A, damping), _inverse_root(B @ B.T, damping) @ B


def _inverse_root(gram: Tensor, damping: float) -> Tensor:
    """(gram + d I)^-1/2 of a positive semidefinite (k, k) matrix; the identity for one of zeros."""
    wide = gram.to(torch.promote_types(gram.dtype, torch.float32))
    d = damping * wide.diagonal().mean()
    if d == 0:
        return torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    values, vectors = torch.linalg.eigh(wide)
    root: Tensor = (vectors * (values.clamp_min(0) + d).rsqrt()) @ vectors.T
    return root
