"""Checks that replicas hold the same weights: after every phase, and inside groups before every merge.

Workers that share gradients apply equal changes to weights that they assume to be equal; nothing else would show that
one of them has drifted. Different processors may round differently: such differences are removed.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from abtrain.comm.checksums import checksum, fingerprint
from abtrain.comm.communicator import Communicator, Scope
from abtrain.comm.layouts import layouts_of
from abtrain.comm.traffic import Calls
from abtrain.consistency.agreement import differences, disagreeing, gather_json, sent_by_comparison
from abtrain.errors import RanksDisagreeError

log = logging.getLogger("abtrain")

_ROUNDING = 1e-5
"""The largest difference that rounding can cause, relative to the largest number of the tensor."""
_ULPS = 4
"""The same in units of the last place, for dtypes that round more coarsely."""


def check_replicas(
    comm: Communicator,
    tensors: Mapping[str, Tensor],
    scope: Scope,
    where: str,
    buffers: Mapping[str, Tensor] | None = None,
) -> None:
    """Compares the tensors of the ranks of a scope. Collective over it; 16 bytes, until something differs.

    Args:
        comm: the communicator.
        tensors: by name, the same names and shapes on all ranks. Where they differ by rounding alone, they become
            those of the scope's first rank, in place.
        scope: the ranks that have to hold the same.
        where: for the message, such as `step 120, phase warmup`.
        buffers: by name; only their names, shapes and dtypes are compared, and only over the scope `world`.

    Raises:
        RanksDisagreeError: a rank has drifted, with its number; on all ranks of the scope.
    """
    ranks = comm.ranks(scope)
    if len(ranks) == 1:
        return
    sums = [checksum(tensor) for tensor in tensors.values()]
    layouts = layouts_of(buffers or {})
    mine = fingerprint(*sums, *layouts.items())
    if not disagreeing(comm, [mine], scope):
        return
    different = differences(gather_json(comm, layouts)) if layouts else ""
    if different:
        raise RanksDisagreeError(
            f"{where}: workers hold buffers of different shapes: {different}. Change buffers on all workers at the "
            "same step"
        )
    rows = comm.all_gather(torch.tensor([mine, *sums], dtype=torch.int64, device=comm.device), scope).tolist()
    digests, *columns = zip(*rows, strict=True)
    relative = 0.0
    for (name, tensor), column in zip(tensors.items(), columns, strict=True):
        if len(set(column)) > 1:
            relative = max(relative, _equalize(comm, name, tensor, scope, f"{_odd(digests, ranks)}: {where}"))
    if comm.rank == ranks[0]:
        log.info("%s: weights differed by rounding (%.1e): all workers take rank %d's", where, relative, ranks[0])


def sent_by_check_replicas(scope: Scope) -> Calls:
    """The call of `check_replicas` while nothing differs, over a scope of several ranks."""
    return sent_by_comparison(1, scope)


def _equalize(comm: Communicator, name: str, tensor: Tensor, scope: Scope, what: str) -> float:
    """Overwrites a tensor with the first rank's if ranks differ by rounding; returns the relative difference.

    Raises:
        RanksDisagreeError: they differ by more.
    """
    held = comm.all_gather(tensor.detach().contiguous().to(comm.device), scope)
    wide = held.double().view(len(held), -1)
    distance, size = (wide - wide[0]).abs().max().item(), wide.abs().max().item()
    # A zero and its negative are no distance apart, whatever `size` is. NaN and infinity do not come of rounding.
    if not math.isfinite(distance) or distance > max(_ROUNDING, _ULPS * torch.finfo(tensor.dtype).eps) * size:
        raise RanksDisagreeError(
            f"{what}, where all must be equal, {name} differs by up to {distance:.1e}. Resume from the last "
            "checkpoint, and look for what changes weights on one worker alone (a hook, its memory, its optimizer, its "
            "learning rate)"
        )
    tensor.copy_(held[0])
    return distance / max(size, torch.finfo(torch.float64).tiny)


def _odd(digests: Sequence[int], ranks: Sequence[int]) -> str:
    """Says which ranks have drifted: the minority. Between two, nobody can tell: the first rank counts as right."""
    common, count = Counter(digests).most_common(1)[0]
    kept = common if 2 * count > len(digests) else digests[0]
    odd = [rank for rank, value in zip(ranks, digests, strict=True) if value != kept]
    rest = [rank for rank in ranks if rank not in odd]
    return f"rank {', '.join(map(str, odd))} holds other weights than rank {', '.join(map(str, rest))}"
