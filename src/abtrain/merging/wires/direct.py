"""Defines a wire that averages over all workers and sends every number in few bits, with error feedback.

Two workers send each other all their numbers, in the first code. Of three or more, each worker sends every other worker
a chunk of its numbers, sums the chunks that it receives in float32, and sends their average back, encoded again. This
reply may use more bits: rounding errors of the first direction differ between workers and average out, and those of the
reply are the same on all workers.

Rounding errors are returned to the caller, who adds them to the next merge (error feedback, Seide et al. 2014;
Karimireddy et al., arXiv 1901.09847). The worker that averages a chunk also keeps the rounding error of its reply.
Summed over all merges, averages plus errors equal the exact average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from abtrain.comm.buckets import Bucket, average_exactly, pack, sent_by_average, unpack
from abtrain.comm.communicator import Calls, Communicator, Traffic
from abtrain.comm.stages import Stages, in_step
from abtrain.memory import Recycler
from abtrain.merging.wires.codes import CODES, Code
from abtrain.merging.wires.exchange import chunk_of, exchange
from abtrain.merging.wires.flat import FlatAverage, Numbers, Parts, WholeAverage, parts_of
from abtrain.merging.wires.gather import gather, padded
from abtrain.merging.wires.wire import Averages, Wire

CAPACITY = 64 * 2**20
"""The largest number of bytes, counted as float32, in one bucket. A bucket is encoded and sent as one message."""

_NARROW = (torch.bfloat16, torch.float16)


class DirectWire(Wire):
    """Encodes numbers by one code, and the averages of three or more workers by the code `reply`; default: the same."""

    elementwise = True

    def __init__(self, code: str, reply: str | None = None) -> None:
        self._code, self._reply = CODES[code], CODES[reply or code]
        self.lossy = not self._code.exact

    def average(self, numbers: Mapping[str, Tensor], comm: Communicator) -> Stages[Averages]:
        names, tensors = list(numbers), list(numbers.values())
        # The stages free the numbers when they have copied them into buckets.
        if self._code.exact or comm.topology.n_groups == 1:
            exact = average_exactly(tensors, comm)
            del numbers, tensors
            return Averages(dict(zip(names, (yield from exact), strict=True)), {})
        narrow = _average_narrowly(tensors, self._code, self._reply, comm)
        del numbers, tensors
        mean, error = yield from narrow
        return Averages(dict(zip(names, mean, strict=True)), dict(zip(names, error, strict=True)))

    def average_flat(self, numbers: Numbers, comm: Communicator) -> Stages[FlatAverage]:
        if self._code.exact or comm.topology.n_groups == 1:
            return (yield from _average_exactly(numbers, comm))
        # Gloo exchanges tensors on the CPU only.
        if numbers.dtype != torch.float32 or numbers.device != comm.device:
            return (yield from super().average_flat(numbers, comm))
        return (yield from _average_coded(numbers, self._code, self._reply, comm))

    def sends(self, tensors: Sequence[Tensor], workers: int) -> tuple[Calls, ...]:
        if self._code.exact:
            return (sent_by_average(tensors),)
        counts = _counts(tensors)
        if _in_one_message(workers):
            coded = [self._code.nbytes(padded(count, self._code)) for count in counts]
            return (tuple(Traffic("all_gather", "counterparts", nbytes) for nbytes in coded),)
        chunks, replies = [], []
        for count in counts:
            chunk = chunk_of(count, workers, self._code, self._reply)
            chunks.append(Traffic("exchange", "counterparts", (workers - 1) * self._code.nbytes(chunk)))
            replies.append(Traffic("all_gather", "counterparts", self._reply.nbytes(chunk)))
        return tuple(chunks), tuple(replies)

    def holds(self, tensors: Sequence[Tensor], workers: int) -> int:
        if self._code.exact:
            return sum(tensor.nbytes for tensor in tensors)
        counts = _counts(tensors)
        if _in_one_message(workers):
            sizes = [padded(count, self._code) for count in counts]
            # Beside the rounding errors, each worker holds its codes, and receives those of both.
            return sum(torch.float32.itemsize * size + 3 * self._code.nbytes(size) for size in sizes)
        chunks = [chunk_of(count, workers, self._code, self._reply) for count in counts]
        # Beside the padded numbers, of which rounding errors remain, codes are sent and received.
        coded = [max(2 * self._code.nbytes(chunk), self._reply.nbytes(chunk)) for chunk in chunks]
        return workers * (torch.float32.itemsize * sum(chunks) + sum(coded))


def _average_narrowly(
    tensors: Sequence[Tensor], code: Code, reply: Code, comm: Communicator
) -> Stages[tuple[list[Tensor], list[Tensor]]]:
    """Averages tensors in few bits. Returns the averages, and this worker's rounding errors in float32."""
    buckets = _buckets(tensors)
    like = [torch.empty_like(tensor, device="meta") for tensor in tensors]
    del tensors
    # Gloo exchanges tensors on the CPU only.
    flats = [_average_coded(_numbers_in(bucket.flat.to(comm.device)), code, reply, comm) for bucket in buckets]
    places = [(bucket.indices, bucket.flat.device) for bucket in buckets]
    del buckets  # Each average frees its bucket.
    averages = yield from in_step(flats)
    means, errors = [], []
    for average, (indices, device) in zip(averages, places, strict=True):
        mean = average.whole().mean
        means.append(Bucket(mean.to(device), indices))
        errors.append(Bucket(average.error.to(device), indices))
    return unpack(means, like), unpack(errors, [tensor.float() for tensor in like])


def _in_one_message(workers: int) -> bool:
    """Returns whether each worker sends all its numbers at once. More workers would send more than by chunks."""
    return workers == 2


def _average_coded(numbers: Numbers, code: Code, reply: Code, comm: Communicator) -> Stages[FlatAverage]:
    if _in_one_message(comm.topology.n_groups):
        return gather(numbers, code, comm)
    return exchange(numbers, code, reply, comm)


def _counts(tensors: Sequence[Tensor]) -> list[int]:
    """Returns how many numbers are in each bucket."""
    return [bucket.flat.numel() for bucket in pack([tensor.to(torch.float32) for tensor in tensors], CAPACITY)]


def _numbers_in(flat: Tensor) -> Numbers:
    def write(part: slice, out: Tensor) -> None:
        out.copy_(flat[part])

    return Numbers(flat.numel(), flat.dtype, flat.device, write, None, Recycler())


class _Exact(FlatAverage):
    """The sum over all workers, which is divided by their number part by part."""

    taken: Tensor

    def __init__(self, total: Tensor, workers: int) -> None:
        self.taken, self._workers = total, workers

    def parts(self) -> Parts:
        return ((part, self.taken[part].div_(self._workers)) for part in parts_of(self.taken))

    def whole(self) -> WholeAverage:
        return WholeAverage(self.taken.div_(self._workers), None)


def _average_exactly(numbers: Numbers, comm: Communicator) -> Stages[FlatAverage]:
    total = numbers.memory.take(numbers.count, numbers.dtype, numbers.device)
    for part in parts_of(total):
        numbers.write(part, total[part])
    pending = comm.launch_all_reduce(total, "sum", "counterparts")
    yield
    pending.wait()
    return _Exact(total, comm.topology.n_groups)


def _buckets(tensors: Sequence[Tensor]) -> list[Bucket]:
    """Returns float32 tensors in buckets, which must not be written: a tensor that fills one is not copied."""
    if len(tensors) == 1 and tensors[0].dtype == torch.float32 and tensors[0].is_contiguous():
        return [Bucket(tensors[0].detach().view(-1), (0,))]
    # Narrow floats are widened where they are copied into a bucket.
    return pack([tensor if tensor.dtype in _NARROW else tensor.float() for tensor in tensors], CAPACITY)
