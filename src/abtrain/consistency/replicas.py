"""Checks that replicas hold the same weights: after every phase, and inside groups before every merge.

Workers that average gradients apply equal changes to weights that they assume to be equal; without a check, nobody
would notice that one of them has drifted. Differences that processors cause by rounding are removed.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from abtrain.comm.checksums import checksum, fingerprint, layouts_of
from abtrain.comm.communicator import Communicator, Scope
from abtrain.consistency.agreement import differences, disagreeing, gather_json
from abtrain.errors import RanksDisagreeError

log = logging.getLogger("abtrain")

# The largest difference that counts as rounding, relative to the largest number of the tensor; for dtypes that round
# more coarsely, in units of the last place.
_ROUNDING, _ULPS = 1e-5, 4


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
        tensors: by name, of the same shapes on all ranks. If they differ only by rounding, all take those of the
            scope's first rank, in place.
        scope: the ranks that must hold the same.
        where: for messages, such as `step 120, phase warmup`.
        buffers: by name; only their names, shapes and dtypes are compared. For the scope `world` alone.

    Raises:
        RanksDisagreeError: a rank has drifted; on all ranks of the scope, with the rank.
    """
    ranks = comm.ranks(scope)
    if len(ranks) == 1:
        return
    sums = [checksum(tensor) for tensor in tensors.values()]
    layouts = layouts_of(buffers or {})
    mine = fingerprint(*sums, *layouts.items())
    if not disagreeing(comm, [mine], scope):
        return
    if layouts and (different := differences(gather_json(comm, layouts))):
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


def _equalize(comm: Communicator, name: str, tensor: Tensor, scope: Scope, what: str) -> float:
    """Takes the first rank's tensor if ranks differ only by rounding; returns the relative difference."""
    held = comm.all_gather(tensor.detach().contiguous().to(comm.device), scope)
    wide = held.double().view(len(held), -1)
    distance, size = (wide - wide[0]).abs().max().item(), wide.abs().max().item()
    # 0 and -0 have distance 0, whatever `size` is. Rounding does not cause NaN or infinity.
    if not math.isfinite(distance) or distance > max(_ROUNDING, _ULPS * torch.finfo(tensor.dtype).eps) * size:
        raise RanksDisagreeError(
            f"{what}, where all must be equal, {name} differs by up to {distance:.1e}. Resume from the last "
            "checkpoint, and find the cause that changes weights on one worker alone (a hook, its memory, its "
            "optimizer, its learning rate)"
        )
    tensor.copy_(held[0])
    return distance / max(size, torch.finfo(torch.float64).tiny)


def _odd(digests: Sequence[int], ranks: Sequence[int]) -> str:
    """Says which ranks have drifted: those that differ from the majority or, without one, from the first rank."""
    common, count = Counter(digests).most_common(1)[0]
    kept = common if 2 * count > len(digests) else digests[0]
    odd = [rank for rank, value in zip(ranks, digests, strict=True) if value != kept]
    rest = [rank for rank in ranks if rank not in odd]
    return f"rank {', '.join(map(str, odd))} holds other weights than rank {', '.join(map(str, rest))}"
