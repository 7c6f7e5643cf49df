"""Averages flat numbers of two groups in few bits: a worker and its counterpart send each other all numbers.

They send no more bytes than by `exchange.py`. But they round every number once instead of twice, wait for one message
instead of two, and encode fewer numbers.
"""

from __future__ import annotations

import torch

from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Stages
from abtrain.merging.wires.coded_numbers import (
    CodedAverage,
    encode,
    memory_for_errors,
    scratch_for,
    sum_of,
    values_of,
)
from abtrain.merging.wires.codes import Code
from abtrain.merging.wires.flat import FlatAverage, Numbers, Parts


def padded(count: int, code: Code) -> int:
    """Returns how many numbers are encoded, which are `count` numbers and padding."""
    return -(-count // code.granule) * code.granule


def gather(numbers: Numbers, code: Code, comm: Communicator) -> Stages[FlatAverage]:
    """Sends all float32 numbers encoded, and averages what all workers have sent."""
    count, chunk = numbers.count, padded(numbers.count, code)
    error, taken = memory_for_errors(numbers)
    data = torch.empty(code.nbytes(chunk), dtype=torch.uint8, device=numbers.device)
    encode(numbers, 0, chunk, code, data, error)
    gathered = comm.launch_all_gather(data, "counterparts")
    del numbers, data
    yield
    return _Sums(gathered.wait(), count, code, error, taken)


class _Sums(CodedAverage):
    """The sums of the numbers in all rows, divided by the number of workers."""

    def parts(self) -> Parts:
        count = padded(self.count, self.code)
        scratch = scratch_for(count, self.rows.device)
        coded = [self.code.parts(row, count, scratch) for row in self.rows]
        for parts in zip(*coded, strict=True):
            total = values_of(parts[0], scratch)
            sum_of(parts, self.code, total, scratch)
            total /= len(self.rows)
            start, stop = parts[0].place.start, min(parts[0].place.stop, self.count)
            yield slice(start, stop), total[: stop - start]
