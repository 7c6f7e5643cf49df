"""Many tensors <-> few flat buffers, because a slow link is best asked seldom. Pure: no communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MIB = 2**20
DEFAULT_CAPACITY = 25 * MIB


@dataclass(frozen=True)
class Bucket:
    """Some tensors of a sequence, laid end to end.

    `flat` is contiguous and 1-D; it holds the tensors whose places in the sequence are `indices`, in that
    order.
    """

    flat: Tensor
    indices: tuple[int, ...]


class _Kind(NamedTuple):
    """The dtype and device that all tensors of a bucket share."""

    dtype: torch.dtype
    device: torch.device


def pack(tensors: Sequence[Tensor], capacity_bytes: int = DEFAULT_CAPACITY, widen: bool = True) -> list[Bucket]:
    """Copies tensors of any shape, dtype and device into few flat buffers.

    A bucket holds tensors of one dtype on one device, in their order, and at most `capacity_bytes`; a tensor
    larger than that has a bucket of its own. The same shapes and dtypes give the same layout on every rank.

    Args:
        tensors: what to pack; empty tensors are allowed.
        capacity_bytes: the largest bucket.
        widen: make float32 of narrower floats, which lose digits when they are summed. Without it the bits
            are kept.
    """
    layouts: list[tuple[_Kind, list[int]]] = []
    filling: dict[_Kind, tuple[list[int], int]] = {}
    for index, tensor in enumerate(tensors):
        kind = _Kind(_dtype_in_bucket(tensor.dtype, widen), tensor.device)
        nbytes = tensor.numel() * kind.dtype.itemsize
        indices, filled = filling.get(kind, ([], 0))
        if not indices or filled + nbytes > capacity_bytes:
            indices, filled = [], 0
            layouts.append((kind, indices))
        indices.append(index)
        filling[kind] = (indices, filled + nbytes)
    return [Bucket(_lay_out(kind, [tensors[i] for i in indices]), tuple(indices)) for kind, indices in layouts]


def unpack(buckets: Sequence[Bucket], like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in `buckets`, with the shapes, dtypes and order of `like`.

    Where a bucket has the dtype of a tensor, what is returned is a view into the bucket.
    """
    tensors: dict[int, Tensor] = {}
    for bucket in buckets:
        pieces = bucket.flat.split([like[i].numel() for i in bucket.indices])
        for index, piece in zip(bucket.indices, pieces, strict=True):
            tensors[index] = piece.view(like[index].shape).to(like[index].dtype)
    return [tensors[i] for i in range(len(like))]


def _dtype_in_bucket(dtype: torch.dtype, widen: bool) -> torch.dtype:
    narrow = dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize
    return torch.float32 if widen and narrow else dtype


def _lay_out(kind: _Kind, tensors: Sequence[Tensor]) -> Tensor:
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=kind.dtype, device=kind.device)
    pieces = flat.split([t.numel() for t in tensors])
    for piece, tensor in zip(pieces, tensors, strict=True):
        piece.view(tensor.shape).copy_(tensor.detach())
    return flat
