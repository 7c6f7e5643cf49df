"""A dense weight is loaded into the factors that stand for it: decomposed anew, and cut to the rank that they have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from abtrain.errors import NonFiniteError
from abtrain.lowrank.svd import Factors, decompose
from abtrain.lowrank.weight import FactoredWeight, without_autocast
from abtrain.recipes.rank_rules import FixedRank

_ROUNDING = 1e-5
"""Relative error that is no loss, in float32."""

_cuts: ContextVar[bool] = ContextVar("cuts", default=False)


@contextmanager
def cutting(cut: bool) -> Iterator[None]:
    """Inside it, weights that are loaded are cut to the ranks of the model, whatever that loses (`cut`)."""
    token = _cuts.set(cut)
    try:
        yield
    finally:
        _cuts.reset(token)


def empty_like_dense(weight: FactoredWeight) -> nn.Parameter:
    """A Parameter of the dense weight's shape, for a value to be loaded into."""
    return nn.Parameter(weight.A.detach().new_empty(weight.matrix_shape.tensor))


def load_(weight: FactoredWeight, key: str, value: Tensor, dtype: torch.dtype) -> list[str]:
    """Replaces the factors of a weight, in place, by those of a dense value; ranks stay.

    Args:
        weight: whose factors they are.
        key: the weight's name, for messages.
        value: of the dense weight's shape.
        dtype: that it was saved in.

    Returns:
        What is wrong, and then nothing has changed.
    """
    wide = torch.promote_types(weight.A.dtype, torch.float32)
    W = weight.matrix_shape.to_matrix(value.to(weight.A.device, wide))
    try:
        pair = _of_rank(decompose(W, FixedRank(weight.k)), weight.k)
    except (NonFiniteError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # not in the stubs
        return [f"While loading {key} into its factors: {error}"]
    A, B = (factor.to(weight.A.dtype) for factor in pair)
    with without_autocast(W):
        size, error_size = W.norm(), (W - A.to(wide) @ B.to(wide)).norm()
    lost = float(error_size / size) if size > 0 else 0.0
    if lost > _allowed(weight.A.dtype, dtype) and not _cuts.get():
        return [
            f"{key} is factored with rank {weight.k} at present, and cutting the loaded weight to that rank would lose "
            f"{lost:.2%} of it (in Frobenius norm): load it with ABTraining.load_dense_state_dict(state, cut=True), or "
            "into the model before the factored phases."
        ]
    with torch.no_grad():
        weight.A.copy_(A)
        weight.B.copy_(B)
    return []


def _of_rank(pair: Factors, k: int) -> Factors:
    """Factors with signs that do not depend on the machine, and zeros for what is rounding, up to rank k."""
    A, B = pair
    largest = A.gather(0, A.abs().argmax(0, keepdim=True))[0]
    signs = torch.where(largest < 0, -1.0, 1.0).to(A.dtype)
    S = A.square().sum(0)
    signs[S.max() * torch.finfo(S.dtype).eps * max(len(A), B.shape[1]) >= S] = 0.0
    missing = k - pair.k
    return Factors(
        nn.functional.pad(A * signs, (0, missing)), nn.functional.pad(signs[:, None] * B, (0, 0, 0, missing))
    )


def _allowed(*dtypes: torch.dtype) -> float:
    """The relative error that rounding explains."""
    return max(_ROUNDING, *(2 * torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point))
