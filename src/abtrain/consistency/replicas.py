"""Proof that workers that ought to hold the same weights do: after every phase, and inside groups before every merge.

Workers that share gradients apply the same changes to what they believe to be the same weights; nothing else would tell
that one of them has drifted away. On unlike processors the last bits may part by themselves: these are levelled.
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
from abtrain.comm.traffic import Calls, Traffic
from abtrain.consistency.agreement import ABSENT, gather_json, values_by_rank
from abtrain.errors import RanksDisagreeError

log = logging.getLogger("abtrain")

_ROUNDING = 1e-5
"""Of the largest number of a tensor: what comes of rounding on unlike processors stays below."""
_MOST_TOLD = 5
_ULPS = 4
"""Of a dtype whose own rounding is coarser."""


def check_replicas(
    comm: Communicator,
    tensors: Mapping[str, Tensor],
    scope: Scope,
    where: str,
    buffers: Mapping[str, Tensor] | None = None,
) -> None:
    """Compares what the ranks of a scope hold. Collective over it; 16 bytes, until something differs.

    Args:
        comm: of this worker.
        tensors: by name, the same names and shapes on all ranks; where they differ by rounding alone, they become
            those of the scope's first rank, in place.
        scope: whose ranks ought to hold the same.
        where: for the message, such as `step 120, phase warmup`.
        buffers: by name, of which ranks ought to have the same, in the same shapes; for the scope `world` alone.

    Raises:
        RanksDisagreeError: a rank has drifted, with its number; on all ranks of the scope.
    """
    ranks = comm.ranks(scope)
    if len(ranks) == 1:
        return
    sums = [checksum(tensor) for tensor in tensors.values()]
    layouts = layouts_of(buffers or {})
    mine = fingerprint(*sums, *layouts.items())
    ends = torch.tensor([mine, -mine], dtype=torch.int64, device=comm.device)
    comm.all_reduce(ends, "max", scope)
    if int(ends.sum()):
        if layouts:
            _check_layouts(comm, layouts, where)
        _level(comm, tensors, [mine, *sums], scope, where)


def sent_by_check_replicas(scope: Scope) -> Calls:
    """The call of `check_replicas` where nothing differs, over a scope of several ranks."""
    return (Traffic("all_reduce", scope, 2 * torch.int64.itemsize),)


def _check_layouts(comm: Communicator, layouts: Mapping[str, str], where: str) -> None:
    """Makes sure that all workers have the same buffers, in the same shapes. Collective over the world.

    Raises:
        RanksDisagreeError: they do not; with the names of those that differ.
    """
    everyone = gather_json(comm, layouts)
    columns = {
        name: [held.get(name, ABSENT) for held in everyone]
        for name in dict.fromkeys(key for held in everyone for key in held)
    }
    unlike = [values_by_rank(name, column) for name, column in columns.items() if len(set(column)) > 1]
    if unlike:
        raise RanksDisagreeError(
            f"{where}: workers hold buffers of unlike shapes: {'; '.join(unlike[:_MOST_TOLD])}. Change buffers on all "
            "workers, at the same step"
        )


def _level(comm: Communicator, tensors: Mapping[str, Tensor], sums: Sequence[int], scope: Scope, where: str) -> None:
    """Takes the first rank's tensors where others differ by rounding.

    Raises:
        RanksDisagreeError: they differ by more.
    """
    ranks = comm.ranks(scope)
    rows = comm.all_gather(torch.tensor(sums, dtype=torch.int64, device=comm.device), scope).tolist()
    largest = 0.0
    for place, (name, tensor) in enumerate(tensors.items(), start=1):
        if len({row[place] for row in rows}) == 1:
            continue
        held = comm.all_gather(tensor.detach().contiguous().to(comm.device), scope)
        wide = held.double().view(len(ranks), -1)
        distance, size = (wide - wide[0]).abs().max().item(), wide.abs().max().item()
        # Zeros of unlike signs are no distance apart, whatever their size. NaN and infinity are no rounding.
        if not math.isfinite(distance) or distance > max(_ROUNDING, _ULPS * torch.finfo(tensor.dtype).eps) * size:
            raise RanksDisagreeError(
                f"{_odd([row[0] for row in rows], ranks)}: {where}, where all ought to be equal, {name} is up to "
                f"{distance:.1e} apart. What was not shared is lost: go on from the last checkpoint, and look for what "
                "changes weights on one worker alone (a hook, its memory, its optimizer, a learning rate of its own)"
            )
        apart = distance / max(size, torch.finfo(torch.float64).tiny)
        largest = max(largest, apart)
        tensor.copy_(held[0])
    if comm.rank == ranks[0]:
        log.info(
            "%s: weights differed between workers by rounding (%.1e): rank %d's were taken", where, largest, ranks[0]
        )


def _odd(digests: Sequence[int], ranks: Sequence[int]) -> str:
    """Who has drifted: the few against the many; of two, nobody can tell."""
    common, count = Counter(digests).most_common(1)[0]
    kept = common if 2 * count > len(digests) else digests[0]
    odd = [rank for rank, value in zip(ranks, digests, strict=True) if value != kept]
    rest = [rank for rank in ranks if rank not in odd]
    return f"rank {', '.join(map(str, odd))} holds other weights than rank {', '.join(map(str, rest))}"
