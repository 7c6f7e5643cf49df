"""Divides the work of a merge in a group: each worker merges one piece of every tensor, its own rows.

All workers of a group hold equal tensors. The worker at place p of a group of g merges the p-th of g pieces with its
counterparts, the workers at place p of the other groups. Then the workers of a group exchange their merged pieces. The
bytes between groups, and the state that merges need, are therefore those of one worker for each group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from abtrain.comm.buckets import MIB
from abtrain.comm.communicator import Calls, Communicator, Traffic
from abtrain.comm.topology import Topology
from abtrain.merging.held import Held
from abtrain.shards import cut, piece

Tensors = dict[str, Tensor]
_CAPACITY = 25 * MIB
"""The largest number of bytes of whole tensors whose pieces are exchanged in one message."""


class Places:
    """Cuts tensors into the pieces of a group's workers, and puts pieces together again.

    A piece of a tensor is a range of its first dimension, with the same bounds as in PyTorch's FSDP: of m rows, each
    place gets ceil(m / g), the last places fewer or none. If a group is one worker, a piece is the whole tensor.

    If the model is `sharded`, the tensors that merge are this worker's shards. They are its pieces already.
    """

    def __init__(self, comm: Communicator, sharded: bool = False) -> None:
        self._comm, self._sharded = comm, sharded
        self.count, self.own = comm.topology.group_size, comm.topology.place_of(comm.rank)

    def held(self, tensors: Mapping[str, Tensor]) -> Held:
        """Returns this worker's piece of each tensor, as a view of it: the same object for the same `Held`."""
        whole = tensors if isinstance(tensors, Held) else Held(tensors)
        return whole if self._sharded else whole.piece(self.own, self.count)

    def pieces(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Returns this worker's piece of each tensor, as a view of it."""
        return dict(tensors) if self._sharded else cut(tensors, self.own, self.count)

    def joined(self, pieces: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Tensors:
        """Returns whole tensors from the pieces of all workers of the group, on each of them. Collective in the group.

        `shapes` are the shapes of the whole tensors, by name. Workers pass the same names in the same order.
        """
        if self.count == 1:
            return dict(pieces)
        whole = {name: own.new_empty(tuple(shapes[name])) for name, own in pieces.items()}
        for name, own in pieces.items():
            piece(whole[name], self.own, self.count).copy_(own)
        self._exchange(whole)
        return whole

    def spread(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the other workers' pieces of each tensor by what these workers have. Collective in the group."""
        if self.count > 1 and not self._sharded:
            self._exchange(tensors)

    def _exchange(self, tensors: Mapping[str, Tensor]) -> None:
        for batch in _batches(list(tensors.values())):
            size = _message(batch, self.count)
            own = torch.cat([piece(t, self.own, self.count).detach().reshape(-1) for t in batch])
            sent = own.new_zeros(size)
            sent[: own.numel()] = own
            for place, received in enumerate(self._comm.all_gather(sent.to(self._comm.device), "group")):
                if place != self.own:
                    _fill([piece(t, place, self.count) for t in batch], received)

    def gathered(self, own: int) -> list[int]:
        """Returns the integers that the workers of the group pass, in the order of their places. Collective in it."""
        if self.count == 1:
            return [own]
        return self._comm.all_gather(torch.tensor([own], device=self._comm.device), "group").flatten().tolist()


def sent_by_gathered(topology: Topology) -> Calls:
    """Returns the collective call that `Places.gathered` makes."""
    return (Traffic("all_gather", "group", torch.int64.itemsize),) if topology.group_size > 1 else ()


def sent_by_spread(tensors: Sequence[Tensor], topology: Topology) -> Calls:
    """Returns the collective calls that `Places.spread` makes for these tensors."""
    count = topology.group_size
    if count == 1:
        return ()
    sizes = [batch[0].itemsize * _message(batch, count) for batch in _batches(tensors)]
    return tuple(Traffic("all_gather", "group", size) for size in sizes)


def used_by_spread(tensors: Sequence[Tensor], topology: Topology) -> int:
    """Returns the largest number of bytes of temporary tensors while `Places.spread` exchanges pieces."""
    count = topology.group_size
    if count == 1:
        return 0
    # This worker's pieces, a message with padding, and the messages of all workers of the group.
    return max(((2 + count) * batch[0].itemsize * _message(batch, count) for batch in _batches(tensors)), default=0)


def _batches(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Divides tensors into lists of one dtype and device, in their order, whose pieces are sent in one message."""
    batches: list[list[Tensor]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        batch, filled = filling.get((tensor.dtype, tensor.device), ([], 0))
        if not batch or filled + tensor.nbytes > _CAPACITY:
            batch, filled = [], 0
            batches.append(batch)
        batch.append(tensor)
        filling[tensor.dtype, tensor.device] = (batch, filled + tensor.nbytes)
    return batches


def _message(batch: Sequence[Tensor], count: int) -> int:
    """Returns the number of elements of a message: those of the first place, which has the largest pieces."""
    return sum(piece(tensor, 0, count).numel() for tensor in batch)


def _fill(pieces: Sequence[Tensor], flat: Tensor) -> None:
    """Copies the elements of a flat tensor into pieces, one after the other."""
    sizes = [own.numel() for own in pieces]
    for own, received in zip(pieces, flat[: sum(sizes)].split(sizes), strict=True):
        own.copy_(received.view(own.shape))
