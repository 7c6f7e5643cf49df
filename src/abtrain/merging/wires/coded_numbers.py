"""Computes with encoded numbers part by part, so that each part stays in a CPU's cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abtrain.memory import allocated
from abtrain.merging.wires.codes import Code, CodedPart
from abtrain.merging.wires.flat import FlatAverage, Numbers, WholeAverage, joined
from abtrain.merging.wires.scratch import Scratch

_PART = 3
"""The slot of a part's numbers. Codes use the slots before it."""


class CodedAverage(FlatAverage):
    """An average of `count` numbers that is decoded part by part from uint8 rows (workers, bytes) in a code."""

    error: Tensor

    def __init__(self, rows: Tensor, count: int, code: Code, error: Tensor, taken: Tensor | None) -> None:
        self.rows, self.count, self.code, self.error, self.taken = rows, count, code, error, taken

    def whole(self) -> WholeAverage:
        mean = allocated(self.count, torch.float32, self.rows.device)
        return WholeAverage(joined(self.parts(), mean), self.error)


def encode(numbers: Numbers, start: int, chunk: int, code: Code, data: Tensor, error: Tensor) -> None:
    """Encodes the numbers from `start` on in uint8 `data`, and writes their rounding errors into `error`."""
    scratch = scratch_for(chunk, numbers.device)
    for part in code.parts(data, chunk, scratch):
        values = values_of(part, scratch)
        first, last = start + part.place.start, start + part.place.stop
        if last <= numbers.count:
            numbers.write(slice(first, last), values)
            code.encode_part(part, values, error[first:last], scratch)
            continue
        known = max(numbers.count - first, 0)
        if known:
            numbers.write(slice(first, numbers.count), values[:known])
        values[known:] = 0
        code.encode_part(part, values, values, scratch)
        error[first : numbers.count] = values[:known]


def memory_for_errors(numbers: Numbers) -> tuple[Tensor, Tensor | None]:
    """Returns float32 memory for the rounding errors of numbers, and the tensor that `numbers.memory` gets back."""
    if numbers.error is not None:
        return numbers.error, None
    error = numbers.memory.take(numbers.count, torch.float32, numbers.device)
    return error, error


def sum_of(parts: Sequence[CodedPart], code: Code, total: Tensor, scratch: Scratch) -> None:
    """Adds up the parts in rank order and in float32."""
    first, *others = parts
    code.decode_part(first, total, scratch)
    for part in others:
        code.add_part(part, total, scratch)


def scratch_for(chunk: int, device: torch.device) -> Scratch:
    """Returns buffers for the parts of `chunk` encoded numbers."""
    return Scratch(torch.empty(chunk, device="meta"), device)


def values_of(part: CodedPart, scratch: Scratch) -> Tensor:
    """Returns memory for the float32 numbers of a part."""
    return scratch(_PART, (part.place.stop - part.place.start,), torch.float32)
