"""Predicts the memory that the merges of a phase need from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from abtrain.comm.topology import Topology
from abtrain.merging.batch_merge import MergeMemory, used_by_merge
from abtrain.merging.batches import cut_into_batches
from abtrain.merging.places import used_by_spread
from abtrain.merging.selection import cut_into_fragments
from abtrain.merging.wires.wire import make_wire
from abtrain.recipes.sync import WeightSync
from abtrain.shards import cut


class MergesMemory(NamedTuple):
    """The bytes that the merges of a phase need on one worker, besides its `OuterState`.

    Attributes:
        hidden: what hidden merges hold during training steps: the values that they began with, and what they send.
        most: the largest number of bytes of temporary tensors while `ab.step()` merges, those in `hidden` included.
    """

    hidden: int
    most: int


def used_by_merges(
    sync: WeightSync,
    tensors: Mapping[str, Tensor],
    trained_by: Mapping[str, Sequence[bool]],
    buffers: Sequence[Tensor],
    topology: Topology,
    rank: int = 0,
) -> MergesMemory:
    """Returns the memory for the merges of a phase.

    Args:
        sync: the settings of the merges.
        tensors: all tensors that merge in the phase, by name.
        trained_by: by tensor name, whether each worker trained the tensor. If a name is missing, all workers did.
        buffers: the buffers that workers share.
        topology: the workers and their groups.
        rank: the rank of the worker.
    """
    wire, groups = make_wire(sync.wire, topology.n_groups), topology.n_groups
    place, count = topology.place_of(rank), topology.group_size

    def used(part: Mapping[str, Tensor], hidden: bool) -> MergeMemory:
        pieces = cut(part, place, count)
        kinds = {name: tuple(trained_by.get(name, ())) for name in pieces}
        return used_by_merge(wire, cut_into_batches(pieces, kinds, whole=not wire.elementwise), groups, hidden)

    spread = used_by_spread(list(tensors.values()), topology)
    most = max(used(tensors, hidden=False).most, spread)
    if not sync.delay:
        return MergesMemory(0, most)
    parts = cut_into_fragments(tensors, sync.fragments)
    each = [used(part, hidden=True) for part in parts]
    started = [sum(piece.nbytes for piece in cut(part, place, count).values()) for part in parts]
    started[-1] += sum(buffer.nbytes for buffer in buffers)
    # A merge that takes longer than the time until the next one overlaps with it.
    at_once = min(-(-sync.delay * sync.fragments // sync.every), sync.fragments)
    waiting = [start + one.waiting for start, one in zip(started, each, strict=True)]
    hidden = max(sum(waiting[i - place] for place in range(at_once)) for i in range(len(waiting)))
    ending = max(one.most - one.waiting for one in each)
    return MergesMemory(hidden, max(hidden + max(ending, spread), most))
