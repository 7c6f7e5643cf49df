"""The wire that sends every number: an average over the world, in few bits, with error feedback.

A narrow merge is narrow both ways: each worker sends every other one its chunk of the numbers, adds up the chunks that
it gets in float32, and sends the average back, encoded again. So what crosses the network shrinks, not only a counter.
The way back may have a wider code: what rounding takes on the way there differs from worker to worker and is averaged,
what it takes on the way back is the same for all.

What rounding takes from a number is handed back, for the caller to add it the next time (error feedback, Seide et al.
2014; Karimireddy et al., arXiv 1901.09847). The worker that averages a chunk keeps what its own rounding took from the
average as well. Over all merges, what workers received and what they kept sum to the truth.
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
"""Bytes of float32 that are encoded and sent at once: what a merge needs beside the weights."""


class DirectWire(Wire):
    """Sends every number, in one code.

    Args:
        code: in which numbers are sent.
        reply: in which their average comes back; by default the same.
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
    """Averages and this worker's errors, in float32."""
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
    """How many of `count` numbers each of the workers averages: the last ones may get fewer, the rest is padding."""
    granule = math.lcm(code.granule, reply.granule)
    return -(-count // (workers * granule)) * granule


class _Exchange:
    """One bucket's way: chunks are sent on construction, `reply` sends averages back, `outcome` gathers them.

    Args:
        flat: (count,) float32.
        code: in which it is sent.
        reply: in which averages are sent back.
        comm: of this worker.
    """

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
        # In rank order and in float32; every other worker takes over these very bits.
        total = self._error.new_zeros(self._chunk)
        for row in self._chunks.wait():
            total += self._code.decode(row, self._chunk)
        total /= workers
        reply = self._reply_code.encode(total)
        # The average is divided by the number of workers: what its rounding took is that much larger in one's part.
        self._error[self._comm.rank] += workers * (total - self._reply_code.decode(reply, self._chunk))
        self._replies = self._comm.launch_all_gather(reply)

    def outcome(self) -> tuple[Tensor, Tensor]:
        """The average (count,), and what rounding took from this worker's part of it."""
        mean = torch.cat([self._reply_code.decode(row, self._chunk) for row in self._replies.wait()])
        return mean[: self._count], self._error.view(-1)[: self._count]


def _refilled(bucket: Bucket, flat: Tensor) -> Bucket:
    return Bucket(flat.to(bucket.flat.device), bucket.indices)
