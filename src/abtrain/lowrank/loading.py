"""Loads a dense weight into its factors: truncates it to their rank and keeps their basis where possible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from abtrain.errors import NonFiniteError
from abtrain.lowrank.svd import Factors, decompose
from abtrain.lowrank.weight import FactoredWeight, without_autocast
from abtrain.recipes.rank_rules import FixedRank

_ROUNDING = 1e-5
"""The largest relative error that counts as rounding in float32."""
_SAME = 8
"""The relative error, in units of machine epsilon, by which two products of the same factors may differ."""
_CONDITION = 1e-4
"""The share of a factor's largest singular value that its smallest one must exceed before the factor is inverted."""

_replaced: WeakKeyDictionary[FactoredWeight, Factors] = WeakKeyDictionary()
"""The factors of each weight before it was last loaded. A loop that swaps an average in and out gets them back."""

_cuts: ContextVar[bool] = ContextVar("cuts", default=False)


@contextmanager
def cutting(cut: bool) -> Iterator[None]:
    """Sets whether weights loaded in the block may lose more than rounding errors when truncated to their ranks."""
    token = _cuts.set(cut)
    try:
        yield
    finally:
        _cuts.reset(token)


def load_(weight: FactoredWeight, key: str, value: Tensor, dtype: torch.dtype) -> list[str]:
    """Writes a dense value that was saved in `dtype` into a weight's factors, in place and without changing the rank.

    Optimizer state and the tensors that merges keep belong to single elements of the factors, so the factors change as
    little as possible. They stay if their product already equals the value. If the factors before the last load have
    this product, they are restored. Otherwise, the value is factored in the basis of the current factors if possible.

    Returns:
        Messages about problems, in which `key` is the weight's name. The factors change only if there are none.
    """
    present = Factors(weight.A.detach(), weight.B.detach())
    if _makes(present, weight, value, dtype):
        return []
    pair = _replaced.get(weight)
    if pair is not None:
        pair = Factors(*(factor.to(weight.A.device) for factor in pair))
    if pair is None or not _makes(pair, weight, value, dtype):
        try:
            pair, lost = _factors_of(weight, present, value)
        except (NonFiniteError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # not in the stubs
            return [f"While loading {key} into its factors: {error}"]
        if lost > _allowed(weight.A.dtype, dtype) and not _cuts.get():
            return [
                f"{key} is factored with rank {weight.k} now, and truncating the loaded weight to that rank would lose "
                f"{lost:.2%} of it (in Frobenius norm): load it before a factored phase, or with "
                "ABTraining.load_dense_state_dict(state, cut=True)."
            ]
    _replaced[weight] = Factors(present.A.clone(), present.B.clone())
    with torch.no_grad():
        weight.A.copy_(pair.A)
        weight.B.copy_(pair.B)
    return []


def _makes(pair: Factors, weight: FactoredWeight, value: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether the product of two factors equals a value that was saved in `dtype`, up to rounding."""
    wide = torch.promote_types(value.dtype, torch.float32)
    W = weight.product_of(*pair)
    if dtype.is_floating_point and bool(value.any()):
        W = W.to(dtype)
    W, value = W.to(wide), value.to(W.device, wide)
    return bool((W - value).norm() <= _SAME * torch.finfo(wide).eps * value.norm())


def _factors_of(weight: FactoredWeight, present: Factors, value: Tensor) -> tuple[Factors, float]:
    """Returns factors of a value, near the current ones, and the share of its norm that truncation to the rank loses.

    Raises:
        NonFiniteError: the value contains NaN or infinity.
        torch.linalg.LinAlgError: the SVD did not converge.
    """
    wide = torch.promote_types(weight.A.dtype, torch.float32)
    W = weight.matrix_shape.to_matrix(value.to(weight.A.device, wide))
    size = W.norm()

    def rounded(pair: Factors) -> tuple[Factors, float]:
        """Returns the factors in the weight's dtype, and the share of the value's norm that their product misses."""
        pair = Factors(*(factor.to(weight.A.dtype) for factor in pair))
        missed = (W - pair.A.to(wide) @ pair.B.to(wide)).norm()
        return pair, float(missed / size) if size > 0 else 0.0

    with without_autocast(W):
        cut = _of_rank(decompose(W, FixedRank(weight.k)), weight.k)
        by_svd, lost = rounded(cut)
        # The factors of a run that has diverged define no basis.
        near = _in_basis_of(present, cut) if bool(present.A.isfinite().all()) else None
        if near is not None:
            by_basis, missed = rounded(near)
            if missed <= lost + _allowed(weight.A.dtype):
                return by_basis, lost
    return by_svd, lost


def _in_basis_of(present: Factors, cut: Factors) -> Factors | None:
    """Returns A' = W pinv(B') and B' = pinv(A) W in float64, with A of `present`, W of `cut`; None if B' lacks rank."""
    W = cut.A.double() @ cut.B.double()
    B = torch.linalg.pinv(present.A.double()) @ W
    S = torch.linalg.svdvals(B)
    return Factors(W @ torch.linalg.pinv(B), B) if S[-1] > _CONDITION * S[0] else None


def _of_rank(pair: Factors, k: int) -> Factors:
    """Returns factors zero-padded to rank k, with equal signs on all machines. Mere rounding errors become zero."""
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
    """Returns the largest relative error that counts as rounding in any of the dtypes."""
    return max(_ROUNDING, *(2 * torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point))
