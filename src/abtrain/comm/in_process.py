"""The contract for threads of one process: tests, notebooks, the reference.

Nothing is sent, but everything is counted as if it were. Results do not depend on which thread comes first: sums are
taken in rank order. Threads share the random generators of the process, so a worker that draws numbers brings its own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from abtrain.comm.communicator import (
    PLAIN,
    Communicator,
    DataParallel,
    Pending,
    Reduction,
    Scope,
    Unsynchronized,
    check_contiguous,
    check_reducible,
    check_rows,
    check_source,
    scope_ranks,
    scope_spans,
    still_open,
)
from abtrain.comm.meter import Meter
from abtrain.comm.rendezvous import Combine, Rendezvous
from abtrain.comm.topology import Topology
from abtrain.errors import ConfigurationError, UsageError
from abtrain.sync import GradientSync, Sync

T = TypeVar("T")


def run_in_process(
    world_size: int,
    worker: Callable[[Communicator], T],
    group_size: int = 1,
    timeout: float = 60.0,
) -> list[T]:
    """Runs `worker` once for each rank of a world of threads.

    Args:
        world_size: how many ranks.
        worker: called in a thread of its own with the rank's communicator.
        group_size: ranks in a group.
        timeout: seconds that a collective waits for the last rank to come.

    Returns:
        What the workers returned, in rank order.

    Raises:
        The first error of any worker. The others are freed at once, by a PeerLostError in the collective that they wait
        in or in the next one with the rank that is gone.
    """
    topology = Topology(world_size, group_size)
    rendezvous = Rendezvous(timeout)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def give_up() -> None:
        for rank in range(world_size):
            rendezvous.leave(rank, "was interrupted")

    def run(rank: int) -> None:
        try:
            results[rank] = worker(InProcessCommunicator(rank, topology, rendezvous))
        except BaseException as error:
            # Before the others can see that this rank is gone: theirs come later in the list.
            errors.append(error)
            rendezvous.leave(rank, f"died of {type(error).__name__}: {error}")
        else:
            rendezvous.leave(rank, "has finished its work")

    threads = [threading.Thread(target=run, args=(r,), name=f"rank {r}", daemon=True) for r in range(world_size)]
    _run_threads(threads, give_up)
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world_size)]


def _run_threads(threads: Sequence[threading.Thread], give_up: Callable[[], None]) -> None:
    """Runs all threads to their end, each with one intra-op thread: the ranks are the parallelism."""
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        give_up()
        raise
    finally:
        torch.set_num_threads(intra_op)


class InProcessCommunicator:
    """The `Communicator` of one thread among the ranks of a `Rendezvous`."""

    def __init__(self, rank: int, topology: Topology, rendezvous: Rendezvous, meter: Meter | None = None) -> None:
        self.rank = rank
        self.topology = topology
        self.device = torch.device("cpu")
        self.meter = meter or Meter()
        self._rendezvous = rendezvous

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum", scope: Scope = "world") -> None:
        check_reducible(tensor, op)
        if len(self.ranks(scope)) > 1:
            reduced = self.meet(f"all_reduce({op})", [tensor], scope, _add if op == "sum" else _take_largest)
            tensor.detach().copy_(reduced[0])

    def all_gather(self, tensor: Tensor, scope: Scope = "world") -> Tensor:
        check_contiguous(tensor)
        if len(self.ranks(scope)) == 1:
            return tensor.detach()[None].clone()
        return self.meet("all_gather", [tensor], scope, _stack)[0].clone()

    # Threads meet when they wait: what was launched before goes on in name only.

    def launch_all_reduce(self, tensor: Tensor, op: Reduction = "sum") -> Pending[None]:
        return Pending(lambda: self.all_reduce(tensor, op))

    def launch_all_gather(self, tensor: Tensor) -> Pending[Tensor]:
        return Pending(lambda: self.all_gather(tensor))

    def launch_exchange(self, rows: Tensor) -> Pending[Tensor]:
        check_rows(rows, self.topology)
        return Pending(lambda: self._exchange(rows))

    def _exchange(self, rows: Tensor) -> Tensor:
        workers = self.topology.world_size
        if workers == 1:
            return rows.detach().clone()
        # Everybody's rows meet; what would not have been sent is not counted.
        nbytes = rows.nbytes - rows.nbytes // workers
        return self.meet("exchange", [rows], "world", _stack, nbytes)[0][:, self.rank].clone()

    def broadcast(self, tensor: Tensor, source: int) -> None:
        check_source(source, self.topology)
        check_contiguous(tensor)
        if self.topology.world_size > 1:
            sent = self.meet(f"broadcast(from {source})", [tensor], "world", lambda of: _copy(of[source]))
            tensor.detach().copy_(sent[0])

    def barrier(self) -> None:
        if self.topology.world_size > 1:
            self.meet("barrier", [], "world", lambda of: [])

    def cannot_carry(self, sync: Sync) -> str:
        if not isinstance(sync, GradientSync) or sync.wire == "fp32":
            return ""
        return f"threads cannot send gradients as {sync.wire!r}: PyTorch's hooks need torch.distributed. Use 'fp32'"

    def data_parallel(
        self, module: nn.Module, scope: Scope, find_unused_parameters: bool = False, sync: GradientSync = PLAIN
    ) -> DataParallel:
        if len(self.ranks(scope)) == 1 or not any(p.requires_grad for p in module.parameters()):
            return Unsynchronized(module)
        refused = self.cannot_carry(sync)
        if refused:
            raise ConfigurationError(refused)
        return InProcessDataParallel(module, self, scope, find_unused_parameters)

    def ranks(self, scope: Scope) -> tuple[int, ...]:
        """The world ranks of a scope, in order."""
        return scope_ranks(self.topology, self.rank, scope)

    def meet(
        self, call: str, tensors: Sequence[Tensor], scope: Scope, combine: Combine, nbytes: int | None = None
    ) -> list[Tensor]:
        """Brings `tensors` to the other ranks of the scope; see `Rendezvous.meet`. Counts `nbytes`, or all of them."""
        counted = sum(t.nbytes for t in tensors) if nbytes is None else nbytes
        self.meter.count(counted, scope_spans(self.topology, scope))
        brought = [t.detach() for t in tensors]
        with self.meter.waiting():
            return self._rendezvous.meet(self.rank, self.ranks(scope), call, brought, combine, self.meter.where)


class InProcessDataParallel:
    """The `DataParallel` of threads. It follows DDP's rules, and counts the same bytes.

    A forward pass in training takes the first rank's buffers, unless the pass before it was inside `no_sync`, and arms
    the hooks on the parameters. When backward has given all of them a gradient, the gradients are averaged.
    """

    def __init__(
        self, module: nn.Module, comm: InProcessCommunicator, scope: Scope, find_unused_parameters: bool
    ) -> None:
        self._module: nn.Module | None = module
        self._meet = partial(comm.meet, scope=scope)
        self._share = 1.0 / len(comm.ranks(scope))
        self._find_unused = find_unused_parameters
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._ready: set[str] = set()  # have their gradient from the backward pass to be averaged
        self._used: set[str] = set()  # have had one since the last average, be it inside no_sync
        self._synchronizing = self._buffers_due = True
        self._armed = self._queued = False
        # A hook that held this object would keep it, and through it the model, alive.
        me = weakref.ref(self)
        handles = [
            p.register_post_accumulate_grad_hook(partial(_gradient_ready, me, name))
            for name, p in self._parameters.items()
        ]
        self._detach = weakref.finalize(self, lambda: [handle.remove() for handle in handles])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = still_open(self._module)
        if not torch.is_grad_enabled():
            return module(*args, **kwargs)
        self._check_last_backward()
        if self._buffers_due:
            self._follow_first_rank(list(module.buffers()))
        self._buffers_due = self._synchronizing
        output = module(*args, **kwargs)
        self._armed = self._armed or self._synchronizing
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        still_open(self._module)
        before, self._synchronizing = self._synchronizing, False
        try:
            yield
        finally:
            self._synchronizing = before

    def arrivals(self) -> list[int]:
        return []  # sums are taken in rank order, whatever the order of gradients

    def follow(self, arrivals: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        self._detach()
        self._module = None
        self._parameters = {}

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
        if self._find_unused:
            shares.append(torch.tensor([name in self._used for name in self._parameters], dtype=torch.int32))
        sums = self._meet("average of gradients", shares, combine=_add)
        used = sums[-1].tolist() if self._find_unused else [1] * len(parameters)
        for p, average, users in zip(parameters, sums, used, strict=False):
            # Unused by all ranks: what is in .grad, or that there is none, is left alone.
            if p.grad is not None and users:
                p.grad.copy_(average)
            elif users:
                p.grad = average.clone()

    def _check_last_backward(self) -> None:
        missing = [name for name in self._parameters if name not in self._ready]
        if self._ready and missing:
            raise UsageError(
                f"the last backward pass left {len(missing)} parameters without a gradient ({missing[0]} is one): "
                "freeze them (requires_grad_(False)), or set find_unused_parameters=True"
            )

    def _follow_first_rank(self, buffers: list[Tensor]) -> None:
        if not buffers:
            return
        first = self._meet("broadcast of buffers", buffers, combine=lambda of: _copy(of[0]))
        # As DDP does: a pass whose backward is still to come must not mind that its buffers moved on.
        with torch.no_grad(), _unsafe_preserve_version_counter(tuple(buffers)):
            for buffer, received in zip(buffers, first, strict=True):
                buffer.copy_(received)


def _gradient_ready(wrapper: weakref.ref[InProcessDataParallel], name: str, _: Tensor) -> None:
    alive = wrapper()
    if alive is not None:
        alive.note_gradient(name)


def _add(of_ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    sums = _copy(of_ranks[0])
    for tensors in of_ranks[1:]:
        for total, tensor in zip(sums, tensors, strict=True):
            total += tensor
    return sums


def _take_largest(of_ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(same).amax(dim=0) for same in zip(*of_ranks, strict=True)]


def _stack(of_ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(same) for same in zip(*of_ranks, strict=True)]


def _copy(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]
