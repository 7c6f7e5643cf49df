"""Preconditions factors: makes optimizer steps of a weight independent of its split into A and B.

Many pairs of factors have the same product W = A B, yet optimizer steps depend on the pair. The gradient of A is that
of W times B^T, and a step of A changes W by that step times B. Small singular values therefore shrink a direction
twice: in the gradient, and in the step. The preconditioner corrects both. With R_B = (B B^T + d I)^-1/2 and
R_A = (A^T A + d I)^-1/2, the optimizer gets

    G_A R_B  and  R_A G_B,    and its steps D_A, D_B become    D_A R_B  and  R_A D_B.

These are the gradient and the step in orthonormal coordinates of the rows of B and of the columns of A. For plain
gradient descent, both corrections together are ScaledGD, G_A (B B^T + d I)^-1 (Tong, Ma, Chi, arXiv 2005.08898; for
LoRA, Zhang and Pilanci, arXiv 2402.02347). An optimizer that normalizes its gradients, such as Adam, undoes a change
of the gradient alone, so it needs both corrections.

Weight decay is not a step along a gradient: it shrinks the weight by a fixed share. If it is decoupled from the
gradient (AdamW, Muon), it is removed from the step, and half of it is applied to each factor.

Muon is left out: it makes the step of a factor equally long in all directions itself, and converted steps are not. Its
steps reach the factors as they are, and only its weight decay is halved.

An optimizer with master weights steps its own copy of a factor, and overwrites the factor by the rounded copy. The
copy therefore takes the preconditioned step, and the factor is rounded from it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, Optimizer

from abtrain.errors import NonFiniteError
from abtrain.lowrank.optimizer import LINEAR_MOMENTS, SQUARED_MOMENTS
from abtrain.lowrank.optimizers import Optimizers, is_a
from abtrain.lowrank.weight import FactoredWeight
from abtrain.optim import Muon

_MUON = (torch.optim.Muon, Muon)


class _Start(NamedTuple):
    """Stores a factor's value before the optimizer's step, and the matrix that preconditions its gradient."""

    factor: nn.Parameter
    value: Tensor  # a copy of the factor
    masters: dict[str, Tensor]  # copies of optimizer state that may be master weights, by their keys
    decay: float  # the share by which decoupled weight decay shrinks it in the step
    root: Tensor | None  # R_B for A, and R_A for B; None for the identity
    is_A: bool

    def converted(self, change: Tensor) -> Tensor:
        """Multiplies a gradient or a step of the factor by R_B from the right for A, and by R_A from the left for B."""
        if self.root is None:
            return change
        change = change.to(self.root.dtype)
        return change @ self.root if self.is_A else self.root @ change

    def target(self, value: Tensor, now: Tensor, scale: float) -> Tensor:
        """Returns the value after a preconditioned step, if the optimizer's step went from `value` to `now`."""
        step = now - value * (1 - self.decay)
        return value * (1 - self.decay / 2) + scale * self.converted(step)


class Preconditioner:
    """Preconditions the gradients of A and B before each optimizer step, and the changes of A and B after it.

    Args:
        damping: the number d, divided by the mean of the diagonal of A^T A or B B^T.
        scale: the number by which the changes are multiplied. Adam's step in k of n coordinates is up to sqrt(n / k)
            times shorter than its step for the whole weight.
    """

    def __init__(self, optimizers: Optimizers, damping: float, scale: float = 1.0) -> None:
        self._optimizers = optimizers
        self._damping = damping
        self._scale = scale
        self._roots: dict[str, tuple[Tensor, Tensor]] = {}
        self._starts: dict[int, list[_Start]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns `damping`, `scale`, and the current matrices R_A and R_B (k, k) of weights, by name."""
        roots = {name: list(pair) for name, pair in self._roots.items()}
        return {"damping": self._damping, "scale": self._scale, "roots": roots}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores the state that `state_dict` returned, with the matrices on `device`."""
        self._damping, self._scale = float(state["damping"]), float(state["scale"])
        self._roots = {
            name: (R_A.to(device, copy=True), R_B.to(device, copy=True)) for name, (R_A, R_B) in state["roots"].items()
        }

    @torch.no_grad()
    def refresh(self, records: Iterable[FactoredWeight]) -> None:
        """Computes R_A and R_B from the current factors. All steps use them until the next call."""
        self._roots = {
            record.name: _inverse_roots(record.A, record.B, self._damping)
            for record in records
            if preconditions(self._optimizers.steps(record.A))
        }

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, records: Iterable[FactoredWeight]) -> None:
        """Preconditions in place the gradients of the factors that `optimizer` is about to change."""
        decays = {id(p): _decay(optimizer, group) for group in optimizer.param_groups for p in group["params"]}
        starts = self._starts[id(optimizer)] = []
        for record in records:
            R_A, R_B = self._roots.get(record.name, (None, None))
            if self._optimizers.steps(record.A) is optimizer:
                for factor, root, is_A in ((record.A, R_B, True), (record.B, R_A, False)):
                    decay = decays.get(id(factor), 0.0)
                    masters = {key: copy.clone() for key, copy in _maybe_masters(optimizer, factor)}
                    starts.append(_Start(factor, factor.detach().clone(), masters, decay, root, is_A))
                    if factor.grad is not None:
                        factor.grad.copy_(starts[-1].converted(factor.grad))

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Preconditions in place the changes of the factors since `before_step` of the same optimizer.

        If a GradScaler found infinity, fused optimizers skip the step and its decay, and factors stay unchanged. The
        device makes this choice, so the host does not wait for it.
        """
        for start in self._starts.pop(id(optimizer), ()):
            factor, value = start.factor, start.value
            if factor.grad is not None:
                target = start.target(value, factor, self._scale).to(factor.dtype)
                moved = (factor != value).any()
                for key, copy in _maybe_masters(optimizer, factor):
                    now = copy.to(factor.device)
                    # An optimizer's first step may create the master weight, from the factor.
                    before = start.masters.get(key, value).to(now)
                    stepped = start.target(before, now, self._scale).to(now.dtype)
                    is_master = (now.to(factor.dtype) == factor).all() & (now != before).any()
                    copy.copy_(torch.where(is_master, stepped, now))
                    target, moved = torch.where(is_master, stepped.to(factor.dtype), target), moved | is_master
                factor.copy_(torch.where(moved, target, factor))


def used_by_preconditioner(factors: Iterable[Tensor]) -> int:
    """Returns the bytes that a `Preconditioner` of these factors holds during an optimizer step, roots included."""
    return sum(factor.nbytes + min(factor.shape) ** 2 * factor.itemsize for factor in factors)


def _maybe_masters(optimizer: Optimizer, factor: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """Yields optimizer state of a factor that may be its master weight, with the key of each."""
    for key, state in optimizer.state.get(factor, {}).items():
        if not isinstance(state, Tensor) or not state.is_floating_point() or state.shape != factor.shape:
            continue
        if key not in LINEAR_MOMENTS | SQUARED_MOMENTS and state.data_ptr() != factor.data_ptr():
            yield key, state


def preconditions(optimizer: Optimizer | None) -> bool:
    """Returns whether factors that an optimizer steps are preconditioned; None stands for an unknown optimizer."""
    return optimizer is None or not is_a(optimizer, _MUON)


def _decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Returns the share by which decoupled weight decay shrinks the parameters of a group in one step."""
    # Muon and Adafactor always decouple it, without such a setting.
    decoupled = group.get("decoupled_weight_decay") or is_a(optimizer, (*_MUON, Adafactor))
    return float(group["lr"] * group["weight_decay"]) if decoupled else 0.0


def seen_through(record: FactoredWeight, damping: float) -> tuple[Tensor, Tensor]:
    """Returns A' (m, k) and B' (k, n) such that the optimizer gets G B'^T and A'^T G as the gradients of the factors.

    G is the gradient of the weight. A' = A R_A and B' = R_B B with preconditioning, A and B without it (`damping` 0).
    """
    A, B = record.A.detach(), record.B.detach()
    if damping == 0:
        return A, B
    wide = torch.promote_types(A.dtype, torch.float32)
    A, B = A.to(wide), B.to(wide)
    R_A, R_B = _inverse_roots(A, B, damping)
    return A @ R_A, R_B @ B


def _inverse_roots(A: Tensor, B: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns R_A and R_B, both (k, k), in float32 or float64."""
    return _inverse_root(A.T @ A, damping), _inverse_root(B @ B.T, damping)


def _inverse_root(gram: Tensor, damping: float) -> Tensor:
    """Returns (gram + d I)^-1/2 of a positive semidefinite (k, k) matrix; the identity if it is all zero."""
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
