"""Reads and writes the tensors of a model batch by batch, also if they are many and small.

PyTorch takes about a microsecond to copy a tensor, however small it is. Python copies memory in a tenth of this time.
Tensors that lie side by side need no copies (see `side_by_side.py`).
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Hashable, Mapping
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from abtrain.comm.checksums import bytes_of, fingerprint
from abtrain.merging import batches
from abtrain.merging.batches import Batch, cut_into_batches
from abtrain.shards import cut
from abtrain.side_by_side import in_one_piece

_MANY = 16
"""The least number of tensors in a batch whose memory is copied by Python."""


class Held(dict[str, Tensor]):
    """The tensors of a model that merge, by name.

    They stay in the same memory from merge to merge, so whatever follows from names, shapes and addresses is computed
    once. A tensor that moves, or gets another shape, needs a new `Held`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self._cuts: dict[bool, tuple[Mapping[str, Hashable], list[Batch]]] = {}
        self._in_one_piece: WeakKeyDictionary[Batch, Tensor | None] = WeakKeyDictionary()
        self._memories: WeakKeyDictionary[Batch, _Memory | None] = WeakKeyDictionary()
        self._pieces: dict[tuple[int, int], Held] = {}

    @cached_property
    def names_hash(self) -> int:
        """A hash of the names, in their order."""
        return fingerprint(*self)

    def piece(self, place: int, count: int) -> Held:
        """Returns the piece of each tensor for one of `count` places, as a view of it."""
        if count == 1:
            return self
        if (place, count) not in self._pieces:
            self._pieces[place, count] = Held(cut(self, place, count))
        return self._pieces[place, count]

    def batches(self, kinds: Mapping[str, Hashable] | None = None, whole: bool = False) -> list[Batch]:
        """Returns the batches of these tensors (see `cut_into_batches`): the same objects for the same `kinds`."""
        kinds, whole = kinds or {}, whole and self._largest > batches.CAPACITY
        if whole not in self._cuts or self._cuts[whole][0] != kinds:
            self._cuts[whole] = (kinds, cut_into_batches(self, kinds, whole))
        return self._cuts[whole][1]

    @cached_property
    def _largest(self) -> int:
        return max((tensor.numel() for tensor in self.values()), default=0)

    def flat(self, batch: Batch) -> Tensor:
        """Returns a batch as one flat tensor, which must not be written: it may be a view."""
        piece = self.memory(batch)
        if piece is not None:
            return piece
        memory = self._memory(batch)
        return batch.flat(self) if memory is None else memory.read()

    def memory(self, batch: Batch) -> Tensor | None:
        """Returns the memory of a batch as one flat tensor; None if it is not one piece."""
        if batch not in self._in_one_piece:
            self._in_one_piece[batch] = in_one_piece(batch.of(self))
        return self._in_one_piece[batch]

    def write(self, batch: Batch, flat: Tensor) -> None:
        """Copies a flat tensor into a batch."""
        piece = self.memory(batch)
        memory = self._memory(batch) if piece is None else None
        if piece is not None:
            piece.copy_(flat)
        elif memory is None:
            batch.write(self, flat)
        else:
            memory.write(flat)

    def _memory(self, batch: Batch) -> _Memory | None:
        if len(batch.ranges) < _MANY:
            return None
        if batch not in self._memories:
            self._memories[batch] = _memory_of(batch.of(self))
        return self._memories[batch]


class _Memory:
    """The memory of many contiguous tensors of one dtype on the CPU, with at least one element in all."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._dtype = tensors[0].dtype
        self._views = [memoryview(bytes_of(tensor)) for tensor in tensors if tensor.numel()]

    def read(self) -> Tensor:
        return torch.frombuffer(bytearray().join(self._views), dtype=self._dtype)

    def write(self, flat: Tensor) -> None:
        converted = flat.to(self._dtype)
        # A deque of length 0 only exhausts the iterator, faster than a loop.
        deque(map(io.BytesIO(bytes_of(converted)).readinto, self._views), maxlen=0)


def _memory_of(tensors: list[Tensor]) -> _Memory | None:
    """Returns the memory of tensors; None if Python cannot copy it."""
    plain = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
    return _Memory(tensors) if plain and any(tensor.numel() for tensor in tensors) else None
