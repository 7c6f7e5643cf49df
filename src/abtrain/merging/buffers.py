"""Handles buffers in a merge: each keeps its value, is averaged, or takes one worker's value.

A buffer that is equal on all workers keeps its bits: constants, masks of -inf, equal counters. An average would round
it, or fail on its infinities. Running statistics differ at every merge. So workers remember which buffers differed, and
prove with one number in the roll call that no other buffer does. Only if that fails do they compare buffer by buffer.

Of the buffers that differ, running statistics are averaged. All others follow one worker, as in DDP: the mean of two
masks is not a mask, nor that of two unit vectors a unit vector.
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
"""The report of a worker that asks for a comparison, because a buffer that has differed is not finite."""

_STATISTICS = ("running_mean", "running_var")
"""Names of running statistics in PyTorch's norms, and in others that imitate them."""

_DIRECTIONS = ("weight_u", "weight_v", "_u", "_v")
"""Names of singular vectors in both forms of PyTorch's spectral norm."""


def averaged_buffers(names: Iterable[str], further: Sequence[str] = ()) -> list[str]:
    """Returns the names of the buffers that are averaged if they differ; `further` has glob patterns of names."""
    return [name for name in names if name.rpartition(".")[2] in _STATISTICS or matching(name, further) is not None]


def settled(name: str, mean: Tensor) -> Tensor:
    """Returns the new value of a buffer, given its mean over workers: spectral norm's vectors get length 1."""
    if name.rpartition(".")[2] not in _DIRECTIONS:
        return mean
    return torch.nn.functional.normalize(mean, dim=0, eps=torch.finfo(mean.dtype).tiny)


def pooled_buffers(held: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the first worker's buffers, by name, with running statistics that differ averaged over the workers."""
    return {name: _pooled(name, [buffers[name] for buffers in held]) for name in held[0]}


def _pooled(name: str, buffers: Sequence[Tensor]) -> Tensor:
    first = buffers[0]
    if not averaged_buffers([name]) or all(checksum(buffer) == checksum(first) for buffer in buffers):
        return first
    return torch.stack(list(buffers)).mean(0)


class Buffers:
    """Compares the buffers of workers, merge by merge.

    Attributes:
        differed: by name, for each buffer that differed at the last merge, its checksum after the merge; the same on
            all workers.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.differed: dict[str, int] = {}

    def report(self, buffers: Mapping[str, Tensor], sums: Mapping[str, int]) -> int:
        """Returns a number for the roll call. If it is equal on all workers, no buffers differ but those in `differed`.

        The arguments are those of `compare`.
        """
        still = self._still(sums)
        changed = [buffers[name] for name in sums if name in self.differed and name not in still]
        if not all(map(is_finite, changed)):
            return _COMPARE
        return fingerprint(*((name, total) for name, total in sums.items() if name not in self.differed), *still)

    def compare(
        self, buffers: Mapping[str, Tensor], sums: Mapping[str, int], reports: Sequence[int]
    ) -> dict[str, list[int]]:
        """Finds the buffers that differ between workers. Collective only if the reports differ or ask for it.

        Args:
            buffers: the buffers by name; the names are the same on all workers.
            sums: the checksums of the buffers.
            reports: the `report` of each worker.

        Returns:
            The buffers that differ, by name, with the ranks on which each is not finite.
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
        """Remembers the checksums of the values, by name, that a merge writes to buffers that differed."""
        self.differed |= {name: checksum(tensor) for name, tensor in outcome.items()}

    def _still(self, sums: Mapping[str, int]) -> list[str]:
        """Returns the buffers that differed before, and that this worker has not changed since the last merge."""
        return [name for name, total in sums.items() if self.differed.get(name) == total]


def sent_by_first_comparison(buffers: Sequence[Tensor]) -> Calls:
    """Returns the collective calls of a run's first `Buffers.compare`, if buffers differ between workers."""
    return (Traffic("all_gather", "world", len(buffers) * torch.int64.itemsize),)
