"""PyTorch's own communication hooks for DDP: gradients sent in few bits, counted by what they really send."""

# No `from __future__ import annotations` here: DDP compares the annotations of a communication hook with classes.

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from abtrain.comm.buckets import MIB
from abtrain.comm.communicator import Scope
from abtrain.comm.traffic import Calls, Traffic
from abtrain.recipes.sync import GradientSync

_FIRST_BUCKET, _BUCKET = 1 * MIB, 25 * MIB
"""Sizes at which DDP closes its first bucket, and the others (its defaults)."""

# A torch.distributed.GradBucket, which its stubs leave out.
Bucket = Any


class GradientHook(Protocol):
    """Averages one bucket of gradients over a process group.

    Attributes:
        in_turn: whether a bucket has to wait until the one before it is averaged.
        arrivals: the order of gradients whose buckets its state fits, empty as long as there is none; None if it has no
            state.
    """

    in_turn: bool
    arrivals: list[int] | None

    def __call__(self, bucket: Bucket) -> tuple[torch.futures.Future[Tensor], int]:
        """Starts the average; returns its future, and the bytes handed over."""
        ...


class BFloat16:
    """Gradients rounded to bfloat16: half the bytes (PyTorch's `bf16_compress_hook`)."""

    in_turn = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.arrivals: list[int] | None = None

    def __call__(self, bucket: Bucket) -> tuple[torch.futures.Future[Tensor], int]:
        return bf16_compress_hook(self._group, bucket), self.nbytes([bucket.buffer()])

    @staticmethod
    def nbytes(gradients: Sequence[Tensor]) -> int:
        """Bytes that a bucket of these gradients is sent in."""
        return sum(gradient.numel() for gradient in gradients) * torch.bfloat16.itemsize


class PowerSGD:
    """Gradients as rank-r factors with error feedback (Vogels et al., arXiv 1905.13727; PyTorch's `powerSGD_hook`).

    The state outlives the DDP wrapper that it serves, so errors and warm starts go over from phase to phase. It goes by
    buckets, and so the next wrapper has to lay them out as this one does: by `arrivals`.
    """

    # The hook goes on in threads of the backend's, and sends from there. Two buckets under way at once would send in
    # another order on every rank, and on Gloo, which has two such threads, wait for each other.
    in_turn = True
    # DDP lays its buckets out anew after the first backward pass: errors of the first layout would fit no more.
    PLAIN_STEPS = 2
    # Of a bucket that is compressed: gradients that are not factored, then P, then Q, each after the one before.
    ROUNDS = 3
    # PyTorch's default: a gradient is sent as it is, unless its factors are smaller by this.
    _MIN_SAVING = 2
    # A weight whose gradient is zero for some steps has columns of zeros, which cannot be normalized.
    _EPSILON = 1e-8

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self._state = PowerSGDState(
            process_group=group,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=self.PLAIN_STEPS,
            orthogonalization_epsilon=self._EPSILON,
            min_compression_rate=self._MIN_SAVING,
        )
        self.arrivals: list[int] | None = []
        self._noise: dict[int, Tensor] = {}

    def __call__(self, bucket: Bucket) -> tuple[torch.futures.Future[Tensor], int]:
        state, buffer = self._state, bucket.buffer()
        error = state.error_dict.get(bucket.index())
        if error is not None and error.numel() != buffer.numel():
            # A new wrapper's first layout: this bucket goes uncompressed once, and the state waits for its own.
            buffer.mul_(1.0 / state.process_group.size())
            work = dist.all_reduce(buffer, group=state.process_group, async_op=True)
            return work.get_future().then(lambda future: future.value()[0]), buffer.nbytes
        self._refill_starts(bucket.index())
        before = state.total_numel_after_compression
        future = powerSGD_hook(state, bucket)
        sent = state.total_numel_after_compression - before
        return future, sent * buffer.element_size() if sent else buffer.nbytes

    def _refill_starts(self, index: int) -> None:
        """Replaces zeros in a bucket's warm starts by noise, the same on all ranks.

        A gradient of zero leaves a start of zero, and from there no later gradient would ever be found.
        """
        starts = self._state.q_memory_dict.get(index)
        if starts is None:
            return
        noise = self._noise.get(index)
        if noise is None or noise.shape != starts.shape:
            drawn = torch.randn(starts.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float32)
            noise = self._noise[index] = drawn.to(starts)
        starts.copy_(torch.where(starts == 0, noise, starts))

    @classmethod
    def nbytes(cls, gradients: Sequence[Tensor], rank: int) -> int:
        """Bytes that a bucket of these gradients is sent in, after the plain steps, as factors of that rank."""
        total = 0
        for gradient in gradients:
            rows = gradient.shape[0] if gradient.ndim else 1
            columns = gradient.numel() // max(rows, 1)
            factored = (rows + columns) * min(rows, columns, rank)
            is_worth_it = factored * cls._MIN_SAVING < gradient.numel()
            total += (factored if is_worth_it else gradient.numel()) * gradient.itemsize
        return total


def plain_steps(sync: GradientSync) -> int:
    """The first steps with a hook in which gradients are sent as they are."""
    return PowerSGD.PLAIN_STEPS if sync.wire == "powersgd" else 0


def sent_by_backward(parameters: Sequence[Tensor], scope: Scope, sync: GradientSync) -> Calls:
    """The buckets of one backward pass over these parameters, in the order in which they become ready.

    A bucket is ready when as much of the backward pass is done as it and those before it hold of all gradients.

    Args:
        parameters: by their shapes, in the model's order.
        scope: over which gradients are averaged.
        sync: with the wire, after its plain steps.
    """
    total, done, calls = sum(parameter.nbytes for parameter in parameters), 0, []
    for bucket in _buckets(parameters):
        done += sum(parameter.nbytes for parameter in bucket)
        nbytes, rounds = sum(parameter.nbytes for parameter in bucket), 1
        if sync.wire == "bf16":
            nbytes = BFloat16.nbytes(bucket)
        elif sync.wire == "powersgd":
            nbytes, rounds = PowerSGD.nbytes(bucket, sync.rank), PowerSGD.ROUNDS
        calls.append(Traffic("gradients", scope, nbytes, rounds, done / max(total, 1)))
    return tuple(calls)


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """DDP fills buckets from the model's end to its start, and closes one that has reached its size."""
    bucket: list[Tensor] = []
    limit = _FIRST_BUCKET
    for parameter in reversed(parameters):
        bucket.append(parameter)
        if sum(one.nbytes for one in bucket) >= limit:
            yield bucket
            bucket, limit = [], _BUCKET
    if bucket:
        yield bucket


def make_hook(sync: GradientSync, group: dist.ProcessGroup) -> GradientHook:
    """The hook for a wire other than fp32."""
    return BFloat16(group) if sync.wire == "bf16" else PowerSGD(group, sync.rank)
