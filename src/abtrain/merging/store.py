"""Stores what merges need from one merge to the next, by tensor name, so that a batch is one flat tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from abtrain.memory import allocated
from abtrain.merging.batches import Batch, alike
from abtrain.merging.held import Held

_SMALL = 2**14
"""The largest number of elements of a tensor that shares memory with others."""
Room = Callable[[Tensor, torch.device, torch.dtype], Tensor]
"""Creates a tensor like another one, for a parameter on a device, with a dtype."""


class Place(NamedTuple):
    """Where a tensor of some shape lies: from element `start` of a row, or in memory of its own if `row` is None.

    `device` is that of the parameter to which it belongs.
    """

    row: int | None
    start: int
    shape: torch.Size
    device: torch.device


class Layout:
    """Divides small tensors into rows, one for each dtype and device, where one tensor follows the other.

    The tensors of a batch are neighbours in a row, unless there are large ones among them or others between them.

    Attributes:
        sizes: the number of elements of each row.
        places: the place of each tensor, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        self.sizes: list[int] = []
        self.places: dict[str, Place] = {}
        for row, names in enumerate(alike(tensors)):
            start = 0
            for name in names:
                shape, beside = tensors[name].shape, device or tensors[name].device
                small = shape.numel() <= _SMALL
                self.places[name] = Place(row if small else None, start, shape, beside)
                start += shape.numel() if small else 0
            self.sizes.append(start)
        self._spans: WeakKeyDictionary[Batch, tuple[int, int, int] | None] = WeakKeyDictionary()

    def span(self, batch: Batch) -> tuple[int, int, int] | None:
        """Returns the row of a batch, and where the batch starts and stops in it; None if its tensors lie apart."""
        if batch not in self._spans:
            self._spans[batch] = self._find(batch)
        return self._spans[batch]

    def _find(self, batch: Batch) -> tuple[int, int, int] | None:
        first = self.places.get(batch.names[0])
        if first is None or first.row is None:
            return None
        start = stop = first.start + batch.ranges[0].start
        for one, shape in zip(batch.ranges, batch.shapes, strict=True):
            place = self.places.get(one.name)
            if place is None or (place.row, place.start + one.start) != (first.row, stop):
                return None
            stop += shape.numel()
        return first.row, start, stop


def plain_room(like: Tensor, beside: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns an uninitialized tensor in the shape of another one, on the device `beside`."""
    return allocated(like.numel(), dtype, beside).view(like.shape)


class Store(MutableMapping[str, Tensor]):
    """Tensors by name. Small ones that were written in batches lie in the rows of a layout."""

    def __init__(self, layout: Layout | None = None, room: Room = plain_room) -> None:
        self._layout, self._room = layout or Layout({}), room
        self._named: dict[str, Tensor] = {}
        self._rows: dict[int, Tensor] = {}
        self._laid: set[str] = set()
        """The names of the tensors that lie in their places."""
        self._complete: WeakSet[Batch] = WeakSet()
        """The batches whose tensors all lie in a row, side by side."""

    @classmethod
    def of(cls, tensors: Held, room: Room = plain_room, widened: bool = False) -> Store:
        """Returns copies of tensors; those of narrow floats in float32 if `widened`."""
        store = cls(Layout(tensors), room)
        for batch in tensors.batches():
            flat = tensors.flat(batch)
            store.put(batch, flat.to(batch.dtype) if widened else flat)
        return store

    def lay_out(self, layout: Layout) -> None:
        """Drops all tensors but those of a layout, in whose rows batches will lie from now on."""
        if layout.places != self._layout.places:
            self._rows, self._layout = {}, layout
            self._laid.clear()
        for name in [name for name in self._named if name not in layout.places]:
            del self[name]
        self._complete.clear()

    def clear(self) -> None:
        """Drops all tensors."""
        self._named, self._rows = {}, {}
        self._laid.clear()
        self._complete.clear()

    def flat(self, batch: Batch) -> Tensor | None:
        """Returns a batch as one flat tensor, which must not be written, with zeros for missing tensors.

        Returns None if all are missing.
        """
        if not self._named:
            return None
        if batch in self._complete:
            return self._side_by_side(batch)
        missing = [name for name in batch.names if name not in self._named]
        if len(missing) == len(batch.names):
            return None
        dtype = next(self._named[name].dtype for name in batch.names if name in self._named)
        zeros = {name: self._new(name, dtype).zero_() for name in missing}
        return batch.flat({**self._named, **zeros} if zeros else self._named)

    def memory(self, batch: Batch, dtype: torch.dtype) -> Tensor | None:
        """Returns the memory of a batch as one flat tensor; None if its tensors lie apart.

        Tensors that are missing begin to exist, and their parts outside the batch become zero.
        """
        if batch in self._complete:
            return self._side_by_side(batch)
        for one in batch.ranges:
            if one.name not in self._laid:
                self._lay(one.name, dtype, whole=one.stop is None)
        if len(batch.ranges) == 1:
            return batch.ranges[0].of(self._named[batch.names[0]]).view(-1)
        if self._layout.span(batch) is None:
            return None
        self._complete.add(batch)
        return self._side_by_side(batch)

    def put(self, batch: Batch, flat: Tensor) -> None:
        """Stores copies of a batch of flat values. Other parts of its tensors become zero if they are missing."""
        memory = self.memory(batch, flat.dtype)
        if memory is None:
            batch.write(self._named, flat)
        else:
            memory.copy_(flat)

    def add(self, batch: Batch, flat: Tensor) -> None:
        """Adds flat values on the device of this store to a batch whose tensors are all stored."""
        memory = self.memory(batch, flat.dtype)
        if memory is None:
            torch._foreach_add_(batch.of(self._named), batch.views(flat))
        else:
            memory.add_(flat)

    def _side_by_side(self, batch: Batch) -> Tensor:
        span = self._layout.span(batch)
        assert span is not None
        row, start, stop = span
        return self._rows[row][start:stop]

    def _lay(self, name: str, dtype: torch.dtype, whole: bool) -> None:
        """Moves a tensor to its place. A missing one becomes zero, unless it is about to be written as a `whole`."""
        known, place = self._named.get(name), self._layout.places[name]
        self._laid.add(name)
        if known is not None and place.row is None and known.is_contiguous():
            return
        memory = self._new(name, dtype) if place.row is None else self._in_row(place.row, place, dtype)
        if known is not None:
            memory.copy_(known)
        elif not whole:
            memory.zero_()
        self._named[name] = memory

    def _in_row(self, row: int, place: Place, dtype: torch.dtype) -> Tensor:
        if row not in self._rows:
            like = torch.empty(self._layout.sizes[row], device="meta")
            self._rows[row] = self._room(like, place.device, dtype)
        return self._rows[row][place.start : place.start + place.shape.numel()].view(place.shape)

    def _new(self, name: str, dtype: torch.dtype) -> Tensor:
        place = self._layout.places[name]
        return self._room(torch.empty(place.shape, device="meta"), place.device, dtype)

    def __getitem__(self, name: str) -> Tensor:
        return self._named[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._forget(name)
        self._named[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._named[name]
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._laid.discard(name)
        self._complete.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)
