"""Measures how fast the links between groups add up tensors."""

from __future__ import annotations

import statistics
import time

import torch

from abtrain.comm.buckets import MIB
from abtrain.comm.communicator import Communicator

_LONG_ENOUGH = 0.2
"""The seconds after which a measurement is not repeated with a larger tensor."""
_SMALLEST, _LARGEST = 64 * 1024, 4 * MIB
_TURNS = 5


def reduce_seconds(comm: Communicator, most: int) -> tuple[float, float]:
    """Returns the seconds of an all-reduce over counterparts: for each byte of a large tensor, and of a small one.

    Collective over the world. All places of a group send at the same time, as in a merge. Of tensors of twice the size
    each, the first that takes long enough counts, so that a slow link carries little. Both results are 0 if there is
    only one group. Workers measure different seconds.

    Args:
        comm: the connection to the other workers.
        most: the largest number of bytes of a tensor, such as those of the model; at least 64 KiB are sent.
    """
    if comm.topology.n_groups == 1:
        return 0.0, 0.0
    latency = statistics.median(_timed(comm, 8) for _ in range(_TURNS))
    size, largest = _SMALLEST, min(_LARGEST, most)
    while True:
        seconds = _timed(comm, size)
        # All workers must agree whether to go on.
        longest = torch.tensor([seconds], dtype=torch.float64, device=comm.device)
        comm.all_reduce(longest, "max")
        if longest.item() >= _LONG_ENOUGH or 2 * size > largest:
            return max(seconds - latency, 0.0) / size, latency
        size *= 2


def _timed(comm: Communicator, nbytes: int) -> float:
    """Returns the seconds of an all-reduce of a tensor of this size that all workers begin together."""
    tensor = torch.zeros(max(nbytes // 4, 1), device=comm.device)
    comm.barrier()
    started = time.perf_counter()
    comm.all_reduce(tensor, scope="counterparts")
    synchronize(comm.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all its work, so that a time that is read now includes it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
