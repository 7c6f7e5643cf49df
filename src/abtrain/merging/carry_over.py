"""Converts the momentum and the residuals of merges when weights become factors, and back.

To first order, changes of the factors of W = A B change the weight by E_A B + A E_B. The changes of this form are the
tangent space of matrices of rank k at W. Factors can express any other change E only by its projection,
P_A E + E P_B - P_A E P_B, with P_A on the columns of A and P_B on the rows of B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from abtrain.lowrank.names import factor_names
from abtrain.lowrank.weight import FactoredWeight
from abtrain.merging.merger import Merger, Tensors


def carry_over(
    merger: Merger,
    records: Iterable[FactoredWeight],
    momentum: bool,
    convert: Callable[[Tensors, FactoredWeight], None],
) -> None:
    """Converts the momentum and the residuals of a merger, and drops the state of its wires.

    The factors of all `records` are in place: `convert` is `into_weight` before factors are multiplied, `into_factors`
    after weights have been factored. Without `momentum`, outer momentum is dropped.
    """
    for record in records:
        names = (record.name, *factor_names(record.name))
        merger.forget(names)
        for name in () if momentum else names:
            merger.momentum.pop(name, None)
        convert(merger.momentum, record)
        convert(merger.residuals, record)


def into_weight(store: Tensors, record: FactoredWeight) -> None:
    """Replaces the changes of a weight's two factors in `store` by one change of the weight."""
    E_A, E_B = (store.pop(name, None) for name in factor_names(record.name))
    given = E_A if E_A is not None else E_B
    if given is None:
        return
    A, B = record.A.detach().to(given.dtype), record.B.detach().to(given.dtype)
    # A factor that no worker trained did not change.
    E_A, E_B = torch.zeros_like(A) if E_A is None else E_A, torch.zeros_like(B) if E_B is None else E_B
    store[record.name] = record.matrix_shape.to_tensor(to_weight(E_A, E_B, A, B)).contiguous()


def into_factors(store: Tensors, record: FactoredWeight) -> None:
    """Replaces the change of a weight in `store` by changes of its two factors, as far as they can express it."""
    E = store.pop(record.name, None)
    if E is not None:
        matrix = record.matrix_shape.to_matrix(E)
        store |= zip(factor_names(record.name), to_factors(matrix, record.A.data, record.B.data), strict=True)


def to_weight(E_A: Tensor, E_B: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Converts changes of A (m, k) and B (k, n) to the change (m, n) of the weight."""
    return E_A @ B + A @ E_B


def to_factors(E: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Converts a change (m, n) of the weight to changes of A (m, k) and B (k, n) that produce its projection.

    The part that both factors can express is shared evenly: E_A = (I - P_A / 2) E B^+ and E_B = A^+ E (I - P_B / 2).
    """
    A_plus, B_plus = torch.linalg.pinv(A.double()), torch.linalg.pinv(B.double())
    right, left = E.double() @ B_plus, A_plus @ E.double()
    E_A = right - A.double() @ (A_plus @ right) / 2
    E_B = left - (left @ B_plus) @ B.double() / 2
    return E_A.to(E.dtype), E_B.to(E.dtype)
