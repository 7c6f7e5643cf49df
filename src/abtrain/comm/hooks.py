"""PyTorch's own communication hooks for DDP: gradients sent in few bits, counted by what is really sent."""

# No `from __future__ import annotations` here: DDP compares the annotations of a communication hook with classes.

from collections.abc import Iterator, Sequence
from typing import Any

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
"""DDP's defaults for the bytes at which it closes its first bucket, and the others."""

# A torch.distributed.GradBucket, which its stubs leave out.
Bucket = Any


# The average of a bucket that is under way.
Average = torch.futures.Future[Tensor]


class GradientHook:
    """Averages one bucket of gradients over a process group: in float32, bit by bit as DDP without a hook.

    Attributes:
        in_turn: whether a bucket must wait until the one before it is averaged.
        arrivals: the order of gradients that the hook's state fits; empty while there is none. None: without state.
    """

    in_turn = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.arrivals: list[int] | None = None

    def __call__(self, bucket: Bucket) -> tuple[Average, int]:
        """Starts the average; returns it, and the bytes handed over."""
        # DDP too multiplies by the reciprocal; for three ranks, a division gives other bits.
        buffer = bucket.buffer().mul_(1.0 / self._group.size())
        work = dist.all_reduce(buffer, group=self._group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0]), buffer.nbytes


class BFloat16(GradientHook):
    """Gradients rounded to bfloat16: half the bytes (PyTorch's `bf16_compress_hook`)."""

    def __call__(self, bucket: Bucket) -> tuple[Average, int]:
        return bf16_compress_hook(self._group, bucket), self.nbytes([bucket.buffer()])

    @staticmethod
    def nbytes(gradients: Sequence[Tensor]) -> int:
        """Bytes that a bucket of these gradients is sent in."""
        return sum(gradient.numel() for gradient in gradients) * torch.bfloat16.itemsize


class PowerSGD(GradientHook):
    """Gradients as rank-r factors with error feedback (Vogels et al., arXiv 1905.13727; PyTorch's `powerSGD_hook`).

    The state outlives the DDP wrapper that it serves, so errors and warm starts carry over from phase to phase. It is
    kept by bucket, so the next wrapper must lay its buckets out in the same way: by `arrivals`.
    """

    # The hook continues in the backend's threads and sends from there. Two buckets in flight would send in another
    # order on every rank, and on Gloo, which has two such threads, wait for each other.
    in_turn = True
    # DDP rebuilds its buckets after the first backward pass: errors of the first layout would no longer fit.
    PLAIN_STEPS = 2
    # Of a compressed bucket: the gradients that are not factored, then P, then Q, one after another.
    ROUNDS = 3
    # PyTorch's default: a gradient is factored only if that makes it smaller by this ratio.
    _MIN_SAVING = 2
    # A weight whose gradient is zero for some steps has columns of zeros, which cannot be normalized.
    _EPSILON = 1e-8

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        super().__init__(group)
        self._state = PowerSGDState(
            process_group=group,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=self.PLAIN_STEPS,
            orthogonalization_epsilon=self._EPSILON,
            min_compression_rate=self._MIN_SAVING,
        )
        self.arrivals = []
        self._noise: dict[int, Tensor] = {}

    def __call__(self, bucket: Bucket) -> tuple[Average, int]:
        state, buffer = self._state, bucket.buffer()
        error = state.error_dict.get(bucket.index())
        if error is not None and error.numel() != buffer.numel():
            # A new wrapper's first layout: this bucket is sent uncompressed once, and the state waits for its layout.
            return super().__call__(bucket)
        self._refill_starts(bucket.index())
        before = state.total_numel_after_compression
        average = powerSGD_hook(state, bucket)
        sent = state.total_numel_after_compression - before
        return average, sent * buffer.element_size() if sent else buffer.nbytes

    def _refill_starts(self, index: int) -> None:
        """Replaces zeros in a bucket's warm starts by noise, the same on all ranks.

        A gradient of zero leaves a warm start of zero, from which no later gradient would ever be found.
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


def make_hook(sync: GradientSync, group: dist.ProcessGroup | None) -> GradientHook:
    """The hook for a wire, over a process group (None: the world)."""
    group = group or dist.distributed_c10d._get_default_group()
    if sync.wire == "powersgd":
        return PowerSGD(group, sync.rank)
    return BFloat16(group) if sync.wire == "bf16" else GradientHook(group)


def plain_steps(sync: GradientSync) -> int:
    """How many of the first steps send gradients uncompressed."""
    return PowerSGD.PLAIN_STEPS if sync.wire == "powersgd" else 0


def sent_by_backward(parameters: Sequence[Tensor], scope: Scope, sync: GradientSync) -> Calls:
    """The buckets of one backward pass over these parameters, in the order in which they become ready.

    The share of backward after which a bucket is ready is estimated by the share of the gradients' bytes in it and in
    the buckets before it. PowerSGD is described as it sends after its plain steps.
    """
    total, done, calls = sum(parameter.nbytes for parameter in parameters), 0, []
    for bucket in _buckets(parameters):
        nbytes, rounds = sum(parameter.nbytes for parameter in bucket), 1
        done += nbytes
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
