"""Averages flat numbers in few bits: workers exchange encoded chunks, average one each, and gather all averages."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Stages
from abtrain.merging.wires.codes import Code, CodedPart
from abtrain.merging.wires.flat import FlatAverage, Numbers, Parts
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
    taken = None if numbers.error is not None else numbers.memory.take(count, torch.float32, device)
    error = numbers.error if taken is None else taken
    assert error is not None
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
    return _Decoded(replies.wait(), chunk, reply, error, numbers, taken)


def _encode(numbers: Numbers, start: int, chunk: int, code: Code, data: Tensor, error: Tensor) -> None:
    """Encodes the numbers from `start` on in uint8 `data`, and writes their rounding errors into `error`."""
    scratch = _scratch(chunk, numbers.device)
    for part in code.parts(data, chunk, scratch):
        values = scratch(_PART, (part.place.stop - part.place.start,), torch.float32)
        place = slice(start + part.place.start, min(start + part.place.stop, numbers.count))
        known = max(place.stop - place.start, 0)
        if known:
            numbers.write(place, values[:known])
        if known == len(values):
            code.encode_part(part, values, error[place], scratch)
            continue
        values[known:] = 0
        code.encode_part(part, values, values, scratch)
        error[place.start : place.start + known] = values[:known]


def _answer(rows: list[Tensor], chunk: int, code: Code, answer: Tensor, reply: Code, error: Tensor) -> None:
    """Averages the encoded rows of all workers into uint8 `answer`.

    Adds its rounding errors to `error`, which lacks the padding of the chunk.
    """
    scratch = _scratch(chunk, answer.device)
    coded = [code.parts(row, chunk, scratch) for row in rows]
    for part, *parts in zip(reply.parts(answer, chunk, scratch), *coded, strict=True):
        total = scratch(_PART, (part.place.stop - part.place.start,), torch.float32)
        _sum(parts, code, total, scratch)
        total /= len(rows)
        reply.encode_part(part, total, total, scratch)
        # Only this worker keeps the rounding error of the reply, and the next average divides it by the workers.
        kept = error[part.place]
        kept += total.mul_(len(rows))[: len(kept)]


def _sum(parts: list[CodedPart], code: Code, total: Tensor, scratch: Scratch) -> None:
    """Adds up the parts in rank order and in float32."""
    first, *others = parts
    code.decode_part(first, total, scratch)
    for part in others:
        code.add_part(part, total, scratch)


class _Decoded(FlatAverage):
    """The averages of all workers' chunks, which are decoded part by part."""

    def __init__(
        self, rows: Tensor, chunk: int, code: Code, error: Tensor, numbers: Numbers, taken: Tensor | None
    ) -> None:
        self._rows, self._chunk, self._code, self.error = rows, chunk, code, error
        self._count, self._memory, self._taken = numbers.count, numbers.memory, taken

    def parts(self) -> Parts:
        scratch = _scratch(self._chunk, self._rows.device)
        for row, data in enumerate(self._rows):
            for part in self._code.parts(data, self._chunk, scratch):
                start = row * self._chunk + part.place.start
                stop = min(row * self._chunk + part.place.stop, self._count)
                if start < stop:
                    values = scratch(_PART, (part.place.stop - part.place.start,), torch.float32)
                    self._code.decode_part(part, values, scratch)
                    yield slice(start, stop), values[: stop - start]

    def release(self) -> None:
        if self._taken is not None:
            self._memory.give(self._taken)


def _scratch(chunk: int, device: torch.device) -> Scratch:
    return Scratch(torch.empty(chunk, device="meta"), device)
