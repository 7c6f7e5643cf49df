"""PyTorch's own communication hooks for DDP: gradients sent in few bits, counted by what they really send."""

# No `from __future__ import annotations` here: DDP compares the annotations of a communication hook with classes.

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from abtrain.recipes.sync import GradientSync

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
        nbytes = bucket.buffer().numel() * torch.bfloat16.itemsize
        return bf16_compress_hook(self._group, bucket), nbytes


class PowerSGD:
    """Gradients as rank-r factors with error feedback (Vogels et al., arXiv 1905.13727; PyTorch's `powerSGD_hook`).

    The state outlives the DDP wrapper that it serves, so errors and warm starts go over from phase to phase. It goes by
    buckets, and so the next wrapper has to lay them out as this one does: by `arrivals`.
    """

    # The hook goes on in threads of the backend's, and sends from there. Two buckets under way at once would send in
    # another order on every rank, and on Gloo, which has two such threads, wait for each other.
    in_turn = True
    # DDP lays its buckets out anew after the first backward pass: errors of the first layout would fit no more.
    _PLAIN_STEPS = 2
    # A weight whose gradient is zero for some steps has columns of zeros, which cannot be normalized.
    _EPSILON = 1e-8

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self._state = PowerSGDState(
            process_group=group,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=self._PLAIN_STEPS,
            orthogonalization_epsilon=self._EPSILON,
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


def make_hook(sync: GradientSync, group: dist.ProcessGroup) -> GradientHook:
    """The hook for a wire other than fp32."""
    return BFloat16(group) if sync.wire == "bf16" else PowerSGD(group, sync.rank)
