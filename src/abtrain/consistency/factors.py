"""Factors weights so that all workers have the same factors.

Two processes may compute different decompositions of the same matrix: the number of threads and the instruction set
affect rounding, and if singular values are equal, rounding determines the basis. The average of factors in different
bases is not a factorization of the weight. So factors are compared by checksum. If they differ, all workers use those
of one worker, the owner of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from abtrain.comm.checksums import checksum, fingerprint
from abtrain.comm.communicator import Calls, Communicator
from abtrain.consistency.agreement import disagreeing, largest, sent_by_comparison, sent_by_share, share
from abtrain.errors import NonFiniteError
from abtrain.lowrank.svd import Factors, decompose
from abtrain.recipes.factoring import Factoring


class _Outcome(IntEnum):
    """The outcome of factoring a weight, from best to worst. The worst outcome on any worker applies to all workers."""

    FACTORED = 0
    ALL_ZERO = 1
    FAILED = 2
    NON_FINITE = 3


_WHY_DENSE = {
    _Outcome.ALL_ZERO: "all zero: its factors would never get a gradient",
    _Outcome.FAILED: "its SVD did not converge",
}


def agree_on_factors(
    comm: Communicator, weights: Mapping[str, Tensor], factoring: Factoring
) -> tuple[dict[str, Factors], dict[str, str]]:
    """Factors (m, n) matrices, which all workers pass in the same order. Collective over the world.

    Returns:
        The factors, equal on all workers, and the reasons why the other weights stay dense, both by the weights' names.

    Raises:
        NonFiniteError: a weight contains NaN or infinity on at least one worker. All workers raise the error.
    """
    owners = {name: i % comm.topology.world_size for i, name in enumerate(weights)}
    shared = factoring.svd == "shared"
    work = [name for name, owner in owners.items() if owner == comm.rank or not shared]
    outcomes, factors = _decompose(weights, work, factoring)
    # The maximum is the worst outcome on any worker, and the owner's k, as the others pass 0.
    mine = [factors[name].k if name in factors and owner == comm.rank else 0 for name, owner in owners.items()]
    numbers = largest(comm, [*outcomes.values(), *mine], torch.int64)
    outcomes = dict(zip(weights, map(_Outcome, numbers), strict=False))
    k = dict(zip(weights, numbers[len(weights) :], strict=True))
    broken = [name for name, outcome in outcomes.items() if outcome == _Outcome.NON_FINITE]
    if broken:
        raise NonFiniteError(
            f"cannot factor {', '.join(broken)}: found NaN or infinity. Training has diverged: "
            "lower the learning rate, or clip gradients"
        )
    dense: dict[str, str] = {}
    for name, W in weights.items():
        m, n = W.shape
        if outcomes[name]:
            dense[name] = _WHY_DENSE[outcomes[name]]
        elif factoring.keep_dense_if_larger and k[name] * (m + n) >= m * n:
            dense[name] = f"factors of rank {k[name]} would be no smaller"
    kept = {name: W for name, W in weights.items() if name not in dense}
    return _exchange(comm, kept, factors, k, owners, shared), dense


def sent_by_agree_on_factors(factors: Sequence[Factors | None], workers: int, shared: bool) -> Calls:
    """Returns the collective calls that `agree_on_factors` makes if all workers compute the same factors.

    `factors` has A (m, k) and B (k, n) for each weight, or None for a weight that stays dense. Only shapes matter.
    If `shared`, only the owner of a weight decomposes it.
    """
    calls = sent_by_comparison(len(factors))  # `largest` sends an outcome and a rank for each weight
    if not shared:
        return (*calls, *sent_by_comparison(sum(pair is not None for pair in factors)))
    for owner in range(workers):
        owned = [tensor for pair in factors[owner::workers] if pair is not None for tensor in pair]
        calls += sent_by_share(owned)
    return calls


def _decompose(
    weights: Mapping[str, Tensor], work: Sequence[str], factoring: Factoring
) -> tuple[dict[str, _Outcome], dict[str, Factors]]:
    """Factors the weights named in `work`. Returns outcomes, in which other weights count as factored, and factors."""
    outcomes = dict.fromkeys(weights, _Outcome.FACTORED)
    factors: dict[str, Factors] = {}
    for name in work:
        if not weights[name].any():
            outcomes[name] = _Outcome.ALL_ZERO
            continue
        try:
            factors[name] = decompose(weights[name], factoring.rank_rule)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but missing from the stubs
            outcomes[name] = _Outcome.FAILED
        except NonFiniteError:
            outcomes[name] = _Outcome.NON_FINITE
    return outcomes, factors


def _exchange(
    comm: Communicator,
    matrices: Mapping[str, Tensor],
    factors: Mapping[str, Factors],
    k: Mapping[str, int],
    owners: Mapping[str, int],
    shared: bool,
) -> dict[str, Factors]:
    """Returns factors of `matrices`, equal on all workers. If some differ or are missing, the owner sends them."""
    names = list(matrices)
    if not shared:
        digests = [fingerprint(checksum(factors[name].A), checksum(factors[name].B)) for name in names]
        names = [names[place] for place in disagreeing(comm, digests)]
    final = dict(factors)
    for name in names:
        if comm.rank != owners[name]:
            (m, n), empty = matrices[name].shape, matrices[name].new_empty
            final[name] = Factors(empty(m, k[name]), empty(k[name], n))
    pairs = [(tensor, owners[name]) for name in names for tensor in final[name]]
    share(comm, [tensor for tensor, _ in pairs], [owner for _, owner in pairs])
    return {name: final[name] for name in matrices}
