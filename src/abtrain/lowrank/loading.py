"""Loads a dense weight into its factors, cut to their rank and in their basis."""

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
"""Relative error that counts as rounding in float32."""
_SAME = 8
"""Two products of the same factors may differ by this many units of rounding."""
_CONDITION = 1e-4
"""A factor is inverted only if its smallest singular value is larger than this share of its largest."""

_replaced: WeakKeyDictionary[FactoredWeight, Factors] = WeakKeyDictionary()
"""Each weight's factors before the last load that changed them, for loops that swap an average in and out."""

_cuts: ContextVar[bool] = ContextVar("cuts", default=False)


@contextmanager
def cutting(cut: bool) -> Iterator[None]:
    """Sets whether weights loaded in the block may lose more than rounding when they are cut to their ranks."""
    token = _cuts.set(cut)
    try:
        yield
    finally:
        _cuts.reset(token)


def load_(weight: FactoredWeight, key: str, value: Tensor, dtype: torch.dtype) -> list[str]:
    """Writes a dense value that was saved in `dtype` into the factors of a weight, in place; ranks stay.

    Momentum, anchors and residuals refer to the factors element by element, so the pair changes as little as possible.
    It stays if its product is the value already. If the product of the pair before the last load is the value, that
    pair returns. Otherwise, the pair becomes factors of the value in the basis nearest to the current one.

    Returns:
        The list of problems, with `key` as the weight's name. If there are any, nothing has changed.
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
                f"{key} is factored with rank {weight.k} now, and cutting the loaded weight to that rank would lose "
                f"{lost:.2%} of it (in Frobenius norm): load it before the factored phases, or with "
                "ABTraining.load_dense_state_dict(state, cut=True)."
            ]
    _replaced[weight] = Factors(present.A.clone(), present.B.clone())
    with torch.no_grad():
        weight.A.copy_(pair.A)
        weight.B.copy_(pair.B)
    return []


def _makes(pair: Factors, weight: FactoredWeight, value: Tensor, dtype: torch.dtype) -> bool:
    """Whether the product of a pair equals a value that was saved in `dtype`, up to rounding."""
    wide = torch.promote_types(value.dtype, torch.float32)
    W = weight.product_of(*pair)
    if dtype.is_floating_point and bool(value.any()):
        W = W.to(dtype)
    W, value = W.to(wide), value.to(W.device, wide)
    return bool((W - value).norm() <= _SAME * torch.finfo(wide).eps * value.norm())


def _factors_of(weight: FactoredWeight, present: Factors, value: Tensor) -> tuple[Factors, float]:
    """Returns factors of a value at the weight's rank, near the current ones, and the share of its norm they miss.

    Raises:
        NonFiniteError: the value holds NaN or infinity.
        torch.linalg.LinAlgError: the SVD did not converge.
    """
    wide = torch.promote_types(weight.A.dtype, torch.float32)
    W = weight.matrix_shape.to_matrix(value.to(weight.A.device, wide))
    size = W.norm()

    def rounded(pair: Factors) -> tuple[Factors, float]:
        """Returns the pair in the dtype of the weight's factors, and the share of the norm that it misses."""
        pair = Factors(*(factor.to(weight.A.dtype) for factor in pair))
        missed = (W - pair.A.to(wide) @ pair.B.to(wide)).norm()
        return pair, float(missed / size) if size > 0 else 0.0

    with without_autocast(W):
        cut = _of_rank(decompose(W, FixedRank(weight.k)), weight.k)
        by_svd, lost = rounded(cut)
        near = _in_basis_of(present, cut)
        if near is not None:
            by_basis, missed = rounded(near)
            if missed <= lost + _allowed(weight.A.dtype):
                return by_basis, lost
    return by_svd, lost


def _in_basis_of(present: Factors, cut: Factors) -> Factors | None:
    """Returns other factors of the product: B' = A^+ W, then A' = W B'^+, in float64; None if B' lacks full rank."""
    W = cut.A.double() @ cut.B.double()
    B = torch.linalg.pinv(present.A.double()) @ W
    S = torch.linalg.svdvals(B)
    return Factors(W @ torch.linalg.pinv(B), B) if S[-1] > _CONDITION * S[0] else None


def _of_rank(pair: Factors, k: int) -> Factors:
    """Returns the pair with the same signs on every machine, zeros instead of rounding errors, and padded to rank k."""
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
    """Returns the largest relative error that counts as rounding."""
    return max(_ROUNDING, *(2 * torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point))
