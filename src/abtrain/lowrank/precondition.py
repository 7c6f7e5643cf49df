"""Steps of factors as the weight sees them: any optimizer, in coordinates that do not depend on the split into A and B.

W = A B does not say how a weight is split between A and B, yet steps depend on it: a gradient of A is one of W times
B^T, and a step of A moves W by that step times B. So directions with small singular values are seen dimly and moved
little, twice. Here both are made good: with R_B = (B B^T + d I)^-1/2 and R_A = (A^T A + d I)^-1/2 the optimizer gets

    G_A R_B  and  R_A G_B,    and its steps D_A, D_B become    D_A R_B  and  R_A D_B.

These are the gradient and the step in orthonormal coordinates of the rows of B and of the columns of A. For plain
gradient descent the two together are ScaledGD, G_A (B B^T + d I)^-1 (Tong, Ma, Chi, arXiv 2005.08898; for LoRA, Zhang
and Pilanci, arXiv 2402.02347). An optimizer that normalizes its gradients, as Adam does, undoes what is done to the
gradient alone: it needs both halves.

Weight decay is no step along a gradient, and shrinks the weight by its own share: decoupled from the gradient (AdamW)
it is taken out of the step, and half of it goes to each factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abtrain.errors import NonFiniteError
from abtrain.lowrank.optimizers import Optimizers
from abtrain.lowrank.weight import FactoredWeight


class _Roots(NamedTuple):
    """R_A and R_B, (k, k), in float32 at least."""

    of_A: Tensor
    of_B: Tensor


class _Start(NamedTuple):
    """A factor as it was before the step.

    Attributes:
        decay: what the optimizer shrinks it by beside the step, as a share.
    """

    factor: nn.Parameter
    value: Tensor
    decay: float


class Preconditioner:
    """Surrounds the steps of optimizers.

    Args:
        optimizers: over the factors.
        damping: d, as a share of the mean of the Gram matrix's diagonal.
        scale: what steps are multiplied by. In k of n coordinates a step of Adam is shorter than one of the whole
            weight, by sqrt(k / n) at most.
    """

    def __init__(self, optimizers: Optimizers, damping: float, scale: float = 1.0) -> None:
        self._optimizers = optimizers
        self._damping = damping
        self._scale = scale
        self._roots: dict[str, _Roots] = {}
        self._starts: dict[int, list[tuple[_Roots, _Start, _Start]]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Damping and scale, and by name the coordinates, R_A and R_B (k, k), that were taken last."""
        roots = {name: list(pair) for name, pair in self._roots.items()}
        return {"damping": self._damping, "scale": self._scale, "roots": roots}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Takes the coordinates of a `state_dict`, on `device`."""
        self._damping, self._scale = float(state["damping"]), float(state["scale"])
        self._roots = {
            name: _Roots(R_A.to(device, copy=True), R_B.to(device, copy=True))
            for name, (R_A, R_B) in state["roots"].items()
        }

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
    def before_step(self, optimizer: Optimizer, records: Iterable[FactoredWeight]) -> None:
        """Replaces the gradients of the factors that an optimizer steps, in place; those without are left alone."""
        decays = {id(p): _decay(group) for group in optimizer.param_groups for p in group["params"]}
        starts = self._starts[id(optimizer)] = []
        for record in records:
            roots, A, B = self._roots[record.name], record.A, record.B
            if self._optimizers.steps(A) is not optimizer:
                continue
            start_A, start_B = (_Start(p, p.detach().clone(), decays.get(id(p), 0.0)) for p in (A, B))
            starts.append((roots, start_A, start_B))
            if A.grad is not None:
                A.grad.copy_(A.grad.to(roots.of_B.dtype) @ roots.of_B)
            if B.grad is not None:
                B.grad.copy_(roots.of_A @ B.grad.to(roots.of_A.dtype))

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Replaces the steps that the factors have made since `before_step` of the same optimizer, in place."""
        for roots, A, B in self._starts.pop(id(optimizer), ()):
            if A.factor.grad is not None:
                _replace(A, _half_decayed(A) + self._scale * (_step(A).to(roots.of_B.dtype) @ roots.of_B))
            if B.factor.grad is not None:
                _replace(B, _half_decayed(B) + self._scale * (roots.of_A @ _step(B).to(roots.of_A.dtype)))


def _decay(group: dict[str, Any]) -> float:
    """The share by which a step of the optimizer shrinks the parameters of a group, whatever their gradients."""
    return float(group["lr"] * group["weight_decay"]) if group.get("decoupled_weight_decay") else 0.0


def _replace(start: _Start, value: Tensor) -> None:
    """Sets a factor to `value` if the optimizer moved it.

    A step that the optimizer skips, as fused ones do where a GradScaler found infinity, decays nothing either: what the
    decay would have been must not be taken for a step. The choice is made on the device, without waiting for it.
    """
    moved = (start.factor != start.value).any()
    start.factor.copy_(torch.where(moved, value.to(start.factor.dtype), start.factor))


def _step(start: _Start) -> Tensor:
    return start.factor - start.value * (1 - start.decay)


def _half_decayed(start: _Start) -> Tensor:
    return start.value * (1 - start.decay / 2)


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
    if not bool(torch.isfinite(wide).all()):
        raise NonFiniteError(
            "NaN or infinity in the factors of a weight, or in their squares: training has diverged. Lower the "
            "learning rate, or clip gradients"
        )
    d = damping * wide.diagonal().mean()
    if d == 0:
        return torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    values, vectors = torch.linalg.eigh(wide)
    root: Tensor = (vectors * (values.clamp_min(0) + d).rsqrt()) @ vectors.T
    return root
