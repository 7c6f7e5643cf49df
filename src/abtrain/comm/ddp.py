"""Gradient averaging on torch.distributed: PyTorch's DistributedDataParallel, counted and timed."""

# No `from __future__ import annotations` here: DDP compares the annotations of a communication hook with classes.

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _BufferCommHookLocation

from abtrain.comm.averages import extremes
from abtrain.comm.communicator import nothing, still_open
from abtrain.comm.following import Following
from abtrain.comm.hooks import GradientHook
from abtrain.comm.link import Link
from abtrain.comm.sync_batch_norm import point_at, release
from abtrain.errors import ConfigurationError, UsageError
from abtrain.own import IGNORED, own_names, shared_buffers, shared_parameters


class TorchDataParallel:
    """The `DataParallel` of a scope of several ranks: DDP with its defaults, so the bits are those of a plain DDP.

    DDP is in no reference cycle: dropped or closed, it frees its buckets at once. `at_close` is called then.
    """

    def __init__(
        self,
        module: nn.Module,
        link: Link,
        find_unused_parameters: bool,
        hook: GradientHook | None,
        at_close: Callable[[], None] = nothing,
    ) -> None:
        self._link, self._at_close = link, at_close
        self._hook = hook
        self._rebuilds = not find_unused_parameters  # or else buckets stay as they are laid out at first
        self._trained = [p for p in shared_parameters(module).values() if p.requires_grad]
        with _every_name_ignored(module):
            self._ddp: DistributedDataParallel | None = DistributedDataParallel(
                module,
                process_group=link.group,
                find_unused_parameters=find_unused_parameters,
                init_sync=False,
            )
        self._arrivals = _Arrivals(self._trained)
        # To find unused parameters, DDP adds up one int32 for each parameter.
        extra_bytes = 4 * len(self._trained) if find_unused_parameters else 0
        self._averaging = _Averaging(link, Following(link, shared_buffers(module)), extra_bytes, hook)
        self._ddp.register_comm_hook(self._averaging, _average_gradients)
        self._ddp._register_buffer_comm_hook(self._averaging, _follow_first_rank, _BufferCommHookLocation.PRE_FORWARD)
        if hook is not None and hook.arrivals:
            self.follow(hook.arrivals)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ddp = still_open(self._ddp)
        if not torch.is_grad_enabled():
            return ddp.module(*args, **kwargs)
        self._arrivals.listen(ddp.require_backward_grad_sync)
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

    def arrivals(self) -> list[int]:
        return list(self._arrivals.order) if self._rebuilds else []

    def follow(self, arrivals: Sequence[int]) -> None:
        if not arrivals or not self._rebuilds:
            return
        if sorted(arrivals) != list(range(len(self._trained))):
            raise ValueError(f"gradients of {len(arrivals)} parameters came, but {len(self._trained)} are trained")
        ddp = still_open(self._ddp)
        model = ddp.module
        ddp.module = _Rehearsal(model, [self._trained[place] for place in arrivals])
        self._averaging.rehearses = True
        try:
            with torch.enable_grad():
                ddp().backward()
        finally:
            ddp.module, self._averaging.rehearses = model, False
        for parameter in self._trained:
            parameter.grad = None
        self._arrivals.order = list(arrivals)

    def spoiled(self) -> bool:
        return not all(bool(one.isfinite().all()) for one in self._averaging.brought)

    def close(self) -> None:
        if self._hook is not None and self._hook.arrivals is not None and len(self.arrivals()) == len(self._trained):
            self._hook.arrivals = self.arrivals()
        self._ddp = None
        self._arrivals.stop()
        self._at_close()


@contextmanager
def _every_name_ignored(module: nn.Module) -> Iterator[None]:
    """Inside it, DDP finds what it is to ignore by every name that it looks for.

    By itself it misses a tied parameter of which one name is listed, and one of the model's own, whose name it begins
    with a dot.
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
    """Listens to the order in which gradients are completed, until each has come once.

    DDP lays its buckets out by this order after its first backward pass, but does not tell it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.order: list[int] = []
        self._count = len(parameters)
        self._listens = False
        self._handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, place))
            for place, parameter in enumerate(parameters)
        ]

    def listen(self, shares: bool) -> None:
        """A forward pass begins, whose gradients are shared or not."""
        self._listens = shares
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
    """In the model's place: a pass in which parameters get gradients of zero, in the order in which they are given."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.model = model  # DDP looks for its buffers
        self._order = tuple(parameters)

    def forward(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._order[0].device)
        # Autograd goes back the way that it came.
        for parameter in reversed(self._order):
            total = total + parameter.real.sum().double() * 0
        return total


class _Averaging:
    """The all-reduces of one backward pass that are under way.

    Attributes:
        rehearses: whether gradients are zeros that nobody is to hear of.
        buffers: which follow the first rank.
        brought: of each bucket of the last pass, the least and the greatest number before it was averaged.
    """

    def __init__(self, link: Link, buffers: Following, extra_bytes: int, hook: GradientHook | None) -> None:
        self.link = link
        self._extra_bytes = extra_bytes
        self._hook = hook
        self.rehearses = False
        self.brought: list[Tensor] = []
        self.buffers = buffers
        self._starts = True
        self._works: list[dist.Work | torch.futures.Future[Tensor]] = []

    def launch(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        buffer = bucket.buffer()
        if self.rehearses:
            done: torch.futures.Future[Tensor] = torch.futures.Future(
                devices=[buffer.device] if buffer.device.type == "cuda" else []
            )
            done.set_result(buffer)
            return done
        self.brought = [*([] if self._starts else self.brought), *extremes([buffer])]
        self._starts = bucket.is_last()
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


def _follow_first_rank(averaging: _Averaging, named_buffers: Mapping[str, Tensor]) -> None:
    if not averaging.rehearses:
        averaging.buffers.follow(named_buffers)


def point_sync_batch_norm(module: nn.Module, link: Link, alone: bool) -> Callable[[], None]:
    """Makes every SyncBatchNorm take its statistics over the ranks of the link.

    By itself a SyncBatchNorm talks to the world at every step, which is what groups are there to avoid.

    Returns:
        What makes all of them what they were.

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
        point_at(layer, link.group)

    def release_all() -> None:
        while layers:
            release(layers.pop())

    return release_all
