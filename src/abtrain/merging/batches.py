"""Cuts the tensors of a merge into batches, so that a merge needs memory for a few batches and not for the whole model.

A batch is some tensors, or a range of one large tensor, as one flat tensor. One operation then serves many tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from abtrain.merging.changes import wide

CAPACITY = 2 * 2**20
"""The largest number of elements of a batch, except for a tensor that cannot be cut."""


class Range(NamedTuple):
    """A range of a tensor's elements in row-major order; the whole tensor if `stop` is None."""

    name: str
    start: int = 0
    stop: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Returns a view of this range of a tensor, flat unless it is the whole tensor."""
        return tensor if self.stop is None else tensor.view(-1)[self.start : self.stop]


@dataclass(frozen=True, eq=False)
class Batch:
    """Ranges of tensors of one dtype and device that are merged together. Two batches are equal if they are one object.

    Attributes:
        ranges: the ranges, whose elements are consecutive in flat tensors.
        shapes: the shape of each range.
        dtype: the dtype in which their changes are computed (see `wide`).
        device: the device of the tensors.
    """

    ranges: tuple[Range, ...]
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def names(self) -> list[str]:
        return [one.name for one in self.ranges]

    @cached_property
    def numel(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def of(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Returns views of this batch's ranges of tensors, given by name."""
        return [one.of(tensors[one.name]) for one in self.ranges]

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns this batch's ranges of tensors as one flat tensor, which must not be written: it may be a view."""
        parts = [part.reshape(-1) for part in self.of(tensors)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Returns views of a flat tensor in the shapes of the ranges."""
        pieces = flat.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def write(self, tensors: Mapping[str, Tensor], flat: Tensor) -> None:
        """Copies a flat tensor into this batch's ranges of tensors."""
        torch._foreach_copy_(self.of(tensors), self.views(flat))


def cut_into_batches(
    tensors: Mapping[str, Tensor], kinds: Mapping[str, Hashable] | None = None, whole: bool = False
) -> list[Batch]:
    """Cuts tensors, in their order, into batches. Equal shapes, dtypes and kinds give equal batches on all workers.

    Args:
        tensors: the tensors by name. Only shapes, strides, dtypes and devices matter.
        kinds: by name, what all tensors of a batch must have in common.
        whole: whether to keep large tensors whole.
    """
    batches: list[Batch] = []
    for same in alike(tensors, kinds):
        ranges: list[Range] = []
        filled = 0
        for one, count in (found for name in same for found in _ranges(name, tensors[name], whole)):
            if ranges and filled + count > CAPACITY:
                batches.append(_batch(ranges, tensors))
                ranges, filled = [], 0
            ranges.append(one)
            filled += count
        batches.append(_batch(ranges, tensors))
    return batches


def alike(tensors: Mapping[str, Tensor], kinds: Mapping[str, Hashable] | None = None) -> list[list[str]]:
    """Returns the names of tensors with the same dtype, device and kind, in lists."""
    kinds = kinds or {}
    lists: dict[Hashable, list[str]] = {}
    for name, tensor in tensors.items():
        lists.setdefault((tensor.dtype, tensor.device, kinds.get(name)), []).append(name)
    return list(lists.values())


def _ranges(name: str, tensor: Tensor, whole: bool) -> Iterator[tuple[Range, int]]:
    """Yields ranges of a tensor that fit into batches, with their numbers of elements."""
    count = tensor.numel()
    if whole or count <= CAPACITY or not tensor.is_contiguous():
        yield Range(name), count
        return
    for start in range(0, count, CAPACITY):
        stop = min(start + CAPACITY, count)
        yield Range(name, start, stop), stop - start


def _batch(ranges: Sequence[Range], tensors: Mapping[str, Tensor]) -> Batch:
    shapes = tuple(
        tensors[one.name].shape if one.stop is None else torch.Size([one.stop - one.start]) for one in ranges
    )
    first = tensors[ranges[0].name]
    return Batch(tuple(ranges), shapes, wide(first.dtype), first.device)
