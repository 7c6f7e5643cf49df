"""What a merge sends: an average over the world, in few bits, without losing what the bits cannot hold.

A narrow merge is narrow both ways: each worker sends every other one its chunk of the numbers, adds up the chunks that
it gets in float32, and sends the average back, encoded again. So what crosses the network shrinks, not only a counter.

What rounding takes from a number is kept and added to it the next time (error feedback, Seide et al. 2014; Karimireddy
et al., arXiv 1901.09847). The worker that averages a chunk keeps what its own rounding took from the average as well.
Over all merges, what workers received and what they kept sum to the truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from abtrain.comm.buckets import pack, unpack
from abtrain.comm.communicator import Communicator
from abtrain.comm.quantize import CODES, Code

CAPACITY = 64 * 2**20
"""Bytes of float32 that are encoded and sent at once: what a merge needs beside the weights."""


class Wire:
    """Averages over all workers, in one code, and the errors that are still to be sent.

    Attributes:
        residuals: by name, float32: what rounding has taken from this worker's numbers so far.
    """

    def __init__(self, code: str) -> None:
        self.code = CODES[code]
        self.residuals: dict[str, Tensor] = {}

    def average(self, numbers: Mapping[str, Tensor], comm: Communicator) -> dict[str, Tensor]:
        """The average over all workers, the same bits on all of them. Collective over the world.

        Args:
            numbers: finite tensors by name, with the same names, shapes and dtypes in the same order on all workers.
            comm: of this worker.

        Returns:
            New tensors of the same shapes and dtypes.
        """
        if self.code.name == "fp32" or comm.topology.world_size == 1:
            return dict(zip(numbers, exact_average(list(numbers.values()), comm), strict=True))
        wanted = [self._with_residual(name, tensor) for name, tensor in numbers.items()]
        buckets = pack(wanted, CAPACITY)
        errors = []
        for bucket in buckets:
            # Gloo exchanges tensors on the CPU only.
            mean, error = _narrow(bucket.flat.to(comm.device), self.code, comm)
            bucket.flat.copy_(mean)
            errors.append(error)
        averages = [mean.clone() for mean in unpack(buckets, wanted)]
        for bucket, error in zip(buckets, errors, strict=True):
            bucket.flat.copy_(error)
        self.residuals |= zip(numbers, unpack(buckets, wanted), strict=True)
        return {name: mean.to(numbers[name].dtype) for name, mean in zip(numbers, averages, strict=True)}

    def forget(self, name: str) -> None:
        """What is still to be sent of a tensor no longer holds: its shape or its basis changes."""
        self.residuals.pop(name, None)

    def _with_residual(self, name: str, tensor: Tensor) -> Tensor:
        residual = self.residuals.get(name)
        return tensor.float() if residual is None else tensor.float() + residual


def exact_average(tensors: Sequence[Tensor], comm: Communicator) -> list[Tensor]:
    """The average of each tensor over all workers, the same bits on all of them. Halves are summed in float32.

    Args:
        tensors: of the same shapes and dtypes on all workers; not changed.
        comm: of this worker.

    Returns:
        New tensors of the same shapes and dtypes.
    """
    buckets = pack(tensors)
    for bucket in buckets:
        comm.all_reduce(bucket.flat)
        bucket.flat.div_(comm.topology.world_size)
    return unpack(buckets, tensors)


def _narrow(flat: Tensor, code: Code, comm: Communicator) -> tuple[Tensor, Tensor]:
    """The average of `flat` (count,) over all workers, and what rounding took from this worker's part of it."""
    count, workers = flat.numel(), comm.topology.world_size
    chunk = -(-count // (workers * code.granule)) * code.granule
    mine = torch.nn.functional.pad(flat, (0, chunk * workers - count)).view(workers, chunk)
    sent = torch.stack([code.encode(row) for row in mine])
    error = mine - torch.stack([code.decode(row, chunk) for row in sent])

    received = comm.exchange(sent)
    # In rank order and in float32; every other worker takes over these very bits.
    total = torch.zeros_like(mine[0])
    for row in received:
        total += code.decode(row, chunk)
    total /= workers
    reply = code.encode(total)
    # The average is divided by the number of workers: what its rounding took is that much larger in one worker's part.
    error[comm.rank] += workers * (total - code.decode(reply, chunk))
    mean = torch.cat([code.decode(row, chunk) for row in comm.all_gather(reply)])
    return mean[:count], error.view(-1)[:count]
