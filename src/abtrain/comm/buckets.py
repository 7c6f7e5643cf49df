"""Packs many tensors into few flat buffers and averages them: each message over a slow link costs a delay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abtrain.comm.communicator import Calls, Communicator, Traffic
from abtrain.comm.stages import Stages, finish

MIB = 2**20


@dataclass(frozen=True)
class Bucket:
    """Some tensors of a sequence, laid end to end.

    `flat` is contiguous and 1-D. It holds the tensors of the sequence with these `indices`, in that order.
    """

    flat: Tensor
    indices: tuple[int, ...]


_Kind = tuple[torch.dtype, torch.device]  # shared by all tensors of a bucket


def pack(tensors: Sequence[Tensor], capacity_bytes: int = 25 * MIB, widen: bool = True) -> list[Bucket]:
    """Copies tensors of any shape, dtype and device into few flat buffers.

    A bucket holds tensors of one dtype on one device, in their order, and at most `capacity_bytes`; a tensor
    larger than that has a bucket of its own. The same shapes and dtypes give the same layout on every rank.

    With `widen`, narrower floats become float32, since their sums would lose digits. Otherwise bits are kept.
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

    A tensor with the dtype of its bucket is a view into it.
    """
    tensors: dict[int, Tensor] = {}
    for bucket in buckets:
        pieces = bucket.flat.split([like[i].numel() for i in bucket.indices])
        for index, piece in zip(bucket.indices, pieces, strict=True):
            tensors[index] = piece.view(like[index].shape).to(like[index].dtype)
    return [tensors[i] for i in range(len(like))]


def exact_average(tensors: Sequence[Tensor], comm: Communicator) -> list[Tensor]:
    """Runs all stages of `average_exactly` at once."""
    return finish(average_exactly(tensors, comm))


def average_exactly(tensors: Sequence[Tensor], comm: Communicator) -> Stages[list[Tensor]]:
    """Returns the average of each tensor over all workers, bitwise equal on all of them.

    All workers pass the same shapes and dtypes; averages keep them. Half precision is summed in float32.
    """
    buckets = pack(tensors)
    launched = [comm.launch_all_reduce(bucket.flat) for bucket in buckets]
    yield
    for bucket, pending in zip(buckets, launched, strict=True):
        pending.wait()
        bucket.flat.div_(comm.topology.world_size)
    return unpack(buckets, tensors)


def sent_by_average(tensors: Sequence[Tensor]) -> Calls:
    """Returns the calls of `average_exactly` and `exact_average` of these tensors."""
    return tuple(Traffic("all_reduce", "world", bucket.flat.nbytes) for bucket in pack(tensors))


def _dtype_in_bucket(dtype: torch.dtype, widen: bool) -> torch.dtype:
    narrow = dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize
    return torch.float32 if widen and narrow else dtype


def _lay_out(kind: _Kind, tensors: Sequence[Tensor]) -> Tensor:
    dtype, device = kind
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=dtype, device=device)
    for piece, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True):
        piece.view(tensor.shape).copy_(tensor.detach())
    return flat
