"""What tensors become on each wire: the collectives and their payload, as `abtrain.comm` makes and counts them.

`merge_stages` knows the wires of merges; a wire of gradients is one entry in `GRADIENT_WIRES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from abtrain.comm.buckets import MIB, pack
from abtrain.comm.communicator import Scope
from abtrain.commands.plan.stretches import Calls, Traffic
from abtrain.merging.wires.codes import CODES, Code
from abtrain.merging.wires.direct import CAPACITY, chunk_of
from abtrain.merging.wires.low_rank import pays
from abtrain.recipes.sync import GradientSync, WireName, wire_between

_FIRST_BUCKET, _BUCKET = 1 * MIB, 25 * MIB
"""Where DDP closes its first bucket, and the others (its defaults)."""
_MIN_SAVING = 2
"""PowerSGD leaves a gradient alone that it would not make smaller than that (its default)."""
_NUMBER = 8


def compared(count: int, scope: Scope = "world") -> Calls:
    """What workers send to find out whether they hold the same `count` numbers: int64, both ends of their range."""
    return (Traffic("all_reduce", scope, 2 * count * _NUMBER),) if count else ()


def broadcast(tensors: Sequence[Tensor], scope: Scope = "world") -> Calls:
    """Tensors that one worker sends to all, bit by bit."""
    return tuple(Traffic("broadcast", scope, bucket.flat.nbytes) for bucket in pack(tensors, widen=False))


def exact(tensors: Sequence[Tensor]) -> Calls:
    """An average in full precision (see `abtrain.merging.wires.direct.exact_average`)."""
    return tuple(Traffic("all_reduce", "world", bucket.flat.nbytes) for bucket in pack(tensors))


def merge_stages(wire: str, tensors: Sequence[Tensor], workers: int) -> tuple[Calls, ...]:
    """What a merge of these tensors sends over a wire, stage by stage (see `abtrain.merging.wires.direct.Wire`)."""
    name = WireName.parse(wire_between(workers, wire))
    direct = partial(_direct, CODES[name.code], CODES[name.reply], workers=workers)
    if not name.rank:
        return direct(tensors)
    matrices, rest = [], []
    for tensor in tensors:
        if pays(tensor, name.rank):
            matrices.append(tensor.float().flatten(1))
        else:
            rest.append(tensor)
    P = [M.new_empty(M.shape[0], name.rank) for M in matrices]
    Q = [M.new_empty(M.shape[1], name.rank) for M in matrices]
    return (*direct(P + rest), *direct(Q))


def _direct(code: Code, reply: Code, tensors: Sequence[Tensor], workers: int) -> tuple[Calls, ...]:
    """Every number in one code, averages perhaps in another.

    In few bits each worker sends the others their chunks, then its average to all.
    """
    if code.exact:
        return (exact(tensors),)
    chunks, replies = [], []
    for bucket in pack([tensor.to(torch.float32) for tensor in tensors], CAPACITY):
        chunk = chunk_of(bucket.flat.numel(), workers, code, reply)
        chunks.append(Traffic("exchange", "world", (workers - 1) * code.nbytes(chunk)))
        replies.append(Traffic("all_gather", "world", reply.nbytes(chunk)))
    return tuple(chunks), tuple(replies)


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


def gradients(tensors: Sequence[Tensor], scope: Scope, sync: GradientSync) -> Calls:
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
