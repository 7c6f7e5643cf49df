"""The contract of a wire: an average over all workers, and what it sends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Stages
from abtrain.comm.traffic import Calls

Tensors = dict[str, Tensor]


class Averages(NamedTuple):
    """The outcome of one merge on the wire.

    Attributes:
        mean: by name, the average over all workers: the same bits on all of them.
        error: by name, what the wire took from this worker's own numbers; the average of it over all workers is what
            `mean` lacks. Empty where the wire is exact.
    """

    mean: Tensors
    error: Tensors


class Wire(ABC):
    """A way to average over all workers. `abtrain.recipes.wires` has the names of wires.

    Attributes:
        starts: by name, in float32, what a wire keeps of a tensor from merge to merge; the same on all workers.
    """

    def __init__(self) -> None:
        self.starts: Tensors = {}

    @abstractmethod
    def average(self, numbers: Mapping[str, Tensor], comm: Communicator) -> Stages[Averages]:
        """The average over all workers, in stages. Collective over the world.

        Args:
            numbers: finite tensors by name, with the same names, shapes and dtypes in the same order on all workers.
            comm: of this worker.

        Returns:
            New tensors of the same shapes and dtypes; errors in float32.
        """

    @abstractmethod
    def sends(self, tensors: Sequence[Tensor], workers: int) -> tuple[Calls, ...]:
        """The calls of one average, stage by stage, by one of two or more workers.

        Args:
            tensors: by their shapes and dtypes.
            workers: how many average.
        """

    @property
    def stages(self) -> int:
        """How often `average` yields, at most."""
        return len(self.sends((), workers=2))

    def keeps(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The shapes of the `starts` that merges of these tensors leave, by name."""
        return {}

    def forget(self, names: Iterable[str]) -> None:
        """Drops what is kept of these tensors: their shape or their basis changes."""
        for name in names:
            self.starts.pop(name, None)
