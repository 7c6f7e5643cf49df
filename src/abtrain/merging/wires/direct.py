"""The wire that sends every number: an average over the world, in few bits, with error feedback.

A narrow merge is narrow in both directions. Each worker sends every other worker a chunk of its numbers, sums the
chunks that it receives in float32, and sends their average back, encoded again. The reply may have a wider code:
rounding errors of the first direction differ between workers and average out, those of the reply are common to all.

Rounding errors are returned to the caller, who adds them to the next merge (error feedback, Seide et al. 2014;
Karimireddy et al., arXiv 1901.09847). The worker that averages a chunk also keeps the rounding error of its reply.
Summed over all merges, averages plus errors equal the exact average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from abtrain.comm.averages import average_exactly, sent_by_average
from abtrain.comm.buckets import Bucket, pack, unpack
from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Stages
from abtrain.comm.traffic import Calls, Traffic
from abtrain.merging.wires.codes import CODES, Code
from abtrain.merging.wires.wire import Averages, Wire

CAPACITY = 64 * 2**20
"""Bytes of float32 that are encoded and sent at once: the memory that a merge needs in addition to the weights."""


class DirectWire(Wire):
    """Sends every number, in one code.

    Args:
        code: the code of the numbers.
        reply: the code of their average; by default the same.
    """

    def __init__(self, code: str, reply: str | None = None) -> None:
        super().__init__()
        self._code, self._reply = CODES[code], CODES[reply or code]

    def average(self, numbers: Mapping[str, Tensor], comm: Communicator) -> Stages[Averages]:
        tensors = list(numbers.values())
        if self._code.exact or comm.topology.world_size == 1:
            mean = yield from average_exactly(tensors, comm)
            return Averages(dict(zip(numbers, mean, strict=True)), {})
        mean, error = yield from _average_narrowly(tensors, self._code, self._reply, comm)
        return Averages(dict(zip(numbers, mean, strict=True)), dict(zip(numbers, error, strict=True)))

    def sends(self, tensors: Sequence[Tensor], workers: int) -> tuple[Calls, ...]:
        if self._code.exact:
            return (sent_by_average(tensors),)
        chunks, replies = [], []
        for bucket in pack([tensor.to(torch.float32) for tensor in tensors], CAPACITY):
            chunk = _chunk_of(bucket.flat.numel(), workers, self._code, self._reply)
            chunks.append(Traffic("exchange", "world", (workers - 1) * self._code.nbytes(chunk)))
            replies.append(Traffic("all_gather", "world", self._reply.nbytes(chunk)))
        return tuple(chunks), tuple(replies)


def _average_narrowly(
    tensors: Sequence[Tensor], code: Code, reply: Code, comm: Communicator
) -> Stages[tuple[list[Tensor], list[Tensor]]]:
    """Returns averages and this worker's errors, in float32."""
    wanted = [tensor.float() for tensor in tensors]
    buckets = pack(wanted, CAPACITY)
    # Gloo exchanges tensors on the CPU only.
    exchanges = [_Exchange(bucket.flat.to(comm.device), code, reply, comm) for bucket in buckets]
    yield
    for exchange in exchanges:
        exchange.reply()
    yield
    outcomes = [exchange.outcome() for exchange in exchanges]
    means = unpack([_refilled(bucket, mean) for bucket, (mean, _) in zip(buckets, outcomes, strict=True)], tensors)
    errors = unpack([_refilled(bucket, error) for bucket, (_, error) in zip(buckets, outcomes, strict=True)], wanted)
    return means, errors


def _chunk_of(count: int, workers: int, code: Code, reply: Code) -> int:
    """Returns how many of `count` numbers each worker averages. Padding fills up the last chunk."""
    granule = math.lcm(code.granule, reply.granule)
    return -(-count // (workers * granule)) * granule


class _Exchange:
    """The exchange of one bucket, (count,) float32: sends chunks, then averages, and then gathers these."""

    def __init__(self, flat: Tensor, code: Code, reply: Code, comm: Communicator) -> None:
        self._code, self._reply_code, self._comm, self._count = code, reply, comm, flat.numel()
        workers = comm.topology.world_size
        self._chunk = _chunk_of(self._count, workers, code, reply)
        mine = torch.nn.functional.pad(flat, (0, self._chunk * workers - self._count)).view(workers, self._chunk)
        sent = torch.stack([code.encode(row) for row in mine])
        self._error = mine - torch.stack([code.decode(row, self._chunk) for row in sent])
        self._chunks = comm.launch_exchange(sent)

    def reply(self) -> None:
        workers = self._comm.topology.world_size
        # In rank order and in float32; all other workers take over these bits.
        total = self._error.new_zeros(self._chunk)
        for row in self._chunks.wait():
            total += self._code.decode(row, self._chunk)
        total /= workers
        reply = self._reply_code.encode(total)
        # An average is divided by the number of workers: its rounding error is that much larger in one worker's part.
        self._error[self._comm.rank] += workers * (total - self._reply_code.decode(reply, self._chunk))
        self._replies = self._comm.launch_all_gather(reply)

    def outcome(self) -> tuple[Tensor, Tensor]:
        """Returns the average (count,), and the rounding error of this worker's part of it."""
        mean = torch.cat([self._reply_code.decode(row, self._chunk) for row in self._replies.wait()])
        return mean[: self._count], self._error.view(-1)[: self._count]


def _refilled(bucket: Bucket, flat: Tensor) -> Bucket:
    return Bucket(flat.to(bucket.flat.device), bucket.indices)
