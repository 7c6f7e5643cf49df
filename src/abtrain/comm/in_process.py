"""Implements the communication interfaces on threads of one process, for tests, notebooks and the reference.

Nothing is sent, but every byte is counted as if it were. Sums are taken in rank order, whatever the order in which
threads arrive. Threads share the random generators of the process, so each worker needs a generator of its own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from abtrain.comm.communicator import Communicator, Pending, Reduction, Scope, scope_spans, senders
from abtrain.comm.data_parallel import DataParallel, Layouts, extremes, unused_error
from abtrain.comm.rendezvous import Combine, Rendezvous
from abtrain.comm.topology import Topology
from abtrain.errors import ConfigurationError
from abtrain.own import shared_buffers, trained_parameters
from abtrain.recipes.sync import GradientSync, Sync

T = TypeVar("T")


def run_in_process(
    world_size: int, worker: Callable[[Communicator], T], group_size: int = 1, timeout: float = 60.0
) -> list[T]:
    """Runs `worker` once for each rank of a world of threads, and returns the results in rank order.

    Args:
        world_size: the number of ranks.
        worker: the function that the thread of each rank calls with its communicator.
        group_size: the number of ranks in a group.
        timeout: the seconds that a collective waits for its last rank.

    Raises:
        The first error of any worker. The others stop with a PeerLostError, in the collective where they wait or in
        their next one with the dead rank.
    """
    topology = Topology(world_size, group_size)
    rendezvous = Rendezvous(timeout)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = worker(InProcessCommunicator(rank, topology, rendezvous))
        except BaseException as error:
            # Listed before the others notice that this rank has left, so that their errors come later.
            errors.append(error)
            rendezvous.leave(rank, f"failed with {type(error).__name__}: {error}")
        else:
            rendezvous.leave(rank, "has finished its work")

    threads = [threading.Thread(target=run, args=(r,), name=f"rank {r}", daemon=True) for r in range(world_size)]
    try:
        _run_threads(threads)
    except BaseException:
        for rank in range(world_size):
            rendezvous.leave(rank, "was interrupted")
        raise
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world_size)]


def _run_threads(threads: Sequence[threading.Thread]) -> None:
    """Runs all threads until they return, each with one intra-op thread, since the ranks already run in parallel."""
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(intra_op)


class InProcessCommunicator(Communicator):
    """A `Communicator` for one thread, which a `Rendezvous` connects with the threads of the other ranks."""

    def __init__(self, rank: int, topology: Topology, rendezvous: Rendezvous) -> None:
        super().__init__(rank, topology, torch.device("cpu"))
        self._rendezvous = rendezvous

    # Threads exchange tensors in `wait`: nothing happens between a launch and its wait.

    def _start_all_reduce(self, tensor: Tensor, op: Reduction, scope: Scope) -> Pending[None]:
        def finish() -> None:
            tensor.copy_(self._meet(f"all_reduce({op})", [tensor], scope, _sums if op == "sum" else _maxima)[0])

        return Pending(finish)

    def _start_all_gather(self, tensor: Tensor, scope: Scope) -> Pending[Tensor]:
        return Pending(lambda: self._meet("all_gather", [tensor], scope, _stacked)[0].clone())

    def _start_exchange(self, rows: Tensor, scope: Scope, nbytes: int) -> Pending[Tensor]:
        own = self.ranks(scope).index(self.rank)
        return Pending(lambda: self._meet("exchange", [rows], scope, _stacked, nbytes)[0][:, own].clone())

    def _broadcast(self, tensor: Tensor, source: int, scope: Scope) -> None:
        call, place = f"broadcast(from {source})", self.ranks(scope).index(source)
        tensor.copy_(self._meet(call, [tensor], scope, lambda of_ranks: _copied(of_ranks[place]))[0])

    def _barrier(self) -> None:
        self._meet("barrier", [], "world", lambda of_ranks: [])

    def cannot_carry(self, sync: Sync) -> str:
        if not isinstance(sync, GradientSync) or sync.wire == "fp32":
            return ""
        return f"threads cannot send gradients as {sync.wire!r}: PyTorch's hooks need torch.distributed. Use 'fp32'"

    def _wrap(self, module: nn.Module, scope: Scope, find_unused_parameters: bool, sync: GradientSync) -> DataParallel:
        refused = self.cannot_carry(sync)
        if refused:
            raise ConfigurationError(refused)
        meet = partial(self._meet, scope=scope)
        return InProcessDataParallel(module, meet, len(self.ranks(scope)), find_unused_parameters)

    def _meet(
        self, call: str, tensors: Sequence[Tensor], scope: Scope, combine: Combine, nbytes: int | None = None
    ) -> list[Tensor]:
        """Calls `Rendezvous.meet` for the scope, and counts `nbytes` (None: those of all tensors)."""
        counted = sum(t.nbytes for t in tensors) if nbytes is None else nbytes
        self.meter.count(counted, scope_spans(self.topology, scope), senders(self.topology, scope))
        with self.meter.waiting():
            return self._rendezvous.meet(self.rank, self.ranks(scope), call, tensors, combine, self.meter.where)


class InProcessDataParallel(DataParallel):
    """A `DataParallel` for threads that follows DDP's rules and counts the same bytes.

    A forward pass copies the first rank's buffers, unless the previous pass was inside `no_sync`, and enables the hooks
    on the parameters. When backward has completed all gradients, they are averaged. Sums are taken in rank order
    whatever the order of gradients, so there are no `arrivals`.

    `meet` receives a call's name, tensors and a `Combine` function, and combines the tensors with the other workers'.
    """

    def __init__(
        self, module: nn.Module, meet: Callable[..., list[Tensor]], workers: int, find_unused_parameters: bool
    ) -> None:
        super().__init__(module)
        self._meet = meet
        self._share = 1.0 / workers
        self._find_unused = find_unused_parameters
        self._parameters = trained_parameters(module)
        self._ready: set[str] = set()  # parameters with a gradient in the backward pass to be averaged
        self._used: set[str] = set()  # parameters with a gradient since the last average, also inside no_sync
        self._synchronizing = self._buffers_due = True
        self._armed = self._queued = False
        self._layouts = Layouts(shared_buffers(module))
        # A strong reference in a hook would keep this object, and through it the model, alive.
        me: Any = weakref.proxy(self)
        note = partial(InProcessDataParallel._note_gradient, me)
        handles = [p.register_post_accumulate_grad_hook(partial(note, name)) for name, p in self._parameters.items()]
        self.at_close.callback(weakref.finalize(self, lambda: [handle.remove() for handle in handles]))

    def _differentiable(self, *args: Any, **kwargs: Any) -> Any:
        missing = [name for name in self._parameters if name not in self._ready]
        if self._ready and missing:
            raise unused_error(f"{len(missing)} parameters (such as {missing[0]})")
        self._queued = False  # still True if the last backward pass raised an error
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

    def _note_gradient(self, name: str, _: Tensor) -> None:
        """Notes that this backward pass has completed the gradient of a parameter. Autograd calls this."""
        self._used.add(name)
        if not self._armed:
            return
        self._ready.add(name)
        if not self._queued:
            self._queued = True
            # Runs at the end of this backward pass, as DDP's own last step does.
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
        sums = self._meet("average of gradients", shares, combine=_sums)
        used = sums[-1].tolist() if self._find_unused else [1] * len(parameters)
        for p, average, users in zip(parameters, sums, used, strict=False):
            # A parameter that no rank used keeps its .grad, or stays without one.
            if p.grad is not None and users:
                p.grad.copy_(average)
            elif users:
                p.grad = average.clone()

    def _follow_first_rank(self, named: Mapping[str, Tensor]) -> None:
        if not named:
            return
        buffers, changed = list(named.values()), self._layouts.changes(named)
        call = f"broadcast of buffers ({changed} now)" if changed else "broadcast of buffers"
        first = self._meet(call, buffers, combine=lambda of: _copied(of[0]))
        # As in DDP, autograd then accepts the backward of an earlier pass although its buffers have changed.
        with torch.no_grad(), _unsafe_preserve_version_counter(tuple(buffers)):
            for buffer, received in zip(buffers, first, strict=True):
                buffer.copy_(received)


def _sums(of_ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Returns the sums of all ranks' tensors, added in rank order."""
    sums = _copied(of_ranks[0])
    for tensors in of_ranks[1:]:
        for total, tensor in zip(sums, tensors, strict=True):
            total += tensor
    return sums


def _maxima(of_ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [stacked.amax(dim=0) for stacked in _stacked(of_ranks)]


def _stacked(of_ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(same) for same in zip(*of_ranks, strict=True)]


def _copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]
