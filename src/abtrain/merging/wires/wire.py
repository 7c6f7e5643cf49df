"""Defines the interface of wires, which average tensors and predict the bytes that they send.

A wire averages over the counterparts of a worker: the workers with the same place in all groups. If a group is one
worker, these are all workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import NamedTuple

from torch import Tensor

from abtrain.comm.communicator import Calls, Communicator
from abtrain.comm.stages import Stages
from abtrain.merging.wires.flat import FlatAverage, Numbers, WholeAverage
from abtrain.recipes.wires import parse_wire, wire_between

Tensors = dict[str, Tensor]


class Averages(NamedTuple):
    """The averages that a wire computes in one merge, and their rounding errors.

    Attributes:
        mean: by name, the average over all counterparts, bitwise equal on all of them.
        error: by name, the rounding error of this worker's own numbers. Its average over all counterparts is the
            difference between the exact average and `mean`. Empty if the wire is exact.
    """

    mean: Tensors
    error: Tensors


class Wire(ABC):
    """Averages tensors, which are sent in one format. `abtrain.recipes.wires` names the formats.

    Attributes:
        elementwise: whether the wire treats all numbers alike, so that tensors may be cut and joined before.
        lossy: whether averages of two or more workers have rounding errors, which callers keep for the next merge.
    """

    elementwise = False
    lossy = False

    @abstractmethod
    def average(self, numbers: Mapping[str, Tensor], comm: Communicator) -> Stages[Averages]:
        """Averages tensors over all counterparts, in stages. Collective over them.

        Tensors are finite, with the same names, shapes and dtypes in the same order on all of them. Returns averages as
        new tensors of the same shapes and dtypes, and errors in float32.
        """

    def average_flat(self, numbers: Numbers, comm: Communicator) -> Stages[FlatAverage]:
        """Averages flat numbers over all counterparts, in stages, if the wire is `elementwise`."""
        means, errors = yield from self.average({"": numbers.whole()}, comm)
        return WholeAverage(means[""], errors.get(""))

    @abstractmethod
    def sends(self, tensors: Sequence[Tensor], workers: int) -> tuple[Calls, ...]:
        """Returns the collective calls that each of two or more workers makes for one average, stage by stage.

        Only shapes and dtypes of the tensors matter.
        """

    def holds(self, tensors: Sequence[Tensor], workers: int) -> int:
        """Returns the bytes that `average` of two or more workers holds between its stages, given tensors included.

        By default, these are the tensors and a copy. Only shapes and dtypes of the tensors matter.
        """
        return 2 * sum(tensor.nbytes for tensor in tensors)

    def stages(self, workers: int) -> int:
        """Returns the largest number of times that `average` yields."""
        return len(self.sends((), max(workers, 2)))


def make_wire(name: str, workers: int) -> Wire:
    """Returns a new `Wire` for a wire format (see `parse_wire`). The format `auto` depends on the number of workers.

    Raises:
        ConfigurationError: no wire format has this name.
    """
    form, values = parse_wire(wire_between(workers, name))
    wire: Wire = resolve_name(form.wire)(**values)
    return wire
