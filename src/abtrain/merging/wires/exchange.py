"""Averages flat numbers of three or more groups in few bits.

They exchange encoded chunks, average one chunk each, and gather all averages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Stages
from abtrain.merging.wires.coded_numbers import CodedAverage, encode, memory_for_errors, scratch_for, sum_of, values_of
from abtrain.merging.wires.codes import Code
from abtrain.merging.wires.flat import FlatAverage, Numbers, Parts


def chunk_of(count: int, workers: int, code: Code, reply: Code) -> int:
    """Returns how many of `count` numbers each worker averages. Padding fills up the last chunk."""
    granule = math.lcm(code.granule, reply.granule)
    return -(-count // (workers * granule)) * granule


def exchange(numbers: Numbers, code: Code, reply: Code, comm: Communicator) -> Stages[FlatAverage]:
    """Sends chunks of float32 numbers, then averages one chunk, and then gathers all averages."""
    count, workers, device = numbers.count, comm.topology.n_groups, numbers.device
    chunk = chunk_of(count, workers, code, reply)
    error, taken = memory_for_errors(numbers)
    sent = torch.empty(workers, code.nbytes(chunk), dtype=torch.uint8, device=device)
    for row, data in enumerate(sent):
        encode(numbers, row * chunk, chunk, code, data, error)
    chunks = comm.launch_exchange(sent, "counterparts")
    del numbers, sent, data
    yield
    answer = torch.empty(reply.nbytes(chunk), dtype=torch.uint8, device=device)
    start = chunk * comm.topology.group_of(comm.rank)
    _answer(list(chunks.wait()), chunk, code, answer, reply, error[start : start + chunk])
    replies = comm.launch_all_gather(answer, "counterparts")
    del chunks, answer
    yield
    return _Chunks(replies.wait(), chunk, count, reply, error, taken)


def _answer(rows: list[Tensor], chunk: int, code: Code, answer: Tensor, reply: Code, error: Tensor) -> None:
    """Averages the encoded rows of all workers into uint8 `answer`.

    Adds its rounding errors to `error`, which lacks the padding of the chunk.
    """
    scratch = scratch_for(chunk, answer.device)
    coded = [code.parts(row, chunk, scratch) for row in rows]
    for part, *parts in zip(reply.parts(answer, chunk, scratch), *coded, strict=True):
        total = values_of(part, scratch)
        sum_of(parts, code, total, scratch)
        total /= len(rows)
        reply.encode_part(part, total, total, scratch)
        # Only this worker keeps the rounding error of the reply, and the next average divides it by the workers.
        kept = error[part.place]
        kept += total.mul_(len(rows))[: kept.numel()]


class _Chunks(CodedAverage):
    """The averages of all workers' chunks, one in each row."""

    def __init__(self, rows: Tensor, chunk: int, count: int, code: Code, error: Tensor, taken: Tensor | None) -> None:
        super().__init__(rows, count, code, error, taken)
        self._chunk = chunk

    def parts(self) -> Parts:
        scratch = scratch_for(self._chunk, self.rows.device)
        for row, data in enumerate(self.rows):
            for part in self.code.parts(data, self._chunk, scratch):
                start = row * self._chunk + part.place.start
                stop = min(row * self._chunk + part.place.stop, self.count)
                if start < stop:
                    values = values_of(part, scratch)
                    self.code.decode_part(part, values, scratch)
                    yield slice(start, stop), values[: stop - start]
