"""Makes buffers equal in a merge: each keeps its value, is averaged, or takes one worker's value.

A buffer that is equal on all workers, such as a constant or a mask of -inf, keeps its exact value. An average would
round it, or be rejected as infinite. Running statistics differ at every merge. So workers remember which buffers
differed, and compare one fingerprint of all others. If it differs, they compare buffers one by one.

If buffers differ, running statistics are averaged, and other buffers take one worker's values, as in DDP: the mean of
two masks is not a mask, and the mean of two unit vectors is not a unit vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from abtrain.comm.checksums import checksum, fingerprint
from abtrain.comm.communicator import Calls, Communicator, Traffic
from abtrain.lowrank.names import matching
from abtrain.merging.changes import is_finite

_COMPARE = 0
"""Reported by a worker that requires a comparison: a buffer that differed at the last merge is not finite now."""

_STATISTICS = ("running_mean", "running_var")
"""Names of running statistics in PyTorch's normalization layers, and in layers that use the same names."""

_DIRECTIONS = ("weight_u", "weight_v", "_u", "_v")
"""Names of singular vectors in PyTorch's two implementations of spectral norm."""


def averaged_buffers(names: Iterable[str], further: Sequence[str] = ()) -> list[str]:
    """Returns the buffers to average if they differ: running statistics, and names that match a glob in `further`."""
    return [name for name in names if name.rpartition(".")[2] in _STATISTICS or matching(name, further) is not None]


def settled(name: str, mean: Tensor) -> Tensor:
    """Returns the value of a buffer after averaging: its mean, scaled to length 1 for vectors of a spectral norm."""
    if name.rpartition(".")[2] not in _DIRECTIONS:
        return mean
    return torch.nn.functional.normalize(mean, dim=0, eps=torch.finfo(mean.dtype).tiny)


def pooled_buffers(held: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the first worker's buffers by name, but the workers' average of running statistics that differ."""
    return {name: _pooled(name, [buffers[name] for buffers in held]) for name in held[0]}


def _pooled(name: str, buffers: Sequence[Tensor]) -> Tensor:
    first = buffers[0]
    if not averaged_buffers([name]) or all(checksum(buffer) == checksum(first) for buffer in buffers):
        return first
    return torch.stack(list(buffers)).mean(0)


class Buffers:
    """Finds at each merge which buffers differ between workers.

    Attributes:
        differed: by name, the checksum of each buffer that differed at the last merge, computed after that merge; the
            same on all workers.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.differed: dict[str, int] = {}

    def report(self, buffers: Mapping[str, Tensor], sums: Mapping[str, int]) -> int:
        """Returns a fingerprint to send before a merge, or 0 to request a comparison of all buffers.

        If all workers return the same fingerprint, only buffers in `differed` can differ. Arguments: see `compare`.
        """
        still = self._still(sums)
        changed = [buffers[name] for name in sums if name in self.differed and name not in still]
        if not all(map(is_finite, changed)):
            return _COMPARE
        return fingerprint(*((name, total) for name, total in sums.items() if name not in self.differed), *still)

    def compare(
        self, buffers: Mapping[str, Tensor], sums: Mapping[str, int], reports: Sequence[int]
    ) -> dict[str, list[int]]:
        """Finds the buffers that differ between workers. Collective over the world if reports differ or one is 0.

        Args:
            buffers: the buffers by name; the names are the same on all workers.
            sums: the checksums of the buffers.
            reports: each worker's result of `report`, in rank order.

        Returns:
            The names of the buffers that differ, each with the ranks on which the buffer is not finite.
        """
        if not buffers:
            return {}
        if len(set(reports)) == 1 and reports[0] != _COMPARE:
            still = self._still(sums)
            return {name: [] for name in sums if name in self.differed and name not in still}
        # One number for each buffer: its checksum, and in the lowest bit whether it is not finite.
        row = [2 * sums[name] + (not is_finite(buffer)) for name, buffer in buffers.items()]
        rows = self._comm.all_gather(torch.tensor(row, dtype=torch.int64, device=self._comm.device)).tolist()
        columns = dict(zip(buffers, zip(*rows, strict=True), strict=True))
        differing = {name: column for name, column in columns.items() if len(set(column)) > 1}
        self.differed = dict.fromkeys(differing, -1)
        return {name: [rank for rank, value in enumerate(column) if value % 2] for name, column in differing.items()}

    def merged(self, outcome: Mapping[str, Tensor]) -> None:
        """Records in `differed` the checksums of the values that a merge writes to buffers, by name."""
        self.differed |= {name: checksum(tensor) for name, tensor in outcome.items()}

    def _still(self, sums: Mapping[str, int]) -> list[str]:
        """Returns the buffers that differed at the last merge and that this worker has not changed since."""
        return [name for name, total in sums.items() if self.differed.get(name) == total]


def sent_by_first_comparison(buffers: Sequence[Tensor]) -> Calls:
    """Returns the collective calls that a run's first `Buffers.compare` makes if buffers differ between workers."""
    return (Traffic("all_gather", "world", len(buffers) * torch.int64.itemsize),)
