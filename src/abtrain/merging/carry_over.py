"""Converts the outer momentum and the compression residuals of merges from weights to factors, and back.

If the factors of W = A B change by E_A and E_B, then W changes by E_A B + A E_B, to first order. Changes of this form
make up the tangent space, at W, of the matrices of rank k. Any other change E of W is replaced by its projection onto
this space, P_A E + E P_B - P_A E P_B. P_A projects onto the column space of A, and P_B onto the row space of B.
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
    """Converts a merger's momentum and residuals for the weights in `records`.

    The weights must be factored during the call. Pass `into_weight` as `convert` before factors are multiplied, and
    `into_factors` after weights have been factored. If `momentum` is false, outer momentum is dropped.
    """
    held, shapes = list(records), dict[str, torch.Size]()
    for record in held:
        names = (record.name, *factor_names(record.name))
        for name in () if momentum else names:
            merger.momentum.pop(name, None)
        shapes |= zip(names, (record.dense.shape, record.A.shape, record.B.shape), strict=True)
    for store in (merger.momentum, merger.residuals):
        whole = merger.places.joined({name: store.pop(name) for name in shapes if name in store}, shapes)
        for record in held:
            device, names = record.A.device, (record.name, *factor_names(record.name))
            part = {name: merger.near(whole.pop(name), device) for name in names if name in whole}
            convert(part, record)
            # A view would keep the whole tensor in memory.
            store.update({name: merger.kept(piece, device) for name, piece in merger.places.pieces(part).items()})


def into_weight(store: Tensors, record: FactoredWeight) -> None:
    """Replaces the changes of a weight's factors in `store` by the change of the weight that they cause."""
    E_A, E_B = (store.pop(name, None) for name in factor_names(record.name))
    given = E_A if E_A is not None else E_B
    if given is None:
        return
    A, B = record.A.detach().to(given.dtype), record.B.detach().to(given.dtype)
    # A factor that no worker trained did not change.
    E_A, E_B = torch.zeros_like(A) if E_A is None else E_A, torch.zeros_like(B) if E_B is None else E_B
    store[record.name] = record.matrix_shape.to_tensor(to_weight(E_A, E_B, A, B)).contiguous()


def into_factors(store: Tensors, record: FactoredWeight) -> None:
    """Replaces the change of a weight in `store` by changes of its factors that cause the projection of this change."""
    E = store.pop(record.name, None)
    if E is not None:
        matrix = record.matrix_shape.to_matrix(E)
        store |= zip(factor_names(record.name), to_factors(matrix, record.A.data, record.B.data), strict=True)


def to_weight(E_A: Tensor, E_B: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Converts changes of A (m, k) and B (k, n) to the change (m, n) of W = A B, to first order."""
    return E_A @ B + A @ E_B


def to_factors(E: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Converts a change (m, n) of the weight to changes of A (m, k) and B (k, n) that cause its projection.

    Each causes half of P_A E P_B: E_A = (I - P_A / 2) E B^+, E_B = A^+ E (I - P_B / 2), with pseudoinverses A^+, B^+.
    """
    A_plus, B_plus = torch.linalg.pinv(A.double()), torch.linalg.pinv(B.double())
    right, left = E.double() @ B_plus, A_plus @ E.double()
    E_A = right - A.double() @ (A_plus @ right) / 2
    E_B = left - (left @ B_plus) @ B.double() / 2
    return E_A.to(E.dtype), E_B.to(E.dtype)
