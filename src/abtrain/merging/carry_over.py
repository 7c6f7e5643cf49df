"""Converts outer momentum and wire residuals when weights become factors, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from abtrain.lowrank.names import factor_names
from abtrain.lowrank.tangent import to_factors, to_weight
from abtrain.lowrank.weight import FactoredWeight
from abtrain.merging.merger import Merger, Tensors


def carry_to_weights(merger: Merger, records: Iterable[FactoredWeight], momentum: bool) -> None:
    """Converts from factors to weights, before the factors are multiplied.

    Args:
        merger: whose momentum and residuals are converted.
        records: the factored weights, their factors still in place.
        momentum: whether outer momentum is converted, or dropped.
    """
    for record, store, (name_A, name_B) in _stores(merger, records, momentum):
        E_A, E_B = store.pop(name_A, None), store.pop(name_B, None)
        if E_A is None and E_B is None:
            continue
        dtype = (E_A if E_A is not None else E_B).dtype  # type: ignore[union-attr]  # one of them is there
        A, B = record.A.detach().to(dtype), record.B.detach().to(dtype)
        # A factor that nobody trained did not change.
        E_A, E_B = torch.zeros_like(A) if E_A is None else E_A, torch.zeros_like(B) if E_B is None else E_B
        store[record.name] = record.matrix_shape.to_tensor(to_weight(E_A, E_B, A, B)).contiguous()


def carry_to_factors(merger: Merger, records: Iterable[FactoredWeight], momentum: bool) -> None:
    """Converts from weights to factors, as far as factors can express it; the arguments are those of the inverse."""
    for record, store, (name_A, name_B) in _stores(merger, records, momentum):
        E = store.pop(record.name, None)
        if E is not None:
            matrix = record.matrix_shape.to_matrix(E)
            store[name_A], store[name_B] = to_factors(matrix, record.A.data, record.B.data)


def _stores(
    merger: Merger, records: Iterable[FactoredWeight], momentum: bool
) -> Iterator[tuple[FactoredWeight, Tensors, tuple[str, str]]]:
    """Yields each weight with each store that is converted, and the names of its factors."""
    for record in records:
        names = factor_names(record.name)
        merger.forget([record.name, *names])
        if momentum:
            yield record, merger.momentum, names
        else:
            for name in (record.name, *names):
                merger.momentum.pop(name, None)
        yield record, merger.residuals, names
