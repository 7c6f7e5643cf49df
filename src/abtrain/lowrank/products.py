"""Multiplies rows x by a factored matrix W = outer inner, in the order of products that is fastest for a training step.

The order depends on shapes and on what is trained, so it is the same on all workers.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from abtrain.lowrank.blocks import linear

Order = Literal["factors", "gradient", "rebuilt"]
"""`factors`: W and its gradient are never computed. `gradient`: the backward pass computes the gradient of W, and the
gradients of both factors from it. `rebuilt`: the forward pass computes W, too."""

_MOVED = 16
"""The multiplications that take as long as reading or writing one number of a large matrix, measured on CPUs."""


def best_order(x: Tensor, inner: Tensor, outer: Tensor) -> Order:
    """Returns the fastest order for a training step with rows x (..., n_in), inner (k, n_in) and outer (n_out, k).

    Products with the factors take fewer multiplications at low ranks. Near full rank, W pays for many rows whose input
    needs no gradient: products with the factors then need the gradient between them.
    """
    # Autocast would multiply A B in full precision, and an exported program must not depend on the number of rows.
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_exporting():
        return "factors"
    (k, n_in), n_out, rows = inner.shape, len(outer), x.numel() // inner.shape[1]
    of_x, of_inner, of_outer = x.requires_grad, inner.requires_grad, outer.requires_grad
    if rows == 0 or not (of_inner or of_outer):
        return "factors"
    with_inner, with_outer, with_W = _cost(rows, n_in, k), _cost(rows, n_out, k), _cost(rows, n_in, n_out)
    to_factors = (of_inner + of_outer) * _cost(n_in, n_out, k)
    factors = with_inner * (1 + of_x + of_inner) + with_outer * (1 + (of_x or of_inner) + of_outer)
    gradient = (with_inner + with_outer) * (1 + of_x) + with_W + to_factors
    rebuilt = with_W * (2 + of_x) + _cost(n_in, n_out, k) + to_factors
    if factors <= gradient and factors <= rebuilt:
        return "factors"
    return "gradient" if gradient <= rebuilt else "rebuilt"


def _cost(m: int, n: int, k: int) -> int:
    """Returns the time of a product of an (m, k) and a (k, n) matrix, as a number of multiplications."""
    return m * n * k + _MOVED * (m * n + m * k + n * k)


def through_factors(x: Tensor, inner: Tensor, outer: Tensor, bias: Tensor | None, order: Order) -> Tensor:
    """Returns x inner^T outer^T + bias, (..., n_out)."""
    if order == "gradient":
        y: Tensor = _ThroughGradient.apply(x, inner, outer)
    elif x.device.type != "cpu":
        return F.linear(F.linear(x, inner), outer, bias)
    else:
        y = linear(linear(x, inner), outer)
    # On CPUs, a product with a bias begins with a copy of the bias to each row.
    return y if bias is None else y.add_(bias)


class _ThroughGradient(torch.autograd.Function):
    """Computes x inner^T outer^T, and the gradients of both factors from the gradient of W = outer inner."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        return F.linear(F.linear(x, inner), outer)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_y,), (x, inner, outer) = gradients, ctx.saved_tensors
        G = of_y.flatten(0, -2).T @ x.flatten(0, -2)
        of_x = (of_y @ outer) @ inner if ctx.needs_input_grad[0] else None
        return of_x, outer.T @ G if ctx.needs_input_grad[1] else None, G @ inner.T if ctx.needs_input_grad[2] else None
