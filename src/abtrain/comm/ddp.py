"""Gradient averaging on torch.distributed: PyTorch's DistributedDataParallel, counted and timed."""

# No `from __future__ import annotations` here: DDP compares the annotations of a communication hook with classes.

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _BufferCommHookLocation

from abtrain.comm.buckets import pack, unpack
from abtrain.comm.communicator import still_open
from abtrain.comm.hooks import GradientHook
from abtrain.comm.link import Link
from abtrain.errors import ConfigurationError, UsageError


class TorchDataParallel:
    """The `DataParallel` of a scope of several ranks: DDP with its defaults, so the bits are those of a plain DDP.

    DDP is in no reference cycle: dropped or closed, it frees its buckets at once.
    """

    def __init__(self, module: nn.Module, link: Link, find_unused_parameters: bool, hook: GradientHook | None) -> None:
        self._link = link
        self._ddp: DistributedDataParallel | None = DistributedDataParallel(
            module,
            process_group=link.group,
            find_unused_parameters=find_unused_parameters,
            init_sync=False,
        )
        trained = sum(p.requires_grad for p in module.parameters())
        # To find unused parameters, DDP adds up one int32 for each parameter.
        averaging = _Averaging(link, 4 * trained if find_unused_parameters else 0, hook)
        self._ddp.register_comm_hook(averaging, _average_gradients)
        self._ddp._register_buffer_comm_hook(link, _follow_first_rank, _BufferCommHookLocation.PRE_FORWARD)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ddp = still_open(self._ddp)
        if not torch.is_grad_enabled():
            return ddp.module(*args, **kwargs)
        try:
            return ddp(*args, **kwargs)
        except RuntimeError as error:
            explained = self._explain(error)
            if explained is None:
                raise
            raise explained from error

    def no_sync(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = still_open(self._ddp).no_sync()
        return context

    def _explain(self, error: RuntimeError) -> Exception | None:
        """The error that tells the user more than one of DDP does; None for an error of the model itself."""
        if "Expected to have finished reduction" in str(error):
            return UsageError(
                "the last backward pass left some parameters without a gradient: freeze them "
                "(requires_grad_(False)), or set find_unused_parameters=True"
            )
        # At its second forward pass DDP agrees on the order of its buckets, out of reach of our hooks.
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            return self._link.peer_lost("DDP's forward pass")
        return None

    def close(self) -> None:
        self._ddp = None


class _Averaging:
    """The all-reduces of one backward pass that are under way."""

    def __init__(self, link: Link, extra_bytes: int, hook: GradientHook | None) -> None:
        self.link = link
        self._extra_bytes = extra_bytes
        self._hook = hook
        self._works: list[dist.Work | torch.futures.Future[Tensor]] = []

    def launch(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        buffer = bucket.buffer()
        work: dist.Work | torch.futures.Future[Tensor]
        if self._hook is None:
            # DDP without a hook multiplies by the reciprocal too; for three ranks, a division gives other bits.
            buffer.mul_(1.0 / len(self.link.ranks))
            nbytes, work = buffer.nbytes, self.link.launch("all_reduce of gradients", dist.all_reduce, buffer)
            future = work.get_future().then(lambda future: future.value()[0])
        else:
            if self._hook.in_turn:
                self._wait()
            future, nbytes = self._hook(bucket)
            work = future
        self.link.meter.count(nbytes + (self._extra_bytes if bucket.is_last() else 0), self.link.spans)
        if buffer.device.type == "cpu":
            self._works.append(work)
            if bucket.is_last():
                # Runs when backward has nothing left to compute and before DDP's own wait, so what is measured is
                # the wait that no computation hides, and a lost peer is an error with a name.
                torch.autograd.Variable._execution_engine.queue_callback(self._wait)
        return future

    def _wait(self) -> None:
        works, self._works = self._works, []
        with self.link.meter.waiting():
            for work in works:
                self.link.wait("all_reduce of gradients", work)


def _average_gradients(
    averaging: _Averaging,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    return averaging.launch(bucket)


def _follow_first_rank(link: Link, named_buffers: Mapping[str, Tensor]) -> None:
    buffers = list(named_buffers.values())
    buckets = pack(buffers, widen=False)
    for bucket in buckets:
        link.broadcast(bucket.flat, link.ranks[0])
    for buffer, received in zip(buffers, unpack(buckets, buffers), strict=True):
        buffer.copy_(received)


def point_sync_batch_norm(module: nn.Module, link: Link, alone: bool) -> None:
    """Makes every SyncBatchNorm take its statistics over the ranks of the link.

    By itself a SyncBatchNorm talks to the world at every step, which is what groups are there to avoid.

    Raises:
        ConfigurationError: the scope is one rank of a larger world.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.SyncBatchNorm)]
    if layers and len(link.ranks) == 1 and not alone:
        raise ConfigurationError(
            f"the model has {len(layers)} SyncBatchNorm layers, but groups of one worker: nobody to "
            "synchronize with. Use BatchNorm, or a group size of at least 2"
        )
    for layer in layers:
        layer.process_group = link.group
