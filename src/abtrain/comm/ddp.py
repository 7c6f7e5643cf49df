"""Averages gradients with PyTorch's DistributedDataParallel (DDP), and counts the bytes and the seconds of waiting."""

# No `from __future__ import annotations` here: DDP compares the annotations of a communication hook with classes.

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _BufferCommHookLocation

from abtrain.comm.data_parallel import DataParallel, unused_error
from abtrain.comm.following import Following
from abtrain.comm.hooks import Average, GradientHook
from abtrain.comm.link import Link
from abtrain.own import IGNORED, own_names, shared_buffers, trained_parameters

_CALL = "all_reduce of gradients"


class TorchDataParallel(DataParallel):
    """A `DataParallel` for several ranks that uses DDP with its defaults. Results equal plain DDP's bitwise.

    DDP is not part of a reference cycle, so its buckets are freed as soon as this object is closed or dropped.
    """

    def __init__(self, module: nn.Module, link: Link, find_unused_parameters: bool, hook: GradientHook) -> None:
        super().__init__(module)
        self._link, self._hook = link, hook
        self._rebuilds = not find_unused_parameters  # otherwise DDP keeps its first buckets
        self._trained = list(trained_parameters(module).values())
        with _every_name_ignored(module):
            self._ddp: Any = DistributedDataParallel(
                module, process_group=link.group, find_unused_parameters=find_unused_parameters, init_sync=False
            )
        self._arrivals = _Arrivals(self._trained)
        # To find unused parameters, DDP adds up one int32 for each parameter.
        extra_bytes = 4 * len(self._trained) if find_unused_parameters else 0
        buffers = Following(link, shared_buffers(module))
        self._averaging = _Averaging(link, buffers, extra_bytes, hook, self._sent_extremes)
        self._ddp.register_comm_hook(self._averaging, _Averaging.launch)
        before_forward = _BufferCommHookLocation.PRE_FORWARD
        self._ddp._register_buffer_comm_hook(self._averaging, _Averaging.follow_first_rank, before_forward)
        if hook.arrivals:
            self.follow(hook.arrivals)

    def _differentiable(self, *args: Any, **kwargs: Any) -> Any:
        self._arrivals.listen(self._ddp.require_backward_grad_sync)
        try:
            return self._ddp(*args, **kwargs)
        except RuntimeError as error:
            if "Expected to have finished reduction" in str(error):
                raise unused_error("some parameters") from error
            # In its second forward pass, DDP broadcasts the order of its buckets without calling our hooks.
            if isinstance(error, dist.DistError) or "/gloo/" in str(error):
                raise self._link.peer_lost("DDP's forward pass") from error
            raise

    def no_sync(self) -> Any:
        return self._ddp.no_sync()

    def arrivals(self) -> list[int]:
        return list(self._arrivals.order) if self._rebuilds else []

    def follow(self, arrivals: Sequence[int]) -> None:
        if not arrivals or not self._rebuilds:
            return
        if sorted(arrivals) != list(range(len(self._trained))):
            count = len(self._trained)
            raise ValueError(f"arrivals has {len(arrivals)} indices: give each index from 0 to {count - 1} once")
        self._ddp.module = _Rehearsal(self.module, [self._trained[place] for place in arrivals])
        self._averaging.rehearses = True
        try:
            # Without the users' hooks: these gradients are not real.
            with torch.enable_grad(), ExitStack() as restored:
                found = [h for p in self._trained for h in (p._backward_hooks, p._post_accumulate_grad_hooks)]
                for hooks in filter(None, found):
                    restored.callback(hooks.update, dict(hooks))
                    hooks.clear()
                self._ddp().backward()
        finally:
            self._ddp.module, self._averaging.rehearses = self.module, False
        for parameter in self._trained:
            parameter.grad = None
        self._arrivals.order = list(arrivals)

    def close(self) -> None:
        if self._hook.arrivals is not None and len(self.arrivals()) == len(self._trained):
            self._hook.arrivals = self.arrivals()
        self._ddp = None
        self._arrivals.stop()
        super().close()


@contextmanager
def _every_name_ignored(module: nn.Module) -> Iterator[None]:
    """Lists the module's ignored tensors under every name that DDP looks for, inside the context.

    Otherwise DDP misses a tied parameter that is listed under only one of its names, and a parameter of the root
    module itself, whose name begins with a dot in DDP.
    """
    own = own_names(module)
    if not own:
        yield
        return
    listed = getattr(module, IGNORED)
    setattr(module, IGNORED, sorted(own | {f".{name}" for name in own}))
    try:
        yield
    finally:
        setattr(module, IGNORED, listed)


class _Arrivals:
    """Records the order in which gradients are completed, until each has been completed once.

    DDP rebuilds its buckets in this order after the first backward pass, but does not expose it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.order: list[int] = []
        self._count = len(parameters)
        self._listens = False
        self._handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, place))
            for place, parameter in enumerate(parameters)
        ]

    def listen(self, averaged: bool) -> None:
        """Announces a forward pass, whose gradients are averaged over ranks if `averaged` is True."""
        self._listens = averaged
        if len(self.order) == self._count:
            self.stop()

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arrived(self, place: int, parameter: Tensor) -> None:
        if self._listens and place not in self.order:
            self.order.append(place)


class _Rehearsal(nn.Module):
    """Replaces the model in a backward pass that gives parameters gradients of zero, in the given order."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.model = model  # DDP looks for its buffers
        self._order = tuple(parameters)

    def forward(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._order[0].device)
        # Backward visits the sum's terms from the last to the first.
        for parameter in reversed(self._order):
            total = total + parameter.real.sum().double() * 0
        return total


class _Averaging:
    """Averages the gradients of a backward pass bucket by bucket, as DDP completes them.

    While `rehearses` is True it sends nothing: that backward pass only shows DDP the order of the gradients.
    """

    def __init__(
        self, link: Link, buffers: Following, extra_bytes: int, hook: GradientHook, sent_extremes: list[Tensor]
    ) -> None:
        self.rehearses = False
        self._link, self._buffers, self._hook = link, buffers, hook
        self._extra_bytes, self._sent_extremes = extra_bytes, sent_extremes
        self._starts = True
        self._averages: list[Average] = []

    def launch(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> Average:
        """Starts the average of a bucket of gradients. DDP calls this when the bucket is complete."""
        buffer = bucket.buffer()
        if self.rehearses:
            done: Average = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else [])
            done.set_result(buffer)
            return done
        if self._starts:
            self._sent_extremes.clear()
        self._starts = bucket.is_last()
        if self._hook.in_turn:
            self._wait()
        with self._link.naming_lost_peer(_CALL, dist.DistError):
            average, nbytes, seen = self._hook(bucket)
        self._sent_extremes += seen
        self._link.meter.count(nbytes + (self._extra_bytes if bucket.is_last() else 0), self._link.spans)
        if buffer.device.type == "cpu":
            self._averages.append(average)
            if bucket.is_last():
                # Runs after all computation of backward and before DDP's own wait. So it measures the wait that no
                # computation hides, and raises PeerLostError for a lost worker.
                torch.autograd.Variable._execution_engine.queue_callback(self._wait)
        return average

    def _wait(self) -> None:
        averages, self._averages = self._averages, []
        with self._link.meter.waiting(), self._link.naming_lost_peer(_CALL, RuntimeError):
            for average in averages:
                average.wait()

    def follow_first_rank(self, named_buffers: Mapping[str, Tensor]) -> None:
        """Overwrites buffers with those of the first rank. DDP calls this before a forward pass."""
        if not self.rehearses:
            self._buffers.follow(named_buffers)
