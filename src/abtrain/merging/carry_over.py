"""Converts outer momentum and wire residuals when weights become factors, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from abtrain.lowrank.names import factor_names
from abtrain.lowrank.tangent import to_factors, to_weight
from abtrain.lowrank.weight import FactoredWeight
from abtrain.merging.merger import Merger, Tensors


def carry_over(
    merger: Merger,
    records: Iterable[FactoredWeight],
    momentum: bool,
    convert: Callable[[Tensors, FactoredWeight], None],
) -> None:
    """Converts the state of merges, and drops the state of its wires.

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
    """Replaces the entries of two factors by one of their weight."""
    E_A, E_B = (store.pop(name, None) for name in factor_names(record.name))
    given = E_A if E_A is not None else E_B
    if given is None:
        return
    A, B = record.A.detach().to(given.dtype), record.B.detach().to(given.dtype)
    # A factor that nobody trained did not change.
    E_A, E_B = torch.zeros_like(A) if E_A is None else E_A, torch.zeros_like(B) if E_B is None else E_B
    store[record.name] = record.matrix_shape.to_tensor(to_weight(E_A, E_B, A, B)).contiguous()


def into_factors(store: Tensors, record: FactoredWeight) -> None:
    """Replaces the entry of a weight by two of its factors, as far as factors can express it."""
    E = store.pop(record.name, None)
    if E is not None:
        matrix = record.matrix_shape.to_matrix(E)
        store |= zip(factor_names(record.name), to_factors(matrix, record.A.data, record.B.data), strict=True)
