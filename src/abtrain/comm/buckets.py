"""Averages many tensors in a few flat buffers, because every message over a slow link adds latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abtrain.comm.communicator import SMALL, Calls, Communicator, Scope, Traffic
from abtrain.comm.stages import Stages, finish
from abtrain.comm.topology import Topology
from abtrain.memory import allocated

MIB = 2**20


@dataclass(frozen=True)
class Bucket:
    """A flat buffer that contains some tensors of a sequence, one after the other.

    `flat` is contiguous and 1-D. `indices` are its tensors' indices in the sequence, in the order of the buffer.
    """

    flat: Tensor
    indices: tuple[int, ...]


_Kind = tuple[torch.dtype, torch.device]  # shared by all tensors of a bucket


def pack(tensors: Sequence[Tensor], capacity_bytes: int = 25 * MIB, widen: bool = True) -> list[Bucket]:
    """Copies tensors of any shape, dtype and device into few flat buffers.

    Tensors in a bucket share a dtype and a device, and keep their order. A bucket exceeds `capacity_bytes` only if it
    has a single, larger tensor. Equal shapes and dtypes give equal layouts on all ranks.

    `widen` converts floats of fewer bits to float32, whose sums are more precise. Without it, values stay unchanged.
    """
    layouts: list[tuple[_Kind, list[int]]] = []
    filling: dict[_Kind, tuple[list[int], int]] = {}
    for index, tensor in enumerate(tensors):
        dtype = _dtype_in_bucket(tensor.dtype, widen)
        kind, nbytes = (dtype, tensor.device), tensor.numel() * dtype.itemsize
        indices, filled = filling.get(kind, ([], 0))
        if not indices or filled + nbytes > capacity_bytes:
            indices, filled = [], 0
            layouts.append((kind, indices))
        indices.append(index)
        filling[kind] = (indices, filled + nbytes)
    return [Bucket(_lay_out(kind, [tensors[i] for i in indices]), tuple(indices)) for kind, indices in layouts]


def unpack(buckets: Sequence[Bucket], like: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tensors in `buckets`, with the shapes, dtypes and order of `like`.

    A tensor that has the same dtype as its bucket is a view into the bucket.
    """
    tensors: dict[int, Tensor] = {}
    for bucket in buckets:
        pieces = bucket.flat.split([like[i].numel() for i in bucket.indices])
        for index, piece in zip(bucket.indices, pieces, strict=True):
            tensors[index] = piece.view(like[index].shape).to(like[index].dtype)
    return [tensors[i] for i in range(len(like))]


def exact_average(tensors: Sequence[Tensor], comm: Communicator) -> list[Tensor]:
    """Returns the average of each tensor over all workers, by running all stages of `average_over_world` at once."""
    return finish(average_over_world(tensors, comm))


def average_exactly(tensors: Sequence[Tensor], comm: Communicator) -> Stages[list[Tensor]]:
    """Computes in stages the average of each tensor over a worker's counterparts, bitwise equal on all of them.

    The counterparts are the workers with the same place in all groups: all workers, if a group is one worker. They pass
    the same shapes and dtypes, which the averages keep. Half precision is summed in float32.
    """
    return _average(tensors, comm, "counterparts")


def sent_by_average(tensors: Sequence[Tensor], scope: Scope = "counterparts") -> Calls:
    """Returns the collective calls that `average_exactly` makes for these tensors."""
    return tuple(Traffic("all_reduce", scope, bucket.flat.nbytes) for bucket in pack(tensors))


def average_over_world(tensors: Sequence[Tensor], comm: Communicator) -> Stages[list[Tensor]]:
    """Computes in stages the average of each tensor over all workers, bitwise equal on all of them.

    Workers of a group add up their tensors. Then each of them averages one part with its counterparts in the other
    groups, so that the bytes between groups do not grow with the size of groups.
    """
    size = comm.topology.group_size
    if not _goes_by_parts(tensors, comm.topology):
        return (yield from _average(tensors, comm, "world"))
    buckets = pack(tensors)
    for bucket in buckets:
        comm.all_reduce(bucket.flat, "sum", "group")
    place = comm.topology.place_of(comm.rank)
    means = yield from average_exactly([_part(bucket.flat, size, place) for bucket in buckets], comm)
    for bucket, mean in zip(buckets, means, strict=True):
        bucket.flat.copy_(comm.all_gather(mean.div_(size), "group").view(-1)[: bucket.flat.numel()])
    return unpack(buckets, tensors)


def sent_by_average_over_world(tensors: Sequence[Tensor], topology: Topology) -> Calls:
    """Returns the collective calls that `average_over_world` and `exact_average` make for these tensors."""
    size = topology.group_size
    if not _goes_by_parts(tensors, topology):
        return sent_by_average(tensors, "world")
    flats = [bucket.flat for bucket in pack(tensors)]
    parts = [_part(flat, size, 0) for flat in flats]
    inside = [Traffic("all_reduce", "group", flat.nbytes) for flat in flats]
    return (*inside, *sent_by_average(parts), *(Traffic("all_gather", "group", part.nbytes) for part in parts))


def _average(tensors: Sequence[Tensor], comm: Communicator, scope: Scope) -> Stages[list[Tensor]]:
    buckets = pack(tensors)
    like = [torch.empty_like(tensor, device="meta") for tensor in tensors]
    del tensors  # A caller that keeps no reference needs memory for the buckets only.
    launched = [comm.launch_all_reduce(bucket.flat, "sum", scope) for bucket in buckets]
    yield
    for bucket, pending in zip(buckets, launched, strict=True):
        pending.wait()
        bucket.flat.div_(len(comm.ranks(scope)))
    return unpack(buckets, like)


def _goes_by_parts(tensors: Sequence[Tensor], topology: Topology) -> bool:
    """Returns whether workers of a group each average a part. They average small tensors together."""
    several = topology.group_size > 1 and topology.n_groups > 1
    return several and sum(tensor.nbytes for tensor in tensors) > SMALL


def _part(flat: Tensor, parts: int, place: int) -> Tensor:
    """Copies one of several parts of a flat tensor, all of the same size. Zeros fill up the last part."""
    part = flat.new_zeros(-(-flat.numel() // parts))
    own = flat[place * part.numel() : (place + 1) * part.numel()]
    part[: own.numel()] = own
    return part


def _dtype_in_bucket(dtype: torch.dtype, widen: bool) -> torch.dtype:
    narrow = dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize
    return torch.float32 if widen and narrow else dtype


def _lay_out(kind: _Kind, tensors: Sequence[Tensor]) -> Tensor:
    dtype, device = kind
    flat = allocated(sum(t.numel() for t in tensors), dtype, device)
    for piece, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True):
        piece.view(tensor.shape).copy_(tensor.detach())
    return flat
