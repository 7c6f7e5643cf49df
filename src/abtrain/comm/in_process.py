"""The contract for threads of one process: tests, notebooks, the reference.

Nothing is sent, but everything is counted as if it were. Results do not depend on which thread comes first: sums are
taken in rank order. Threads share the random generators of the process, so a worker that draws numbers brings its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

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
)
from abtrain.comm.in_process_ddp import InProcessDataParallel
from abtrain.comm.meter import Meter
from abtrain.comm.rendezvous import Combine, Rendezvous, add, copied
from abtrain.comm.topology import Topology
from abtrain.errors import ConfigurationError
from abtrain.own import shared_parameters
from abtrain.recipes.sync import GradientSync, Sync

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
            reduced = self.meet(f"all_reduce({op})", [tensor], scope, add if op == "sum" else _take_largest)
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
            sent = self.meet(f"broadcast(from {source})", [tensor], "world", lambda of: copied(of[source]))
            tensor.detach().copy_(sent[0])

    def barrier(self) -> None:
        if self.topology.world_size > 1:
            self.meet("barrier", [], "world", lambda of: [])

    def cannot_carry(self, sync: Sync) -> str:
        if not isinstance(sync, GradientSync) or sync.wire == "fp32":
            return ""
        return f"threads cannot send gradients as {sync.wire!r}: PyTorch's hooks need torch.distributed. Use 'fp32'"

    def begin_run(self) -> None: ...

    def data_parallel(
        self, module: nn.Module, scope: Scope, find_unused_parameters: bool = False, sync: GradientSync = PLAIN
    ) -> DataParallel:
        if len(self.ranks(scope)) == 1 or not any(p.requires_grad for p in shared_parameters(module).values()):
            return Unsynchronized(module)
        refused = self.cannot_carry(sync)
        if refused:
            raise ConfigurationError(refused)
        return InProcessDataParallel(
            module, partial(self.meet, scope=scope), len(self.ranks(scope)), find_unused_parameters
        )

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


def _take_largest(of_ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(same).amax(dim=0) for same in zip(*of_ranks, strict=True)]


def _stack(of_ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(same) for same in zip(*of_ranks, strict=True)]
