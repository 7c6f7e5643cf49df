"""Merges one batch of weights: from this worker's changes to the merged weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Stages, begun, in_step
from abtrain.memory import Recycler
from abtrain.merging.batches import Batch
from abtrain.merging.changes import is_finite
from abtrain.merging.divergence import Terms, local_terms
from abtrain.merging.held import Held
from abtrain.merging.merge_input import MergeInput
from abtrain.merging.outer_state import OuterState
from abtrain.merging.places import Places
from abtrain.merging.store import Store
from abtrain.merging.wires.flat import PART, FlatAverage, Numbers, Parts, WholeAverage
from abtrain.merging.wires.wire import Wire

IN_FLIGHT = 2
"""The number of batches that are merged at once: while one is sent, the next is encoded."""
_APPLIED = 3
"""The batches of memory that `BatchMerge.apply` needs at most besides averages: what the rule computes, and a sum."""
Check = Callable[[Sequence[str]], None]
"""Receives the names of tensors whose average is not finite, and raises an error if any worker has such a tensor."""


@dataclass
class BatchMerge:
    """Merges one batch.

    Attributes:
        started: the values to merge, by name.
        changes: the changes of the batch, if they are known already. They are overwritten.
        weight: the number by which this worker multiplies its changes before all changes are averaged.
        excluded: whether the merge excludes this worker, whose weight is then 0.
        sent_all: whether the wire has sent this worker's changes without rounding them.
        memory: creates tensors for one batch after the other.
        measuring: whether to compute `terms`, this worker's terms of the divergence by name.
    """

    state: OuterState
    comm: Communicator
    places: Places
    wire: Wire
    part: MergeInput
    batch: Batch
    started: Held | Store
    changes: Tensor | None
    weight: float
    excluded: bool
    measuring: bool
    memory: Recycler
    sent_all: bool = False
    terms: dict[str, Terms] = field(default_factory=dict)

    def average(self) -> Stages[FlatAverage]:
        """Averages the changes of all workers."""
        numbers = self._numbers()
        if self.wire.elementwise:
            return (yield from self.wire.average_flat(numbers, self.comm))
        # Only the wire refers to the changes, so that it can free them.
        means, errors = yield from self.wire.average(self._named(numbers.whole()), self.comm)
        return WholeAverage(self._flat(means), self._flat(errors) if errors else None)

    def _numbers(self) -> Numbers:
        """Returns the changes of this worker times its weight, plus residuals."""
        batch, changes, self.changes = self.batch, self.changes, None
        write = self.state.contribution(batch, self.started, changes, self.weight)
        at_once = self.part.started is None and self.wire.lossy and self.comm.topology.n_groups > 1
        error = self.state.errors_of(batch) if at_once else None
        return Numbers(batch.numel, batch.dtype, batch.device, write, error, self.memory)

    def apply(self, held: Held, average: FlatAverage) -> list[str]:
        """Writes the merged weights into this worker's pieces `held`.

        Adds what this worker has changed since a hidden merge began.

        Returns:
            The names of the batch's tensors whose average is not finite.
        """
        if self.measuring:
            average = average.whole()
            self._measure(average.mean)
        self.sent_all = average.error is None
        rule, continued = self.part.sync.merge, self.part.started is not None and not self.excluded
        before = self.state.stepped_alone(self.batch, self.started, rule) if continued else None
        broken: list[str] = []
        parts, memory = self._checked(average.parts(), broken), held.memory(self.batch) if before is None else None
        merged = self.state.advance(self.batch, rule, parts, average.error, memory)
        if average.taken is not None:
            self.memory.give(average.taken)
        if before is not None and merged is not None:
            merged = (held.flat(self.batch).to(self.batch.dtype) - before).add_(merged)
        if merged is not None:
            held.write(self.batch, merged)
        return list(dict.fromkeys(broken))

    def broken(self, average: FlatAverage) -> list[str]:
        """Returns the names of the batch's tensors whose average is not finite."""
        broken: list[str] = []
        for _ in self._checked(average.parts(), broken):
            pass
        return broken

    def _checked(self, parts: Parts, broken: list[str]) -> Parts:
        """Yields parts of an average. Adds the names of the tensors with values that are not finite to `broken`."""
        for place, part in parts:
            if not bool(part.sum().isfinite()):
                broken += [name for name, numbers in self._within(place, part) if not is_finite(numbers)]
            yield place, part

    def _within(self, place: slice, part: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors of which a part of the batch has numbers, by name, with these numbers."""
        start = 0
        for name, shape in zip(self.batch.names, self.batch.shapes, strict=True):
            stop = start + shape.numel()
            numbers = part[max(start - place.start, 0) : max(stop - place.start, 0)]
            if len(numbers):
                yield name, numbers
            start = stop

    def _measure(self, mean: Tensor) -> None:
        shapes = {name: tensor.shape for name, tensor in self.part.tensors().items()}
        changes = self.state.change(self.batch, self.started)
        stores = changes, mean, self.state.anchors_of(self.batch)
        moved, average, anchors = (self.places.joined(self._named(flat), shapes) for flat in stores)
        self.terms = local_terms(moved, average, anchors, self.part.factors)

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.batch.names, self.batch.views(flat), strict=True))

    def _flat(self, named: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([named[name].reshape(-1) for name in self.batch.names])


def average_at_once(works: Sequence[BatchMerge]) -> Stages[list[FlatAverage]]:
    """Averages all batches stage by stage. Changes no weight."""
    averages = yield from in_step([work.average() for work in works])
    return [average.whole() for average in averages]


def apply_at_once(works: Sequence[BatchMerge], averages: Sequence[FlatAverage], held: Held, check: Check) -> None:
    """Applies what `average_at_once` has returned for these batches to this worker's pieces `held`."""
    check([name for work, average in zip(works, averages, strict=True) for name in work.broken(average)])
    for work, average in zip(works, averages, strict=True):
        work.apply(held, average)


def merge_in_turn(works: Sequence[BatchMerge], held: Held, check: Check) -> None:
    """Averages one batch after the other, of which two are under way at a time, and applies them to pieces `held`."""
    broken: list[str] = []
    under_way: deque[tuple[BatchMerge, Callable[[], FlatAverage]]] = deque()
    waiting = deque(works)
    while waiting or under_way:
        while waiting and len(under_way) < IN_FLIGHT:
            work = waiting.popleft()
            under_way.append((work, begun(work.average())))
        work, finish = under_way.popleft()
        broken += work.apply(held, finish())
    check(broken)


class MergeMemory(NamedTuple):
    """The bytes of temporary tensors in a merge.

    Attributes:
        waiting: the bytes that a hidden merge holds during training steps; 0 if training waits for the merge.
        most: the largest number of bytes at any time.
    """

    waiting: int
    most: int


def used_by_merge(wire: Wire, batches: Sequence[Batch], workers: int, hidden: bool) -> MergeMemory:
    """Returns the memory for temporary tensors of a merge with this number of counterparts."""
    tensors = [[torch.empty(shape, dtype=batch.dtype, device="meta") for shape in batch.shapes] for batch in batches]
    sizes = [sum(tensor.nbytes for tensor in batch) for batch in tensors]
    waiting = [wire.holds(batch, workers) if workers > 1 else sum(one.nbytes for one in batch) for batch in tensors]
    if wire.elementwise and not hidden:
        # Rounding errors replace residuals, and all else is computed in parts.
        narrow = wire.lossy and workers > 1
        coded = [held - size if narrow else held for held, size in zip(waiting, sizes, strict=True)]
        changes = sum(sizes) if len(batches) <= IN_FLIGHT else 0
        # Three or more workers average a chunk each.
        chunks = workers if narrow and workers > 2 else 1
        part = min(max(sizes, default=0) // chunks, PART * torch.float32.itemsize)
        return MergeMemory(0, changes + IN_FLIGHT * max(coded, default=0) + (_APPLIED - 1) * part)
    outcomes = [size * (2 if wire.lossy and workers > 1 else 1) for size in sizes]
    applied = _APPLIED * max(sizes, default=0)
    if hidden:
        return MergeMemory(sum(waiting), max(sum(waiting), sum(outcomes) + max(sizes, default=0)) + applied)
    encoding = max((held + size for held, size in zip(waiting, sizes, strict=True)), default=0)
    under_way = (IN_FLIGHT - 1) * max(waiting, default=0)
    return MergeMemory(0, under_way + max(encoding, *outcomes, 0) + applied)
