"""Which buffers take part in a merge.

A buffer that all workers hold the same stays as it is, to the bit, whatever it holds: constants, masks of -inf, equal
counters. An average would round it, or be refused for its infinities. Other buffers, such as running statistics, differ
at every merge. So workers remember which buffers differed, and prove with one number in the roll call that nothing else
does. Only where that fails, they compare buffer by buffer.

Of the buffers that differ, running statistics are averaged. All others follow one worker, as under DDP: the mean of two
masks, of two codebooks, or of two unit vectors is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abtrain.comm.checksums import checksum, fingerprint
from abtrain.comm.communicator import Communicator
from abtrain.comm.traffic import Calls, Traffic

_COMPARE = 0
"""Told in the place of a fingerprint: a buffer that differed before is not finite here."""


_STATISTICS = ("running_mean", "running_var")
"""How norms of PyTorch, and others in their manner, call what they average over batches."""

_DIRECTIONS = ("weight_u", "weight_v", "_u", "_v")
"""How both forms of PyTorch's spectral norm call their singular vectors."""


def averaged_buffers(names: Iterable[str], further: Sequence[str] = ()) -> list[str]:
    """Returns the names of the buffers that are averaged if they differ.

    Args:
        names: of buffers.
        further: globs of names that are averaged too.
    """
    return [
        name
        for name in names
        if name.rpartition(".")[2] in _STATISTICS or any(fnmatchcase(name, pattern) for pattern in further)
    ]


def settled(name: str, mean: Tensor) -> Tensor:
    """Returns the value that a buffer takes from its mean over workers: spectral norm's vectors keep length 1."""
    if name.rpartition(".")[2] not in _DIRECTIONS:
        return mean
    return torch.nn.functional.normalize(mean, dim=0, eps=torch.finfo(mean.dtype).tiny)


class Compared(NamedTuple):
    """How the buffers of workers compare.

    Attributes:
        differing: names of those that workers hold differently.
        broken: of these, by name, the ranks on which they are not finite.
    """

    differing: list[str]
    broken: dict[str, list[int]]


class Buffers:
    """Compares the buffers of workers, merge by merge.

    Args:
        comm: of this worker.

    Attributes:
        differed: by name, the checksum of what the last merge left in each buffer that differed then; the same on all
            workers.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.differed: dict[str, int] = {}

    def told(self, buffers: Mapping[str, Tensor], sums: Mapping[str, int]) -> int:
        """Returns this worker's number for the roll call: 62 bits, equal on all workers if no other buffer differs.

        Args:
            buffers: by name.
            sums: their checksums.
        """
        still = self._still(sums)
        changed = [buffers[name] for name in sums if name in self.differed and name not in still]
        if not all(map(is_finite, changed)):
            return _COMPARE
        return fingerprint(*((name, total) for name, total in sums.items() if name not in self.differed), *still)

    def compare(self, buffers: Mapping[str, Tensor], sums: Mapping[str, int], told: Sequence[int]) -> Compared:
        """Finds the buffers that workers hold differently. Collective where the roll call did not tell.

        Args:
            buffers: by name, the same names on all workers.
            sums: their checksums.
            told: by all workers.
        """
        if not buffers:
            return Compared([], {})
        if len(set(told)) == 1 and told[0] != _COMPARE:
            still = self._still(sums)
            return Compared([name for name in sums if name in self.differed and name not in still], {})
        # One number a buffer: its checksum, and in the lowest bit whether it holds anything that is not finite.
        row = [2 * sums[name] + (not is_finite(buffer)) for name, buffer in buffers.items()]
        rows = self._comm.all_gather(torch.tensor(row, dtype=torch.int64, device=self._comm.device)).tolist()
        columns = dict(zip(buffers, zip(*rows, strict=True), strict=True))
        differing = [name for name, column in columns.items() if len(set(column)) > 1]
        broken = {name: [rank for rank, value in enumerate(columns[name]) if value % 2] for name in differing}
        self.differed = dict.fromkeys(differing, -1)
        return Compared(differing, {name: ranks for name, ranks in broken.items() if ranks})

    def merged(self, outcome: Mapping[str, Tensor]) -> None:
        """A merge has left these values, by name, in the buffers that differed."""
        self.differed |= {name: checksum(tensor) for name, tensor in outcome.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs; JSON can hold it."""
        return dict(self.differed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`."""
        self.differed = {str(name): int(total) for name, total in state.items()}

    def _still(self, sums: Mapping[str, int]) -> list[str]:
        """The buffers that differed before, and that nobody has changed here since they were merged."""
        return [name for name, total in sums.items() if self.differed.get(name) == total]


def sent_by_first_comparison(buffers: Sequence[Tensor]) -> Calls:
    """The call of the first `Buffers.compare` of a run, if some of the buffers differ between workers."""
    return (Traffic("all_gather", "world", len(buffers) * torch.int64.itemsize),)


def is_finite(tensor: Tensor) -> bool:
    # PyTorch cannot ask numbers of eight bits.
    wide = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    return bool(torch.isfinite(wide).all())
