"""Small changes of a weight <-> small changes of its factors.

To first order, changes of the factors of W = A B change the weight by E_A B + A E_B. The changes of this form are the
tangent space of matrices of rank k at W. Factors can express any other change E only by its projection,
P_A E + E P_B - P_A E P_B, with P_A on the columns of A and P_B on the rows of B.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_weight(E_A: Tensor, E_B: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Changes of A (m, k) and B (k, n) -> the change (m, n) of the weight."""
    return E_A @ B + A @ E_B


def to_factors(E: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A change (m, n) of the weight -> changes of A (m, k) and B (k, n) that express its projection.

    The part that both factors can express is shared evenly: E_A = (I - P_A / 2) E B^+ and E_B = A^+ E (I - P_B / 2).
    """
    A_plus, B_plus = torch.linalg.pinv(A.double()), torch.linalg.pinv(B.double())
    right, left = E.double() @ B_plus, A_plus @ E.double()
    E_A = right - A.double() @ (A_plus @ right) / 2
    E_B = left - (left @ B_plus) @ B.double() / 2
    return E_A.to(E.dtype), E_B.to(E.dtype)
