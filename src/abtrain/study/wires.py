"""What tensors become on each wire: the collectives and their payload, as `abtrain.comm` makes and counts them.

A wire of merges is one entry in `MERGE_WIRES`, a wire of gradients one in `GRADIENT_WIRES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from abtrain.comm.buckets import MIB, pack
from abtrain.comm.communicator import Scope
from abtrain.comm.quantize import CODES, Code
from abtrain.comm.wire import CAPACITY
from abtrain.study.traffic import Traffic
from abtrain.sync import GradientSync

_FIRST_BUCKET, _BUCKET = 1 * MIB, 25 * MIB
"""Where DDP closes its first bucket, and the others (its defaults)."""
_MIN_SAVING = 2
"""PowerSGD leaves a gradient alone that it would not make smaller than that (its default)."""
_NUMBER = 8


def compared(count: int) -> tuple[Traffic, ...]:
    """What workers send to find out whether they hold the same `count` numbers: int64, both ends of their range."""
    return (Traffic("all_reduce", "world", 2 * count * _NUMBER),) if count else ()


def broadcast(tensors: Sequence[Tensor], scope: Scope = "world") -> tuple[Traffic, ...]:
    """Tensors that one worker sends to all, bit by bit."""
    return tuple(Traffic("broadcast", scope, bucket.flat.nbytes) for bucket in pack(tensors, widen=False))


def exact(tensors: Sequence[Tensor]) -> tuple[Traffic, ...]:
    """An average in full precision (see `abtrain.comm.wire.exact_average`)."""
    return tuple(Traffic("all_reduce", "world", bucket.flat.nbytes) for bucket in pack(tensors))


def _narrow(code: Code, tensors: Sequence[Tensor], workers: int) -> tuple[Traffic, ...]:
    """An average in few bits: each worker sends the others their chunks, and the average of its own to all."""
    traffic = []
    for bucket in pack([tensor.to(torch.float32) for tensor in tensors], CAPACITY):
        chunk = -(-bucket.flat.numel() // (workers * code.granule)) * code.granule
        row = code.nbytes(chunk)
        traffic += [Traffic("exchange", "world", (workers - 1) * row), Traffic("all_gather", "world", row)]
    return tuple(traffic)


MERGE_WIRES: dict[str, Callable[[Sequence[Tensor], int], tuple[Traffic, ...]]] = {
    "fp32": lambda tensors, workers: exact(tensors),
    **{name: partial(_narrow, code) for name, code in CODES.items() if name != "fp32"},
}
"""By wire: (tensors, workers) -> what a merge of them sends."""


def _powersgd_bytes(tensors: Sequence[Tensor], rank: int) -> int:
    """Both factors of each gradient that they make small enough, the other gradients as they are."""
    total = 0
    for tensor in tensors:
        rows = tensor.shape[0] if tensor.ndim else 1
        columns = tensor.numel() // max(rows, 1)
        compressed = (rows + columns) * min(rows, columns, rank)
        worth_it = compressed * _MIN_SAVING < tensor.numel()
        total += (compressed if worth_it else tensor.numel()) * tensor.itemsize
    return total


GRADIENT_WIRES: dict[str, tuple[Callable[[Sequence[Tensor], GradientSync], int], int]] = {
    "fp32": (lambda tensors, sync: sum(tensor.nbytes for tensor in tensors), 1),
    "bf16": (lambda tensors, sync: sum(tensor.numel() for tensor in tensors) * torch.bfloat16.itemsize, 1),
    # What is not factored, then P, then Q: three all-reduces, each waiting for the one before.
    "powersgd": (lambda tensors, sync: _powersgd_bytes(tensors, sync.rank), 3),
}
"""By wire: (gradients of a bucket, sync) -> bytes, and in how many collectives they go."""


def gradients(tensors: Sequence[Tensor], scope: Scope, sync: GradientSync) -> tuple[Traffic, ...]:
    """The buckets of one backward pass over these parameters, in the order in which they become ready.

    A bucket is ready once as much of the backward pass is done as it and those before it hold of all gradients.
    """
    nbytes, rounds = GRADIENT_WIRES[sync.wire]
    total, done, traffic = sum(tensor.nbytes for tensor in tensors), 0, []
    for bucket in _ddp_buckets(tensors):
        done += sum(tensor.nbytes for tensor in bucket)
        traffic.append(Traffic("gradients", scope, nbytes(bucket, sync), rounds, done / max(total, 1)))
    return tuple(traffic)


def _ddp_buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """DDP fills buckets from the model's end to its start, and closes one that has reached its size."""
    bucket: list[Tensor] = []
    limit = _FIRST_BUCKET
    for tensor in reversed(tensors):
        bucket.append(tensor)
        if sum(one.nbytes for one in bucket) >= limit:
            yield bucket
            bucket, limit = [], _BUCKET
    if bucket:
        yield bucket
