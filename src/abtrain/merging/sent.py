"""Predicts the collective calls of a merge from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from abtrain.comm.buckets import sent_by_average_over_world
from abtrain.comm.communicator import Calls
from abtrain.comm.topology import Topology
from abtrain.consistency.agreement import ROLL_CALL
from abtrain.merging.batches import cut_into_batches
from abtrain.merging.places import sent_by_gathered, sent_by_spread
from abtrain.merging.selection import weights_of
from abtrain.merging.wires.wire import make_wire
from abtrain.recipes.merges import MergeRule, Part
from abtrain.recipes.sync import WeightSync
from abtrain.shards import cut


def steps_alone(rule: MergeRule) -> bool:
    """Returns whether workers continue from other weights while a hidden merge is under way."""
    own = torch.zeros(())
    return rule.step(own, None)[0] is not own


def sent_by_merge(
    sync: WeightSync,
    tensors: Mapping[str, Tensor],
    trained_by: Mapping[str, Sequence[bool]],
    averaged: Sequence[Tensor],
    topology: Topology,
    rank: int = 0,
) -> tuple[Calls, ...]:
    """Returns the collective calls in each stage of a merge, if the same buffers differ as at the previous merge.

    `trained_by` has, by tensor name, whether each worker trained the tensor, and `averaged` the buffers to average.
    Only shapes and dtypes matter.
    """
    wire, workers = make_wire(sync.wire, topology.n_groups), topology.world_size
    pieces = cut(tensors, topology.place_of(rank), topology.group_size)
    equals = [Part(0, 0.0)] * workers
    _, others = weights_of(sync.merge, pieces, trained_by, [True] * workers, equals, topology, rank)

    @cache
    def sends(shapes: tuple[torch.Size, ...], dtype: torch.dtype) -> tuple[Calls, ...]:
        """Returns the calls for a batch. Most batches of a large model are alike."""
        return wire.sends([torch.empty(shape, dtype=dtype, device="meta") for shape in shapes], topology.n_groups)

    stages: list[Calls] = [ROLL_CALL]
    for batch in cut_into_batches(pieces, others, whole=not wire.elementwise) if topology.n_groups > 1 else ():
        # Joined by hand: `torch.cat` is slow on the meta device.
        joined = (torch.Size([sum(map(torch.Size.numel, batch.shapes))]),)
        for place, calls in enumerate(sends(joined if wire.elementwise else batch.shapes, batch.dtype), start=1):
            stages += [()] * (place + 1 - len(stages))
            stages[place] += calls
    stages += [()] * (2 - len(stages))
    stages[1] += sent_by_average_over_world(averaged, topology)
    stages[-1] += (*sent_by_gathered(topology), *sent_by_spread(list(tensors.values()), topology))
    return tuple(stages)
