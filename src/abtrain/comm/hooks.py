"""Compresses gradients with PyTorch's own communication hooks for DDP, and counts their bytes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from abtrain.comm.buckets import MIB
from abtrain.comm.communicator import Calls, Scope, Traffic
from abtrain.comm.data_parallel import extremes, scale_
from abtrain.recipes.sync import GradientSync

_FIRST_BUCKET, _BUCKET = 1 * MIB, 25 * MIB
"""DDP's default sizes of its first bucket and of the others, in bytes."""

Bucket = Any  # a torch.distributed.GradBucket, which PyTorch's stubs leave out
Average = torch.futures.Future[Tensor]  # the average of a bucket, in progress


class GradientHook:
    """Averages a bucket of gradients over a process group, in their dtype. Results equal DDP's without a hook bitwise.

    Attributes:
        in_turn: whether a bucket must wait until the previous one is averaged.
        arrivals: the order of gradients for which the hook has state; empty before it has any. None: it has no state.
    """

    in_turn = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.arrivals: list[int] | None = None

    def __call__(self, bucket: Bucket) -> tuple[Average, int, list[Tensor]]:
        """Starts the average of a bucket.

        Returns its future, the payload in bytes, and numbers that reveal NaN and infinity in this rank's gradients.
        """
        buffer = bucket.buffer()
        # DDP multiplies by the reciprocal too; for three ranks, a division gives other bits.
        seen = scale_(buffer, 1.0 / self._group.size())
        work = dist.all_reduce(buffer, group=self._group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0]), buffer.nbytes, seen


class BFloat16(GradientHook):
    """Sends gradients rounded to bfloat16, which halves the bytes (PyTorch's `bf16_compress_hook`)."""

    def __call__(self, bucket: Bucket) -> tuple[Average, int, list[Tensor]]:
        buffer = bucket.buffer()
        seen = extremes([buffer])
        return bf16_compress_hook(self._group, bucket), buffer.numel() * torch.bfloat16.itemsize, seen


class PowerSGD(GradientHook):
    """Sends gradients as factors of rank r, with error feedback (Vogels et al., arXiv 1905.13727; PyTorch's hook).

    The state outlives its DDP wrapper, so errors and warm starts (the last factors Q) carry over from phase to phase.
    It belongs to buckets, so the next wrapper uses `arrivals` to arrange the same buckets.
    """

    # The hook continues in the backend's threads and sends from there. Two buckets in flight would send in different
    # orders on different ranks, and block each other on Gloo, which has two such threads.
    in_turn = True
    # DDP rebuilds its buckets after the first backward pass; errors of the first layout would not fit the second.
    PLAIN_STEPS = 2
    # Successive collectives of a compressed bucket: the gradients that are not factored, then P, then Q.
    ROUNDS = 3
    # PyTorch's default: a gradient is factored only if that makes it smaller by this ratio.
    MIN_SAVING = 2
    # Added to norms: a weight whose gradient is zero for some steps leads to columns of zeros.
    _EPSILON = 1e-8

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        super().__init__(group)
        self._state = PowerSGDState(
            process_group=_Weakly(group),
            matrix_approximation_rank=rank,
            start_powerSGD_iter=self.PLAIN_STEPS,
            orthogonalization_epsilon=self._EPSILON,
            min_compression_rate=self.MIN_SAVING,
        )
        self.arrivals = []
        self._noise: dict[int, Tensor] = {}

    def __call__(self, bucket: Bucket) -> tuple[Average, int, list[Tensor]]:
        state, buffer = self._state, bucket.buffer()
        error = state.error_dict.get(bucket.index())
        if error is not None and error.numel() != buffer.numel():
            # In a new wrapper's first layout, this bucket is sent uncompressed once; the state is kept for the second.
            return super().__call__(bucket)
        self._refill_starts(bucket.index())
        before, seen = state.total_numel_after_compression, extremes([buffer])
        average = powerSGD_hook(state, bucket)
        sent = state.total_numel_after_compression - before
        return average, sent * buffer.element_size() if sent else buffer.nbytes, seen

    def _refill_starts(self, index: int) -> None:
        """Replaces zeros in a bucket's warm starts by noise, the same on all ranks.

        A gradient of zero leaves a warm start of zero, from which a later gradient could not be approximated.
        """
        starts = self._state.q_memory_dict.get(index)
        if starts is None:
            return
        noise = self._noise.get(index)
        if noise is None or noise.shape != starts.shape:
            drawn = torch.randn(starts.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float32)
            noise = self._noise[index] = drawn.to(starts)
        starts.copy_(torch.where(starts == 0, noise, starts))


class _Weakly:
    """Stands for a process group in the callbacks of PyTorch's hook, without keeping it alive.

    A thread of the backend drops these callbacks, perhaps after all else has dropped the group. It would then destroy
    the group, and wait for itself to end, which aborts the process.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)

    def __getattr__(self, name: str) -> Any:
        group = self._group()
        if group is None:
            raise RuntimeError("the process group was destroyed while gradients were averaged: destroy it last")
        return getattr(group, name)


def make_hook(sync: GradientSync, group: dist.ProcessGroup | None) -> GradientHook:
    """Returns the hook that averages gradients in the wire format of `sync`, over a process group (None: the world)."""
    group = group or dist.distributed_c10d._get_default_group()
    if sync.wire == "powersgd":
        return PowerSGD(group, sync.rank)
    return BFloat16(group) if sync.wire == "bf16" else GradientHook(group)


def plain_steps(sync: GradientSync) -> int:
    """Returns the number of steps at the start that send gradients uncompressed."""
    return PowerSGD.PLAIN_STEPS if sync.wire == "powersgd" else 0


def sent_by_backward(parameters: Sequence[Tensor], scope: Scope, sync: GradientSync) -> Calls:
    """Returns the buckets of one backward pass over these parameters, in the order in which they become ready.

    A bucket is assumed to be ready after the share of backward that equals its cumulative share of the gradients'
    bytes. For PowerSGD, sizes are those after its uncompressed steps.
    """
    total, done, calls = sum(parameter.nbytes for parameter in parameters), 0, []
    rounds = PowerSGD.ROUNDS if sync.wire == "powersgd" else 1
    for bucket in _buckets(parameters):
        done += sum(parameter.nbytes for parameter in bucket)
        nbytes = sum(_payload(parameter, sync) for parameter in bucket)
        calls.append(Traffic("gradients", scope, nbytes, rounds, done / max(total, 1)))
    return tuple(calls)


def held_by_averaging(parameters: Sequence[Tensor], sync: GradientSync) -> int:
    """Returns the bytes that DDP and its hook hold to average the gradients of these parameters.

    DDP has a copy of all gradients in its buckets. `bf16` sends another copy of half the size. PowerSGD keeps errors,
    factors and noise, and copies one bucket at a time.
    """
    gradients, sent = sum(one.nbytes for one in parameters), sum(_payload(one, sync) for one in parameters)
    if sync.wire == "powersgd":
        largest = max((sum(one.nbytes for one in bucket) for bucket in _buckets(parameters)), default=0)
        return 2 * gradients + 2 * sent + largest
    return gradients + (sent if sync.wire == "bf16" else 0)


def _payload(gradient: Tensor, sync: GradientSync) -> int:
    if sync.wire == "bf16":
        return gradient.numel() * torch.bfloat16.itemsize
    if sync.wire == "powersgd":
        rows = gradient.shape[0] if gradient.ndim else 1
        columns = gradient.numel() // max(rows, 1)
        factored = (rows + columns) * min(rows, columns, sync.rank)
        if factored * PowerSGD.MIN_SAVING < gradient.numel():
            return factored * gradient.itemsize
    return gradient.nbytes


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields the parameters of each of DDP's buckets, which DDP fills from the model's end to its start."""
    bucket: list[Tensor] = []
    limit = _FIRST_BUCKET
    for parameter in reversed(parameters):
        bucket.append(parameter)
        if sum(one.nbytes for one in bucket) >= limit:
            yield bucket
            bucket, limit = [], _BUCKET
    if bucket:
        yield bucket
