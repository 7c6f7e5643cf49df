"""Factors weights so that all workers have the same factors.

Two processes may compute different decompositions of the same matrix: the number of threads and the instruction set
affect rounding, and if singular values are equal, rounding determines the basis. The average of factors in different
bases is not a factorization of the weight. So factors are compared by checksum. If they differ, all workers use those
of one worker, the owner of the weight.

If workers share the work, only the owner decomposes a weight, and sends its factors to the others: over the world, or
in each group. Groups then have an owner each, and compare their factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from abtrain.comm.checksums import checksum, fingerprint
from abtrain.comm.communicator import Calls, Communicator, Scope
from abtrain.comm.topology import Topology
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
SHARED_FROM = 10_000_000
"""The number of elements of all weights from which the workers of a group share the work by default."""
_EIGENVECTORS = 8
"""The time to find the eigenvectors of an (n, n) matrix, in units of the time to multiply two such matrices."""

Shape = tuple[int, int]


def agree_on_factors(
    comm: Communicator, weights: Mapping[str, Tensor], factoring: Factoring
) -> tuple[dict[str, Factors], dict[str, str]]:
    """Factors (m, n) matrices, which all workers pass in the same order. Collective over the world.

    Returns:
        The factors, equal on all workers, and the reasons why the other weights stay dense, both by the weights' names.

    Raises:
        NonFiniteError: a weight contains NaN or infinity on at least one worker. All workers raise the error.
    """
    shapes = [(W.shape[0], W.shape[1]) for W in weights.values()]
    scope, workers = _sharing(factoring, shapes, comm.topology)
    owners = dict(zip(weights, divide_work(shapes, workers), strict=True))
    place = comm.rank % workers
    work = [name for name, owner in owners.items() if owner == place or scope is None]
    outcomes, factors = _decompose(weights, work, factoring)
    # The maximum is the worst outcome on any worker, and the k of the first group's owner, as the others pass 0.
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
        elif factoring.stays_dense(k[name], m, n):
            dense[name] = f"factors of rank {k[name]} would save less than 10 %"
    kept = {name: W for name, W in weights.items() if name not in dense}
    return _exchange(comm, kept, factors, k, owners, scope), dense


def sent_by_agree_on_factors(
    shapes: Sequence[Shape], factors: Sequence[Factors | None], factoring: Factoring, topology: Topology
) -> Calls:
    """Returns the collective calls that `agree_on_factors` makes if all owners compute the same factors.

    `shapes` has (m, n) for each weight. `factors` has its A (m, k) and B (k, n), or None if it stays dense; only their
    shapes matter.
    """
    scope, workers = _sharing(factoring, shapes, topology)
    calls = sent_by_comparison(len(factors))  # `largest` sends an outcome and a rank for each weight
    if scope is not None:
        owners = divide_work(shapes, workers)
        for owner in range(workers):
            pairs = [pair for pair, its_owner in zip(factors, owners, strict=True) if pair and its_owner == owner]
            calls += sent_by_share([tensor for pair in pairs for tensor in pair], scope)
    return calls if scope == "world" else (*calls, *sent_by_comparison(sum(pair is not None for pair in factors)))


def largest_share(shapes: Sequence[Shape], factoring: Factoring, topology: Topology) -> float:
    """Returns the share of the work, from 0 to 1, of the worker that decomposes most."""
    scope, workers = _sharing(factoring, shapes, topology)
    if scope is None or not shapes:
        return 1.0
    work = [0.0] * workers
    for shape, owner in zip(shapes, divide_work(shapes, workers), strict=True):
        work[owner] += _work(shape)
    return max(work) / sum(work)


def divide_work(shapes: Sequence[Shape], workers: int) -> list[int]:
    """Returns the owner of each (m, n) matrix, from 0 to workers - 1, so that all of them work for about as long."""
    owners, work = [0] * len(shapes), [0.0] * workers
    # The largest matrices come first, and each goes to the worker that has the least to do.
    for i in sorted(range(len(shapes)), key=lambda i: -_work(shapes[i])):
        owners[i] = work.index(min(work))
        work[owners[i]] += _work(shapes[i])
    return owners


def _work(shape: Shape) -> float:
    """Returns the work of decomposing an (m, n) matrix by its Gram matrix, in multiplications."""
    m, n = shape
    return float(n * n * (m + _EIGENVECTORS * n))


def _sharing(factoring: Factoring, shapes: Sequence[Shape], topology: Topology) -> tuple[Scope | None, int]:
    """Returns the scope in which workers share the work, None if they do not, and the number of a weight's owners.

    By default, no factors are sent between groups: a slow link may take longer than their decomposition.
    """
    if factoring.svd == "shared":
        return "world", topology.world_size
    large = sum(m * n for m, n in shapes) >= SHARED_FROM
    if factoring.svd == "auto" and large and topology.group_size > 1:
        return "group", topology.group_size
    return None, topology.world_size


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
    scope: Scope | None,
) -> dict[str, Factors]:
    """Returns factors of rank `k` of `matrices`, equal on all workers. If some differ, those of one owner replace them.

    `scope` contains the workers that share the work: first, owners send factors to the others in it.
    """
    final = {name: _of_rank(k[name], factors.get(name), W) for name, W in matrices.items()}
    if scope is not None:
        _send(comm, final, owners, scope)
    if scope != "world":
        names = list(final)
        digests = [fingerprint(checksum(pair.A), checksum(pair.B)) for pair in final.values()]
        _send(comm, {names[i]: final[names[i]] for i in disagreeing(comm, digests)}, owners, "world")
    return final


def _of_rank(k: int, factors: Factors | None, W: Tensor) -> Factors:
    """Returns factors of W. Where they are missing, or rounding gave them another rank than k: zeros of rank k.

    Zeros differ from any owner's factors. So the comparison of factors finds them, and the owner's replace them.
    """
    if factors is not None and factors.k == k:
        return factors
    return Factors(W.new_zeros(W.shape[0], k), W.new_zeros(k, W.shape[1]))


def _send(comm: Communicator, factors: Mapping[str, Factors], owners: Mapping[str, int], scope: Scope) -> None:
    """Replaces factors by their owner's, in place, on all workers in the scope."""
    ranks = comm.ranks(scope)
    tensors = [tensor for pair in factors.values() for tensor in pair]
    share(comm, tensors, [ranks[owners[name]] for name, pair in factors.items() for _ in pair], scope)
