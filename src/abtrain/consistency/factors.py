"""The same factors on every worker.

Two processes may compute different decompositions of the same matrix: the number of threads and the instruction set
change the rounding, and where singular values repeat, the rounding picks the basis. Averaging factors of different
bases destroys the weight. So factors are compared by checksum, and where they differ all take those of one owner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from abtrain.comm.checksums import checksum, fingerprint
from abtrain.comm.communicator import Communicator
from abtrain.comm.traffic import Calls, Traffic
from abtrain.consistency.agreement import disagreeing, sent_by_comparison, sent_by_share, share
from abtrain.errors import NonFiniteError
from abtrain.lowrank.svd import Factors, decompose
from abtrain.recipes.factoring import Factoring


class _Outcome(IntEnum):
    """The outcome of one decomposition, from best to worst; the worst of any worker applies to all."""

    FACTORED = 0
    ALL_ZERO = 1
    FAILED = 2
    NON_FINITE = 3


_WHY_DENSE = {
    _Outcome.ALL_ZERO: "all zero: its factors would never get a gradient",
    _Outcome.FAILED: "its SVD did not converge",
}


@dataclass(frozen=True)
class Agreed:
    """Factors by weight name, alike on all workers; and the weights that stay dense, with the reason."""

    factors: dict[str, Factors]
    dense: dict[str, str]


def agree_on_factors(comm: Communicator, weights: Mapping[str, Tensor], factoring: Factoring) -> Agreed:
    """Decomposes the weights and proves that all workers hold the same factors. Collective over the world.

    Args:
        comm: of this worker.
        weights: (m, n) matrices by name, the same names in the same order on all workers.
        factoring: rank rule and policies.

    Raises:
        NonFiniteError: a weight holds NaN or infinity, on any worker; raised on all.
    """
    names, matrices = list(weights), list(weights.values())
    owners = [i % comm.topology.world_size for i in range(len(names))]
    mine = [i for i, owner in enumerate(owners) if owner == comm.rank]
    work = mine if factoring.svd == "shared" else range(len(names))
    outcomes, factors = _decompose_some(matrices, work, factoring)

    ranks = {i: factors[i].k for i in mine if i in factors}
    outcomes, k = _agree(comm, outcomes, ranks, len(names))
    broken = [name for name, outcome in zip(names, outcomes, strict=True) if outcome == _Outcome.NON_FINITE]
    if broken:
        raise NonFiniteError(
            f"cannot factor {', '.join(broken)}: NaN or infinity in the weight. Training has diverged: "
            "lower the learning rate, or clip gradients"
        )
    dense: dict[str, str] = {}
    kept: list[int] = []
    for i, (name, W) in enumerate(zip(names, matrices, strict=True)):
        m, n = W.shape
        if outcomes[i]:
            dense[name] = _WHY_DENSE[outcomes[i]]
        elif factoring.keep_dense_if_larger and k[i] * (m + n) >= m * n:
            dense[name] = f"factors of rank {k[i]} would be no smaller"
        else:
            kept.append(i)
    final = _exchange(comm, {i: matrices[i] for i in kept}, factors, k, owners, shared=factoring.svd == "shared")
    return Agreed({names[i]: final[i] for i in kept}, dense)


def sent_by_agree_on_factors(factors: Sequence[Factors | None], workers: int, shared: bool) -> Calls:
    """The calls of `agree_on_factors` where all workers compute the same factors.

    Args:
        factors: by the shapes of A (m, k) and B (k, n), for each weight in their order; None where it stays dense.
        workers: how many.
        shared: whether each weight is decomposed by its owner alone.
    """
    calls: Calls = ()
    if factors:
        calls = (Traffic("all_reduce", "world", 2 * len(factors) * torch.int64.itemsize),)
    if not shared:
        return (*calls, *sent_by_comparison(sum(pair is not None for pair in factors)))
    for owner in range(workers):
        owned = [tensor for pair in factors[owner::workers] if pair is not None for tensor in pair]
        calls += sent_by_share(owned)
    return calls


def _decompose_some(
    matrices: Sequence[Tensor], work: Sequence[int], factoring: Factoring
) -> tuple[list[_Outcome], dict[int, Factors]]:
    outcomes = [_Outcome.FACTORED] * len(matrices)
    factors: dict[int, Factors] = {}
    for i in work:
        if not matrices[i].any():
            outcomes[i] = _Outcome.ALL_ZERO
            continue
        try:
            factors[i] = decompose(matrices[i], factoring.rank_rule)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but missing from the stubs
            outcomes[i] = _Outcome.FAILED
        except NonFiniteError:
            outcomes[i] = _Outcome.NON_FINITE
    return outcomes, factors


def _agree(
    comm: Communicator, outcomes: Sequence[_Outcome], owned_ranks: Mapping[int, int], count: int
) -> tuple[list[_Outcome], list[int]]:
    """The worst outcome of any worker, and the owner's k, for each weight."""
    table = torch.tensor([*outcomes, *(owned_ranks.get(i, 0) for i in range(count))], dtype=torch.int64)
    table = table.to(comm.device)
    comm.all_reduce(table, op="max")
    numbers = table.tolist()
    return [_Outcome(number) for number in numbers[:count]], numbers[count:]


def _exchange(
    comm: Communicator,
    matrices: Mapping[int, Tensor],
    factors: Mapping[int, Factors],
    k: Sequence[int],
    owners: Sequence[int],
    shared: bool,
) -> dict[int, Factors]:
    """The factors of `matrices`, with those that workers do not hold alike taken from their owners."""
    wanted = list(matrices)
    if shared:
        unlike = wanted
    else:
        digests = [fingerprint(checksum(factors[i].A), checksum(factors[i].B)) for i in wanted]
        unlike = [wanted[place] for place in disagreeing(comm, digests)]
    final = {i: factors[i] for i in wanted if i not in unlike}
    tensors: list[Tensor] = []
    for i in unlike:
        if comm.rank == owners[i]:
            final[i] = factors[i]
        else:
            m, n = matrices[i].shape
            final[i] = Factors(matrices[i].new_empty(m, k[i]), matrices[i].new_empty(k[i], n))
        tensors += final[i]
    if tensors:
        share(comm, tensors, [owners[i] for i in unlike for _ in Factors._fields])
    return final
