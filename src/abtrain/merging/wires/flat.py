"""Defines flat averages, whose numbers are computed part by part when they are needed.

A batch of a merge does not fit into a CPU's cache, and a part does. So all that happens to a part before it is sent, or
after it has arrived, happens while it is in the cache, and needs no memory for the whole batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from abtrain.memory import Recycler, allocated

Parts = Iterator[tuple[slice, Tensor]]
"""Parts of a flat tensor in their order, each with its range. A part may overwrite the one before it."""
Write = Callable[[slice, Tensor], object]
"""Computes a range of a flat tensor into another tensor."""


@dataclass(frozen=True)
class Numbers:
    """Finite numbers to average, as one flat tensor that is computed part by part.

    Attributes:
        write: computes a range of the numbers into a tensor.
        error: float32 memory (count,) for the rounding errors; None if the wire creates it. While the average is under
            way, the memory already has other values. `write` may read a range of it before the range is overwritten.
        memory: creates the tensors that are not needed any more when the average has been applied.
    """

    count: int
    dtype: torch.dtype
    device: torch.device
    write: Write
    error: Tensor | None
    memory: Recycler

    def whole(self) -> Tensor:
        """Returns all numbers in a new tensor."""
        out = allocated(self.count, self.dtype, self.device)
        for part in parts_of(out):
            self.write(part, out[part])
        return out


class FlatAverage(ABC):
    """The average of flat numbers over all counterparts, bitwise equal on all of them.

    Attributes:
        error: the rounding errors of this worker's numbers (see `Averages`); None if the wire is exact.
        taken: the tensor that the numbers' `memory` gets back when the average has been applied; None if there is none.
    """

    error: Tensor | None = None
    taken: Tensor | None = None

    @abstractmethod
    def parts(self) -> Parts:
        """Yields the parts of the average. Called once."""

    @abstractmethod
    def whole(self) -> WholeAverage:
        """Returns the average as one tensor, in place of this one."""


class WholeAverage(FlatAverage):
    """An average that is one tensor."""

    def __init__(self, mean: Tensor, error: Tensor | None) -> None:
        self.mean, self.error = mean, error

    def parts(self) -> Parts:
        return ((part, self.mean[part]) for part in parts_of(self.mean))

    def whole(self) -> WholeAverage:
        return self


PART = 67_200
"""The number of elements that one thread of a CPU computes at once: six such tensors fit into a cache of 2 MB."""
_LAUNCHED = 2**21
"""The number of elements that another device computes at once, which take longer than launching kernels."""


def joined(parts: Parts, out: Tensor) -> Tensor:
    """Copies all parts into the flat tensor `out`, and returns it."""
    for place, part in parts:
        out[place] = part
    return out


def parts_of(flat: Tensor) -> list[slice]:
    """Returns ranges of a flat tensor that are computed one after the other."""
    size = PART * torch.get_num_threads() if flat.device.type == "cpu" else _LAUNCHED
    return [slice(start, start + size) for start in range(0, flat.numel(), size)]
