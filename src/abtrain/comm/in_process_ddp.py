"""Data parallelism of threads: the rules of DDP, without DDP."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from abtrain.comm.averages import extremes
from abtrain.comm.data_parallel import DataParallel, unused_error
from abtrain.comm.layouts import Layouts
from abtrain.comm.rendezvous import add, copied
from abtrain.own import shared_buffers, trained_parameters


class InProcessDataParallel(DataParallel):
    """The `DataParallel` of threads. It follows DDP's rules, and counts the same bytes.

    A forward pass takes the first rank's buffers, unless the pass before it was inside `no_sync`, and arms the hooks on
    the parameters. When backward has completed all of their gradients, the gradients are averaged. Sums are taken in
    rank order whatever the order of gradients, so there are no `arrivals`.

    Args:
        module: the model to train.
        meet: brings tensors to the other workers, given the name of the call and how they are combined.
        workers: how many bring them.
        find_unused_parameters: see `Communicator.data_parallel`.
    """

    def __init__(
        self, module: nn.Module, meet: Callable[..., list[Tensor]], workers: int, find_unused_parameters: bool
    ) -> None:
        super().__init__(module)
        self._meet = meet
        self._share = 1.0 / workers
        self._find_unused = find_unused_parameters
        self._parameters = trained_parameters(module)
        self._ready: set[str] = set()  # have their gradient from the backward pass to be averaged
        self._used: set[str] = set()  # have had one since the last average, including inside no_sync
        self._synchronizing = self._buffers_due = True
        self._armed = self._queued = False
        self._layouts = Layouts(shared_buffers(module))
        # A hook that held this object would keep it, and through it the model, alive.
        me = weakref.ref(self)
        handles = [
            p.register_post_accumulate_grad_hook(partial(_gradient_ready, me, name))
            for name, p in self._parameters.items()
        ]
        self.at_close.callback(weakref.finalize(self, lambda: [handle.remove() for handle in handles]))

    def _differentiable(self, *args: Any, **kwargs: Any) -> Any:
        missing = [name for name in self._parameters if name not in self._ready]
        if self._ready and missing:
            raise unused_error(f"{len(missing)} parameters ({missing[0]} is one)")
        if self._buffers_due:
            self._follow_first_rank(shared_buffers(self.module))
        self._buffers_due = self._synchronizing
        output = self.module(*args, **kwargs)
        self._armed = self._armed or self._synchronizing
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self._synchronizing = self._synchronizing, False
        try:
            yield
        finally:
            self._synchronizing = before

    def note_gradient(self, name: str) -> None:
        """Called by autograd when the gradient of a parameter is complete for this backward pass."""
        self._used.add(name)
        if not self._armed:
            return
        self._ready.add(name)
        if not self._queued:
            self._queued = True
            # Runs when this backward pass has nothing left to compute, as DDP's own last step does.
            torch.autograd.Variable._execution_engine.queue_callback(self._finish_backward)

    def _finish_backward(self) -> None:
        self._queued = False
        if self._find_unused or len(self._ready) == len(self._parameters):
            self._average_gradients()
            self._ready.clear()
            self._used.clear()
            self._armed = False

    @torch.no_grad()
    def _average_gradients(self) -> None:
        parameters = list(self._parameters.values())
        shares = [torch.zeros_like(p) if p.grad is None else p.grad * self._share for p in parameters]
        self._sent_extremes = extremes(shares)
        if self._find_unused:
            shares.append(torch.tensor([name in self._used for name in self._parameters], dtype=torch.int32))
        sums = self._meet("average of gradients", shares, combine=add)
        used = sums[-1].tolist() if self._find_unused else [1] * len(parameters)
        for p, average, users in zip(parameters, sums, used, strict=False):
            # Unused by all ranks: what is in .grad, or that there is none, is left alone.
            if p.grad is not None and users:
                p.grad.copy_(average)
            elif users:
                p.grad = average.clone()

    def _follow_first_rank(self, named: Mapping[str, Tensor]) -> None:
        if not named:
            return
        buffers, changed = list(named.values()), self._layouts.changes(named)
        call = f"broadcast of buffers ({changed} now)" if changed else "broadcast of buffers"
        first = self._meet(call, buffers, combine=lambda of: copied(of[0]))
        # As DDP does: a pass whose backward is still to come must not mind that its buffers moved on.
        with torch.no_grad(), _unsafe_preserve_version_counter(tuple(buffers)):
            for buffer, received in zip(buffers, first, strict=True):
                buffer.copy_(received)


def _gradient_ready(wrapper: weakref.ref[InProcessDataParallel], name: str, _: Tensor) -> None:
    alive = wrapper()
    if alive is not None:
        alive.note_gradient(name)
