"""Averages flat numbers in few bits: workers exchange encoded chunks, average one each, and gather all averages."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Stages
from abtrain.memory import allocated
from abtrain.merging.wires.codes import Code, CodedPart
from abtrain.merging.wires.flat import FlatAverage, Numbers, Parts, WholeAverage, joined
from abtrain.merging.wires.scratch import Scratch

_PART = 3
"""The slot of a part's numbers. Codes use the slots before it."""


def chunk_of(count: int, workers: int, code: Code, reply: Code) -> int:
    """Returns how many of `count` numbers each worker averages. Padding fills up the last chunk."""
    granule = math.lcm(code.granule, reply.granule)
    return -(-count // (workers * granule)) * granule


def exchange(numbers: Numbers, code: Code, reply: Code, comm: Communicator) -> Stages[FlatAverage]:
    """Sends chunks of float32 numbers, then averages one chunk, and then gathers all averages."""
    count, workers, device = numbers.count, comm.topology.n_groups, numbers.device
    chunk = chunk_of(count, workers, code, reply)
    error, taken = numbers.error, None
    if error is None:
        error = taken = numbers.memory.take(count, torch.float32, device)
    sent = torch.empty(workers, code.nbytes(chunk), dtype=torch.uint8, device=device)
    for row, data in enumerate(sent):
        _encode(numbers, row * chunk, chunk, code, data, error)
    chunks = comm.launch_exchange(sent, "counterparts")
    del sent, data
    yield
    answer = torch.empty(reply.nbytes(chunk), dtype=torch.uint8, device=device)
    start = chunk * comm.topology.group_of(comm.rank)
    _answer(list(chunks.wait()), chunk, code, answer, reply, error[start : start + chunk])
    replies = comm.launch_all_gather(answer, "counterparts")
    del chunks, answer
    yield
    average = _Decoded(replies.wait(), chunk, count, reply, error)
    average.taken = taken
    return average


def _encode(numbers: Numbers, start: int, chunk: int, code: Code, data: Tensor, error: Tensor) -> None:
    """Encodes the numbers from `start` on in uint8 `data`, and writes their rounding errors into `error`."""
    scratch = _scratch(chunk, numbers.device)
    for part in code.parts(data, chunk, scratch):
        values = _values(part, scratch)
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


def _answer(rows: list[Tensor], chunk: int, code: Code, answer: Tensor, reply: Code, error: Tensor) -> None:
    """Averages the encoded rows of all workers into uint8 `answer`.

    Adds its rounding errors to `error`, which lacks the padding of the chunk.
    """
    scratch = _scratch(chunk, answer.device)
    coded = [code.parts(row, chunk, scratch) for row in rows]
    for part, *parts in zip(reply.parts(answer, chunk, scratch), *coded, strict=True):
        total = _values(part, scratch)
        _sum(parts, code, total, scratch)
        total /= len(rows)
        reply.encode_part(part, total, total, scratch)
        # Only this worker keeps the rounding error of the reply, and the next average divides it by the workers.
        kept = error[part.place]
        kept += total.mul_(len(rows))[: kept.numel()]


def _sum(parts: list[CodedPart], code: Code, total: Tensor, scratch: Scratch) -> None:
    """Adds up the parts in rank order and in float32."""
    first, *others = parts
    code.decode_part(first, total, scratch)
    for part in others:
        code.add_part(part, total, scratch)


class _Decoded(FlatAverage):
    """The averages of all workers' chunks, which are decoded part by part."""

    def __init__(self, rows: Tensor, chunk: int, count: int, code: Code, error: Tensor) -> None:
        self._rows, self._chunk, self._count, self._code, self.error = rows, chunk, count, code, error

    def parts(self) -> Parts:
        scratch = _scratch(self._chunk, self._rows.device)
        for row, data in enumerate(self._rows):
            for part in self._code.parts(data, self._chunk, scratch):
                start = row * self._chunk + part.place.start
                stop = min(row * self._chunk + part.place.stop, self._count)
                if start < stop:
                    values = _values(part, scratch)
                    self._code.decode_part(part, values, scratch)
                    yield slice(start, stop), values[: stop - start]

    def whole(self) -> WholeAverage:
        mean = allocated(self._count, torch.float32, self._rows.device)
        return WholeAverage(joined(self.parts(), mean), self.error)


def _scratch(chunk: int, device: torch.device) -> Scratch:
    return Scratch(torch.empty(chunk, device="meta"), device)


def _values(part: CodedPart, scratch: Scratch) -> Tensor:
    """Returns memory for the float32 numbers of a part."""
    return scratch(_PART, (part.place.stop - part.place.start,), torch.float32)
