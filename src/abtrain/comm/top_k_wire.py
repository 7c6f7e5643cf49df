"""What a round changed most, sent by each worker to all others.

Workers send the largest of their own numbers (`abtrain.comm.top_k`) in one all-gather, and each adds up what all sent.
The sum is exact: to send an average back in so few places would lose most of what workers do not have in common. So a
worker's payload does not depend on how many they are, but what crosses its link does: n - 1 times as much among n.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from abtrain.comm.buckets import pack, refilled, unpack
from abtrain.comm.communicator import Communicator
from abtrain.comm.stages import Stages
from abtrain.comm.top_k import GRANULE, decode_top, encode_top
from abtrain.comm.wire import CAPACITY, Averages, average_exactly


class TopKWire:
    """Sends the `k` largest of every 128 numbers, all with the sign that they have and a size that they share."""

    stages = 1

    def __init__(self, k: int) -> None:
        self._k = k

    def average(self, numbers: Mapping[str, Tensor], comm: Communicator) -> Stages[Averages]:
        tensors = list(numbers.values())
        if comm.topology.world_size == 1:
            exact = yield from average_exactly(tensors, comm)
            return Averages(dict(zip(numbers, exact, strict=True)), {})
        wanted = [tensor.float() for tensor in tensors]
        buckets = pack(wanted, CAPACITY)
        padded = [torch.nn.functional.pad(b.flat, (0, -b.flat.numel() % GRANULE)).to(comm.device) for b in buckets]
        sent = [encode_top(flat, self._k) for flat in padded]
        launched = [comm.launch_all_gather(data) for data in sent]
        yield
        means, errors = [], []
        for bucket, flat, mine, pending in zip(buckets, padded, sent, launched, strict=True):
            count = flat.numel()
            total = torch.zeros_like(flat)
            for data in pending.wait():  # in rank order: the same bits on all workers
                total += decode_top(data, count, self._k)
            error = flat - decode_top(mine, count, self._k)
            means.append(refilled(bucket, total.div_(comm.topology.world_size)))
            errors.append(refilled(bucket, error))
        mean, error_of = unpack(means, tensors), unpack(errors, wanted)
        return Averages(dict(zip(numbers, mean, strict=True)), dict(zip(numbers, error_of, strict=True)))

    def forget(self, names: Iterable[str]) -> None:
        """Nothing is learnt."""
