"""Multiplies rows by a factor, and adds up the factor's gradient in blocks of rows where that is faster.

The gradient is a product of a narrow and a wide matrix that are both tall. MKL takes up to twice as long for it as for
the other products of a step. A sum of products of short blocks takes no longer than those, in any shape of the wide
matrix, as long as the narrow one is on the left.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_BLOCK = 64
"""Rows of a block. On CPUs with 48 KiB of first-level cache, 96 and 128 rows are not faster."""
_MOST_NARROW, _LEAST_WIDE, _LEAST_ROWS = 160, 1024, 512
"""The dimensions of a factor and the number of rows from which blocks are measured to be faster."""
_MKL = torch.backends.mkl.is_available()


def linear(x: Tensor, factor: Tensor) -> Tensor:
    """Returns x factor^T, (..., n_out), for rows x (..., n_in) and a factor (n_out, n_in)."""
    y: Tensor = _InBlocks.apply(x, factor) if _is_faster(x, factor) else F.linear(x, factor)
    return y


def _is_faster(x: Tensor, factor: Tensor) -> bool:
    if not _MKL or type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    if not (torch.is_grad_enabled() and factor.requires_grad) or x.dtype != factor.dtype:
        return False
    # An exported program has to run without this package.
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting() or _forward_mode():
        return False
    n_out, n_in = factor.shape
    return min(n_out, n_in) <= _MOST_NARROW and max(n_out, n_in) >= _LEAST_WIDE and x.numel() // n_in >= _LEAST_ROWS


def _forward_mode() -> bool:
    """Whether derivatives are computed in forward mode, for which a Function below would need a further method.

    torch.compile refuses Functions with that method.
    """
    level: int = torch.autograd.forward_ad._current_level
    return level >= 0


class _InBlocks(torch.autograd.Function):
    """Computes x factor^T. Both are saved for the backward pass; the factor needs a gradient, so x has to be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return F.linear(x, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor]:
        (of_y,), (x, factor) = gradients, ctx.saved_tensors
        rows_y, rows_x = of_y.flatten(0, -2), x.flatten(0, -2)
        n_out, n_in = factor.shape
        of_factor = _Product.apply(rows_y, rows_x) if n_out <= n_in else _Product.apply(rows_x, rows_y).T
        return of_y @ factor if ctx.needs_input_grad[0] else None, of_factor


class _Product(torch.autograd.Function):
    """Computes narrow^T wide, (k, n), for narrow (rows, k) and wide (rows, n), and can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(narrow: Tensor, wide: Tensor) -> Tensor:
        product: Tensor = _product_of_tall(narrow, wide)
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (of_product,), (narrow, wide) = gradients, ctx.saved_tensors
        return wide @ of_product.T, narrow @ of_product


# As one operator, the blocks are a single call in a compiled model, for any number of rows.
@torch.library.custom_op("abtrain::product_of_tall", mutates_args=())
def _product_of_tall(narrow: Tensor, wide: Tensor) -> Tensor:
    if torch.get_num_threads() > 1:  # threads would wait for each other after every block
        return narrow.T @ wide
    total = narrow.new_zeros(narrow.shape[1], wide.shape[1])
    for left, right in zip(narrow.split(_BLOCK), wide.split(_BLOCK), strict=True):
        torch.addmm(total, left.T, right, out=total)
    return total


@_product_of_tall.register_fake
def _shape(narrow: Tensor, wide: Tensor) -> Tensor:
    return narrow.new_empty(narrow.shape[1], wide.shape[1])


@_product_of_tall.register_vmap
def _batch(info: Any, dims: tuple[int | None, int | None], narrow: Tensor, wide: Tensor) -> tuple[Tensor, int]:
    left, right = (t if dim is None else t.movedim(dim, 0) for t, dim in zip((narrow, wide), dims, strict=True))
    return left.mT @ right, 0


@register_flop_formula(torch.ops.abtrain.product_of_tall)
def _flops(narrow: torch.Size, wide: torch.Size, *, out_shape: Any = None) -> int:
    return 2 * narrow[0] * narrow[1] * wide[1]
